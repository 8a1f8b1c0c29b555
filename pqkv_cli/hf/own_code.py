"""Repositories that bring code of their own: it is never run, and nobody is asked whether to.

Without ``trust_remote_code=False`` transformers asks on a terminal, and an absent-minded "y" runs what was downloaded.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Final

# To be given to every loader of transformers and datasets.
NO_CODE: Final = False
_WORDS = ("trust_remote_code", "custom code", "Dataset scripts are no longer supported")


def needs_own_code(error: BaseException) -> bool:
    """Return whether a loader of transformers or datasets failed with `error` because it may not run a repository's code."""
    return any(words in str(error) for words in _WORDS)


def foreign_tokenizer(config: Path) -> str | None:
    """Return the tokenizer class that ``tokenizer_config.json`` at `config` takes from the repository; None without one.

    Where transformers does not know the class it takes a general one in its place without a word, and that one may cut text
    into other tokens.
    """
    try:
        document: Any = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # absent or damaged: the loader says so
    if not isinstance(document, dict):
        return None
    mapped, name = document.get("auto_map"), document.get("tokenizer_class")
    has_code = isinstance(mapped, list | tuple) or (isinstance(mapped, dict) and "AutoTokenizer" in mapped)
    if not has_code or not isinstance(name, str):
        return None
    plain = name.removesuffix("Fast")
    transformers = import_module("transformers")  # slow, and texts are read without it
    return None if any(hasattr(transformers, known) for known in (name, plain, f"{plain}Fast")) else name
