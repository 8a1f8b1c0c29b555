"""`pqkv prefix` and prompts that begin with stored prefixes: what is said, what is saved, what stays the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

QUESTIONS = (" what did the dog see", " where did the old man go")


@pytest.fixture
def document(texts: tuple[Path, Path], tmp_path: Path) -> str:
    text = texts[1].read_text(encoding="utf-8")[:1500]
    (tmp_path / "document.txt").write_text(text, encoding="utf-8")
    return text


def test_a_text_is_read_once(pqkv: Callable, exported: Path, document: str, tmp_path: Path) -> None:
    answer = pqkv("prefix", "save", exported, "--text", "document.txt", "--store", "store", "--json", "-")
    assert answer.code == 0, answer.err
    made = answer.json
    assert made["num_restored_tokens"] == 0 and "0 of" in answer.err
    stored = made["prefix"]
    assert stored["num_tokens"] == len(made["tokens"]) > 200
    assert stored["num_bytes"] == stored["own_bytes"] == sum(f.stat().st_size for f in Path("store").rglob("*.safetensors"))
    for question in QUESTIONS:
        words = ("generate", exported, document + question, "--max-new-tokens", 8, "--prefix-store", "store")
        told = pqkv(*words, "--json", "-")
        assert told.code == 0, told.err
        assert told.json["num_restored_tokens"] >= stored["num_tokens"] - 2
        assert f"{told.json['num_restored_tokens']} of the {told.json['num_prompt_tokens']} tokens of the prompt" in told.err
        assert pqkv(*words).out == document + question + told.json["text"] + "\n"
    again = pqkv("prefix", "save", exported, "--text", "document.txt", "--store", "store", "--json", "-").json
    assert again["prefix"]["name"] == stored["name"]
    assert again["num_restored_tokens"] == stored["num_tokens"] - 1, "the last token is read for its logits"


def test_prompts_are_stored_on_request(pqkv: Callable, exported: Path, document: str) -> None:
    words = ("generate", exported, document, "--max-new-tokens", 8, "--prefix-store", "store")
    first = pqkv(*words, "--json", "-")
    assert (first.code, first.json["num_restored_tokens"]) == (0, 0)
    assert "no prefix in store serves this prompt" in first.err and not Path("store").exists()
    saving = pqkv(*words, "--save-prefix", "--json", "-")
    assert "the prompt is stored as " in saving.err
    for _ in range(2):
        restored = pqkv(*words, "--save-prefix", "--json", "-")
        assert restored.json["num_restored_tokens"] == restored.json["num_prompt_tokens"] - 1
        assert "is stored" not in restored.err
        assert restored.json["text"] == saving.json["text"], "from the same cache the same continuation"
    sampled = [pqkv(*words, "--temperature", 2, "--seed", 3, "--json", "-").json["text"] for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_prefixes_are_listed_shown_and_removed(pqkv: Callable, exported: Path, document: str, tmp_path: Path) -> None:
    assert pqkv("prefix", "list", "--store", "store").code == 0
    for length in (300, 900, 1500):
        (tmp_path / "text.txt").write_text(document[:length], encoding="utf-8")
        assert pqkv("prefix", "save", exported, "--text", "text.txt", "--store", "store").code == 0
    listed = pqkv("prefix", "list", "--store", "store", "--json", "-").json
    names = [each["name"] for each in listed["prefixes"]]
    assert len(names) == 3 and listed["removed"] == []
    assert listed["num_bytes"] < sum(each["num_bytes"] for each in listed["prefixes"]), "they share what they have in common"
    assert all(name in pqkv("prefix", "list", "--store", "store").out for name in names)
    shown = pqkv("prefix", "show", names[0][:8], "--store", "store")
    assert shown.code == 0 and names[0] in shown.out and "serves texts that share" in shown.out
    assert pqkv("prefix", "remove", names[0], "--store", "store", "--json", "-").json["removed"] == [names[0]]
    pruned = pqkv("prefix", "prune", "--store", "store", "--max-age", "0.001s", "--json", "-").json
    assert sorted(pruned["removed"]) == sorted(names[1:]) and pruned["num_bytes"] == 0
    assert pqkv("prefix", "prune", "--store", "store", "--max-size", "1GB").code == 0


def test_damage_is_found(pqkv: Callable, exported: Path, document: str) -> None:
    pqkv("prefix", "save", exported, "--text", "document.txt", "--store", "store")
    assert pqkv("prefix", "verify", "--store", "store").code == 0
    block = next(Path("store/blocks").iterdir())
    block.write_bytes(block.read_bytes()[:-1] + b"?")
    answer = pqkv("prefix", "verify", "--store", "store", "--json", "-")
    assert (answer.code, answer.json["passed"]) == (1, False)
    assert f"its block {block.name[:12]} has the SHA-256" in answer.err
    told = pqkv("generate", exported, document, "--max-new-tokens", 2, "--prefix-store", "store")
    assert told.code == 0 and "is not used: its block" in told.err and "no prefix in store serves" in told.err


def test_prefixes_of_another_artifact_are_refused(pqkv: Callable, exported: Path, document: str, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(exported, tmp_path / "other"))
    pqkv("prefix", "save", exported, "--text", "document.txt", "--store", "store")
    assert pqkv("export", other, "--window-tokens", 128).code == 0
    told = pqkv("generate", other, document, "--max-new-tokens", 2, "--prefix-store", "store")
    assert told.code == 0
    assert "artifact: stored with" in told.err and "window: stored with 64, here 128" in told.err
