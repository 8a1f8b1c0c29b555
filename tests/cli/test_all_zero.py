"""A model whose keys and values are all zero: every verb says what is so, and nobody is told of wrong answers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("zero", [("k_proj",), ("v_proj",), ("k_proj", "v_proj")])
def test_the_whole_chain_on_zeros(
    zero: tuple[str, ...], pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_model, tmp_path / "zero"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in zero:
                getattr(layer.self_attn, name).weight.zero_()
    model.save_pretrained(folder)
    run = tmp_path / "run"
    lines = (
        ("calibrate", folder, "--data", texts[0], "--samples", 20, "--seq-len", 64, "--batch-size", 4, "-o", run),
        ("fit-codebooks", run, "--bits", 4, "--iterations", 2),
        ("export", run),
        ("eval", run, "--task", "perplexity", "--data", texts[1], "--mode", "all", "--limit", 2, "--max-kld", 9),
        ("verify", run, "--against", folder),
        ("verify", run, "--against", folder, "--data", texts[1], "--quality-windows", 2),
        ("diff", run, run),
        ("inspect", run),
        ("report", run),
    )
    for line in lines:
        answer = pqkv(*line)
        assert answer.code == 0, (line[0], answer.err)
        assert "wrong answers" not in answer.out + answer.err
        assert "nan" not in (answer.out + answer.err).lower().split(), line[0]
