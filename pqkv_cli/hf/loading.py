"""How transformers and the hub load: without progress bars of their own, and never with code of a repository."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from transformers import logging


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Let transformers draw no bars while the block runs: what people see is decided elsewhere."""
    switch: Any = logging
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


# To be given to every loader of transformers and datasets.
NO_CODE: Final = False
_WORDS = ("trust_remote_code", "custom code", "Dataset scripts are no longer supported")


def needs_own_code(error: BaseException) -> bool:
    """Return whether a loader of transformers or datasets failed with `error` because it may not run a repository's code."""
    return any(words in str(error) for words in _WORDS)


def foreign_tokenizer(*configs: Path) -> str | None:
    """Return the tokenizer class that is to come from the repository; None where it is one of transformers.

    Where transformers does not know the class it takes a general one in its place without a word, and that one may cut text
    into other tokens.

    Parameters
    ----------
    configs
        Where ``tokenizer_config.json`` and ``config.json`` are or would be: what the first says of the class counts.
    """
    documents = [_document(config) for config in configs]
    own = next((mapped for mapped in map(_own_class, documents) if mapped is not None), None)
    if own is None:
        return None
    said = (document.get("tokenizer_class") for document in documents)
    name = next((name for name in said if isinstance(name, str)), own.rpartition(".")[2])
    plain = name.removesuffix("Fast")
    transformers = import_module("transformers")  # slow, and texts are read without it
    return None if any(hasattr(transformers, known) for known in (name, plain, f"{plain}Fast")) else name


def _document(config: Path) -> dict[str, Any]:
    try:
        document: Any = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # absent or damaged: the loader says so
    return document if isinstance(document, dict) else {}


def _own_class(document: dict[str, Any]) -> str | None:
    """Return the class of the repository's own code that `document` names for the tokenizer, slow or fast."""
    mapped = document.get("auto_map")
    named = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else mapped
    names = [name for name in (named if isinstance(named, list | tuple) else [named]) if isinstance(name, str)]
    return names[0] if names else None


def own_attention(config: Any) -> str | None:
    """Return the attention that `config` asks to be fetched from the hub, which is code as well; None where it does not."""
    named = getattr(config, "_attn_implementation", None)
    every = [str(name) for name in (named.values() if isinstance(named, dict) else [named])]
    return next((name for name in every if "/" in name), None)


def leave_own_attention(config: Any) -> None:
    """Let transformers choose one of its own attentions for a model of `config`, and say so, where another is asked for."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    if foreign := [name for part in parts if (name := own_attention(part))]:
        for part in filter(None, parts):
            part._attn_implementation = None
        warnings.warn(
            f"config.json asks for the attention {foreign[0]} of the hub, whose code pqkv never runs; one of transformers' own "
            "is used",
            stacklevel=2,
        )
