"""A model of lm-evaluation-harness that really quantizes while it is scored. Needs the extra `eval`; knows no task.

The harness's own model scores with one forward pass and no cache, in which a quantized cache shows no loss at all. Here
log-likelihoods are those of mode `all` (every key and value the scored tokens attend to is quantized), and generation runs on
the cache of the mode asked for. Answers go to a log a few at a time, so that an interrupted evaluation goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from pqkv_cli.evaluation.contender import CacheFactory, contender
from pqkv_cli.evaluation.prompts import num_positions
from pqkv_cli.evaluation.settings import EvaluationSettings, Mode, Subject

_REQUESTS_AT_ONCE = 16
_DEFAULT_POSITIONS = 2048


class HarnessModel(HFLM):  # type: ignore[misc]
    """One side of an evaluation: the uncompressed model, or with `quantizes` the compressed one.

    Attributes
    ----------
    modes
        What each kind of request was answered in, ``loglikelihood`` and ``generation``.
    """

    def __init__(self, subject: Subject, settings: EvaluationSettings, on_answers: Callable[[int], None], *, quantizes: bool):
        positions = num_positions(subject.model) or _DEFAULT_POSITIONS
        super().__init__(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            backend="causal",
            batch_size=max(1, settings.batch_tokens // positions),
            max_length=positions,
        )
        self._subject, self._settings, self._on_answers, self._quantizes = subject, settings, on_answers, quantizes
        self._new_cache: CacheFactory | None = None
        self.modes: dict[str, Mode] = {}

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
            logits: torch.Tensor = self.model(inps, past_key_values=cache, use_cache=cache is not None).logits
        return logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        if self._new_cache is not None:
            options["past_key_values"] = self._new_cache()
        return super()._model_generate(context, max_length, stop, **options)

    @contextmanager
    def _caches(self, kind: str, mode: Mode) -> Iterator[None]:
        if not self._quantizes:
            yield
            return
        self.modes[kind] = mode
        with contender(self._subject, mode) as self._new_cache:
            yield
        self._new_cache = None

    def _answered(self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        answers: list[Any] = []
        for start in range(0, len(requests), _REQUESTS_AT_ONCE):
            part = list(requests[start : start + _REQUESTS_AT_ONCE])
            name = f"{'quantized' if self._quantizes else 'baseline'}/{kind}/{start}"
            group = self._subject.log.get(name)
            if group is None:
                samples = [{"name": f"{name}+{i}", "answer": answer} for i, answer in enumerate(ask(part))]
                group = self._subject.log.add(name, samples, {})
            answers += [sample["answer"] for sample in group.samples]
            self._on_answers(len(part))
        return answers
