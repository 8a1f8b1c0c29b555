"""Text of data sets, from a local one: no network."""

import json
import sys
from pathlib import Path

import pytest

from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import DataError, UsageError

ROWS = [
    {"text": "one\ntwo", "chat": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "count": 1},
    {"text": "three", "chat": [{"role": "user", "content": "bye"}], "count": 2},
]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("set")
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", directory / "cache")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield f"hf:{directory}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "one\ntwo\n\nthree"),
        ("?rows=1", "one\ntwo"),
        ("?column=chat&split=train", "hi\nyes\n\nbye"),
    ],
)
def test_rows_become_one_text(options: str, expected: str, local: str) -> None:
    assert load_text(local + options) == expected


@pytest.mark.parametrize(
    ("options", "kind", "phrase"),
    [
        ("?colum=text", UsageError, r"has 'colum' \(did you mean 'column'\?\)"),
        ("?rows=0", UsageError, "has rows='0'"),
        ("?column=texts", DataError, r"row 0 has no column 'texts' \(did you mean 'text'\?\); it has text, chat, count"),
        ("?column=count", DataError, "count is '1'; expected a text"),
        ("?split=test", DataError, "cannot be had .*test"),
    ],
)
def test_what_cannot_be_read_is_said(options: str, kind: type[Exception], phrase: str, local: str) -> None:
    with pytest.raises(kind, match=phrase):
        load_text(local + options)


def test_a_set_that_is_nowhere_is_one_error(tmp_path: Path, local: str) -> None:
    with pytest.raises(DataError, match=r"cannot be had \(.*; expected hf:ORG/NAME.*a UTF-8 text file needs neither"):
        load_text(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match="has no name"):
        load_text("hf:")


def test_without_the_package_its_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets, which is not installed: pip install datasets"):
        load_text("hf:org/name")
