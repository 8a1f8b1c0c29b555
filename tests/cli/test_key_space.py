"""Where keys with rotary embedding are coded: ``--key-space``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

QUICK = ("--iterations", 2, "--prototype-bits", 0)


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


def codecs(run: Path) -> dict[str, str | None]:
    from pqkv_cli.artifact.store import open_artifact

    return {name: spec.key_space for name, spec in open_artifact(run / "artifact").header.plan.codecs.items()}


def test_keys_after_rotary_embedding_are_fitted_written_and_read(pqkv: Callable, run: Path, texts: tuple[Path, Path]) -> None:
    assert pqkv("fit-codebooks", run, "--bits", 4, "--key-space", "post_rope", *QUICK).code == 0
    assert pqkv("export", run).code == 0
    assert codecs(run) == {"k4_post": "post_rope", "v4": None}
    assert pqkv("verify", run).code == 0
    answer = pqkv(
        *("eval", run, "--task", "perplexity", "--mode", "all", "--mode", "cache", "--data", texts[1]),
        *("--context", 320, "--limit", 2, "--json", "-"),
    )
    assert answer.code == 0, answer.err
    costs = {record["mode"]: record["metrics"]["kl_bits"]["quantized"] for record in answer.json}
    assert 0 < costs["cache"] < costs["all"] < 0.5


def test_measured_takes_what_costs_less_in_each_layer(pqkv: Callable, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pqkv_cli.pipeline import key_space

    asked = []

    def losses(model, windows, choices, on_progress=None, position_offset=0) -> torch.Tensor:
        spaces = [next(c for c in codecs if c)["keys"].rotary is None for codecs in choices]
        assert spaces == [True, False]  # after rotary embedding, before it
        layer = next(i for i, c in enumerate(choices[0]) if c)
        asked.append((layer, position_offset))
        costs = {0: [[0.2, 0.2]], 1: [[0.1, 0.2]] if position_offset == 0 else [[0.9, 0.2]]}
        return torch.tensor(costs[layer], dtype=torch.float64)

    monkeypatch.setattr(key_space, "held_out_losses", losses)
    words = ("fit-codebooks", run, "--bits", 4, "--key-space", "measured", *QUICK)
    assert pqkv(*words).code == 0
    # Layer 0 costs the same in both: the cheaper to read. Layer 1 only does so where it was calibrated.
    assert pqkv("export", run).code == 0
    assert codecs(run) == {"k4": "pre_rope", "k4_post": "post_rope", "v4": None}
    assert asked == [(0, 0), (0, 1024 - 64), (1, 0), (1, 1024 - 64)]
    rows = json.loads((run / "codebooks" / "key_spaces.json").read_text())["layers"]
    assert [(row["layer"], row["post_rope"], row["pre_rope"]) for row in rows] == [(0, 0.2, 0.2), (1, 0.5, 0.2)]


def test_layers_that_were_measured_are_not_measured_again(pqkv: Callable, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pqkv_cli.pipeline import key_space

    measured, done = key_space.held_out_losses, []

    def once(model, windows, choices, **how) -> torch.Tensor:
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return measured(model, windows, choices, **how)

    words = ("fit-codebooks", run, "--bits", 3, "--key-space", "measured", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(key_space, "held_out_losses", once)
        assert pqkv(*words).code == 130
        first = json.loads((run / "codebooks" / "key_spaces.json").read_text())["layers"]
        assert [row["layer"] for row in first] == [0]
        assert pqkv(*words).code == 0
    assert len(done) == 5  # layer 0 twice, layer 1 once in vain and twice more
    rows = json.loads((run / "codebooks" / "key_spaces.json").read_text())["layers"]
    assert rows[0] == first[0] and [row["layer"] for row in rows] == [0, 1]
    before = (run / "codebooks" / "fit.json").read_bytes()
    shutil.rmtree(run / "codebooks")
    (run / "codebooks").mkdir()
    (run / "codebooks" / "key_spaces.json").write_text('{"schema": "pqkv.key-spaces/1", "layers": [{"layer": 0}]}')
    assert pqkv(*words).code == 0  # a damaged record is made anew
    assert json.loads((run / "codebooks" / "key_spaces.json").read_text())["layers"] == rows
    assert (run / "codebooks" / "fit.json").read_bytes() == before


def test_an_unknown_space_is_refused(pqkv: Callable, run: Path) -> None:
    answer = pqkv("fit-codebooks", run, "--key-space", "pre-rope")
    assert answer.code == 2 and "expected 'pre_rope', 'post_rope' or 'measured'" in answer.err
