"""The texts that a recipe names in one setting: one alone, or a list. Knows how they are written, not what they are."""

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema


def _several(found: object) -> tuple[str, ...]:
    """Return the sources of a text, of which one alone may stand without a list."""
    sources = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise ValueError(f"found {found!r}, expected text that is not empty, or a list of such texts")
    if len(set(sources)) < len(sources):
        raise ValueError(f"found {found!r}, expected every text once: each gets an equal share of the windows")
    return tuple(map(str, sources))


def _written_sources(sources: tuple[str, ...]) -> str | list[str]:
    return sources[0] if len(sources) == 1 else list(sources)


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True}
Sources = Annotated[
    tuple[str, ...],
    BeforeValidator(_several),
    PlainSerializer(_written_sources),
    WithJsonSchema({"anyOf": [_TEXT, _TEXTS]}),
]
