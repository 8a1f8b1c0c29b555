"""Gives every verb all of its options, and lets it take them as one frozen dataclass. Knows typer's ways."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from pqkv_cli.cli.log_setup import LOG_FORMATS
from pqkv_cli.cli.options import LogFormatOption, QuietOption
from pqkv_cli.cli.recipe_options import with_recipe_options
from pqkv_cli.errors import UsageError, did_you_mean

T = TypeVar("T")


def takes(options: Callable[..., T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Return a decorator: a verb of one `options` object becomes a function with a parameter per field, as typer reads it."""
    hints = get_type_hints(options, include_extras=True)

    def decorate(verb: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def wrapper(**words: Any) -> None:
            verb(options(**words))

        wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    f.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if f.default is MISSING else f.default,
                    annotation=hints[f.name],
                )
                for f in fields(options)  # type: ignore[arg-type]
            ]
        )
        wrapper.__annotations__ = {f.name: hints[f.name] for f in fields(options)}  # type: ignore[arg-type]
        del wrapper.__wrapped__  # typer would read the verb's own signature
        return wrapper

    return decorate


def with_all_options(name: str, verb: Callable[..., None]) -> Callable[..., None]:
    """Return the verb called `name` with the options of the recipe's settings that it takes, and those that every verb has."""
    return with_common_options(with_recipe_options(name, verb))


def with_common_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Return `verb` with the options that every verb has and none needs to know: how stderr is written.

    They are obeyed from the first word on (`log_setup.wanted_voice`), before typer has read a line that may be wrong; here they
    are declared and checked.
    """

    @functools.wraps(verb)
    def wrapper(*, log_format: str, quiet: bool, **words: Any) -> None:
        if log_format not in LOG_FORMATS:
            nearest = did_you_mean(log_format, LOG_FORMATS)
            raise UsageError(f"--log-format is {log_format!r}{nearest}; expected one of {', '.join(LOG_FORMATS)}")
        verb(**words)

    signature, hints = inspect.signature(verb), get_type_hints(verb, include_extras=True)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in signature.parameters.values()]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in (("log_format", "text", LogFormatOption), ("quiet", False, QuietOption))
    ]
    wrapper.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *common]}
    del wrapper.__wrapped__  # typer would read the verb's own signature
    return wrapper
