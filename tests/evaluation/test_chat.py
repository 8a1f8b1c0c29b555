"""Chat templates of every kind: used where they work, else left out and said, and never a second beginning."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny_chain import byte_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.kld import kld_generated
from pqkv_cli.evaluation.lines import lines
from pqkv_cli.evaluation.longbench import longbench
from pqkv_cli.evaluation.needle import needle
from pqkv_cli.evaluation.passkey import passkey
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.prompts import prompt_ids
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.models.chat import chat_text, has_chat_template, template_notes

Maker = Callable[..., Subject]
WORKS = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<b>"
PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}<u>{{ p.text }}</u>{% endif %}{% endfor %}"
    "{% endfor %}"
)
USELESS: dict[str, Any] = {
    "raises": "{{ raise_exception('a system turn is needed') }}",
    "is no template": "{% for m in messages %}",
    "knows no such name": "{{ messages[0].content.nothing.more }}",
    "loses the message": "hello",
    "makes nothing": "",
    "several, no default": {"tool_use": WORKS, "rag": WORKS},
}


def with_template(template: Any) -> Any:
    made = byte_tokenizer()
    found = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    found.chat_template = template
    return found


@pytest.mark.parametrize("template", [WORKS, PARTS, {"default": WORKS, "tool_use": "x"}])
def test_templates_that_work_are_used(template: Any) -> None:
    made = with_template(template)
    assert template_notes(made) == {"chat_template": True}
    assert chat_text(made, "one { two").startswith("<u>one { two</u>")


@pytest.mark.parametrize("kind", USELESS)
def test_templates_of_no_use_are_left_out_and_that_is_said(kind: str) -> None:
    made = with_template(USELESS[kind])
    assert not has_chat_template(made)
    if kind == "makes nothing":  # the same as none
        assert template_notes(made) == {"chat_template": False}
        return
    with pytest.warns(
        UserWarning, match=r"the chat template of the tokenizer cannot be used \(.+\); the model is asked without it"
    ):
        notes = template_notes(made)
    assert notes["chat_template"] is False and notes["chat_template_fault"]


def test_a_template_that_fails_on_one_message_is_named() -> None:
    made = with_template("{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}")
    assert chat_text(made, "good") == "good"
    with pytest.raises(DataError, match=r"fails on the message 'bad one' \(.*no\); expected a turn"):
        chat_text(made, "bad one")


def test_what_a_template_writes_is_not_put_twice_and_nothing_stands_behind() -> None:
    made = with_template("<s>" + WORKS)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    ids = prompt_ids(made, chat_text(made, "hi")).tolist()
    made.backend_tokenizer.post_processor = None
    byte_tokenizer().backend_tokenizer.post_processor = None
    assert (ids[0], ids.count(0), ids.count(1)) == (0, 1, 0)
    assert made.decode(ids) == "<s><u>hi</u><b>"


def silent(done: int, total: int) -> None:
    """Take progress and say nothing."""


TASKS: dict[str, Callable[..., Any]] = {
    "passkey": passkey,
    "needle": needle,
    "lines": lines,
    "perplexity": perplexity,
    "kld_generated": kld_generated,
}


@pytest.mark.parametrize("positions", [4, 40, 200, 330, 400, 600])
@pytest.mark.parametrize("task", TASKS)
def test_advice_works_or_says_that_nothing_does(
    task: str, positions: int, subject: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    for module in ("prompts", "text_windows", "kld", "lines"):
        monkeypatch.setattr(f"pqkv_cli.evaluation.{module}.num_positions", lambda model: positions)
    monkeypatch.setattr("pqkv_cli.evaluation.qa_runner._asked", lambda *words: (_ for _ in ()).throw(InterruptedError))
    monkeypatch.setattr("pqkv_cli.evaluation.text_windows._measure", lambda *words: (_ for _ in ()).throw(InterruptedError))
    made = subject()
    for context in (2, 60, 300, 1000):
        changes: dict[str, int] = {"context": context, "max_new_tokens": 1000}
        for _ in range(4):
            try:
                TASKS[task](replace(made), EvaluationSettings("all", limit=1, **changes), silent)
            except InterruptedError:
                break
            except DataError as error:
                if "cannot run on" in str(error):
                    break
                advised = dict(re.findall(r"--(context|max-new-tokens) (\d+)", str(error)))
                assert advised, str(error)
                changes |= {name.replace("-", "_"): int(number) for name, number in advised.items()}
        else:
            pytest.fail(f"{task} in {context} tokens of {positions}: advice that does not help")


@pytest.mark.parametrize("positions", [40, 100, 300, 600])
def test_advice_of_longbench_works_or_says_that_nothing_does(
    positions: int, subject: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import json
    import re

    prompts = [{"dataset": name, "prompt": "p" * 900, "answers": ["a"]} for name in ("hotpotqa", "lcc")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    monkeypatch.setattr("pqkv_cli.evaluation.longbench.num_positions", lambda model: positions)
    monkeypatch.setattr("pqkv_cli.evaluation.qa_runner._asked", lambda *words: (_ for _ in ()).throw(InterruptedError))
    made = replace(subject(), data=tmp_path, tokenizer=with_template("<long template>" + WORKS))
    context = 900
    for _ in range(2):
        try:
            longbench(made, EvaluationSettings("all", context=context), silent)
        except InterruptedError:
            assert context <= positions
            return
        except DataError as error:
            if "cannot be asked" in str(error):
                assert positions < 100
                return
            context = int(re.findall(r"--context (\d+)", str(error))[0])
    pytest.fail("advice that does not help")


def test_warnings_are_said_once_by_the_usual_filter() -> None:
    made = with_template(USELESS["raises"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            template_notes(made)
    assert len(seen) == 1
