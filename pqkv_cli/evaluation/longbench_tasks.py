"""The 21 tasks of LongBench v1 as data: how each is asked, how long answers may be, how they are scored.

After Bai et al. 2023 and the published code (THUDM/LongBench, MIT). The prompts themselves come with the data, or from
lm-evaluation-harness where its wording differs only in the ways listed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
