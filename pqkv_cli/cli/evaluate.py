"""``pqkv eval``: measure an artifact next to the uncompressed model."""

from dataclasses import dataclass

from pqkv_cli.cli.option_set import takes
from pqkv_cli.cli.options import (
    ContextOption,
    ContinuationOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EvaluationDataOption,
    ForceOption,
    GateOption,
    GeneratedOption,
    JsonOption,
    LimitOption,
    MaxKldOption,
    MaxPplIncreaseOption,
    MinRecoveryOption,
    ModelOption,
    ModeOption,
    RunOption,
    SeedOption,
    StrideOption,
    TargetArgument,
    TaskOption,
)
from pqkv_cli.cli.peers import AlsoOption, OutliersOption, PeersOption


@dataclass(frozen=True, slots=True)
class EvaluateWords:
    """The options of ``pqkv eval``."""

    target: TargetArgument = None
    run: RunOption = None
    task: TaskOption = None
    data: EvaluationDataOption = None
    mode: ModeOption = None
    context: ContextOption = None
    stride: StrideOption = None
    limit: LimitOption = None
    generated: GeneratedOption = False
    max_new_tokens: ContinuationOption = None
    gate: GateOption = None
    min_recovery: MinRecoveryOption = None
    max_kld: MaxKldOption = None
    max_ppl_increase: MaxPplIncreaseOption = None
    peers: PeersOption = None
    also: AlsoOption = None
    inject_outliers: OutliersOption = None
    model: ModelOption = None
    force: ForceOption = False
    seed: SeedOption = None
    device: DeviceOption = None
    dtype: DtypeOption = None
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
    from pqkv_cli.pipeline.start import artifact_source, file_reference

    output, reporter = Output(words.json_target), TerminalReporter()
    task, mode = task_words(words.task, words.mode, generated=words.generated)
    gates = gate_texts(words.gate, words.min_recovery, words.max_kld, words.max_ppl_increase)
    changes = {
        "evaluation.tasks": task,
        "evaluation.data": file_reference(words.data),
        "evaluation.modes": mode,
        "evaluation.context": words.context,
        "evaluation.stride": words.stride,
        "evaluation.limit": words.limit,
        "evaluation.prompts": words.limit,
        "evaluation.max_new_tokens": words.max_new_tokens,
        "evaluation.gates": gates or None,
        **{"seed": words.seed, "device": words.device, "dtype": words.dtype},
    }
    checked(changes)
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
