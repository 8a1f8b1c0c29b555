"""Quality gates: thresholds on result records, from text to verdict. Knows records as plain data; no tasks, no terminal.

A gate reads ``TASK.METRIC<=NUMBER``, such as ``perplexity.kl_bits<=0.02`` or ``longbench[cache].hotpotqa>=97%``. Of a metric
that is compared with the uncompressed model the recovery is judged, of any other its value; a part may be named:
``passkey.accuracy.quantized>=0.9``. ``increase`` is how much a loss has grown, ``*`` stands for every task that measures the
metric, ``*.recovery`` for the headline metrics of all tasks, and a path such as ``*.bits_per_channel.total`` for the record.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pqkv_cli.errors import UsageError, did_you_mean

Relation = Literal["<=", ">=", "<", ">"]
Record = Mapping[str, Any]

ANY_TASK = "*"
_FORM = re.compile(
    r"\s*(?P<task>\*|[\w:+/-]+)(?:\[(?P<mode>\w+)\])?\.(?P<path>[^<>=\s]+)\s*"
    r"(?P<relation><=|>=|<|>)\s*(?P<bound>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?P<percent>%?)\s*"
)
_LARGEST_RECOVERY = 2.0  # a bound beyond it is a percentage without its sign


@dataclass(frozen=True, slots=True)
class Gate:
    """One threshold; `mode` None means both modes, `path` is a metric with or without a part."""

    text: str
    task: str
    mode: str | None
    path: str
    relation: Relation
    bound: float

    def holds(self, value: float) -> bool:
        """Return whether `value` is within the bound."""
        match self.relation:
            case "<=":
                return value <= self.bound
            case ">=":
                return value >= self.bound
            case "<":
                return value < self.bound
            case ">":
                return value > self.bound

    def concerns(self, task: str, mode: str) -> bool:
        """Return whether results of `task` in `mode` are judged."""
        return self.task in (ANY_TASK, task) and self.mode in (None, mode)


def parse_gate(text: str) -> Gate:
    """Return the gate that `text` describes.

    Raises
    ------
    UsageError
        If it is not understood.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        relations = ", ".join(get_args(Relation))
        raise UsageError(
            f"the gate {text!r} is not understood; expected TASK.METRIC, one of {relations}, and a number, "
            "such as 'perplexity.kl_bits<=0.02' or 'longbench.hotpotqa>=97%'"
        )
    mode, path = found["mode"], found["path"]
    if mode not in (None, "all", "cache"):
        raise UsageError(
            f"the gate {text!r} names the mode {mode!r}{did_you_mean(mode, ('all', 'cache'))}; expected all or cache"
        )
    bound = float(found["bound"]) / (100 if found["percent"] else 1)
    if path.rpartition(".")[2] == "recovery" and bound > _LARGEST_RECOVERY:
        raise UsageError(f"the gate {text!r} asks for a recovery of {bound:g}; expected a share such as 0.99 or 99%")
    relation: Relation = found["relation"]  # type: ignore[assignment]
    return Gate("".join(text.split()), found["task"], mode, path, relation, bound)


def parse_gates(texts: Sequence[str]) -> tuple[Gate, ...]:
    """Return the gates of `texts`, which no result could contradict by itself.

    Raises
    ------
    UsageError
        If one is not understood, or two cannot hold together.
    """
    gates = tuple(parse_gate(text) for text in texts)
    for i, first in enumerate(gates):
        for second in gates[i + 1 :]:
            if _overlap(first, second) and _exclude(first, second):
                raise UsageError(f"the gates {first.text} and {second.text} cannot hold together; give up one of them")
    return gates


def split_gates(gates: Sequence[Gate], tasks: Sequence[str], modes: Sequence[str]) -> tuple[list[Gate], list[Gate]]:
    """Return the gates that an evaluation of `tasks` in `modes` can judge, and those it cannot."""
    judged = [gate for gate in gates if any(gate.concerns(task, mode) for task in tasks for mode in modes)]
    return judged, [gate for gate in gates if gate not in judged]


def judge(gates: Sequence[Gate], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return `records`, each with its ``gate``: whether it ``passed``, what ``failed`` and why, what was ``checked``.

    A gate on a number that is missing or undefined (a recovery of a baseline of zero) fails, and so does any gate on a record
    of which nothing was compressed or nothing scored. One that no record answers for fails in all of its task, or in all.
    """
    failed: list[list[str]] = [[] for _ in records]
    checked: list[list[str]] = [[] for _ in records]
    for gate in gates:
        concerned = [i for i, record in enumerate(records) if gate.concerns(record["task"], record["mode"])]
        if gate.task == ANY_TASK:
            concerned = [i for i in concerned if values_at(records[i], gate.path)]
        if not concerned:  # a task may be measured in another mode than was asked for
            concerned = [i for i, record in enumerate(records) if record["task"] == gate.task] or list(range(len(records)))
        for i in concerned:
            checked[i].append(gate.text)
            failed[i] += _faults(gate, records[i])
    return [
        {**record, "gate": {"passed": not failed[i], "failed": failed[i], "checked": checked[i]}}
        for i, record in enumerate(records)
    ]


def values_at(record: Record, path: str) -> dict[str, float | None]:
    """Return the numbers of `record` that `path` names, by name; empty where there are none."""
    metrics = {name: value for name, value in record.get("metrics", {}).items() if isinstance(value, Mapping)}
    if path == "recovery":
        headline = record.get("headline") or metrics
        return {f"{name}.recovery": metrics[name]["recovery"] for name in headline if "recovery" in metrics.get(name, {})}
    if path in metrics:
        part = "recovery" if "recovery" in metrics[path] else "quantized"
        return {f"{path}.{part}": metrics[path].get(part)}
    name, _, part = path.rpartition(".")
    if name in metrics and (value := _part(metrics[name], part)) is not _MISSING:
        return {path: value}
    found: Any = record
    for key in path.split("."):
        found = found.get(key, _MISSING) if isinstance(found, Mapping) else _MISSING
    return {path: found} if found is None or _is_number(found) else {}


_MISSING: Any = object()


def _part(metric: Mapping[str, Any], part: str) -> Any:
    if part == "increase" and {"baseline", "quantized"} <= metric.keys():
        before, after = metric["baseline"], metric["quantized"]
        return after / before - 1 if before and after is not None else None
    value = metric.get(part, _MISSING)
    return value if value is None or _is_number(value) else _MISSING


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _faults(gate: Gate, record: Record) -> list[str]:
    where = f"{record['task']} ({record['mode']})"
    if gate.mode not in (None, record["mode"]):
        return [f"{where} is no result in mode {gate.mode}, which {gate.text} judges; name the mode {record['mode']} or none"]
    if nothing := _nothing_measured(record):
        return [f"{where}: {nothing}; {gate.text} cannot be met so"]
    found = values_at(record, gate.path)
    if not found:
        names = list(record.get("metrics", {}))
        return [
            f"{where} has no {gate.path}{did_you_mean(gate.path, names)}, which {gate.text} judges; it has {', '.join(names)}"
        ]
    faults = []
    for name, value in found.items():
        if value is None or not math.isfinite(value):
            faults.append(f"{where}: {name} is undefined ({_why_undefined(record, name, value)}); expected {gate.text}")
        elif not gate.holds(value):
            faults.append(f"{where}: {name} is {value:.6g}; expected {gate.relation} {gate.bound:g}")
    return faults


def _nothing_measured(record: Record) -> str | None:
    """Return why the numbers of `record` say nothing about compression, None where they do."""
    if record.get("settings", {}).get("num_tokens") == 0:
        return "no sample was scored"
    if record["mode"] != "cache":
        return None
    held = record.get("cache_bytes", {})
    codes, read = record.get("bits_per_channel", {}).get("codes"), held.get("num_read_as_codes")
    if codes == 0 or read == 0 or held.get("num_tokens") == 0:
        return (
            f"no token was read as a code, because the longest text of {held.get('num_tokens', 'few')} tokens lies in the "
            "exact window or was only read, not continued: give longer prompts (--context), or measure in --mode all"
        )
    return None


def _why_undefined(record: Record, name: str, value: float | None) -> str:
    metric = record.get("metrics", {}).get(name.rpartition(".")[0], {})
    if value is not None:
        return f"it is {value}, no finite number"
    if "baseline" in metric and metric["baseline"] == 0:
        return "the uncompressed model scores 0"
    return "no sample was scored" if metric.get("quantized", 0) is None else "nothing was measured"


def _overlap(a: Gate, b: Gate) -> bool:
    same_task = a.task == b.task or ANY_TASK in (a.task, b.task)
    # A metric by its bare name is its recovery wherever it has one; where it has none, a gate on its recovery cannot hold.
    same_number = a.path.removesuffix(".recovery") == b.path.removesuffix(".recovery")
    return same_number and same_task and (a.mode == b.mode or None in (a.mode, b.mode))


def _exclude(a: Gate, b: Gate) -> bool:
    upper, lower = (a, b) if a.relation in ("<", "<=") else (b, a)
    if upper.relation not in ("<", "<=") or lower.relation in ("<", "<="):
        return False
    strict = "<" in (upper.relation, lower.relation) or ">" in (upper.relation, lower.relation)
    return upper.bound < lower.bound or (strict and upper.bound == lower.bound)
