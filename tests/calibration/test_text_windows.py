from pathlib import Path

import pytest
import torch

from pqkv_cli.calibration.stdlib_text import stdlib_text
from pqkv_cli.calibration.text import load_text, token_windows
from pqkv_cli.errors import DataError


class CharTokenizer:
    """One token per character; adds 1 in front if asked to."""

    bos_token_id = 1

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([1] if self.adds_bos and add_special_tokens else []) + [ord(c) for c in text]}


TEXT = "".join(chr(1000 + i) for i in range(1000))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_windows_are_disjoint_runs_of_the_text(adds_bos: bool) -> None:
    windows = token_windows(CharTokenizer(adds_bos), TEXT, 20, 32, seed=0)
    assert windows.shape == (20, 32)
    assert windows.dtype == torch.int64
    if adds_bos:
        assert bool((windows[:, 0] == 1).all())
        windows = windows[:, 1:]
    assert bool((windows.diff(dim=1) == 1).all())
    assert len(windows.unique()) == windows.numel()


def test_windows_are_a_function_of_the_seed() -> None:
    first, again, other = (token_windows(CharTokenizer(True), TEXT, 10, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_all_windows_can_be_asked_for() -> None:
    windows = token_windows(CharTokenizer(False), TEXT, 10, 100, seed=5)
    assert torch.equal(windows.flatten().sort().values, torch.arange(1000, 2000))


def test_too_little_text_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"has 1000 tokens, enough for 32 windows of 32; 33 windows need 1023"):
        token_windows(CharTokenizer(True), TEXT, 33, 32, seed=0)


@pytest.mark.parametrize(("num", "size"), [(0, 32), (3, 1), (3, 0)])
def test_senseless_sizes(num: int, size: int) -> None:
    with pytest.raises(DataError, match="asked for"):
        token_windows(CharTokenizer(True), TEXT, num, size, seed=0)


def test_builtin_splits() -> None:
    assert load_text("stdlib:calibration") == stdlib_text("calibration")
    with pytest.raises(DataError, match=r"stdlib:evaluation.*did you mean 'evaluation'"):
        load_text("stdlib:evaluatio")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffGrüße\r\n".encode())
    assert load_text(str(path)) == "Grüße\r\n"


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(DataError, match="is not there"):
        load_text(str(path))
    with pytest.raises(DataError, match="is a directory"):
        load_text(str(tmp_path))
    path.write_bytes(b" \n")
    with pytest.raises(DataError, match=r"empty \(2 bytes\)"):
        load_text(str(path))
    path.write_bytes(b"good \xff bad")
    with pytest.raises(DataError, match=r"byte 0xff at offset 5"):
        load_text(str(path))
    path.write_bytes(b"\xef\xbb\xbfgood \xff bad")
    with pytest.raises(DataError, match=r"byte 0xff at offset 8"):
        load_text(str(path))
