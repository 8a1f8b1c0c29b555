"""Turns pydantic's errors into sentences: where, what was found, what was expected. Knows no particular recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pqkv_cli.errors import did_you_mean

_EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text (put it in quotes if it looks like a number or yes/no)",
    "tuple_type": "a list",
    "model_type": "a section with keys",
    "string_too_short": "text that is not empty",
    "too_short": "at least one entry",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "string_pattern_mismatch": "text that matches {pattern}",
}


def describe_faults(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one sentence per fault that pydantic found in data meant for `model`."""
    details = error.errors()
    # pydantic also reports a list whose entries are wrong as too short.
    parents = {detail["loc"][:-1] for detail in details}
    return [_describe(detail, model) for detail in details if detail["loc"] not in parents]


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    *parents, last = detail["loc"] or ("",)
    where = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "extra_forbidden":
            known = tuple(_section(model, parents).model_fields)
            return f"{where}: unknown key{did_you_mean(str(last), known)}; known are {', '.join(known)}"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
        case "missing":
            return f"{where}: missing, but required"
        case "literal_error":
            expected = str(detail["ctx"]["expected"])
            names = expected.replace("'", "").replace(" or ", ", ").split(", ")
            return f"{where}: found {detail['input']!r}{did_you_mean(str(detail['input']), names)}; expected {expected}"
    template = _EXPECTED.get(detail["type"])
    if template is None:
        return f"{where}: found {detail['input']!r}; {detail['msg']}"
    return f"{where}: found {detail['input']!r}, expected {template.format_map(detail.get('ctx', {}))}"


def _section(model: type[BaseModel], parents: Sequence[int | str]) -> type[BaseModel]:
    for name in parents:
        inner: Any = model.model_fields[str(name)].annotation
        model = inner
    return model
