"""Greedy answers of a model to a batch of prompts, with or without a cache of ours, and what they cost. Knows no tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pqkv_cli.evaluation.costs import watching
from pqkv_cli.hf.cache_layers import uncompressed_cache
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.runtime.generate import added_text, own_settings


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how long its answer may be.

    Attributes
    ----------
    name
        Unique in its task, the same in every run.
    ids
        Prompt [T] int64.
    facts
        Plain data about the question, kept with its answers.
    stop_ids
        Tokens that end the answer beside the model's own; like these they cannot come before `min_new_tokens`.
    """

    name: str
    ids: torch.Tensor
    max_new_tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0

    @property
    def decoding(self) -> tuple[object, ...]:
        """What questions of one batch have in common."""
        return self.max_new_tokens, self.stop_ids, self.min_new_tokens


@dataclass(frozen=True, slots=True)
class Replies:
    """Answers of one side to one batch, None where logits were not finite, and what they cost (`GenerationWatch.cost`)."""

    texts: list[str | None]
    cost: Mapping[str, Any]


@torch.no_grad()
def reply(model: Any, tokenizer: Any, questions: Sequence[Question], cache: Any) -> Replies:
    """Answer questions of equal `decoding` in one left-padded batch; without a `cache` uncompressed.

    Both sides answer greedily: of the checkpoint's own generation settings only the special tokens count.
    """
    first = questions[0]
    assert all(question.decoding == first.decoding for question in questions)
    stops = _stop_ids(model, first)
    ids, mask = _padded([question.ids for question in questions], _pad_id(tokenizer, stops), model.device)
    with own_settings(model), watching(len(questions), model.device) as watch:
        output = model.generate(
            ids,
            attention_mask=mask,
            **cache_argument(model, uncompressed_cache(model.config) if cache is None else cache),
            use_cache=True,
            max_new_tokens=first.max_new_tokens,
            min_new_tokens=first.min_new_tokens or None,
            do_sample=False,
            num_beams=1,
            eos_token_id=stops or None,
            pad_token_id=_pad_id(tokenizer, stops),
            logits_processor=watch.processors,
        )
    answers = [_until(row, stops) for row in output[:, ids.shape[1] :].tolist()]
    asked = [question.ids.tolist() for question in questions]
    texts = [added_text(tokenizer, prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    broken = watch.broken.tolist()
    return Replies([None if bad else text for text, bad in zip(texts, broken, strict=True)], watch.cost())


def _stop_ids(model: Any, question: Question) -> list[int]:
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys([*own, *question.stop_ids]))


def _pad_id(tokenizer: Any, stops: Sequence[int]) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, *stops)
    return next((int(token) for token in known if token is not None), 0)


def _padded(rows: Sequence[torch.Tensor], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
