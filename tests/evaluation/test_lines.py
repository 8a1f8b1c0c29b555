import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chain import is_uncompressed

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.lines import line_names, lines
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.hf.names import given_cache

Maker = Callable[..., Subject]
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "longeval"


def answering(made: Subject, monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    """The uncompressed side reads the line; the compressed side is wrong by one."""

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        rows = []
        for row in ids:
            text = made.tokenizer.decode(row, skip_special_tokens=True)
            seen.append(text)
            name = re.findall(r"in line (\S+?)\?", text)[0]
            number = int(re.findall(rf"line {name}: REGISTER_CONTENT is <(\d+)>", text)[0])
            rows.append(made.tokenizer(f"{number + (not is_uncompressed(given_cache(options))):08d}>.").input_ids)
        return torch.cat((ids, torch.tensor(rows)), dim=1)

    monkeypatch.setattr(made.model, "generate", generate)


def test_generated_lists(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = subject(), []
    answering(made, monkeypatch, seen)
    outcome = lines(made, EvaluationSettings("all", context=1000, limit=3), lambda done, total: None)
    assert outcome.metrics["accuracy"].items() >= {"baseline": 1.0, "quantized": 0.0, "recovery": 0.0}.items()
    assert outcome.metrics["accuracy@1000"]["baseline"] == 1.0
    assert outcome.notes == {"chat_template": False, "prompts_too_long_for_the_model": 0}
    for text in seen:
        named = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", text, re.M)
        asked = re.findall(r"in line (\S+?)\?", text)[0]
        assert len({name for name, _ in named}) == len(named) > 5
        assert text.endswith(f"I need the number.\nline {asked}: REGISTER_CONTENT is <")
        assert 940 < len(text) <= 1000
    assert len(set(seen)) == 3


def test_a_chat_model_is_asked(subject: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = subject(), []
    answering(made, monkeypatch, seen)
    template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<bot>"
    monkeypatch.setattr(made.tokenizer, "chat_template", template)
    outcome = lines(made, EvaluationSettings("all", context=1000, limit=1), lambda done, total: None)
    assert seen[0].startswith("<user>Below is a record") and seen[0].endswith("I need the number. </user><bot>")
    assert outcome.notes["chat_template"] is True


def published(count: int, **changes: Any) -> dict[str, Any]:
    body = "".join(f"line name-{i}: REGISTER_CONTENT is <{100 + i}>\n" for i in range(count))
    prompt = f"Remember:\n\n{body}\nNow tell me what is the <REGISTER_CONTENT> in line name-2? I need the number. "
    return {"prompt": prompt, "expected_number": 102, "num_lines": count, "random_idx": ["name-2", 2], **changes}


def test_rows_of_a_directory(subject: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dataclasses import replace

    for count in (5, 8, 100):
        rows = [published(count)] * 3
        (tmp_path / f"{count}_lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, seen = replace(subject(), data=tmp_path), []
    answering(made, monkeypatch, seen)
    outcome = lines(made, EvaluationSettings("all", context=64, limit=2), lambda done, total: None)
    assert outcome.metrics["accuracy@5"]["baseline"] == outcome.metrics["accuracy@8"]["baseline"] == 1.0
    assert outcome.notes["prompts_too_long_for_the_model"] == 2  # 100 lines are 4,000 bytes
    (tmp_path / "5_lines.jsonl").unlink()
    (tmp_path / "8_lines.jsonl").unlink()
    with pytest.raises(DataError, match=r"no prompt of .* fits the model's 1024 positions \(the longest has \d+ tokens\)"):
        lines(made, EvaluationSettings("all", context=64), lambda done, total: None)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("", "holds no rows; expected JSON lines"),
        ("{not json\n", "line 1 is no JSON"),
        ("[1]\n", "line 1 is a list; expected an object"),
        (
            json.dumps(published(3)) + "\n" + json.dumps({"promt": "x"}),
            r"line 2 has no column 'prompt' \(did you mean 'promt'\?\)",
        ),
        (json.dumps(published(3, expected_number="7")), r"expected_number is '7' \(str\); expected int"),
    ],
)
def test_rows_that_are_none(content: str, phrase: str, subject: Maker, tmp_path: Path) -> None:
    from dataclasses import replace

    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=phrase):
        lines(replace(subject(), data=file), EvaluationSettings("all", context=64), lambda done, total: None)


def test_names_differ_and_follow_the_seed() -> None:
    first, again = (line_names(9000, np.random.default_rng(4)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 9000
    assert line_names(20, np.random.default_rng(5)) != first[:20]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="LongEval's own files do not lie beside the repository")
def test_published_files_can_be_read(subject: Maker) -> None:
    from dataclasses import replace

    with pytest.raises(DataError, match=r"fits the model's 1024 positions \(the longest has 1\d{4} tokens\)"):
        lines(replace(subject(), data=PUBLISHED), EvaluationSettings("all", context=64, limit=2), lambda done, total: None)
