"""``pqkv eval``: measure an artifact next to the uncompressed model, and beside its rivals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqkv_cli.cli.option_set import Changes, takes
from pqkv_cli.cli.options import (
    DebugOption,
    ForceOption,
    GeneratedOption,
    JsonOption,
    MaxKldOption,
    MaxPplIncreaseOption,
    MinRecoveryOption,
    ModelOption,
    RunOption,
    TargetArgument,
)
from pqkv_cli.errors import PqkvError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.pipeline.start import Source

PeersOption = Annotated[
    str | None,
    typer.Option(
        "--peers",
        metavar="NAMES",
        help="Compare with rivals on the same text: all, or names such as kivi:2,kvquant:3,million (perplexity, mode all).",
    ),
]
AlsoOption = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="RUN", help="With --peers: another run or artifact of the same model; may be repeated."),
]
OutliersOption = Annotated[
    float | None,
    typer.Option(
        "--inject-outliers",
        metavar="SCALE",
        help="Measure once more with outliers in keys and values that leave the model the same function; a power of two, "
        "such as 16. Rivals are those of --peers, or the usual ones.",
    ),
]

_COLUMNS = ("method", "native bits", "bits/channel", "KL, bits", "KL p99", "top-1", "perplexity", "fit, s")
_OUTLIER_COLUMNS = ("method", "native bits", "bits/channel", "KL, bits", "with outliers", "times", "top-1", "with outliers")

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateWords:
    """The options of ``pqkv eval``."""

    target: TargetArgument = None
    run: RunOption = None
    changes: Changes
    generated: GeneratedOption = False
    min_recovery: MinRecoveryOption = None
    max_kld: MaxKldOption = None
    max_ppl_increase: MaxPplIncreaseOption = None
    peers: PeersOption = None
    also: AlsoOption = None
    inject_outliers: OutliersOption = None
    model: ModelOption = None
    force: ForceOption = False
    json_target: JsonOption = None
    debug: DebugOption = False


@takes(EvaluateWords)
def evaluate(words: EvaluateWords) -> None:
    """Measure an artifact next to the uncompressed model.

    With gates the last line on stdout is JSON, and the exit code is 3 where one is not met. With --peers the artifact is
    put beside its rivals on the same text: a table, and a picture of bits against loss under the run's results.

    Example: pqkv eval my-run --task perplexity --data held-out.txt --mode all --max-kld 0.02
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.tables import raise_on_bad, show_contexts, show_records, verdict
    from pqkv_cli.cli.words import checked, gate_texts, target_of, task_words
    from pqkv_cli.pipeline.start import artifact_source

    output, reporter = Output(words.json_target), TerminalReporter()
    given = words.changes
    task, mode = task_words(given["evaluation.tasks"], given["evaluation.modes"], generated=words.generated)
    gates = gate_texts(given["evaluation.gates"], words.min_recovery, words.max_kld, words.max_ppl_increase)
    own = {"evaluation.tasks": task, "evaluation.modes": mode, "evaluation.gates": gates or None}
    changes = checked({**given, **own})
    with_rivals = _is_comparison(words, task, mode, gates)
    source = artifact_source(target_of(words.target, words.run, reporter), words.model, changes)
    if with_rivals:
        return _run_comparison(words, source, output, reporter)

    from pqkv_cli.pipeline.evaluate import evaluate_source

    # A recipe's gates may be about more than the tasks of this command; those of this command may not.
    all_gates = bool(gates) or not (task or mode)
    records = evaluate_source(source, reporter, force=words.force, all_gates=all_gates)
    output.result(records[0] if len(records) == 1 else records, show_records(records), *show_contexts(records))
    output.last_line(verdict(records))
    raise_on_bad(records)


def _is_comparison(words: EvaluateWords, tasks: Sequence[str] | None, modes: Sequence[str] | None, gates: object) -> bool:
    """Return whether rivals are asked for; refuse what they do not run.

    Raises
    ------
    UsageError
        If another task than perplexity, another mode than all, or gates are asked for, or words do not go together.
    """
    if words.peers is None and words.inject_outliers is None:
        if words.also:
            raise UsageError("found --also without --peers; expected both: --peers all --also OTHER-RUN")
        return False
    option = "--peers" if words.peers is not None else "--inject-outliers"
    wrong = [f"--task {task}" for task in tasks or () if task != "perplexity"]
    wrong += [f"--mode {mode}" for mode in modes or () if mode != "all"]
    if wrong:
        raise UsageError(f"found {' and '.join(wrong)} beside {option}; rivals run the task perplexity in mode all only")
    if gates:
        raise UsageError(f"found a gate beside {option}; gates judge an artifact: give them to a pqkv eval of its own")
    if words.also and words.inject_outliers is not None:
        raise UsageError("found --also beside --inject-outliers; the outlier test takes one artifact and rivals")
    return True


def _run_comparison(words: EvaluateWords, source: "Source", output: "Output", reporter: "TerminalReporter") -> None:
    """Do and show what `words` ask for.

    Raises
    ------
    PqkvError
        If a rival that was asked for by name has no result.
    """
    from pqkv_cli.baselines.outlier_comparison import document, outlier_test
    from pqkv_cli.baselines.run import compare_peers
    from pqkv_cli.cli.words import target_of
    from pqkv_cli.pipeline.start import artifact_source

    if source.recipe.evaluation.gates:
        reporter.note("not judged in a comparison: the recipe's gates; run pqkv eval without rivals for them")
    if words.inject_outliers is not None:
        test = outlier_test(source, words.peers, words.inject_outliers, reporter, force=words.force)
        output.result(document(test), _show_outliers(document(test)))
        records, files = [*test.without, *test.with_outliers], [test.file]
    else:
        others = [artifact_source(target_of(word, None, reporter), None, {}) for word in words.also or ()]
        compared = compare_peers(source, str(words.peers), others, reporter, force=words.force)
        output.result(compared.records, _show_peers(compared.records))
        records, files = compared.records, [compared.numbers, compared.picture]
    for line in dict.fromkeys(_missing(records)):
        reporter.note(f"without a result: {line}")
    for file in files:
        reporter.note(f"wrote {file}")
    _raise_on_missing(records, words.peers)


def _show_peers(records: Sequence[Record]) -> "Table":
    """Return the one table of a comparison, in order of bits per channel."""
    from pqkv_cli.cli.output import table

    known = sorted((r for r in records if r["status"] == "complete"), key=lambda r: -float(r["bits_per_channel"]["total"]))
    model = records[0]["model"]["id"]
    baseline = known[0]["metrics"]["perplexity"]["baseline"] if known else None
    title = f"{model}: every key and value quantized, uncompressed perplexity {baseline:.4g}" if baseline else str(model)
    return table(title, _COLUMNS, [_row(record) for record in known])


def _missing(records: Sequence[Record]) -> list[str]:
    """Return a sentence about every contestant without a result."""
    return [f"{r['method']}:{r['native_bits']:g}: {r['error']}" for r in records if r["status"] != "complete"]


def _raise_on_missing(records: Sequence[Record], wanted: str | None) -> None:
    """Raise where rivals that were asked for by name have no result; `all` takes those there are.

    Raises
    ------
    PqkvError
        With the names.
    """
    names = dict.fromkeys(f"{r['method']}:{r['native_bits']:g}" for r in records if r["status"] != "complete")
    if names and "all" not in (wanted or "all").split(","):
        raise PqkvError(f"the comparison is incomplete: no result for {', '.join(names)}, for the reasons above")


def _show_outliers(test: Mapping[str, Any]) -> "Table":
    """Return the table of an outlier test: every contestant without and with outliers."""
    from pqkv_cli.cli.output import table

    difference = test["largest_logit_difference"]
    same = "bit for bit the same" if difference == 0 else f"the same to {difference:.1e}"
    title = f"outliers of {test['scale']:g} in {test['share']:.1%} of the channels; uncompressed logits are {same}"
    pairs = zip(test["without"], test["with_outliers"], strict=True)
    rows = [_outlier_row(a, b) for a, b in pairs if a["status"] == b["status"] == "complete"]
    return table(title, _OUTLIER_COLUMNS, rows)


def _outlier_row(without: Record, loud: Record) -> tuple[object, ...]:
    kl = [record["metrics"]["kl_bits"]["quantized"] for record in (without, loud)]
    top1 = [f"{record['metrics']['top1_agreement']['quantized']:.2%}" for record in (without, loud)]
    bits = f"{loud['bits_per_channel']['total']:.3f}"
    times = f"{kl[1] / kl[0]:.2f}" if kl[0] else None
    return (without["method"], f"{without['native_bits']:g}", bits, *kl, times, *top1)


def _row(record: Record) -> tuple[object, ...]:
    numbers = record["metrics"]
    seconds = record["cost"]["fit_seconds"]
    return (
        f"{record['method']} (at rest)" if record["at_rest"] else record["method"],
        f"{record['native_bits']:g}",
        f"{record['bits_per_channel']['total']:.3f}",
        numbers["kl_bits"]["quantized"],
        numbers["kl_bits"]["p99"],
        f"{numbers['top1_agreement']['quantized']:.2%}",
        numbers["perplexity"]["quantized"],
        None if seconds is None else f"{seconds:.1f}",
    )
