"""Strict reading of decoded JSON: every fault carries its path and all are collected. Knows no artifact."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pqkv_cli.errors import did_you_mean

MISSING: Final = object()
MAX_COUNT: Final = 2**15 - 1  # channels are numbered by int16
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Node:
    """A value inside a JSON document, the path to it, and the list that collects the document's faults.

    The typed readers never raise: on a fault they note it and return a harmless value of the right type, so that the rest of
    the document is read too. A missing value is noted once, by the object that lacks it.
    """

    value: object
    path: str
    faults: list[str]

    def fault(self, text: str) -> None:
        """Note a fault of this value."""
        if self.value is not MISSING:
            self.faults.append(f"{self.path or 'the header'} {text}")

    def expected(self, what: str) -> None:
        """Note that this value is not `what`."""
        self.fault(f"is {_shown(self.value)}; expected {what}")

    def child(self, key: str) -> "Node":
        """Return the value under `key` of an object, `MISSING` where there is none."""
        value = self.value.get(key, MISSING) if isinstance(self.value, dict) else MISSING
        return Node(value, f"{self.path}.{key}" if self.path else key, self.faults)

    def fields(self, *names: str) -> tuple["Node", ...]:
        """Return the values of an object that must have exactly the fields `names`."""
        if not isinstance(self.value, dict):
            self.expected(f"an object with the fields {', '.join(names)}")
        else:
            for key in self.value:
                if key not in names:
                    self.fault(f"has the unknown field {_shown(key)}{did_you_mean(str(key)[:100], names)}")
            for name in names:
                if name not in self.value:
                    self.fault(f"lacks the field {name!r}")
        return tuple(self.child(name) for name in names)

    def members(self) -> dict[str, "Node"]:
        """Return the values of an object whose keys are free."""
        if not isinstance(self.value, dict):
            self.expected("an object")
            return {}
        return {key: self.child(key) for key in self.value}

    def items(self) -> tuple["Node", ...]:
        """Return the elements of an array."""
        if not isinstance(self.value, list):
            self.expected("an array")
            return ()
        return tuple(Node(value, f"{self.path}[{i}]", self.faults) for i, value in enumerate(self.value))

    def integer(self, least: int = 0, most: int = 2**53 - 1) -> int:
        """Return an integer of ``least..most``."""
        if type(self.value) is int and least <= self.value <= most:
            return self.value
        self.expected(f"an integer from {least} to {most}")
        return least

    def number(self) -> float:
        """Return a finite number that is not negative."""
        if type(self.value) in (int, float) and isinstance(self.value, int | float):
            try:
                number = float(self.value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number) and number >= 0.0:
                return number
        self.expected("a finite number of at least 0")
        return 0.0

    def boolean(self) -> bool:
        """Return true or false."""
        if isinstance(self.value, bool):
            return self.value
        self.expected("true or false")
        return False

    def text(self, empty: bool = False) -> str:
        """Return a string of printable characters; `empty` allows an empty one."""
        if isinstance(self.value, str) and self.value.isprintable() and (self.value or empty):
            return self.value
        self.expected("a string of printable characters" + ("" if empty else ", not empty"))
        return "?"

    def choice(self, known: Iterable[str | int]) -> str | int | None:
        """Return one of `known`, None where it is none of them."""
        options = list(known)
        if type(self.value) in (str, int) and isinstance(self.value, str | int) and self.value in options:
            return self.value
        hint = did_you_mean(self.value[:100], [str(o) for o in options]) if isinstance(self.value, str) else ""
        self.expected(f"one of {', '.join(map(str, options))}{hint}")
        return None

    def sha256(self, empty: bool = False) -> str:
        """Return a lower-case hexadecimal SHA-256; `empty` allows an empty string."""
        if isinstance(self.value, str) and (_SHA256.fullmatch(self.value) or (empty and not self.value)):
            return self.value
        self.expected("a SHA-256 of 64 lower-case hexadecimal digits")
        return ""


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if isinstance(value, list):
        return f"an array of {len(value)} elements"
    kind = {str: "the string ", int: "the integer ", float: "the number "}.get(type(value), "")
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"
    shown = ascii(value[: _SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return kind + (shown if len(shown) <= _SHOWN_CHARACTERS + 2 else shown[:_SHOWN_CHARACTERS] + "...")
