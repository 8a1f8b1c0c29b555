"""``pqkv eval``: measure an artifact next to the uncompressed model."""

from dataclasses import dataclass

from pqkv_cli.cli.option_set import takes
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
from pqkv_cli.cli.peers import AlsoOption, OutliersOption, PeersOption
from pqkv_cli.cli.recipe_options import Changes


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
    from pqkv_cli.cli.peers import is_comparison, run_comparison
    from pqkv_cli.cli.tables import raise_on_bad, show_contexts, show_records, verdict
    from pqkv_cli.cli.words import checked, gate_texts, target_of, task_words
    from pqkv_cli.pipeline.start import artifact_source

    output, reporter = Output(words.json_target), TerminalReporter()
    given = words.changes
    task, mode = task_words(given["evaluation.tasks"], given["evaluation.modes"], generated=words.generated)
    gates = gate_texts(given["evaluation.gates"], words.min_recovery, words.max_kld, words.max_ppl_increase)
    own = {"evaluation.tasks": task, "evaluation.modes": mode, "evaluation.gates": gates or None}
    changes = checked({**given, **own})
    with_rivals = is_comparison(words, task, mode, gates)
    source = artifact_source(target_of(words.target, words.run, reporter), words.model, changes)
    if with_rivals:
        return run_comparison(words, source, output, reporter)

    from pqkv_cli.pipeline.evaluate import evaluate_source

    # A recipe's gates may be about more than the tasks of this command; those of this command may not.
    all_gates = bool(gates) or not (task or mode)
    records = evaluate_source(source, reporter, force=words.force, all_gates=all_gates)
    output.result(records[0] if len(records) == 1 else records, show_records(records), *show_contexts(records))
    output.last_line(verdict(records))
    raise_on_bad(records)
