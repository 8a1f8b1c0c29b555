"""How far a run is from the uncompressed model on text of several domains, beside other runs and rivals: one table.

    PYTHONPATH=tests:tests/studies python tests/studies/domains.py RUN --data DATA [--also RUN2] [--peers kivi:4,...]
        [--text web=FILE] [--limit 8] [--context 1024] [--dtype float32] -o OUT

A run that is good on what it was calibrated on and bad elsewhere shows here. Mode `all`: every key and value is quantized. The
table goes to OUT.md, all numbers to OUT.json, after every domain, so that an interrupted study leaves what it had.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from domain_texts import domain_texts

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.baselines.comparison import MODE, TASK, Contestant, compare, own_contestant, peer_records
from pqkv_cli.baselines.registry import parse_rivals
from pqkv_cli.baselines.run import fitted_rivals, open_comparison
from pqkv_cli.errors import PqkvError
from pqkv_cli.evaluation.settings import Subject
from pqkv_cli.pipeline.evaluation_settings import task_settings
from pqkv_cli.pipeline.start import Source, artifact_source
from pqkv_cli.pipeline.target import resolve_target
from pqkv_cli.reporter import Advance

COLUMNS = ("domain", "method", "bits/channel", "KL mean", "KL p99", "KL p99.9", "top-1")


class Voice:
    """Says on stderr what happens; progress only at its end."""

    def note(self, text: str) -> None:
        """Say one sentence."""
        print(text, file=sys.stderr)

    @contextmanager
    def progress(self, label: str) -> Iterator[Advance]:
        """Say what begins."""
        print(label, file=sys.stderr)
        yield lambda done, total: None


def measured(
    subject: Subject, source: Source, artifacts: Sequence[tuple[str, Artifact]], rivals: Sequence[Contestant], text: str
) -> list[dict[str, Any]]:
    """Return one record per contestant on `text`."""
    own = replace(subject, text=text)
    contestants = [own_contestant(artifact, name) for name, artifact in artifacts]
    contestants += [replace(rival, parts=[], failures=list(rival.failures)) for rival in rivals]
    settings = task_settings(TASK, MODE, source.recipe, own)
    num_tokens = compare(own, settings, contestants, lambda done, total: None)
    return peer_records(own, settings, contestants, num_tokens)


def row(domain: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one line of the table."""
    name = record["method"] if record["artifact_sha256"] else f"{record['method']}:{record['native_bits']:g}"
    if record["status"] != "complete":
        return (domain, name, "", record["error"], "", "", "")
    numbers = record["metrics"]
    kl = numbers["kl_bits"]
    bits = f"{record['bits_per_channel']['total']:.3f}"
    top1 = f"{numbers['top1_agreement']['quantized']:.4f}"
    return (domain, name, bits, *(f"{kl[part]:.4g}" for part in ("quantized", "p99", "p99_9")), top1)


def markdown(found: Mapping[str, Sequence[Mapping[str, Any]]], missing: Mapping[str, str]) -> str:
    """Return the table, and what is not in it."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(name, record) for name, records in found.items() for record in records)]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines += [""] * bool(missing) + [f"- {name} is missing: {reason}" for name, reason in missing.items()]
    return "\n".join(lines) + "\n"


def study(words: argparse.Namespace) -> str:
    """Measure all domains, write both files after each, and return the table.

    Raises
    ------
    PqkvError
        If a run cannot be opened, or a text is too short.
    """
    sizes = {"evaluation.tasks": [TASK], "evaluation.context": words.context, "evaluation.limit": words.limit}
    changes = {**sizes, "dtype": words.dtype}
    source = artifact_source(resolve_target(words.run), None, changes)
    others = [artifact_source(resolve_target(other), None, changes) for other in words.also]
    voice = Voice()
    store, subject, artifacts = open_comparison(source, others, voice, force=False)
    rivals = parse_rivals(words.peers) if words.peers else []
    fitted = fitted_rivals(rivals, store, subject, source.recipe.seed, voice)
    own = dict(pair.split("=", 1) for pair in words.text)
    texts, missing = domain_texts(subject.tokenizer, words.data, words.store, {name: Path(file) for name, file in own.items()})
    found: dict[str, list[dict[str, Any]]] = {}
    for name, text in texts.items():
        voice.note(name)
        try:
            found[name] = measured(subject, source, artifacts, fitted, text)
        except PqkvError as error:
            missing[name] = str(error)
        words.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"domains": found, "missing": missing}
        words.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        words.out.with_suffix(".md").write_text(markdown(found, missing), encoding="utf-8")
    return markdown(found, missing)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run with a calibration and an artifact")
    parser.add_argument("--also", action="append", default=[], help="another run of the same model; may be repeated")
    parser.add_argument("--peers", help="rivals as `pqkv eval --peers` takes them")
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/ and minilongbench/")
    parser.add_argument("--store", type=Path, default=Path("/tmp/pqkv-domains"), help="where fetched packages are kept")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="a domain of your own")
    parser.add_argument("--context", type=int)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--dtype")
    parser.add_argument("-o", "--out", type=Path, required=True, help="OUT.md and OUT.json are written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(study(parsed()))
