"""``pqkv prefix``: texts that were read once, kept on disk: store, list, show, remove, prune and verify them."""

import re
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqkv_cli.cli.option_set import takes
from pqkv_cli.cli.options import DebugOption, ForceOption, JsonOption, ModelOption, RunOption
from pqkv_cli.errors import CacheError, UsageError, did_you_mean

if TYPE_CHECKING:
    from pqkv_cli.cli.output import Output
    from pqkv_cli.runtime import PrefixStore, StoredPrefix

_ACTIONS = ("save", "list", "show", "remove", "prune", "verify")
_NEEDS_A_NAME = {"show": "a prefix", "remove": "a prefix"}
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHOWN_TOKENS = 8

StoreOption = Annotated[str | None, typer.Option("--store", metavar="DIR", help="The directory that holds the prefixes.")]
TextOption = Annotated[str | None, typer.Option("--text", metavar="FILE", help="With save: the text to read and store.")]
MaxSizeOption = Annotated[
    str | None,
    typer.Option("--max-size", metavar="SIZE", help="With save and prune: what the store may weigh, such as 500MB or 20GB."),
]
MaxAgeOption = Annotated[
    str | None,
    typer.Option("--max-age", metavar="TIME", help="With save and prune: how long an unused prefix stays, such as 12h or 30d."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixWords:
    """The options of ``pqkv prefix``."""

    action: Annotated[
        str,
        typer.Argument(
            metavar="save|list|show|remove|prune|verify",
            help="Store a text, list all prefixes, show or remove one, remove what is not used, or check every byte.",
        ),
    ] = "list"
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The run or artifact whose model reads the text, or the prefix.")
    ] = None
    store: StoreOption = None
    text: TextOption = None
    max_size: MaxSizeOption = None
    max_age: MaxAgeOption = None
    run: RunOption = None
    model: ModelOption = None
    force: ForceOption = False
    json_target: JsonOption = None
    debug: DebugOption = False


@takes(PrefixWords)
def prefix(words: PrefixWords) -> None:
    """Keep the caches of long texts on disk, so that prompts that begin with them need not read them again.

    Prefixes share what they have in common. With limits, those that were not used for longest go first.

    Example: pqkv prefix save my-run --text manual.txt --store prefixes
    """
    from pqkv_cli.cli.output import Output

    output = Output(words.json_target)
    _check(words)
    store = open_store(words.store, words.max_size, words.max_age)
    if words.action == "save":
        _save(words, store, output)
    elif words.action == "show":
        _show(store, store.find(str(words.name)), output)
    elif words.action == "verify":
        _verify(store, output)
    else:
        _change(words, store, output)


def open_store(directory: str | None, max_size: str | None = None, max_age: str | None = None) -> "PrefixStore":
    """Return the store in `directory`, with limits given as words.

    Raises
    ------
    UsageError
        If a limit is not understood.
    """
    age = None if max_age is None else _seconds(max_age)

    from pqkv_cli.pipeline.capacity import parse_device_bytes
    from pqkv_cli.runtime import PrefixStore

    size = None if max_size is None else parse_device_bytes(max_size, "--max-size")
    return PrefixStore(str(directory), size, age)


def _check(words: PrefixWords) -> None:
    action = words.action
    if action not in _ACTIONS:
        raise UsageError(f"prefix knows {', '.join(_ACTIONS)}, not {action!r}{did_you_mean(action, _ACTIONS)}")
    if not words.store:
        raise UsageError(f"no store is named; expected the directory of the prefixes: pqkv prefix {action} --store DIR")
    if (words.text is not None) != (action == "save"):
        raise UsageError("--text and 'save' belong together; expected: pqkv prefix save RUN --text FILE --store DIR")
    if (words.max_size or words.max_age) and action not in ("save", "prune"):
        raise UsageError(f"--max-size and --max-age belong to 'save' and 'prune', not to {action!r}; leave them out")
    if action in _NEEDS_A_NAME and words.name is None:
        raise UsageError(f"{action} needs the name of {_NEEDS_A_NAME[action]}; see them with: pqkv prefix list --store DIR")
    if action not in (*_NEEDS_A_NAME, "save") and words.name is not None:
        raise UsageError(f"found {words.name!r} after {action!r}, which is about all prefixes; leave it out")


def _save(words: PrefixWords, store: "PrefixStore", output: "Output") -> None:
    from pqkv_cli.cli.output import TerminalReporter
    from pqkv_cli.cli.words import target_of
    from pqkv_cli.pipeline.prefixes import read_text_file, save_text
    from pqkv_cli.pipeline.start import artifact_source

    reporter = TerminalReporter()
    text = read_text_file(Path(str(words.text)).expanduser())
    source = artifact_source(target_of(words.name, words.run, reporter), words.model, {})
    saved = save_text(source, text, store, reporter, force=words.force)
    reporter.note(f"{saved.num_restored_tokens} of {saved.prefix.num_tokens} tokens were stored already")
    _show(store, saved.prefix, output, saved.num_restored_tokens)


def _show(store: "PrefixStore", found: "StoredPrefix", output: "Output", num_restored: int | None = None) -> None:
    from pqkv_cli.cli.output import table

    tokens = found.header.tokens
    shown = ", ".join(map(str, tokens[:_SHOWN_TOKENS])) + (", ..." if len(tokens) > _SHOWN_TOKENS else "")
    rows = [
        ("tokens", found.num_tokens),
        ("begins with", shown),
        ("bytes", found.num_bytes),
        ("of them not shared", found.own_bytes),
        ("stored", _moment(found.header.created)),
        ("last used", _moment(found.last_used)),
        ("serves texts that share", f"at least {found.header.shape.shortest:,} tokens"),
        *((name.replace("_", " "), value) for name, value in asdict(found.header.owner).items()),
    ]
    document = {
        "schema": "pqkv.prefix/1",
        "store": str(store.directory),
        "prefix": _document(found),
        "tokens": list(tokens),
        "num_restored_tokens": num_restored,
    }
    output.result(document, table(found.key, ("fact", "value"), rows))


def _change(words: PrefixWords, store: "PrefixStore", output: "Output") -> None:
    """List, remove or prune, and show what is there then."""
    from pqkv_cli.cli.output import table

    removed: list[str] = []
    if words.action == "remove":
        removed = [store.find_key(str(words.name))]
        store.remove(*removed)
    elif words.action == "prune":
        removed = [each.key for each in store.prune()]
    left = store.list()
    document = {
        "schema": "pqkv.prefixes/1",
        "store": str(store.directory),
        "num_bytes": store.num_bytes(),
        "prefixes": [_document(each) for each in left],
        "removed": removed,
    }
    rows = [(each.key, each.num_tokens, each.num_bytes, each.own_bytes, _moment(each.last_used)) for each in left]
    title = f"{store.directory}: {document['num_bytes']:,} bytes"
    shown: list[Any] = [table(title, ("prefix", "tokens", "bytes", "not shared", "last used"), rows)]
    output.result(document, *(["removed: " + ", ".join(removed)] if removed else []), *shown)


def _verify(store: "PrefixStore", output: "Output") -> None:
    from pqkv_cli.cli.output import table

    faults = store.verify()
    document = {
        "schema": "pqkv.prefix-check/1",
        "store": str(store.directory),
        "passed": not faults,
        "faults": [{"prefix": key, "fault": fault} for key, fault in faults],
    }
    output.result(document, table(f"{store.directory}: {'damaged' if faults else 'sound'}", ("prefix", "fault"), faults))
    if faults:
        raise CacheError(f"{len(faults)} prefixes are damaged, the first, {faults[0][0]}: {faults[0][1]}")


def _document(found: "StoredPrefix") -> dict[str, Any]:
    return {
        "name": found.key,
        "num_tokens": found.num_tokens,
        "num_bytes": found.num_bytes,
        "own_bytes": found.own_bytes,
        "shortest": found.header.shape.shortest,
        "created": found.header.created,
        "last_used": round(found.last_used, 3),
        "pqkv_version": found.header.pqkv_version,
        "owner": asdict(found.header.owner),
    }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def _seconds(word: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", word)
    if found is None or not float(found[1]):
        raise UsageError(f"--max-age is {word!r}; expected a time with its unit, such as 90m, 12h or 30d")
    return float(found[1]) * _UNITS[found[2]]
