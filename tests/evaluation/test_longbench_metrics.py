"""Scores of constructed predictions, worked out by hand from the published rules."""

import re
import sys
from typing import Any

import pytest

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation import longbench_metrics
from pqkv_cli.evaluation.longbench_metrics import TASKS, LongBenchTask, require_packages, score

CLASSES = ("Food", "Date", "Order, rank", "Individual", "Group or organization of person", "person", "Title of a person")

# task, prediction, references, score
CASES: list[tuple[str, str, list[str], float]] = [
    # qa_f1: articles, case and punctuation do not count; repeated words count as often as both have them
    ("hotpotqa", "The  Dog!", ["a dog"], 1.0),
    ("hotpotqa", "dog dog cat", ["dog dog dog"], 2 * (2 / 3) * (2 / 3) / (4 / 3)),
    ("hotpotqa", "", ["yes"], 0.0),
    ("hotpotqa", "yes", [""], 0.0),
    ("hotpotqa", "the", ["an"], 0.0),  # nothing is left of either
    ("hotpotqa", "it is the year 1987, I think", ["1987"], 2 * (1 / 6) / (1 + 1 / 6)),
    ("hotpotqa", "well-known", ["wellknown"], 1.0),  # punctuation is dropped, not replaced
    ("hotpotqa", "no", ["yes", "no"], 1.0),  # the best reference counts
    ("narrativeqa", "theatre", ["the atre"], 0.0),
    ("qasper", "first\nunanswerable", ["unanswerable"], 2 * 0.5 / 1.5),  # all lines count here ...
    ("triviaqa", "\n\n55\nQuestion: what else?", ["55"], 1.0),  # ... and only the first here
    ("triviaqa", " \n55", ["55"], 0.0),  # a line of spaces is a first line
    # count and retrieval: the share of all numbers that are right
    ("passage_count", "There are 12, no 14.", ["14"], 0.5),
    ("passage_count", "14", ["14"], 1.0),
    ("passage_count", "none", ["0"], 0.0),
    ("passage_count", "014", ["14"], 0.0),
    ("passage_retrieval_en", "Paragraph 3", ["Paragraph 3"], 1.0),
    ("passage_retrieval_en", "3 or Paragraph 30 or 3", ["Paragraph 3"], 2 / 3),
    ("passage_retrieval_en", "the first", ["Paragraph 1"], 0.0),
    ("passage_retrieval_zh", "段落7", ["段落7"], 1.0),
    ("passage_retrieval_zh", "7，8", ["段落7"], 0.5),
    # classification: one over all classes named; those inside the right one do not count
    ("trec", "Date", ["Date"], 1.0),
    ("trec", "Date or Food", ["Date"], 0.5),
    ("trec", "date", ["Date"], 0.0),
    ("trec", "\nDate\nFood", ["Date"], 1.0),
    ("trec", "Title of a person", ["Title of a person"], 1.0),  # "person" is named with it
    ("trec", "Individual", ["Food"], 0.0),
    # code: the first line without comment or fence, in whole percent
    ("lcc", "\n```python\n# a comment\nreturn x\n", ["return x"], 1.0),
    ("lcc", "x = 1 // 2\nx = 1", ["x = 1"], 1.0),
    ("lcc", "# only\n# comments", ["return"], 0.0),
    ("lcc", "", [""], 1.0),
    ("repobench-p", "abcd", ["bcde"], 0.75),  # 2 * 3 / 8
    ("repobench-p", "abc", ["abcdef"], 0.67),  # 6 / 9, rounded
    # ROUGE-L: F-measure of the longest common subsequence over distinct words
    ("gov_report", "the cat sat", ["the cat sat"], 2 / (2 + 1e-8)),
    ("gov_report", "", ["the cat"], 0.0),
    ("gov_report", "dog", ["cat"], 0.0),
    ("samsum", "a b c d\nx y", ["a c"], 2 * 1.0 * 0.5 / (1.5 + 1e-8)),
    ("samsum", "a b", ["a c", "a b"], 2 / (2 + 1e-8)),
]


@pytest.mark.parametrize(("task", "prediction", "answers", "expected"), CASES)
def test_scores_of_the_published_rules(task: str, prediction: str, answers: list[str], expected: float) -> None:
    if TASKS[task].metric == "rouge":
        pytest.importorskip("rouge", reason="the extra `eval` is not installed")
    assert score(TASKS[task], prediction, answers, CLASSES) == pytest.approx(expected, abs=1e-9)


def test_removing_while_walking_skips_the_next_class() -> None:
    # Of the classes inside the right one, each second in a row stays: that is how the published scores came to be.
    task, classes = TASKS["trec"], ("a", "b", "a b c")
    assert score(task, "a b c", ["a b c"], classes) == 1 / 2
    assert score(task, "a b c", ["a b c"], ("a", "x", "b", "a b c")) == 1 / 2
    assert score(task, "a b c", ["a b c"], ("a", "a b c", "b")) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "words"),
    [
        ("北京大学", "北京大学", (1, 1, 1)),
        ("我在北京，工作。", "北京", (1, 4, 1)),
        ("《红楼梦》 的 作者！", "红楼梦作者", (2, 4, 2)),  # of these brackets the published list holds one
        ("Python 3", "python", (1, 2, 1)),
        ("，。！", "北京", (0, 0, 1)),
    ],
)
def test_chinese_f1(prediction: str, answer: str, words: tuple[int, int, int]) -> None:
    """`words`: shared words, words of the prediction, words of the answer, after punctuation is gone."""
    pytest.importorskip("jieba", reason="the extra `eval` is not installed")
    same, predicted, wanted = words
    expected = 2 * same / (predicted + wanted) if same else 0.0
    assert score(TASKS["multifieldqa_zh"], prediction, [answer], None) == pytest.approx(expected, abs=1e-9)


def test_chinese_rouge_is_over_words() -> None:
    pytest.importorskip("jieba", reason="the extra `eval` is not installed")
    pytest.importorskip("rouge", reason="the extra `eval` is not installed")
    # 我 来到 北京 清华大学 against 我 离开 北京: two words in common
    expected = 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3 + 1e-8)
    assert score(TASKS["dureader"], "我来到北京清华大学", ["我离开北京"], None) == pytest.approx(expected, abs=1e-9)
    assert score(TASKS["vcsum"], "", ["我"], None) == 0.0


def test_code_similarity_is_fuzzywuzzys() -> None:
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz", reason="fuzzywuzzy is not installed")
    import difflib

    pairs = [("return x + y", "return x+y"), ("    if a:", "if a:"), ("", "x"), ("foo(bar)", "bar(foo)"), ("aXbX", "XaXb")]
    for line, answer in pairs:
        matched = difflib.SequenceMatcher(None, line, answer).ratio()
        assert score(TASKS["lcc"], line, [answer], None) == round(100 * matched) / 100
        if fuzz.SequenceMatcher is difflib.SequenceMatcher:
            assert score(TASKS["lcc"], line, [answer], None) == pytest.approx(fuzz.ratio(line, answer) / 100, abs=1e-9)


def test_the_harness_agrees_where_its_rules_are_the_published_ones() -> None:
    harness = pytest.importorskip("lm_eval.tasks.longbench.metrics", reason="the extra `eval` and fuzzywuzzy are not installed")
    for task, prediction, answers, _ in CASES:
        name = {"qa_f1": "qa_f1_score", "count": "count_score", "retrieval": "retrieval_score"}.get(TASKS[task].metric)
        if name is None or TASKS[task].first_line_only or not all(answers) or not prediction:
            continue
        theirs = max(getattr(harness, name)(prediction, answer) for answer in answers)
        assert score(TASKS[task], prediction, answers, None) == pytest.approx(theirs, abs=1e-9)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    longbench_metrics._package.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(
        DataError, match=re.escape("needs the package jieba, which is not installed; get it with: pip install 'pqkv[eval]'")
    ):
        require_packages({"qa_f1_zh"})
    require_packages({"qa_f1", "code_similarity", "count"})
    longbench_metrics._package.cache_clear()


def test_the_table_is_that_of_the_paper() -> None:
    assert len(TASKS) == 21
    assert [name for name, task in TASKS.items() if not task.takes_chat] == "trec triviaqa samsum lsht lcc repobench-p".split()
    assert [name for name, task in TASKS.items() if task.first_line_only] == "trec triviaqa samsum lsht".split()
    counts: dict[str, int] = {}
    for task in TASKS.values():
        counts[task.category] = counts.get(task.category, 0) + 1
    assert list(counts.values()) == [4, 4, 4, 4, 3, 2]


def test_no_reference_scores_nothing() -> None:
    task: Any = LongBenchTask("x", 1, "qa_f1")
    assert score(task, "x", [], None) == 0.0
