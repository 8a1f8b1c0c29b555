"""The one typed reader of foreign configs. Knows how to find a value and complain; not what it means."""

from typing import Any, Final, TypeVar

from pqkv_cli.errors import ModelError

T = TypeVar("T")


class _Required:
    """Type of `REQUIRED`."""


REQUIRED: Final = _Required()


def read(config: Any, key: str, kind: type[T], default: T | _Required = REQUIRED) -> T:
    """Return ``config.key`` as `kind`; an absent or None value gives `default`.

    Raises
    ------
    ModelError
        If the value is absent without a default, or has another type.
    """
    found = getattr(config, key, None)
    if found is None:
        if isinstance(default, _Required):
            raise ModelError(
                f"the model's config ({_name(config)}) has no {key!r}; expected {_article(kind)}. "
                "Check config.json against the model's original."
            )
        return default
    # bool is an int in Python, but a head count of True is a fault.
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise ModelError(
            f"{key!r} in the model's config ({_name(config)}) is {found!r}; expected {_article(kind)}. "
            "Check config.json against the model's original."
        )
    return found


def read_count(config: Any, key: str, default: int | _Required = REQUIRED) -> int:
    """Return a whole number of at least one.

    Raises
    ------
    ModelError
        If the value is absent without a default, no whole number, or below one.
    """
    found = read(config, key, int, default)
    if found < 1:
        raise ModelError(f"{key!r} in the model's config ({_name(config)}) is {found}; expected at least 1.")
    return found


def layer_config(text: Any, index: int) -> Any:
    """Return what `text` says about one layer: itself, except where layers differ in shape."""
    return text.per_layer_config[index] if getattr(text, "is_heterogeneous", False) else text


def layer_values(text: Any, key: str) -> list[Any]:
    """Return the values of `key` that layers have, each once and in order; empty where none has one.

    Where layers differ in shape, a key that has one value per layer may not be asked for as one.
    """
    configs = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    found = [value for each in configs if (value := getattr(each, key, None)) is not None]
    return [value for index, value in enumerate(found) if value not in found[:index]]


def _name(config: Any) -> str:
    return str(getattr(config, "model_type", "") or type(config).__name__)


def _article(kind: type) -> str:
    return {int: "a whole number", dict: "a mapping", list: "a list"}.get(kind, f"a {kind.__name__}")
