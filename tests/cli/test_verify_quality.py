"""``pqkv verify --quality-windows``: what was recorded is measured again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(pqkv: Callable, exported: Path, texts: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a run of which three windows are recorded."""
    made = Path(shutil.copytree(exported, tmp_path / "RUN"))
    # At one bit per channel, for so tame a model to lose more than rounding does.
    assert pqkv("fit-codebooks", made, "--bits", 1, "--iterations", 4).code == 0 and pqkv("export", made).code == 0
    line = ("--task", "perplexity", "--mode", "all", "--data", texts[1], "--limit", 3, "--context", 96)
    assert pqkv("eval", made, *line).code == 0
    return made


@pytest.fixture
def words(run: Path, tiny_model: Path, texts: tuple[Path, Path]) -> tuple[object, ...]:
    return "verify", run, "--against", tiny_model, "--data", texts[1], "--json", "-", "--quality-windows"


def quality(answer: Any) -> dict[str, str]:
    return next(check for check in answer.json["checks"] if check["name"] == "quality")


def record(run: Path) -> Path:
    return run / "results" / "samples" / "perplexity-all.jsonl"


def scale(run: Path, name: str, factor: float) -> None:
    """Multiply one of the recorded numbers."""
    lines = [json.loads(line) for line in record(run).read_text().splitlines()]
    for line in lines:
        if name in line:
            line[name] = [value * factor for value in line[name]]
    record(run).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("asked", "measured"), [(2, 2), (50, 3)])
def test_it_is_as_good_as_recorded(asked: int, measured: int, pqkv: Callable, words: tuple) -> None:
    answer = pqkv(*words, asked)
    assert (answer.code, quality(answer)["state"]) == (0, "passed"), answer.err
    assert f"on {measured} windows of 96 tokens" in quality(answer)["detail"]
    found, recorded = (quality(answer)["detail"].split(word)[1].split()[0].rstrip("),") for word in ("KL ", "(recorded "))
    assert float(found) == pytest.approx(float(recorded), rel=1e-3)


@pytest.mark.parametrize(("name", "factor"), [("kl_bits", 0.5), ("agrees", 1.1)])
def test_it_is_worse_than_recorded(name: str, factor: float, pqkv: Callable, words: tuple, run: Path) -> None:
    scale(run, name, factor)
    answer = pqkv(*words, 2)
    assert (answer.code, quality(answer)["state"]) == (3, "failed"), quality(answer)["detail"]
    assert "failed 1 of 5 checks" in answer.err


def test_rounding_is_no_fault(pqkv: Callable, words: tuple, run: Path) -> None:
    scale(run, "kl_bits", 1 / 1.05)
    assert pqkv(*words, 1).code == 0


def test_a_damaged_artifact_fails_before_its_quality(pqkv: Callable, words: tuple, run: Path) -> None:
    file = run / "artifact" / "pqkv.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert pqkv(*words, 1).code == 1


def test_what_cannot_be_compared(pqkv: Callable, words: tuple, run: Path, texts: tuple[Path, Path], tiny_model: Path) -> None:
    other = pqkv("verify", run, "--against", tiny_model, "--data", texts[0], "--quality-windows", 1)
    assert (other.code, "of another text than" in other.err, "--data" in other.err) == (1, True, True)
    modelless = pqkv("verify", run, "--quality-windows", 1)
    assert (modelless.code, "name it with --against" in modelless.err) == (2, True)
    record(run).write_text(record(run).read_text().replace('"artifact_sha256": "', '"artifact_sha256": "0'))
    assert "is about another artifact; measure again with" in pqkv(*words, 1).err
    for damage in ("{", '{"schema": "pqkv.samples/1"}\n', "[]\n1\n"):
        record(run).write_text(damage)
        answer = pqkv(*words, 1)
        assert (answer.code, "cannot be used" in answer.err) == (1, True), answer.err
    record(run).unlink()
    nothing = pqkv(*words, 1)
    assert (nothing.code, "no windows are recorded" in nothing.err) == (1, True)


def test_of_another_model_there_is_nothing_to_compare(
    pqkv: Callable, run: Path, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tuned = Path(shutil.copytree(tiny_model, tmp_path / "tuned"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
    model.save_pretrained(tuned)
    line = ("--against", tuned, "--data", texts[1], "--quality-windows", 1, "--json", "-")
    answer = pqkv("verify", run, *line)
    assert (answer.code, quality(answer)["state"]) == (1, "skipped")
