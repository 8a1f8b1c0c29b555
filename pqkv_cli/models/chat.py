"""Asks a model through the chat template of its tokenizer, where that works. Knows templates, no tasks.

A template may be there and yet be of no use: it raises, it is one of several none of which is the default, or what it makes
does not hold the message. The model is then asked without it, and that is said.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pqkv_cli.errors import DataError

_PROBE = "pqkv"
# A message as plain text, and as parts, which templates of models that also see pictures may insist on.
_FORMS: tuple[Callable[[str], Any], ...] = (lambda text: text, lambda text: [{"type": "text", "text": text}])


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer knows how its model wants to be talked to, and can be asked to do it."""
    return bool(getattr(tokenizer, "chat_template", None)) and _tried(tokenizer)[1] is None


def template_notes(tokenizer: Any) -> dict[str, Any]:
    """Return what a record notes about the chat template; that there is one of no use is also a warning."""
    used = has_chat_template(tokenizer)
    if used or not getattr(tokenizer, "chat_template", None):
        return {"chat_template": used}
    _, fault = _tried(tokenizer)
    warnings.warn(f"the chat template of the tokenizer cannot be used ({fault}); the model is asked without it", stacklevel=3)
    return {"chat_template": False, "chat_template_fault": fault}


def chat_text(tokenizer: Any, message: str) -> str:
    """Return `message` as a user's turn, ready for the answer.

    Raises
    ------
    DataError
        If the template fails on this message.
    """
    form, _ = _tried(tokenizer)
    return _checked(tokenizer, _asked(form(message)), message)


def talk_text(tokenizer: Any, system: str, turns: Sequence[str]) -> str:
    """Return a talk ready for the next answer: `turns` of the user and the model in turn, the user's first and last.

    It is in the tokenizer's template if that works, else in plain words. Where a template knows no system, its words begin the
    first turn; an empty `system` is left out.

    Raises
    ------
    DataError
        If the template fails on these turns.
    """
    if not has_chat_template(tokenizer):
        speakers = ("User", "Assistant")
        lines = [f"{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)]
        return "\n\n".join([*([system] if system else []), *lines, "Assistant:"])
    form, _ = _tried(tokenizer)
    said = [{"role": ("user", "assistant")[i % 2], "content": form(turn)} for i, turn in enumerate(turns)]
    if not system:
        return _checked(tokenizer, said, turns[-1])
    try:
        return _checked(tokenizer, [{"role": "system", "content": form(system)}, *said], system)
    except DataError:
        return talk_text(tokenizer, "", (f"{system}\n\n{turns[0]}", *turns[1:]))


def _tried(tokenizer: Any) -> tuple[Callable[[str], Any], str | None]:
    """Return the form of messages that the template takes, and None, or why it takes none."""
    fault = None
    for form in _FORMS:
        try:
            text = _rendered(tokenizer, _asked(form(_PROBE)))
        except Exception as error:  # templates are programs, and raise what they like
            fault = fault or _reason(error)
            continue
        if isinstance(text, str) and _PROBE in text:
            return form, None
        fault = fault or "what it makes does not hold the message"
    return _FORMS[0], fault


def _asked(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _checked(tokenizer: Any, turns: list[dict[str, Any]], message: str) -> str:
    try:
        return _rendered(tokenizer, turns)
    except Exception as error:  # templates are programs, and raise what they like
        raise DataError(
            f"the chat template of the tokenizer fails on the message {message[:40]!r} ({_reason(error)}); expected a turn: "
            "mend chat_template, or remove it to ask without"
        ) from error


def _rendered(tokenizer: Any, turns: list[dict[str, Any]]) -> str:
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


def _reason(error: Exception) -> str:
    lines = str(error).strip().split("\n")
    return f"{type(error).__name__}: {lines[0][:120]}"
