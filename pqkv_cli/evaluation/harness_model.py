"""A model of lm-evaluation-harness that really quantizes while it is scored. Needs the extra `eval`; knows no task.

The harness's own model scores with one forward pass and no cache, in which a quantized cache shows no loss at all. Here
log-likelihoods are those of mode `all` (every key and value the scored tokens attend to is quantized), and generation runs on
the cache of the mode asked for. Answers go to a log a few at a time, so that an interrupted evaluation goes on.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.evaluation.costs import GenerationWatch, peak_memory, watching
from pqkv_cli.evaluation.prompts import num_positions
from pqkv_cli.evaluation.record import cache_bits
from pqkv_cli.evaluation.sample_log import Sample
from pqkv_cli.evaluation.settings import EvaluationSettings, Mode, Subject
from pqkv_cli.evaluation.text_windows import CacheFactory, contender
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.prefix import end_ids
from pqkv_cli.runtime.generate import own_settings

_REQUESTS_AT_ONCE = 16
_DEFAULT_POSITIONS = 2048
Ask = Callable[[list[Any]], list[Any]]


@dataclass(slots=True)
class Part:
    """What is noted while a few requests are answered: batches that generated, the fullest cache, prompts cut at the left."""

    generated: list[dict[str, Any]] = field(default_factory=list)
    bits: dict[str, Any] | None = None
    batch_size: int = 0
    num_cut: int = 0
    is_broken: bool = False

    def note(self, watch: GenerationWatch, cache: Any) -> None:
        """Add one batch that generated."""
        self.generated.append(watch.cost())
        self.is_broken |= bool(watch.broken.any())
        self.batch_size = max(self.batch_size, len(watch.broken))
        if isinstance(cache, QuantizedCache) and (self.bits is None or cache.get_seq_length() > self.bits["num_tokens"]):
            self.bits = asdict(cache_bits(cache))


class HarnessModel(HFLM):  # type: ignore[misc]
    """One side of an evaluation: the uncompressed model, or with `quantizes` the compressed one.

    Attributes
    ----------
    modes
        What each kind of request was answered in, ``loglikelihood`` and ``generation``.
    parts
        What requests asked together came to: ``seconds``, ``peak_bytes``, and the fields of `Part`.
    failed
        Requests whose logits were not finite, with the reason; the harness counts what it got for them.
    """

    def __init__(self, subject: Subject, settings: EvaluationSettings, on_answers: Callable[[int], None], *, quantizes: bool):
        positions = num_positions(subject.model) or _DEFAULT_POSITIONS
        self._end = end_ids(subject.tokenizer)
        super().__init__(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            backend="causal",
            trust_remote_code=False,
            batch_size=max(1, settings.batch_tokens // positions),
            max_length=positions,
        )
        self._subject, self._settings, self._on_answers, self._quantizes = subject, settings, on_answers, quantizes
        self._new_cache: CacheFactory | None = None
        self._part = Part()
        self.modes: dict[str, Mode] = {}
        self.parts: list[Mapping[str, Any]] = []
        self.failed: list[str] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return log-likelihood and greediness of every request's continuation."""
        with self._caches("loglikelihood", "all"):
            found = self._answered("loglikelihood", requests, lambda part: super(HarnessModel, self).loglikelihood(part, True))
        return [(float(value), bool(greedy)) for value, greedy in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return the log-likelihood of every request's whole text."""
        with self._caches("loglikelihood", "all"):
            ask = super().loglikelihood_rolling
            return [float(value) for value in self._answered("rolling", requests, lambda part: ask(part, True))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return every request's continuation."""
        with self._caches("generation", self._settings.mode):
            ask = super().generate_until
            return [str(text) for text in self._answered("generation", requests, lambda part: ask(part, True))]

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        with torch.no_grad():
            cache = None if self._new_cache is None else self._new_cache()
            logits: torch.Tensor = self.model(inps, **cache_argument(self.model, cache), use_cache=cache is not None).logits
        return logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        cache = None if self._new_cache is None else self._new_cache()
        if cache is not None:
            options |= cache_argument(self.model, cache)  # the harness itself says use_cache=True
        # A task's own settings are in the options and count. Those of the checkpoint do not: scores would measure them.
        with own_settings(self.model), watching(len(context), self.model.device) as watch:
            answered = super()._model_generate(context, max_length, stop, logits_processor=watch.processors, **options)
        self._part.note(watch, cache)
        return answered

    def _loglikelihood_tokens(self, requests: list[Any], *words: Any, **options: Any) -> Any:
        self._part.num_cut += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, *words, **options)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> Any:
        """Return ids and mask of `strings`, as the harness does, but without end tokens; what is cut is counted."""
        if left_truncate_len:
            self._part.num_cut += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
        longest = left_truncate_len + len(self._end) if left_truncate_len else None
        ids, mask = super().tok_batch_encode(strings, padding_side, longest, truncation)
        if self._end and padding_side == "left" and bool((ids[:, -len(self._end) :] == torch.tensor(self._end)).all()):
            ids, mask = ids[:, : -len(self._end)], mask[:, : -len(self._end)]
        return (ids, mask) if left_truncate_len is None else (ids[:, -left_truncate_len:], mask[:, -left_truncate_len:])

    def tok_encode(self, string: str, *words: Any, **options: Any) -> Any:
        """Return the ids of `string`, as the harness does, but without end tokens, which nothing could follow."""
        ids = super().tok_encode(string, *words, **options)
        return ids[: -len(self._end)] if self._end and ids[-len(self._end) :] == self._end else ids

    @contextmanager
    def _caches(self, kind: str, mode: Mode) -> Iterator[None]:
        if not self._quantizes:
            yield
            return
        self.modes[kind] = mode
        with contender(self._subject, mode) as self._new_cache:
            yield
        self._new_cache = None

    def _answered(self, kind: str, requests: Sequence[Any], ask: Ask) -> list[Any]:
        answers: list[Any] = []
        if not self._quantizes:  # the other side is asked the same
            self._subject.asked.extend(dict.fromkeys(_text(request) for request in requests))
        for start in range(0, len(requests), _REQUESTS_AT_ONCE):
            part = list(requests[start : start + _REQUESTS_AT_ONCE])
            name = f"{'quantized' if self._quantizes else 'baseline'}/{kind}/{start}"
            group = self._subject.log.get(name) or self._subject.log.add(name, *self._ask(name, part, ask))
            answers += [sample["answer"] for sample in group.samples]
            self.failed += [sample["failed"] for sample in group.samples if "failed" in sample]
            self.parts.append(group.facts)
            self._on_answers(len(part))
        return answers

    def _ask(self, name: str, requests: list[Any], ask: Ask) -> tuple[list[Sample], dict[str, Any]]:
        """Return a sample per request, with the reason where its logits are not finite, and what answering took."""
        self._part = Part()
        started = time.perf_counter()
        with peak_memory(self.model.device) as peak:
            answers = ask(requests)
        facts = {"seconds": time.perf_counter() - started, "peak_bytes": peak.num_bytes, **asdict(self._part)}
        samples: list[Sample] = [{"name": f"{name}+{i}", "answer": answer} for i, answer in enumerate(answers)]
        if self._part.is_broken or not all(map(_is_finite, answers)):
            side = "compressed" if self._quantizes else "uncompressed"
            for request, sample in zip(requests, samples, strict=True):
                self._part = Part()  # alone, so that it is known whose logits they are
                (sample["answer"],) = ask([request])
                if self._part.is_broken or not _is_finite(sample["answer"]):
                    sample["failed"] = f"{request.task_name}/{request.doc_id}: logits of the {side} model are not finite"
        return samples, facts


def _text(request: Any) -> str:
    return " ".join(word for word in request.args if isinstance(word, str))


def _is_finite(answer: Any) -> bool:
    """Return whether the log-likelihood in `answer`, alone or with its greediness, is a finite number; texts always are."""
    value = answer[0] if isinstance(answer, tuple | list) else answer
    return isinstance(value, str) or math.isfinite(value)
