"""docs/troubleshooting.md names every key that the verbs it describes write as JSON."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, member in value.items():
            yield key
            yield from keys(member)
    elif isinstance(value, list):
        for member in value:
            yield from keys(member)


@pytest.fixture
def other(pqkv: Callable, exported: Path, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(exported, tmp_path / "other"))
    assert pqkv("fit-codebooks", run, "--bits", 2, "--iterations", 2).code == 0
    assert pqkv("export", run).code == 0
    return run


def test_the_page_names_every_key(pqkv: Callable, exported: Path, other: Path) -> None:
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    for verb, words in (("verify", (exported,)), ("diff", (exported, other)), ("doctor", ())):
        document = pqkv(verb, *words, "--json", "-").json
        section = next(each for each in sections if each.startswith(f"`pqkv {verb}`"))
        documented = set(re.findall(r"`([^`]+)`", section))
        assert document["schema"] in documented
        assert set(keys(document)) - documented == set(), verb
