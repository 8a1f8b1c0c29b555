"""Tables that commands print: what a finished stage says about itself, and results of an evaluation."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pqkv_cli.cli.output import Output, table
from pqkv_cli.cli.streams import json_text
from pqkv_cli.errors import GateError, PqkvError

if TYPE_CHECKING:
    from pqkv_cli.pipeline.state import StageOutcome


def show_stage(outcome: "StageOutcome", output: Output, next_command: str) -> None:
    """Print one stage's outcome as two columns, and the command that comes next."""
    rows = [(name.replace("_", " "), value) for name, value in outcome.facts.items()]
    title = f"{outcome.stage}: {outcome.directory}"
    output.result(
        stage_document(outcome),
        table(title, ("fact", "value"), rows),
        f"next: {next_command}",
    )


def stage_document(outcome: "StageOutcome") -> dict[str, Any]:
    """Return one stage's outcome as JSON (``pqkv.stage/1``)."""
    return {"schema": "pqkv.stage/1", **asdict(outcome), "facts": dict(outcome.facts)}


_COLUMNS = ("task", "mode", "bits/channel", "metric", "uncompressed", "quantized", "p99", "recovery")
_BY_CONTEXT = ("kl_bits", "p99", "top1_agreement", "top5_agreement")

Record = Mapping[str, Any]


def show_records(records: Sequence[Record]) -> Table:
    """Return a table with one row per metric of each record."""
    return table("results", _COLUMNS, [row for record in records for row in _rows(record)])


def show_contexts(records: Sequence[Record]) -> list[Table]:
    """Return a table of how results change with what was read or written before, where records say."""
    rows = [
        (record["task"], record["mode"], f"{cell['from']:,}-{cell['to']:,}", *(cell[name] for name in _BY_CONTEXT))
        for record in records
        for cell in [*record["metrics"].get("by_context", ()), *record["metrics"].get("by_step", ())]
    ]
    return [table("by tokens before", ("task", "mode", "tokens", *_BY_CONTEXT), rows)] if rows else []


def raise_on_bad(records: Sequence[Record]) -> None:
    """Raise for results that do not count as good, after they were shown.

    Raises
    ------
    PqkvError
        If a result is incomplete.
    GateError
        If a quality gate was not met.
    """
    incomplete = [r for r in records if r.get("status", "complete") != "complete"]
    if incomplete:
        names = ", ".join(f"{r['task']} ({r['mode']})" for r in incomplete)
        missing = [fault for r in incomplete for fault in r.get("failed_samples", ())]
        raise PqkvError(f"the results of {names} are incomplete; {_first(missing)}; the other samples were measured")
    failed = dict.fromkeys(fault for r in records if not r.get("gate", {}).get("passed", True) for fault in r["gate"]["failed"])
    if failed:
        raise GateError("quality gates not met:\n" + "\n".join(f"  - {fault}" for fault in failed))


def _first(failed: Sequence[str], most: int = 3) -> str:
    if not failed:
        return "samples are missing"
    rest = f" and {len(failed) - most} more" if len(failed) > most else ""
    return f"{len(failed)} samples have no result: {'; '.join(failed[:most])}{rest}"


def verdict(records: Sequence[Record]) -> str | None:
    """Return one line of JSON on what the gates say of `records`, None where there were no gates."""
    gates = [record["gate"] for record in records if "gate" in record]
    if not gates:
        return None
    results = [{name: record[name] for name in ("task", "mode", "method", "status", "gate")} for record in records]
    document = {"schema": "pqkv.verdict/1", "gate": {"passed": all(gate["passed"] for gate in gates)}, "results": results}
    return json_text(document, sys.stdout)


def _rows(record: Record) -> list[tuple[object, ...]]:
    bits = record.get("bits_per_channel", {}).get("total")
    parts = ("baseline", "quantized", "p99", "recovery")
    return [
        (record["task"], record["mode"], bits, name, *(value.get(part) for part in parts))
        for name, value in record.get("metrics", {}).items()
        if isinstance(value, Mapping) and "quantized" in value
    ]
