"""Lets a verb take its options as one frozen dataclass. Knows typer's way of reading a function, no option."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

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
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
                for f in fields(options)  # type: ignore[arg-type]
                if f.default is not MISSING
            ]
        )
        wrapper.__annotations__ = {f.name: hints[f.name] for f in fields(options)}  # type: ignore[arg-type]
        del wrapper.__wrapped__  # typer would read the verb's own signature
        return wrapper

    return decorate
