"""The chain of verbs on a tiny model, as the README writes it."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from pqkv_cli.errors import GateError, PqkvError


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run, to be changed at will."""
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


def test_a_run_holds_what_the_layout_says(exported: Path) -> None:
    wanted = (
        "recipe.yaml stages.json calibration/manifest.json codebooks/fit.json artifact/pqkv.safetensors artifact/pqkv.json "
        "artifact/recipe.yaml artifact/README.md"
    )
    assert [name for name in wanted.split() if not (exported / name).is_file()] == []
    assert list(exported.rglob("*.tmp")) == []


def test_the_effective_recipe_is_saved(exported: Path, tiny_model: Path, texts: tuple[Path, Path]) -> None:
    text = (exported / "recipe.yaml").read_text()
    assert [
        line for line in (f"model: {tiny_model}", f"data: {texts[0]}", "samples: 20", "iterations: 4") if line not in text
    ] == []


def test_artifact_holds_no_path_host_or_time(exported: Path, tiny_model: Path) -> None:
    with safe_open(exported / "artifact" / "pqkv.safetensors", "pt") as file:
        header = file.metadata()["pqkv"]
    assert str(tiny_model.parent) not in header
    assert json.loads(header)["model"]["label"] == "tiny-llama"


def test_same_seed_gives_the_same_bytes(
    pqkv: Callable, exported: Path, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    options = ["--data", texts[0], "--samples", 20, "--seq-len", 64, "--batch-size", 4, "-o", "again"]
    assert pqkv("calibrate", tiny_model, *options).code == 0
    assert pqkv("fit-codebooks", "again", "--bits", 4, "--iterations", 4).code == 0
    assert pqkv("export", "again").code == 0
    first, second = (path / "artifact" / "pqkv.safetensors" for path in (exported, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_every_rate(pqkv: Callable, run: Path, bits: int) -> None:
    assert pqkv("fit-codebooks", run, "--bits", bits, "--iterations", 2).code == 0
    answer = pqkv("export", run, "--json", "-")
    assert answer.json["facts"]["bits_per_channel"] == bits


def test_what_is_done_is_not_done_again(pqkv: Callable, run: Path) -> None:
    before = (run / "codebooks" / "fit.json").stat().st_mtime_ns
    answer = pqkv("fit-codebooks", run)
    assert (answer.code, "already done" in answer.err) == (0, True)
    assert (run / "codebooks" / "fit.json").stat().st_mtime_ns == before


def test_a_change_invalidates_what_follows_and_says_so(pqkv: Callable, run: Path) -> None:
    answer = pqkv("fit-codebooks", run, "--bits", 2)
    assert "codebooks.bits changed from 4 to 2" in answer.err
    stale = pqkv("generate", run, "once")
    assert (stale.code, f"bring it up to date with: pqkv export {run}" in stale.err) == (1, True)
    states = {stage["stage"]: stage["state"] for stage in pqkv("inspect", run, "--json", "-").json["stages"]}
    assert states == {"calibrate": "done", "fit-codebooks": "done", "export": "outdated", "eval": "missing"}


def test_the_artifact_is_what_the_recipe_says(pqkv: Callable, run: Path, tiny_model: Path) -> None:
    answer = pqkv("fit-codebooks", run, "--seed", 3)
    assert (answer.code, "after calibrate was done, seed changed from 0 to 3" in answer.err) == (1, True)
    assert pqkv("fit-codebooks", run, "--bits", 2).code == 0
    # A bare model brings no settings: the run keeps its text, its samples and its bits.
    assert "already done" in pqkv("calibrate", tiny_model, "-o", run).err
    assert pqkv("export", run, "--json", "-").json["facts"]["bits_per_channel"] == 2


def test_changed_text_invalidates_the_calibration(
    pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    shutil.copy(texts[0], data)
    line = ("calibrate", tiny_model, "--data", data, "--samples", 4, "--seq-len", 32, "-o", "RUN")
    assert pqkv(*line).code == 0
    assert "already done" in pqkv(*line).err
    shutil.copy(texts[1], data)
    assert "doing it again, because data changed" in pqkv(*line).err


def test_perplexity(pqkv: Callable, run: Path, texts: tuple[Path, Path]) -> None:
    answer = pqkv("eval", run, "--task", "perplexity", "--data", texts[1], "--mode", "all", "--limit", 4, "--json", "-")
    assert answer.code == 0, answer.err
    record = answer.json
    assert (record["schema"], record["task"], record["mode"], record["status"]) == (
        "pqkv.result/1",
        "perplexity",
        "all",
        "complete",
    )
    assert record["metrics"]["kl_bits"]["quantized"] >= 0
    assert json.loads((run / "results" / "perplexity-all.json").read_text()) == record
    card = (run / "artifact" / "README.md").read_text()
    assert "| result | mode | uncompressed | compressed | recovery | 95 % interval | bits/channel | state |" in card
    (line,) = (line for line in card.splitlines() if line.startswith("| perplexity: perplexity |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert (cells[1], cells[7]) == ("all", "complete")
    assert cells[4] == f"{100 * record['metrics']['perplexity']['recovery']:.1f} %"
    assert " to " in cells[5]


def test_passkey(pqkv: Callable, run: Path, texts: tuple[Path, Path]) -> None:
    line = ("eval", run, "--task", "passkey", "--data", texts[1], "--context", 128, "--limit", 1, "--json", "-")
    answer = pqkv(*line)
    assert answer.code == 0, answer.err
    assert [(record["task"], record["mode"]) for record in answer.json] == [("passkey", "all"), ("passkey", "cache")]


def test_results_are_shown_as_a_table_and_written_as_json(
    pqkv: Callable, run: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    line = ("eval", "-r", run, "--task", "perplexity", "--data", texts[1], "--limit", 2, "--json", "out.json")
    answer = pqkv(*line)
    assert "top1_agreement" in answer.out
    assert [record["mode"] for record in json.loads((tmp_path / "out.json").read_text())] == ["all", "cache"]


def test_generate(pqkv: Callable, run: Path) -> None:
    answer = pqkv("generate", run, "once upon a", "--max-new-tokens", 8)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("once upon a")
    record = pqkv("generate", run, "once upon a", "--max-new-tokens", 8, "--json", "-").json
    assert answer.out.rstrip("\n") == record["prompt"] + record["text"]
    assert record["num_new_tokens"] <= 8


def test_generate_reads_stdin_and_finds_the_only_run(
    pqkv: Callable, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported, tmp_path / "runs" / "only")
    monkeypatch.setattr("sys.stdin", io.StringIO("there was a small"))
    answer = pqkv("generate", "-", "--max-new-tokens", 4)
    assert answer.code == 0, answer.err
    assert "using the only run: runs/only" in answer.err
    assert answer.out.startswith("there was a small")


def test_an_artifact_alone_is_enough(pqkv: Callable, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    shutil.copy(run / "artifact" / "pqkv.safetensors", alone)
    refused = pqkv("generate", alone, "once")
    assert (refused.code, "give it with --model" in refused.err) == (2, True)
    assert pqkv("generate", alone, "once", "--model", tiny_model, "--max-new-tokens", 2).code == 0
    assert pqkv("generate", run / "artifact", "once", "--max-new-tokens", 2).code == 0


def test_an_artifact_of_another_model_is_refused(pqkv: Callable, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    other = Path(shutil.copytree(tiny_model, tmp_path / "tuned"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    model.save_pretrained(other)
    answer = pqkv("generate", run, "once", "--model", other)
    assert (answer.code, "made for another model" in answer.err) == (1, True)
    forced = pqkv("generate", run, "once", "--model", other, "--force", "--max-new-tokens", 2)
    assert (forced.code, "warning: weights: the artifact is for tiny-llama" in forced.err) == (0, True)


def test_inspect_tells_models_runs_and_artifacts_apart(pqkv: Callable, run: Path, tiny_model: Path) -> None:
    kinds = [pqkv("inspect", path, "--json", "-").json["kind"] for path in (tiny_model, run, run / "artifact")]
    assert kinds == ["model", "run", "artifact"]
    assert "relative squared error per layer" in pqkv("inspect", run).out
    assert "256 cache bytes per token" in pqkv("inspect", tiny_model).out


def test_run_does_everything_once(pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"name: mine\nmodel: {tiny_model}\ncalibration: {{data: {texts[0]}, samples: 20, seq_len: 64}}\n"
        "codebooks: {iterations: 2}\n"
        f"evaluation: {{tasks: [perplexity], data: {texts[1]}, limit: 2}}\n"
        "generation: {prompt: once upon, max_new_tokens: 4}\n"
    )
    first = pqkv("run", recipe)
    assert first.code == 0, first.err
    assert "once upon" in first.out and "top1_agreement" in first.out
    again = pqkv("run", recipe, "--json", "-")
    assert again.err.count("already done") == 4
    assert [stage["was_done"] for stage in again.json["stages"]] == [True, True, True]
    assert len(again.json["records"]) == 2
    assert Path("runs/mine/recipe.yaml").is_file()


def test_recipes_of_runs_and_files(pqkv: Callable, run: Path) -> None:
    assert pqkv("recipes", "show", "demo", "--json", "-").json["recipe"]["model"] == "demo"
    assert "samples: 20" in pqkv("recipes", "show", "--run", run).out
    assert [r["name"] for r in pqkv("recipes", "--json", "-").json["recipes"]][0] == "demo"


def test_records_that_are_not_good_fail_the_command() -> None:
    from pqkv_cli.cli.tables import raise_on_bad

    raise_on_bad([{"task": "t", "mode": "all", "status": "complete"}])
    with pytest.raises(PqkvError, match="incomplete") as incomplete:
        raise_on_bad([{"task": "t", "mode": "all", "status": "partial"}])
    with pytest.raises(GateError, match="kl too high") as gate:
        raise_on_bad([{"task": "t", "mode": "all", "gate": {"passed": False, "failed": ["kl too high"]}}])
    assert (incomplete.value.exit_code, gate.value.exit_code) == (1, 3)


def test_a_stage_whose_files_were_deleted_is_done_again(pqkv: Callable, run: Path) -> None:
    shutil.rmtree(run / "codebooks")
    again = pqkv("fit-codebooks", run)
    assert again.code == 0 and "already done" not in again.err
    assert any((run / "codebooks").iterdir())
