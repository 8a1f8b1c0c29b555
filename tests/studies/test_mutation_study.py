"""A share of the mutation study (all of it: ``make mutation-study``), and that its limits are limits."""

import subprocess
import sys
import time
from pathlib import Path

import limits
import pytest
from limits import Cost, HangError, limited
from mutation_study import Kind, document, study

from pqkv_cli.errors import ArtifactError


def test_a_share_of_the_study(tmp_path: Path) -> None:
    kinds, size = study(tmp_path, 150, seed_=1, flips=False)
    assert [violation for kind in kinds for violation in kind.violations] == []
    assert all(kind.num_examples >= 25 for kind in kinds)
    assert f"artifact of {size:,} bytes" in document(kinds, size, 1)


def test_a_huge_allocation_fails_within_the_limit() -> None:
    # In a process of its own: one that has held much and given it back allocates without growing.
    code = """
import limits
from limits import Cost, limited
cost = Cost()
assert isinstance(limited(lambda: bytearray(limits.MOST_BYTES + 2**24), cost), MemoryError)
assert limited(lambda: bytearray(2**24), cost) is None
assert limited(lambda: b"\\1" * 2**24, cost) is None
assert cost.resident_bytes > 2**23  # the kernel counts pages roughly
assert len(bytearray(limits.MOST_BYTES + 2**24)) > 0  # and is allowed again
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(limits.__file__).parent, check=True)


def test_a_hang_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.2)
    assert isinstance(limited(lambda: time.sleep(60), Cost()), HangError)


def test_what_is_a_violation() -> None:
    kind = Kind("truncated")
    clear = ArtifactError("the file holds 3 bytes and should hold more")
    for raised, may_load in ((clear, False), (None, True)):
        kind.count(raised, ArtifactError, may_load, "fine")
    assert kind.violations == []
    for raised in (None, KeyError("x"), MemoryError(), ArtifactError("no"), ArtifactError("x" * 10_000)):
        kind.count(raised, ArtifactError, False, "example")
    assert len(kind.violations) == 5
    assert "7 changes, 5 violations" in document([kind], 10, 0)
