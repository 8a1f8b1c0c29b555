"""``pqkv verify``: what a whole artifact shows, and every way in which one is not."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.artifact_maker import edit, make_header, make_tables
from transformers import AutoModelForCausalLM

from pqkv_cli.artifact import exercise
from pqkv_cli.artifact.store import save_artifact
from pqkv_cli.pipeline.verify import verify
from pqkv_kernels.reference.encode import Encoder


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


class ShiftedSearch(Encoder):
    """Finds the centroid of the point beside."""

    def nearest(self, points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        return super().nearest(points, centroids).roll(1, dims=1)


class SwappedPages(Encoder):
    """Writes pages in another order."""

    def encode(self, *words: Any) -> torch.Tensor:
        return super().encode(*words).flip(1)


def test_a_machine_that_codes_wrongly_fails(pqkv: Callable, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise, "fastest_encoder", lambda device: ShiftedSearch())
    answer = pqkv("verify", artifact)
    assert (answer.code, answer.err.count("decodes to another")) == (1, 6)
    monkeypatch.setattr(exercise, "fastest_encoder", lambda device: SwappedPages())
    answer = pqkv("verify", artifact)
    assert (answer.code, "reading back the pages that were written" in answer.err) == (1, True)
    assert "get other codes than the reference's" in answer.err


def test_while_it_is_exported_again_the_old_or_the_new_one_is_seen(artifact: Path) -> None:
    header = make_header()
    both = {save_artifact(artifact, header, make_tables(header, seed)) for seed in (0, 1)}
    stop, seen = threading.Event(), []

    def export_again() -> None:
        tables = [make_tables(header, seed) for seed in (0, 1)]
        while not stop.is_set():
            for each in tables:
                save_artifact(artifact, header, each)

    def read() -> None:
        seen.extend(verify(artifact) for _ in range(5))

    writer, readers = threading.Thread(target=export_again), [threading.Thread(target=read) for _ in range(10)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    writer.join()
    assert len(seen) == 50
    assert [made.checks for made in seen if made.failed or made.sha256 not in both] == []


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
