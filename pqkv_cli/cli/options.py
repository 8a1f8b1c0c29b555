"""The options of all verbs, spelt once. Knows no verb."""

from typing import Annotated

import typer

from pqkv_cli.cli import completion

# What a verb works on.
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET",
        help="A model, run or artifact directory, a GGUF file, a recipe, or an org/name hub id.",
        autocompletion=completion.targets,
    ),
]
RunOption = Annotated[
    str | None, typer.Option("-r", "--run", metavar="RUN", help="The same as TARGET. Without both, the only run under runs/.")
]
OutOption = Annotated[
    str | None, typer.Option("-o", "--out", metavar="DIR", help="The run directory to make or go on with. [default: runs/NAME]")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Where the artifact's model lies, if not where it was.")
]
RecipeModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The recipe's model at another place: a directory, a GGUF file or a hub id."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Use the artifact although it was made for another model.")]

GpuOption = Annotated[
    str | None,
    typer.Option("--gpu", metavar="SIZE", help="Say how many tokens of a model fit on a GPU, such as 24GB or 80GiB."),
]

# How a verb talks.
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH", help="Write the result as JSON; '-' is one line on stdout, nothing else."),
]
LogFormatOption = Annotated[
    str, typer.Option("--log-format", metavar="NAME", help="How stderr is written: text, or json (one object per line).")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Say nothing on stderr but warnings and errors.")]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error, and what libraries say when imported.")
]

# Settings of the recipe.
SeedOption = Annotated[int | None, typer.Option("--seed", help="Overrides the recipe's seed.")]
DeviceOption = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps or xpu.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="auto, float32, bfloat16 or float16. On a CPU auto takes float32 instead of a half where that is quicker.",
    ),
]
CalibrationDataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Text to calibrate on: a file of text or rows, stdlib:broad, hf:ORG/NAME, or self, which the model writes; may be "
        "repeated.",
    ),
]
SamplesOption = Annotated[int | None, typer.Option("--samples", help="Number of text windows.")]
SeqLenOption = Annotated[int | None, typer.Option("--seq-len", help="Tokens of a window.")]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", help="Windows that go through the model at once.")]
ReservoirOption = Annotated[int | None, typer.Option("--reservoir-size", help="Vectors kept per layer and head.")]
RecallShareOption = Annotated[
    float | None, typer.Option("--recall-share", help="Share of the windows in which numbers are hidden and asked for.")
]
FisherOption = Annotated[
    bool | None,
    typer.Option("--fisher/--no-fisher", help="Measure by a backward pass what errors of keys and values cost."),
]
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget", metavar="N", help="Mean bits of code per channel; each layer's keys and values get their share."),
]
BitsOption = Annotated[
    float | None, typer.Option("--bits", metavar="N", help="The same bits of code per channel everywhere: 4, 3.5, 3, ... 0.5.")
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", metavar="NAME", help="quality, or speed: tables of 16 entries and their sums.")
]
PrototypeBitsOption = Annotated[
    int | None,
    typer.Option("--prototype-bits", metavar="N", help="Bits of the code of the whole vector: 10, 8 or 0."),
]
KeySpaceOption = Annotated[
    str | None,
    typer.Option(
        "--key-space", metavar="NAME", help="Code keys before rotary embedding (pre_rope), after it (post_rope), or measured."
    ),
]
IterationsOption = Annotated[int | None, typer.Option("--iterations", help="Most rounds of k-means.")]
RefineOption = Annotated[
    bool | None,
    typer.Option(
        "--refine/--no-refine", help="Refine codebooks on all of the calibration text, if that brings the model closer."
    ),
]
SinksOption = Annotated[int | None, typer.Option("--num-sinks", help="First tokens of a row that stay exact.")]
WindowOption = Annotated[int | None, typer.Option("--window-tokens", help="Most recent tokens that stay exact.")]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="perplexity, kld, passkey, needle, lines, longbench, or any task of lm-evaluation-harness; may be repeated.",
        autocompletion=completion.tasks,
    ),
]
ModeOption = Annotated[
    list[str] | None,
    typer.Option("--mode", metavar="NAME", help="all (every token quantized) or cache (as in use); may be repeated."),
]
EvaluationDataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="PATH", help="A file of text, stdlib:evaluation, hf:ORG/NAME, or rows (*.jsonl, their folder)."
    ),
]
ContextOption = Annotated[int | None, typer.Option("--context", help="Tokens of an evaluation window.")]
StrideOption = Annotated[
    int | None, typer.Option("--stride", help="Text windows begin so many tokens apart; their last so many are scored.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="At most this many examples of a task.")]
MinRecoveryOption = Annotated[
    str | None, typer.Option("--min-recovery", metavar="SHARE", help="Fail (exit 3) below this recovery, such as 0.99 or 99%.")
]
MaxKldOption = Annotated[
    str | None, typer.Option("--max-kld", metavar="BITS", help="Fail above this mean KL divergence, bits per token.")
]
MaxPplIncreaseOption = Annotated[
    str | None, typer.Option("--max-ppl-increase", metavar="SHARE", help="Fail if perplexity grows by more, such as 1%.")
]
GateOption = Annotated[
    list[str] | None,
    typer.Option("--gate", metavar="GATE", help="Fail unless it holds, as 'perplexity.kl_bits<=0.02'; may be repeated."),
]
GeneratedOption = Annotated[
    bool, typer.Option("--generated", help="Task kld along the uncompressed model's own continuation, in mode cache.")
]
ContinuationOption = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Tokens of a continuation, where the task leaves it open.")
]
MaxNewTokensOption = Annotated[int | None, typer.Option("--max-new-tokens", help="How many tokens to write.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
