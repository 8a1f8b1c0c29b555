"""Publishing on the hub and using what lies there, against a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from cli.fake_hub import WRITE_TOKEN, FakeHub, Repository

from pqkv_cli.artifact.store import open_artifact

NAME = "some-org/tiny-kv"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    made = FakeHub()
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    yield made
    made.close()


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "RUN"))


@pytest.fixture
def pushed(pqkv: Callable, hub: FakeHub, run: Path) -> str:
    """Publish the run's artifact and return the commit."""
    answer = pqkv("export", run, "--push-to-hub", NAME, "--json", "-")
    assert answer.code == 0, answer.err
    return str(answer.json["pushed"]["commit"])


def sha256(run: Path) -> str:
    return open_artifact(run / "artifact").sha256


def test_what_is_published(pqkv: Callable, hub: FakeHub, run: Path, texts: tuple[Path, Path], tiny_model: Path) -> None:
    evaluated = pqkv("eval", run, "--task", "perplexity", "--data", texts[1], "--mode", "all", "--limit", 2)
    assert evaluated.code == 0, evaluated.err
    (run / "results" / "other.json").write_text('{"artifact_sha256": "of another"}')
    answer = pqkv("export", run, "--push-to-hub", NAME, "--json", "-")
    assert answer.code == 0, answer.err
    files = hub.repositories[NAME].files("main")
    assert answer.json["pushed"]["files"] == sorted(files)
    assert answer.json["pushed"]["url"] == f"{hub.url}/{NAME}"
    wanted = ["README.md", "pqkv.json", "pqkv.safetensors", "recipe.yaml", "results/perplexity-all.json"]
    assert sorted(files) == wanted
    assert files["pqkv.safetensors"] == (run / "artifact" / "pqkv.safetensors").read_bytes()
    assert files["README.md"] == (run / "artifact" / "README.md").read_bytes()
    assert [name for name, data in files.items() if str(tiny_model.parent.parent).encode() in data] == []
    assert b"model: tiny-llama" in files["recipe.yaml"] and b"data: calibration.txt" in files["recipe.yaml"]
    assert len(hub.large) == 1


@pytest.mark.parametrize(("flag", "visibility"), [([], "private"), (["--private"], "private"), (["--public"], "public")])
def test_who_may_see_it(pqkv: Callable, hub: FakeHub, run: Path, flag: list[str], visibility: str) -> None:
    assert pqkv("export", run, "--push-to-hub", NAME, *flag).code == 0
    assert hub.repositories[NAME].visibility == visibility


def test_people_see_what_was_published(pqkv: Callable, hub: FakeHub, run: Path) -> None:
    answer = pqkv("export", run, "--push-to-hub", NAME)
    assert f"use it with: pqkv generate {NAME}@" in answer.out
    assert "already done" in answer.err


def test_a_card_of_an_earlier_artifact_is_not_published(pqkv: Callable, hub: FakeHub, run: Path) -> None:
    (run / "artifact" / "README.md").write_text("# of another artifact")
    assert pqkv("export", run, "--push-to-hub", NAME).code == 0
    assert sha256(run).encode() in hub.repositories[NAME].files("main")["README.md"]


def test_an_artifact_is_used_from_the_hub(pqkv: Callable, hub: FakeHub, run: Path, pushed: str, tiny_model: Path) -> None:
    cached = sorted((Path(huggingface_hub.constants.HF_HUB_CACHE)).rglob("*"))
    assert cached == []
    assert pqkv("verify", NAME, "--against", tiny_model, "--json", "-").json["sha256"] == sha256(run)
    assert pqkv("inspect", NAME, "--json", "-").json["artifact"]["sha256"] == sha256(run)
    assert pqkv("diff", NAME, run, "--json", "-").json["same_content"]
    made = pqkv("generate", NAME, "once upon", "--model", tiny_model, "--max-new-tokens", 2, "--json", "-")
    assert (made.code, made.json["num_new_tokens"]) == (0, 2), made.err
    unnamed = pqkv("generate", NAME, "once upon")
    assert (unnamed.code, "model 'tiny-llama' is not there" in unnamed.err) == (1, True)


def test_results_do_not_go_into_the_cache(
    pqkv: Callable, hub: FakeHub, pushed: str, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    assert pqkv("verify", NAME).code == 0
    before = sorted((tmp_path / "cache").rglob("*"))
    line = ("--task", "perplexity", "--data", texts[1], "--mode", "all", "--limit", 1, "--model", tiny_model)
    assert pqkv("eval", NAME, *line).code == 0
    assert sorted((tmp_path / "cache").rglob("*")) == before
    record = json.loads((tmp_path / "results" / "some-org--tiny-kv" / "perplexity-all.json").read_text())
    assert record["task"] == "perplexity"


def test_a_revision_stays_what_it_is(pqkv: Callable, hub: FakeHub, run: Path, pushed: str) -> None:
    first = sha256(run)
    assert pqkv("verify", NAME, "--json", "-").json["sha256"] == first
    assert pqkv("export", run, "--window-tokens", 128, "--push-to-hub", NAME).code == 0
    second = sha256(run)
    assert first != second
    found = {name: pqkv("verify", name, "--json", "-").json["sha256"] for name in (NAME, f"{NAME}@main", f"{NAME}@{pushed}")}
    assert found == {NAME: second, f"{NAME}@main": second, f"{NAME}@{pushed}": first}
    hub.requests.clear()
    assert pqkv("verify", f"{NAME}@{pushed}").code == 0
    assert hub.requests == []


def test_without_network_the_cache_is_used(pqkv: Callable, hub: FakeHub, run: Path, pushed: str) -> None:
    assert pqkv("verify", NAME).code == 0
    hub.close()
    branch = pqkv("verify", NAME, "--json", "-")
    assert (branch.code, branch.json["sha256"]) == (0, sha256(run))
    assert f"taken from the cache: {NAME} of commit {pushed[:12]}" in branch.err
    commit = pqkv("verify", f"{NAME}@{pushed}")
    assert (commit.code, "taken from the cache" in commit.err) == (0, False)
    nowhere = pqkv("verify", "some-org/other")
    assert (nowhere.code, "the hub did not give it" in nowhere.err, "copy pqkv.safetensors" in nowhere.err) == (1, True, True)
    unpublished = pqkv("export", run, "--push-to-hub", NAME)
    assert (unpublished.code, "could not be published" in unpublished.err) == (1, True)


def test_where_the_hub_is_forbidden(pqkv: Callable, hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids the hub" in pqkv("verify", NAME).err
    assert "HF_HUB_OFFLINE forbids the hub" in pqkv("export", run, "--push-to-hub", NAME).err
    assert hub.requests == []


def test_who_may_not_write(pqkv: Callable, hub: FakeHub, run: Path, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    refused = pqkv("export", run, "--push-to-hub", "some-org/another")
    assert (refused.code, "does not let you write to some-org/another" in refused.err) == (1, True)
    hidden = pqkv("verify", NAME)
    assert (hidden.code, "or does not show it to you; check the name, or log in" in hidden.err) == (1, True)


def test_what_is_no_artifact(pqkv: Callable, hub: FakeHub, pushed: str) -> None:
    hub.repositories["some-org/model"] = Repository("public")
    hub.repositories["some-org/model"].commit({"config.json": b"{}"})
    model = pqkv("verify", "some-org/model")
    assert (model.code, "start it with: pqkv calibrate some-org/model" in model.err) == (1, True)
    named = pqkv("verify", "some-org/model@main")
    assert (named.code, "some-org/model@main holds no artifact" in named.err) == (1, True)
    unknown = pqkv("verify", f"{NAME}@v9")
    assert (unknown.code, f"no revision 'v9' of {NAME}" in unknown.err) == (1, True)
    started = pqkv("calibrate", f"{NAME}@main")
    assert (started.code, "is an artifact; expected a model" in started.err) == (2, True)


def test_a_damaged_artifact_on_the_hub_is_refused(pqkv: Callable, hub: FakeHub, run: Path, pushed: str) -> None:
    repository = hub.repositories[NAME]
    data = bytearray(repository.files("main")["pqkv.safetensors"])
    data[-1] ^= 1
    repository.commit({"pqkv.safetensors": bytes(data)})
    assert "content hash" in pqkv("verify", NAME).err
    assert pqkv("verify", f"{NAME}@{pushed}").code == 0


def test_a_run_here_comes_first(pqkv: Callable, hub: FakeHub, run: Path, pushed: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs" / "tiny-kv")
    hub.requests.clear()
    assert pqkv("verify", NAME, "--json", "-").json["path"].startswith("runs/tiny-kv/")
    assert hub.requests == []


@pytest.mark.parametrize("word", ["tiny-kv", "a/b/c", "org/name@main", "../up", "org/"])
def test_words_that_name_no_repository(pqkv: Callable, hub: FakeHub, run: Path, word: str) -> None:
    answer = pqkv("export", run, "--push-to-hub", word)
    assert (answer.code, f"--push-to-hub is {word!r}; expected ORG/NAME" in answer.err) == (2, True)
    assert hub.requests == []


def test_another_process_finds_it_where_the_environment_says(hub: FakeHub, pushed: str, tmp_path: Path) -> None:
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE_TOKEN, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pqkv_cli", "verify", f"{NAME}@{pushed}", "--json", "-"],
        env={**os.environ, **places},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True), done.stderr
