"""Structures and constants of the C++ sources, read from there: each is described once, and Python fills fields in by keyword.

The reader is strict: a structure that it might not lay out as the compiler does is refused, with the line it does not know.
"""

import ctypes
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

from pqkv_kernels.errors import KernelError

_NUMBERS: dict[str, type[Any]] = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_DECLARATION = re.compile(r"(?:const\s+)?([A-Za-z_]\w*)\b(.+)", re.DOTALL)
_DECLARATOR = re.compile(r"\s*((?:\*\s*)*)([A-Za-z_]\w*)\s*")
_EXPECTED = "int64_t, float, a structure that stands above, or pointers, as in 'const float *a, *b;'"


class Struct(ctypes.Structure):
    """A structure of a C++ source, filled in by keyword: all fields but pointers, which are null where they are left out.

    Raises
    ------
    KernelError
        If a field is missing, or there is none of this name.
    """

    _source: ClassVar[Path]  # underscored, so that no field has the same name
    _names: ClassVar[frozenset[str]]
    _needed: ClassVar[frozenset[str]]

    def __init__(self, **values: Any) -> None:
        if not self._needed <= values.keys() <= self._names:
            unknown, missing = sorted(values.keys() - self._names), sorted(self._needed - values.keys())
            found = f"{type(self).__name__} was given unknown fields {unknown} and lacks {missing}"
            raise KernelError(f"{found}; give it the fields that {self._source.name} describes, all but pointers that are null")
        super().__init__(**values)


@lru_cache
def structure(source: Path, name: str) -> type[Struct]:
    """Return ``struct name { ... };`` of the C++ file `source` as a ctypes structure of that name.

    Fields are int64_t, float, pointers to anything, which become addresses, and structures that stand above in the same file.

    Raises
    ------
    KernelError
        If the file does not have exactly one such structure, or a line of it is anything else.
    """
    text = _text(source)
    starts = list(_starts(text, name))
    if len(starts) != 1:
        raise KernelError(f"{source.name} has {len(starts)} structures 'struct {name} {{'; expected one")
    fields: dict[str, type[Any]] = {}
    for first, declaration in _declarations(source, text, starts[0].end()):
        for field, kind in _fields(source, text, first, declaration):
            if field in fields:
                raise _refusal(source, text, first, declaration, f"another name than {field}, which is taken")
            fields[field] = kind
    if not fields:
        raise _refusal(source, text, starts[0].start(), starts[0][0], "at least one field")
    needed = frozenset(field for field, kind in fields.items() if kind is not ctypes.c_void_p)
    members = {"__doc__": f"As {source.name} describes it.", "_source": source, "_names": frozenset(fields), "_needed": needed}
    return cast(type[Struct], type(name, (Struct,), members | {"_fields_": list(fields.items())}))


def constant(source: Path, name: str) -> int:
    """Return the number of ``constexpr int name = 64;`` in the C++ file `source`.

    Raises
    ------
    KernelError
        If the file does not define it exactly once, as a number.
    """
    return int(_constant(source, name, r"\s*=\s*(\d+)\s*;", " = 64"))


def constants(source: Path, name: str) -> tuple[int, ...]:
    """Return the numbers of ``constexpr int name[] = {1, 2, 4};`` in the C++ file `source`.

    Raises
    ------
    KernelError
        If the file does not define it exactly once, as numbers.
    """
    listed = _constant(source, name, r"\[\]\s*=\s*\{(\s*\d+\s*(?:,\s*\d+\s*)*)\}\s*;", "[] = {1, 2, 4}")
    return tuple(int(number) for number in listed.split(","))


def _constant(source: Path, name: str, value: str, example: str) -> str:
    text = _text(source)
    found = re.findall(rf"\bconstexpr\s+int\s+{name}{value}", text)
    defined = len(re.findall(rf"\b{name}\s*(?:\[\w*\]\s*)?=(?!=)", text))
    if len(found) != 1 or defined != 1:
        what = f"defines {name} {defined} times, {len(found)} of them as expected"
        raise KernelError(f"{source.name} {what}; expected it once, as in 'constexpr int {name}{example};'")
    return str(found[0])


@lru_cache
def _text(source: Path) -> str:
    """Return the text of `source` with spaces for comments, so that every line keeps its number."""
    return _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), source.read_text(encoding="utf-8"))


def _starts(text: str, name: str) -> Iterator[re.Match[str]]:
    return re.finditer(rf"\bstruct\s+{name}\s*\{{", text)


def _declarations(source: Path, text: str, start: int) -> Iterator[tuple[int, str]]:
    """Yield where each declaration from behind a ``{`` to the ``};`` begins, and what it says without its semicolon."""
    body = text[start:].partition("}")[0]
    for piece in re.finditer(r"\s*([^;]*)(;?)", body):
        first = start + piece.start(1)
        if piece[2]:
            yield first, piece[1]
        elif piece[1]:
            raise _refusal(source, text, first, piece[1], "declarations that end with ';', and then '};'")
    end = start + len(body)
    if re.match(r"\}\s*;", text[end:]) is None:
        raise _refusal(source, text, end, text[end:].partition("\n")[0], "'};' behind the last declaration")


def _fields(source: Path, text: str, first: int, declaration: str) -> Iterator[tuple[str, type[Any]]]:
    """Yield name and type of every field of `declaration`, which begins at `first` of the text; a star belongs to one name."""
    whole = _DECLARATION.fullmatch(declaration)
    if whole is None:
        raise _refusal(source, text, first, declaration, _EXPECTED)
    for declarator in whole[2].split(","):
        parts = _DECLARATOR.fullmatch(declarator)
        kind = None
        if parts is not None:
            kind = ctypes.c_void_p if parts[1] else _kind(source, text[:first], whole[1])
        if parts is None or kind is None:
            raise _refusal(source, text, first, declaration, _EXPECTED)
        yield parts[2], kind


def _kind(source: Path, above: str, name: str) -> type[Any] | None:
    """Return the type of a field that is no pointer; None where it is neither a known number nor a structure `above`."""
    if name in _NUMBERS:
        return _NUMBERS[name]
    return structure(source, name) if any("}" in above[start.end() :] for start in _starts(above, name)) else None


def _refusal(source: Path, text: str, position: int, found: str, expected: str) -> KernelError:
    line = text.count("\n", 0, position) + 1
    return KernelError(f"{source.name}:{line}: found {' '.join(found.split())!r}; expected {expected}")
