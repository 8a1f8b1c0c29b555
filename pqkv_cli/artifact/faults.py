"""What is wrong with an artifact, in sentences: where, what was found, what was expected. Knows no particular field."""

import json
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pqkv_cli.errors import did_you_mean

_SHOWN_FAULTS = 20
_SHOWN_CHARACTERS = 40
# What was expected, by pydantic's names for faults. "expected" is our own: a type of the header that says it by itself.
_EXPECTED: Mapping[str, str] = {
    "expected": "{what}",
    "int_type": "an integer",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "bool_type": "true or false",
    "literal_error": "{expected}",
    "tuple_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "too_short": "a length of at least {min_length}, not {length}",
    "too_long": "a length of at most {max_length}, not {length}",
}


def listed(what: str, faults: Sequence[str], advice: str = "export the artifact again") -> str:
    """Return one message for all `faults`, with what to do next."""
    return _message(what, faults[:_SHOWN_FAULTS], len(faults), advice)


def refusal(error: ValidationError) -> str:
    """Return one message for all faults that pydantic found in the header of an artifact."""
    details = error.errors(include_url=False)
    lacking: dict[tuple[int | str, ...], list[str]] = {}
    for detail in details:
        if detail["type"] == "missing":
            lacking.setdefault(detail["loc"][:-1], []).append(str(detail["loc"][-1]))
    # Only of those that are shown: a hostile header may have very many.
    sentences = [_sentence(detail, lacking.get(detail["loc"][:-1], ())) for detail in details[:_SHOWN_FAULTS]]
    return _message("the header is not valid", sentences, len(details), "export the artifact again")


def _message(what: str, first_faults: Sequence[str], num_faults: int, advice: str) -> str:
    lines = [f"  - {fault}" for fault in first_faults]
    if num_faults > len(first_faults):
        lines.append(f"  - and {num_faults - len(first_faults)} more")
    return "\n".join([f"{what}:", *lines, advice])


def _sentence(detail: ErrorDetails, lacking: Sequence[str]) -> str:
    """Return the sentence for one fault; an unknown field may be a misspelt one of the fields that are `lacking` beside it."""
    where, found, facts = _path(detail["loc"]), detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return f"{_path(detail['loc'][:-1])} lacks the field {detail['loc'][-1]!r}"
        case "extra_forbidden":
            name = str(detail["loc"][-1])
            hint = did_you_mean(name[:_SHOWN_CHARACTERS], lacking)
            return f"{_path(detail['loc'][:-1])} has the unknown field {shown(name)}{hint}"
        case "value_error":
            return f"{where}: {facts['error']}"
    expected = _EXPECTED.get(detail["type"])
    if expected is None:
        return f"{where} is {shown(found)}; {detail['msg']}"
    length = len(found) if isinstance(found, list | dict) else None
    return f"{where} is {shown(found)}; expected {expected.format_map({**facts, 'length': length})}"


def _path(location: Sequence[int | str]) -> str:
    steps = [f"[{step}]" if isinstance(step, int) else f".{shown(step)[1:-1]}" for step in location]
    # pydantic's mark of a fault in the name of a member.
    return "".join(steps).removeprefix(".").removesuffix(".[key]") or "the header"


def shown(value: object) -> str:
    """Return a value of a JSON document as JSON in ASCII, cut where it is long."""
    text = json.dumps(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"
