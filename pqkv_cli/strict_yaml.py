"""YAML as data alone, with an eye on keys written twice. Knows no recipes."""

from collections.abc import Hashable
from typing import Any

import yaml


def read_yaml(text: str) -> tuple[Any, list[str]]:
    """Return what `text` says, and a line about every key that one mapping has twice.

    Raises
    ------
    ValueError
        If it is no YAML 1.1 without tags; the message says where, on one line.
    """
    try:
        loader = _StrictLoader(text)  # refuses characters that YAML does not have
        return loader.get_single_data(), loader.duplicates
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last: an impossible date such as 2001-99-99
        raise ValueError(" ".join(str(error).split())) from error


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without tags; remembers keys that occur twice in one mapping."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                self.duplicates.append(f"{name}: found twice, on lines {seen[name]} and {line}; expected once")
            seen[name] = line
        return super().construct_mapping(node, deep)
