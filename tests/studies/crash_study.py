"""Kills ``pqkv run`` at seeded random points and goes on: does it end with the bytes of a run that nobody disturbed?

    PYTHONPATH=tests python tests/studies/crash_study.py --points 50 --record notes/crash-study.md

Points are operations on files (half-way through a write, between a write and its rename, ...), drawn from every stage, and
moments in time. Every third resumed run is killed once more; every second one finds another time of day and files dated at
random. Then the same with SIGTERM and SIGINT, which must exit with 143 and 130 and leave no temporary file.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from children import Ended, in_child, pqkv, with_other_clock
from fatal import Operation, Watch, killing
from tiny_run import contents, make_recipe

STAGES = ("calibrate", "fit-codebooks", "export", "eval")
KILLED = -int(signal.SIGKILL)
# What a process says by its exit code when it is stopped, and how many points are tried beside those of SIGKILL.
ANSWERED = {signal.SIGTERM: 143, signal.SIGINT: 130}
_TIMED_SHARE = 0.3


@dataclass(frozen=True)
class Point:
    """Where a run is stopped: before operation `index` of the stage `stage`, or after a share of its time."""

    signal: signal.Signals
    index: int | None = None
    operation: Operation | None = None
    share: float | None = None
    stage: str = ""

    def __str__(self) -> str:
        if self.operation is None:
            return f"after {self.share:.0%} of the time"
        half = "half-way through" if self.operation.kind == "write" else "before"
        return f"{half} {self.operation.kind} {self.operation.place}"


@dataclass(frozen=True)
class Trial:
    """What came of one point; `faults` is empty where all is as it should be."""

    point: Point
    stopped_in: str
    again: str
    other_clock: bool
    faults: tuple[str, ...]


class Study:
    """One recipe, its undisturbed run, and runs that are disturbed."""

    def __init__(self, directory: Path, seed: int, allocation: str) -> None:
        self.directory, self.rng, self.allocation = directory, random.Random(seed), allocation
        self.recipe = make_recipe(directory, allocation)
        listing = directory / "operations.json"

        def count() -> int:
            watch = Watch(directory / "whole")
            code = self._command("whole")()
            listing.write_text(json.dumps([(o.kind, o.place) for o in watch.operations]))
            return code

        # Whatever is built once per machine is built here, so that the next run shows how long one takes.
        _require_good(in_child(self._command("first"), directory / "first.log"))
        started = time.monotonic()
        _require_good(in_child(count, directory / "whole.log"))
        self.seconds = time.monotonic() - started
        self.wanted = contents(directory / "whole")
        self.operations = [Operation(*pair) for pair in json.loads(listing.read_text())]

    def points(self, count: int, timed: int, number: signal.Signals) -> Iterator[Point]:
        """Draw `count` points: every stage in turn, every second one between a write and its rename."""
        stages = _stages_of(self.operations)
        for i in range(count - timed):
            stage = STAGES[i % len(STAGES)]
            own = [k for k, name in enumerate(stages) if name == stage]
            renames = [k for k in own if self.operations[k].kind == "rename"]
            index = self.rng.choice(renames if (i // len(STAGES)) % 2 == i % 2 else own)
            yield Point(number, index, self.operations[index], stage=stage)
        for _ in range(timed):
            yield Point(number, share=self.rng.uniform(0.02, 0.95))

    def tried(self, name: str, point: Point, again: bool, other_clock: bool) -> Trial:
        """Stop a run at `point`, once more on its way if `again`, and let it come to its end."""
        run, log = self.directory / name, self.directory / f"{name}.log"
        stopped = self._stopped(name, point, log)
        while point.share is not None and stopped.code == 0:  # it was faster than the undisturbed run
            shutil.rmtree(run)
            point = replace(point, share=point.share * 0.7)
            stopped = self._stopped(name, point, log)
        faults = _stop_faults(run, point, stopped)
        stopped_in, done = _state(run)
        second = ""
        if again:
            index = self.rng.randrange(len(self.operations) // 2)
            ended = in_child(self._fatal(name, index, signal.SIGKILL), log)
            second = f"operation {index}" if ended.code == KILLED else "came to its end first"
            faults += [] if ended.code in (0, KILLED) else [f"resumed: exit {ended.code}: {ended.log[-500:]}"]
        action = self._command(name)
        ended = in_child(with_other_clock(action, run, self.rng) if other_clock else action, log)
        if ended.code:
            faults.append(f"resumed: exit {ended.code}: {ended.log[-500:]}")
        faults += [f"{stage} was done and done again" for stage in done if f"{stage}: already done" not in ended.log]
        faults += _differences(contents(run), self.wanted)
        return Trial(point, stopped_in, second, other_clock, tuple(faults))

    def _stopped(self, name: str, point: Point, log: Path) -> Ended:
        if point.index is not None:
            return in_child(self._fatal(name, point.index, point.signal), log)
        return in_child(self._command(name), log, kill_after_s=(point.share or 0.0) * self.seconds)

    def _fatal(self, name: str, index: int, number: signal.Signals) -> Callable[[], int]:
        def act() -> int:
            Watch(self.directory / name, index, killing(number))
            return self._command(name)()

        return act

    def _command(self, name: str) -> Callable[[], int]:
        return pqkv("run", self.recipe, "-o", self.directory / name)


def study(directory: Path, points: int, signals: int, seed: int, allocation: str) -> tuple[Study, list[Trial]]:
    """Return the study of `points` SIGKILLs and `signals` points of each signal that is answered."""
    made, trials = Study(directory, seed, allocation), []
    drawn = list(made.points(points, int(points * _TIMED_SHARE) if points >= 10 else 0, signal.SIGKILL))
    for number in ANSWERED:
        drawn += made.points(signals, 0, number)
    for i, point in enumerate(drawn):
        trials.append(made.tried(f"run-{i:03d}", point, again=i % 3 == 2, other_clock=i % 2 == 1))
        _say(f"{i + 1} of {len(drawn)}: {point.signal.name} {point}: {'; '.join(trials[-1].faults) or 'same bytes'}")
    return made, trials


def document(made: Study, trials: Sequence[Trial], seed: int) -> str:
    """Return the record of the study in Markdown."""
    same = {number: [t for t in trials if t.point.signal is number] for number in (signal.SIGKILL, *ANSWERED)}
    counted = [f"| {n.name} | {len(own)} | {sum(not t.faults for t in own)} |" for n, own in same.items() if own]
    kinds = Counter("moment in time" if t.point.operation is None else t.point.operation.kind for t in trials)
    stages = Counter(t.stopped_in for t in trials)
    rows = [
        f"| {i + 1} | {t.point.signal.name} | {t.point} | {t.stopped_in} | {t.again or '-'} | "
        f"{'yes' if t.other_clock else '-'} | {' '.join('; '.join(t.faults).split()) or 'same bytes'} |"
        for i, t in enumerate(trials)
    ]
    lines = [
        "# Crash study",
        "",
        "Written by `make crash-study`; what it does and what counts as the same is in",
        "[robustness.md](../docs/robustness.md).",
        "",
        f"Seed {seed}; Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}.",
        f"Allocation of bits: {made.allocation}. The undisturbed run does {len(made.operations)} operations on files.",
        "",
        "| signal | points | ended with the same bytes |",
        "|---|---|---|",
        *counted,
        "",
        f"By what the process was about to do: {_listed(kinds)}. By the stage it was in: {_listed(stages)}.",
        "",
        "| | signal | point | stage | killed again at | clock and dates changed | outcome |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _stages_of(operations: Sequence[Operation]) -> list[str]:
    """Return the stage of each operation: every stage replaces `stages.json` when it begins and when it ends."""
    replaced, stages = 0, []
    for operation in operations:
        stages.append(STAGES[min(replaced // 2, len(STAGES) - 1)])
        replaced += (operation.kind, operation.place) == ("rename", ".stages.json.tmp")
    return stages


def _state(run: Path) -> tuple[str, list[str]]:
    """Return the stage that `run` has stopped in, and those that are done."""
    file = run / "stages.json"
    records = json.loads(file.read_text()) if file.is_file() else {}
    done = [stage for stage in STAGES if records.get(stage, {}).get("done")]
    return next((stage for stage in STAGES if stage not in done), "after eval"), done


def _stop_faults(run: Path, point: Point, ended: Ended) -> list[str]:
    wanted = ANSWERED.get(point.signal, KILLED)
    faults = [] if ended.code == wanted else [f"exit {ended.code}, expected {wanted}: {ended.log[-500:]}"]
    if point.signal in ANSWERED:
        faults += [f"{path.name} was left" for path in run.rglob("*.tmp")]
        faults += [] if "the same command goes on" in ended.log else ["no word on how to go on"]
    return faults


def _differences(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return [f"{name} is {'surplus' if name not in wanted else 'missing' if name not in found else 'other'}" for name in names]


def _require_good(ended: Ended) -> None:
    if ended.code:
        raise SystemExit(f"the undisturbed run failed with {ended.code}:\n{ended.log}")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50, help="how many times to kill -9")
    parser.add_argument("--signals", type=int, default=10, help="points of SIGTERM and of SIGINT, each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allocation", choices=("uniform", "measured"), default="uniform")
    parser.add_argument("--record", type=Path, help="the Markdown file to write")
    words = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    with tempfile.TemporaryDirectory() as directory:
        made, trials = study(Path(directory).resolve(), words.points, words.signals, words.seed, words.allocation)
    if words.record is not None:
        words.record.write_text(document(made, trials, words.seed), encoding="utf-8")
    bad = [trial for trial in trials if trial.faults]
    _say(f"{len(trials) - len(bad)} of {len(trials)} ended with the same bytes")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(_main())
