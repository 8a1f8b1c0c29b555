"""docs/python.md: its examples run, and it names what there is."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_chain import byte_tokenizer

from pqkv_cli import runtime
from pqkv_cli.cache.cache import CacheBytes, QuantizedCache
from pqkv_cli.runtime import Artifact, Attached

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def test_its_examples_run(model: Any, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run" / "artifact").symlink_to(artifact.path)
    monkeypatch.chdir(tmp_path)
    inputs = byte_tokenizer()("abcdefghij" * 15, return_tensors="pt", return_token_type_ids=False)
    known: dict[str, Any] = dict(model=model, tokenizer=byte_tokenizer(), inputs=inputs)
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), known)
    assert known["answer"].shape[1] > known["first"].shape[1] > 150
    assert model.config._attn_implementation != "pqkv"


@pytest.mark.parametrize(
    "name", ["load", "attach", "simulate_artifact", "Attached.new_cache", "Attached.detach", "Attached.self_test"]
)
def test_it_gives_every_parameter(name: str) -> None:
    function: Any = runtime
    for part in name.split("."):
        function = getattr(function, part)
    (written,) = re.findall(rf"`{re.escape(name)}\((.*?)\)", PAGE)
    given = [word.split("=")[0].strip() for word in written.split(",") if word.strip()]
    assert given == [each for each in _spelled(function) if each != "self"]


def _spelled(function: Any) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(parameter.name)
    return names


def test_what_it_says_of_a_cache_is_there() -> None:
    for owner, names in (
        (QuantizedCache, ("num_bytes", "num_materialized", "quantized_layers", "reset")),
        (Attached, ("detach",)),
    ):
        assert all(name in PAGE and hasattr(owner, name) for name in names)
    assert all(f"`{name}`" in PAGE for name in ("codes", "exact", "dense", "positions", "total"))
    assert hasattr(CacheBytes, "total")
