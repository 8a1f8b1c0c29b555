"""The 21 tasks of LongBench v1 as data, and their metrics: how each is asked and scored.

After Bai et al. 2023 and the published code (THUDM/LongBench, MIT). The prompts themselves come with the data, or from
lm-evaluation-harness where its wording differs only in the ways listed here.
"""

import difflib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

from pqkv_cli.errors import DataError

Metric = Literal[
    "qa_f1", "qa_f1_zh", "rouge", "rouge_zh", "classification", "count", "retrieval", "retrieval_zh", "code_similarity"
]


@dataclass(frozen=True, slots=True)
class LongBenchTask:
    """One task.

    Attributes
    ----------
    category
        The table's column: single-document or multi-document QA, summarization, few-shot, synthetic, code.
    takes_chat
        Whether a chat model is asked through its template; few-shot examples and code are continued as they are.
    first_line_only
        Whether the answer ends with its first line.
    """

    category: str
    max_new_tokens: int
    metric: Metric
    takes_chat: bool = True
    first_line_only: bool = False


_SINGLE, _MULTI, _SUMMARY, _FEW_SHOT, _SYNTHETIC, _CODE = "single QA", "multi QA", "summary", "few-shot", "synthetic", "code"
TASKS: Mapping[str, LongBenchTask] = {
    "narrativeqa": LongBenchTask(_SINGLE, 128, "qa_f1"),
    "qasper": LongBenchTask(_SINGLE, 128, "qa_f1"),
    "multifieldqa_en": LongBenchTask(_SINGLE, 64, "qa_f1"),
    "multifieldqa_zh": LongBenchTask(_SINGLE, 64, "qa_f1_zh"),
    "hotpotqa": LongBenchTask(_MULTI, 32, "qa_f1"),
    "2wikimqa": LongBenchTask(_MULTI, 32, "qa_f1"),
    "musique": LongBenchTask(_MULTI, 32, "qa_f1"),
    "dureader": LongBenchTask(_MULTI, 128, "rouge_zh"),
    "gov_report": LongBenchTask(_SUMMARY, 512, "rouge"),
    "qmsum": LongBenchTask(_SUMMARY, 512, "rouge"),
    "multi_news": LongBenchTask(_SUMMARY, 512, "rouge"),
    "vcsum": LongBenchTask(_SUMMARY, 512, "rouge_zh"),
    "trec": LongBenchTask(_FEW_SHOT, 64, "classification", takes_chat=False, first_line_only=True),
    "triviaqa": LongBenchTask(_FEW_SHOT, 32, "qa_f1", takes_chat=False, first_line_only=True),
    "samsum": LongBenchTask(_FEW_SHOT, 128, "rouge", takes_chat=False, first_line_only=True),
    "lsht": LongBenchTask(_FEW_SHOT, 64, "classification", takes_chat=False, first_line_only=True),
    "passage_count": LongBenchTask(_SYNTHETIC, 32, "count"),
    "passage_retrieval_en": LongBenchTask(_SYNTHETIC, 32, "retrieval"),
    "passage_retrieval_zh": LongBenchTask(_SYNTHETIC, 32, "retrieval_zh"),
    "lcc": LongBenchTask(_CODE, 64, "code_similarity", takes_chat=False),
    "repobench-p": LongBenchTask(_CODE, 64, "code_similarity", takes_chat=False),
}

# Answers to this task also end with a line, but never at once: models repeat "\nDialogue" otherwise.
ENDS_WITH_LINE = frozenset({"samsum"})

# Where the harness's wording ends otherwise than the published one: (its end, the published end).
HARNESS_ENDS: Mapping[str, tuple[str, str]] = {
    "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
    "passage_count": ("answer is:", "answer is: "),
    "passage_retrieval_en": ("answer is:", "answer is: "),
    "lcc": ("line of code:", "line of code:\n"),
    "repobench-p": ("line of code:", "line of code:\n"),
}


INSTALL = "pip install 'pqkv[eval]'"
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_PUNCTUATION = frozenset(string.punctuation)
_ALL_PUNCTUATION = frozenset(string.punctuation + _CHINESE_PUNCTUATION)


def score(task: LongBenchTask, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None) -> float:
    """Return the best score of `prediction` over all reference `answers`."""
    if task.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = _METRICS[task.metric]
    return max((metric(prediction, answer, all_classes or ()) for answer in answers), default=0.0)


def require_packages(metrics: set[Metric]) -> None:
    """Find out before anything is generated whether everything needed to score is installed.

    Raises
    ------
    DataError
        If a package is missing, with the line that installs it.
    """
    if metrics & {"rouge", "rouge_zh"}:
        _package("rouge")
    if metrics & {"qa_f1_zh", "rouge_zh"}:
        _package("jieba")


def qa_f1(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the F1 of the words of both, lower-cased, without punctuation and articles."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the F1 of the Chinese words of both, without punctuation."""
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the F-measure of ROUGE-L, 0 where the package refuses (an empty text)."""
    try:
        found = _rouge().get_scores([prediction], [answer], avg=True)
    except Exception:  # the published rule: whatever goes wrong scores 0
        return 0.0
    return float(found["rouge-l"]["f"])


def rouge_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L over Chinese words."""
    return rouge(*(" ".join(_package("jieba").cut(text, cut_all=False)) for text in (prediction, answer)))


def classification(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 over the number of classes named, if the right one is among them."""
    named = [name for name in all_classes if name in prediction]
    # The published code removes from the list it walks through, and so skips the entry behind each one removed.
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in `prediction` that are the right one."""
    return _share(prediction, str(answer))


def retrieval(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in `prediction` that are the paragraph's."""
    return _share(prediction, (re.findall(r"Paragraph (\d+)", answer) or [""])[0])


def retrieval_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in `prediction` that are the Chinese paragraph's."""
    return _share(prediction, (re.findall(r"段落(\d+)", answer) or [""])[0])


def code_similarity(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the similarity of the first line that is no comment or fence, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


_METRICS: Mapping[Metric, Callable[[str, str, Sequence[str]], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_similarity": code_similarity,
}


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _chinese_words(text: str) -> list[str]:
    cut = (word.lower() for word in _package("jieba").cut(text, cut_all=False))
    plain = ("".join("".join(c for c in word if c not in _ALL_PUNCTUATION).split()) for word in cut)
    return [word for word in plain if word]


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = (Counter(prediction) & Counter(answer)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def _share(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(found == number for found in numbers) / len(numbers) if numbers else 0.0


@cache
def _rouge() -> Any:
    return _package("rouge").Rouge()


@cache
def _package(name: str) -> ModuleType:
    try:
        module = __import__(name)
    except ImportError as error:
        raise DataError(f"LongBench needs the package {name}, which is not installed; get it with: {INSTALL}") from error
    if name == "jieba":
        module.setLogLevel(logging.WARNING)
    return module
