"""``pqkv verify``: what a whole artifact shows, and every way in which one is not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifact.artifact_maker import edit, make_header, make_tables
from transformers import AutoModelForCausalLM

from pqkv_cli.artifact.store import save_artifact


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Return an artifact of every kind of transform, two stages and uneven groups."""
    header = make_header()
    path = tmp_path / "made.safetensors"
    save_artifact(path, header, make_tables(header))
    return path


def states(document: dict) -> dict[str, str]:
    return {check["name"]: check["state"] for check in document["checks"]}


def test_a_whole_artifact_of_the_model(pqkv: Callable, exported: Path, tiny_model: Path) -> None:
    answer = pqkv("verify", exported, "--against", tiny_model, "--json", "-")
    assert answer.code == 0, answer.err
    assert (answer.json["schema"], answer.json["passed"]) == ("pqkv.verify/1", True)
    assert set(states(answer.json).values()) == {"passed"}
    assert [name.split()[0] for name in states(answer.json)] == ["reader's", "keys", "values", "model"]


def test_people_see_a_table(pqkv: Callable, exported: Path) -> None:
    answer = pqkv("verify", exported / "artifact")
    assert (answer.code, "decode to themselves" in answer.out, "skipped" in answer.out) == (0, True, True)


def test_every_transform_passes(pqkv: Callable, artifact: Path) -> None:
    document = pqkv("verify", artifact, "--json", "-").json
    assert states(document) == {
        "reader's laws": "passed",
        "keys codec k2": "passed",
        "keys codec k3": "passed",
        "values codec v1": "passed",
        "values codec v2": "passed",
        "model": "skipped",
    }


def test_a_flipped_byte_fails(pqkv: Callable, artifact: Path) -> None:
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    answer = pqkv("verify", artifact, "--json", "-")
    assert (answer.code, answer.json["passed"], answer.json["sha256"]) == (1, False, None)
    assert states(answer.json) == {"reader's laws": "failed"}
    assert "failed 1 of 1 checks" in answer.err
    assert "content hash" in answer.err


def test_a_transform_that_does_not_survive_its_own_inverse_fails(pqkv: Callable, artifact: Path) -> None:
    # Within what the reader allows, and signed: only coding and decoding shows that no digit is left.
    def ruin(document: dict, tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.keys.k3.map"][1, 2] = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6]])

    edit(artifact, ruin)
    answer = pqkv("verify", artifact, "--json", "-")
    assert answer.code == 1
    assert [name for name, state in states(answer.json).items() if state == "failed"] == ["keys codec k3"]
    assert "layer 1: undoing the transform" in answer.err
    assert "for the heads [1]" in answer.err


def test_a_fine_tune_is_another_model(pqkv: Callable, exported: Path, tiny_model: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(tiny_model, tmp_path / "tuned"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
    model.save_pretrained(tuned)
    answer = pqkv("verify", exported, "--against", tuned, "--json", "-")
    assert (answer.code, states(answer.json)["model"]) == (1, "failed")
    assert "was made for another model" in answer.err


def test_what_cannot_be_verified(pqkv: Callable, exported: Path, tiny_model: Path) -> None:
    assert pqkv("verify", "nowhere").code == 2
    missing = pqkv("verify", tiny_model)
    assert (missing.code, "there is no run in" in missing.err) == (1, True)
    nowhere = pqkv("verify", exported, "--against", "./nowhere")
    assert (nowhere.code, "model './nowhere' is not there" in nowhere.err) == (1, True)
