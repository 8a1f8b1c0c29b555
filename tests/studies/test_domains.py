"""The table of domains has a line for every text and contestant, and says what is missing."""

import json
import random
import zipfile
from pathlib import Path

import pytest
from domain_texts import domain_texts, tool_calls
from domains import markdown, parsed, row, study
from tiny_chain import byte_tokenizer
from tiny_run import make_recipe

from pqkv_cli.cli.main import main


def folder(path: Path) -> Path:
    (path / "wikitext2").mkdir(parents=True)
    (path / "wikitext2" / "wiki.test.raw").write_text("A town lies by a river. " * 400, encoding="utf-8")
    (path / "minilongbench").mkdir()
    rows = [
        {"dataset": name, "prompt": f"{name} says " * 200, "answers": ["a short answer"]}
        for name in ("lcc", "repobench-p", "samsum", "samsum", "qmsum", "dureader")
    ]
    file = path / "minilongbench" / "minilongbench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def wheel(store: Path) -> Path:
    store.mkdir()
    with zipfile.ZipFile(store / "django-1-py3-none-any.whl", "w") as made:
        for language, word in (("de", "Guten Tag"), ("fr", "Bonjour")):
            messages = f'msgid ""\nmsgstr ""\n"Language: x"\n\nmsgid "hi"\nmsgstr "{word} "\n"Welt"\n' * 1 + (
                f'\nmsgid "x"\nmsgstr "{word} und mehr"\n' * 200
            )
            made.writestr(f"django/conf/locale/{language}/LC_MESSAGES/django.po", messages)
    return store


def test_texts_are_found_made_or_named_as_missing(tmp_path: Path) -> None:
    found, missing = domain_texts(byte_tokenizer(), folder(tmp_path / "data"), wheel(tmp_path / "store"), {})
    assert set(found) == {"wikitext", "code", "chat", "tools", "german", "french", "chinese"}
    assert missing == {"web": "no documents of C4 or the like are here; name a file of text or rows with --text web=FILE"}
    assert found["german"].startswith("Guten Tag Welt\nGuten Tag und mehr") and "Language" not in found["german"]
    assert found["chat"].count("Assistant: a short answer") == 2
    _, missing = domain_texts(byte_tokenizer(), tmp_path / "none", tmp_path / "store", {})
    assert missing["wikitext"].endswith("wiki.test.raw is not there; name its folder with --data")


def test_tool_calls_are_json_and_the_same_again() -> None:
    text = tool_calls(random.Random(0))
    assert text == tool_calls(random.Random(0)) != tool_calls(random.Random(1))
    calls = [part.split("</tool_call>")[0] for part in text.split("<tool_call>")[1:]]
    assert len(calls) == 120 and all("arguments" in json.loads(call) for call in calls)


def test_a_contestant_that_failed_has_its_reason_in_the_table() -> None:
    failed = {"method": "x", "native_bits": 2.0, "artifact_sha256": None, "status": "unavailable", "error": "too short"}
    assert row("web", failed) == ("web", "x:2", "", "too short", "", "", "")
    assert markdown({"web": [failed]}, {"code": "gone"}).endswith(
        "| web | x:2 |  | too short |  |  |  |\n\n- code is missing: gone\n"
    )


def test_a_run_and_a_rival_are_measured_on_every_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in (["calibrate", str(make_recipe(tmp_path)), "-o", "run"], ["fit-codebooks", "run"], ["export", "run"]):
        assert main(stage) == 0
    words = ["run", "--data", str(folder(tmp_path / "data")), "--store", str(wheel(tmp_path / "store")), "--peers", "kivi:4"]
    table = study(parsed([*words, "--context", "128", "--limit", "2", "-o", str(tmp_path / "out")]))
    assert table == (tmp_path / "out.md").read_text(encoding="utf-8")
    assert sum(line.startswith("| tools |") for line in table.splitlines()) == 2
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    kl = document["domains"]["tools"][0]["metrics"]["kl_bits"]
    assert 0 < kl["quantized"] < kl["p99"] <= kl["p99_9"]
