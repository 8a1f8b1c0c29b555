"""``pqkv generate``: continue a prompt over a quantized cache."""

import codecs
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from pqkv_cli.cli.option_set import Changes, takes
from pqkv_cli.cli.options import (
    DebugOption,
    ForceOption,
    JsonOption,
    ModelOption,
    RunOption,
    TemperatureOption,
)
from pqkv_cli.errors import UsageError

if TYPE_CHECKING:
    from pqkv_cli.pipeline.prefixes import PrefixUse

GraphOption = Annotated[
    str, typer.Option("--graph", metavar="NAME", help="Whether steps are replayed from a CUDA graph: auto, on or off.")
]

PrefixStoreOption = Annotated[
    str | None,
    typer.Option("--prefix-store", metavar="DIR", help="Begin with the longest prefix stored there (see pqkv prefix)."),
]
WordsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[TARGET] PROMPT", help="A run or artifact, then the prompt; '-' reads stdin.")
]
SavePrefixOption = Annotated[bool, typer.Option("--save-prefix", help="With --prefix-store: store the prompt there.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateWords:
    """The options of ``pqkv generate``."""

    words: WordsArgument = None
    run: RunOption = None
    changes: Changes
    temperature: TemperatureOption = 0.0
    graph: GraphOption = "auto"
    prefix_store: PrefixStoreOption = None
    save_prefix: SavePrefixOption = False
    model: ModelOption = None
    force: ForceOption = False
    json_target: JsonOption = None
    debug: DebugOption = False


@takes(GenerateWords)
def generate(words: GenerateWords) -> None:
    """Continue a prompt over a quantized cache.

    With '-' the prompt is all of stdin, without the end of its last line.

    Example: pqkv generate my-run "Once upon a time" --max-new-tokens 40
    """
    from pqkv_cli.cli.output import Output, TerminalReporter
    from pqkv_cli.cli.words import checked, target_of
    from pqkv_cli.pipeline.start import artifact_source

    output, reporter = Output(words.json_target), TerminalReporter()
    wanted = checked(words.changes)
    target, prompt = _split(words.words or [])
    source = artifact_source(target_of(target, words.run, reporter), words.model, wanted)
    prompt = _stdin() if prompt == "-" else _text(_typed(prompt, sys.getfilesystemencoding()))

    from pqkv_cli.pipeline.generate import generate_from

    # With JSON on stdout nothing else may go there.
    stream = None if words.json_target == "-" else _Stream(prompt)
    options = {"temperature": words.temperature, "force": words.force, "graph": _known_graph(words.graph)}
    prefixes = _prefix_use(words.prefix_store, words.save_prefix)
    made = generate_from(source, prompt, reporter, **options, on_text=stream, prefixes=prefixes)  # type: ignore[arg-type]
    if stream is not None:
        stream("\n")
    output.result({"schema": "pqkv.generation/1", "prompt": prompt, **asdict(made)})


def _prefix_use(directory: str | None, save: bool) -> "PrefixUse | None":
    if not directory:
        if save:
            raise UsageError("--save-prefix needs a store; expected: pqkv generate RUN --prefix-store DIR --save-prefix PROMPT")
        return None

    from pqkv_cli.pipeline.prefixes import PrefixUse
    from pqkv_cli.runtime import PrefixStore

    return PrefixUse(PrefixStore(directory), save)


class _Stream:
    """Writes the prompt, once there is something to follow it, and then the text as it comes."""

    def __init__(self, prompt: str) -> None:
        self._unwritten = prompt

    def __call__(self, text: str) -> None:
        sys.stdout.write(self._unwritten + text)
        sys.stdout.flush()
        self._unwritten = ""


def _known_graph(graph: str) -> str:
    if graph not in ("auto", "on", "off"):
        raise UsageError(f"--graph is {graph!r}; expected auto, on or off")
    return graph


def _split(words: list[str]) -> tuple[str | None, str]:
    match words:
        case [prompt]:
            return None, prompt
        case [target, prompt]:
            return target, prompt
    if not words:
        raise UsageError('there is no prompt; expected it as the last word: pqkv generate RUN "Once upon a time"')
    raise UsageError(f"found {len(words)} words, expected a run and a prompt; put the prompt in quotes")


def _stdin() -> str:
    """Return all of stdin as a prompt: without the end of its last line, which ``echo`` and editors put there."""
    text = _decoded(sys.stdin.buffer.read(), sys.stdin.encoding) if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    text = _text(text.removesuffix("\n").removesuffix("\r") if text.endswith("\r\n") else text.removesuffix("\n"))
    if not text.strip():
        raise UsageError("the prompt is '-', but stdin is empty; pipe it in: echo 'Once upon a time' | pqkv generate RUN -")
    return text


def _typed(prompt: str, encoding: str) -> str:
    """Return a prompt of the command line as it was typed: an ASCII locale leaves the bytes of other characters undecoded."""
    if codecs.lookup(encoding).name != "ascii":
        return prompt
    try:
        return prompt.encode(encoding, "surrogateescape").decode("utf-8")
    except UnicodeError:
        return prompt


def _decoded(data: bytes, encoding: str) -> str:
    """Return the text of stdin, its line ends untouched and no byte order mark; UTF-8, too, where the locale says ASCII."""
    try:
        return data.decode("utf-8-sig" if codecs.lookup(encoding).name in ("ascii", "utf-8") else encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt on stdin is not text in {error.encoding}: byte {error.start} is 0x{data[error.start]:02x}; expected "
            f"{error.encoding}: convert it, as with iconv -f latin1 -t {error.encoding}, or set the locale that it is in"
        ) from error


def _text(prompt: str) -> str:
    """Refuse a prompt with characters that are none: no tokenizer takes them."""
    place = next((i for i, character in enumerate(prompt) if "\ud800" <= character <= "\udfff"), None)
    if place is not None:
        raise UsageError(
            f"the prompt has bytes that are no text in the encoding of this locale, the first behind {place} characters; "
            "expected text: convert it, as with iconv -f latin1 -t utf-8"
        )
    return prompt
