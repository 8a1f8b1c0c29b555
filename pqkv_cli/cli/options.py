"""The options of all verbs, spelt once. Knows no verb."""

from pathlib import Path
from typing import Annotated

import typer

from pqkv_cli.errors import PqkvError


def offered_targets(incomplete: str) -> list[str]:
    """Return the recipes and the runs under ``runs/`` that begin so; paths are the shell's own to offer."""
    from pqkv_cli.pipeline.rundir import runs_under
    from pqkv_cli.recipe_files import recipe_names

    try:
        names = [*recipe_names(), *map(str, runs_under(Path("runs")))]
    except (OSError, PqkvError):  # whoever completes a word cannot be told what is wrong
        return []
    return [name for name in names if name.startswith(incomplete)]


# What a verb works on.
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET",
        help="A model, run or artifact directory, a GGUF file, a recipe, or an org/name hub id.",
        autocompletion=offered_targets,
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

# What is no plain setting of the recipe: each is turned into settings, by `words.py` or by its verb. All others are declared in
# `recipe.py` and get their options in `option_set.py`.
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget", metavar="N", help="Mean bits of code per channel; each layer's keys and values get their share."),
]
BitsOption = Annotated[
    float | None, typer.Option("--bits", metavar="N", help="The same bits of code per channel everywhere: 4, 3.5, 3, ... 0.5.")
]
MinRecoveryOption = Annotated[
    str | None, typer.Option("--min-recovery", metavar="SHARE", help="Fail (exit 3) below this recovery, such as 0.99 or 99%.")
]
MaxKldOption = Annotated[
    str | None, typer.Option("--max-kld", metavar="BITS", help="Fail above this mean KL divergence, bits per token.")
]
MaxPplIncreaseOption = Annotated[
    str | None, typer.Option("--max-ppl-increase", metavar="SHARE", help="Fail if perplexity grows by more, such as 1%.")
]
GeneratedOption = Annotated[
    bool, typer.Option("--generated", help="Task kld along the uncompressed model's own continuation, in mode cache.")
]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
