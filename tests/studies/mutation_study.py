"""Opens artifacts and files of a run that are cut or changed: is each refused with a clear error, at once, in little memory?

    PYTHONPATH=tests:tests/artifact python tests/studies/mutation_study.py --examples 10000 --record notes/mutation-study.md

Every example runs under limits (`limits.py`). A changed artifact must raise `ArtifactError`, and so must a changed header
that was signed anew, unless what was changed is a fact that any value may have. A changed file of a run must raise an error of
ours or be read. Any other exception, a message without end, a load of what is changed, is a violation.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from artifact_maker import make_header, make_tables, read_parts, write_signed
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from limits import MOST_BYTES, MOST_SECONDS, Cost, limited
from mutations import breaks_a_law, changed_document, misled, spliced, truncated
from run_files import RunFiles

from pqkv_cli.artifact.store import open_artifact, save_artifact
from pqkv_cli.errors import ArtifactError, PqkvError

_LONGEST_MESSAGE = 6000
# Parts of the examples, by what is changed.
SHARES = {"truncated": 2, "spliced": 2, "misled": 2, "signed": 2, "run files": 2}
_ALL_HEALTH = [check for check in HealthCheck if check is not HealthCheck.nested_given]


@dataclass
class Kind:
    """What came of one kind of change."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def count(self, raised: BaseException | None, allowed: type[PqkvError], may_load: bool, what: object) -> None:
        """Judge one example; `what` says which."""
        if raised is None:
            self.outcomes["read" if may_load else "LOADED"] += 1
            fault = None if may_load else "was loaded"
        elif isinstance(raised, allowed) and 20 < len(str(raised)) < _LONGEST_MESSAGE:
            self.outcomes["refused"] += 1
            fault = None
        else:
            self.outcomes[type(raised).__name__] += 1
            fault = f"raised {type(raised).__name__}: {str(raised)[:200]}"
        if fault is not None:
            self.violations.append(f"{self.name}: {str(what)[:200]} {fault}")

    @property
    def num_examples(self) -> int:
        """Examples so far."""
        return sum(self.outcomes.values())


class Study:
    """A small artifact and a small run, and what came of changing them."""

    def __init__(self, directory: Path, seed_: int) -> None:
        self.seed, self.path = seed_, directory / "pqkv.safetensors"
        header = make_header()
        save_artifact(self.path, header, make_tables(header))
        self.original = self.path.read_bytes()
        document, tensors = read_parts(self.path)
        # Copies: the file is written over and over, and what is read of it lies in it.
        self.parts = document, {name: tensor.clone() for name, tensor in tensors.items()}
        self.run_files = RunFiles(directory)

    def flips(self) -> Kind:
        """Flip every byte of the artifact, one at a time, by a pattern that changes with its place."""
        kind = Kind("every byte flipped")
        for i in range(len(self.original)):
            changed = bytearray(self.original)
            changed[i] ^= (0x01, 0x20, 0xFF, 0x80, 0x02)[i % 5]
            self._open(kind, bytes(changed), f"byte {i}")
        return kind

    def raw(self, name: str, change: Callable[[bytes], st.SearchStrategy[bytes]], count: int) -> Kind:
        """Change bytes in `count` ways."""
        kind = Kind(name)

        def example(data: st.DataObject) -> None:
            changed = data.draw(change(self.original))
            if changed != self.original:
                self._open(kind, changed, changed[:80])

        return self._repeated(kind, example, count)

    def signed(self, count: int) -> Kind:
        """Change the header in `count` ways and sign it anew."""
        kind, (document, tensors) = Kind("header changed and signed anew"), self.parts
        write_signed(self.path, document, tensors)
        open_artifact(self.path)  # unchanged, it opens: what is refused below is refused for its change

        def example(data: st.DataObject) -> None:
            place, changed = data.draw(changed_document(document))
            write_signed(self.path, changed, tensors)
            raised = limited(lambda: open_artifact(self.path), kind.cost)
            kind.count(raised, ArtifactError, not breaks_a_law(place, document, changed), f"{place}")

        return self._repeated(kind, example, count)

    def files(self, count: int) -> Kind:
        """Change a file of a run in `count` ways and read it as the verbs do."""
        kind = Kind("files of a run")

        def example(data: st.DataObject) -> None:
            name, change = data.draw(self.run_files.changes())
            with self.run_files.changed(name, change) as read:
                kind.count(limited(read, kind.cost), PqkvError, True, f"{name}: {change[:300]!r}")

        return self._repeated(kind, example, count)

    def _open(self, kind: Kind, data: bytes, what: object) -> None:
        self.path.write_bytes(data)
        kind.count(limited(lambda: open_artifact(self.path), kind.cost), ArtifactError, False, what)

    def _repeated(self, kind: Kind, example: Callable[[Any], None], count: int) -> Kind:
        once = settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=_ALL_HEALTH
        )
        once(seed(self.seed)(given(data=st.data())(example)))()
        _say(f"{kind.name}: {kind.num_examples} examples, {len(kind.violations)} violations")
        return kind


def study(directory: Path, examples: int, seed_: int, *, flips: bool = True) -> tuple[list[Kind], int]:
    """Return what came of `examples` changes, and of flipping every byte; and how many bytes the artifact has."""
    torch.set_num_threads(1)
    made, unit = Study(directory, seed_), examples / sum(SHARES.values())
    counts = {name: round(unit * share) for name, share in SHARES.items()}
    kinds = [made.flips()] if flips else []
    for name, change in (("truncated", truncated), ("spliced", spliced), ("misled", misled)):
        kinds.append(made.raw(name, change, counts[name]))
    return [*kinds, made.signed(counts["signed"]), made.files(counts["run files"])], len(made.original)


_MEANINGS = {
    "every byte flipped": "each byte of the artifact changed, one at a time",
    "truncated": "the end cut off, half the time within the head",
    "spliced": "up to 40 bytes taken out and up to 40 put in, anywhere",
    "misled": "another length of the head, or another number within it (up to 2^64)",
    "header changed and signed anew": "one place of the JSON replaced, removed or doubled, the hash made right again",
    "files of a run": "`stages.json`, `recipe.yaml`, calibration and codebooks: cut, spliced, or one place of the JSON changed",
}


def document(kinds: Sequence[Kind], size: int, seed_: int) -> str:
    """Return the record of the study in Markdown."""
    rows = [
        f"| {kind.name} | {_MEANINGS.get(kind.name, '')} | {kind.num_examples:,} | {kind.outcomes['refused']:,} | "
        f"{kind.outcomes['read']:,} | {len(kind.violations)} | "
        f"{kind.cost.seconds:.2f} | {kind.cost.resident_bytes / 2**20:.1f} |"
        for kind in kinds
    ]
    total, violations = sum(kind.num_examples for kind in kinds), sum(len(kind.violations) for kind in kinds)
    lines = [
        "# Mutation study",
        "",
        "Written by `make mutation-study`; what it does and what counts as a violation is in",
        "[robustness.md](../docs/robustness.md).",
        "",
        f"Seed {seed_}; Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}.",
        f"An artifact of {size:,} bytes.",
        f"{total:,} changes, {violations} violations. Limits of one example: {MOST_SECONDS:g} s, {MOST_BYTES // 2**20} MiB.",
        "",
        "| change | | examples | refused | read | violations | slowest, s | most memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    lines += ["", "Violations:", "", *(f"- {text}" for kind in kinds for text in kind.violations)] if violations else []
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="the Markdown file to write")
    words = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as directory:
        kinds, size = study(Path(directory).resolve(), words.examples, words.seed)
    if words.record is not None:
        words.record.write_text(document(kinds, size, words.seed), encoding="utf-8")
    violations = [text for kind in kinds for text in kind.violations]
    _say("\n".join([*violations[:50], f"{len(violations)} violations"]))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(_main())
