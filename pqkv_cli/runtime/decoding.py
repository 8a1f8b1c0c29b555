"""Which of a checkpoint's own generation settings count while we generate. Knows names of settings, no caches.

A checkpoint may ask for beams, penalties, another cache or none (``generation_config.json``). An evaluation that obeyed would
measure those, and some of them do not go together with a cache that is handed in. So nothing counts that is not named here.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SPECIAL_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"})
# What its makers found good for the model's texts. Steps stay steps: one row, one token, one forward pass.
TEXT_SETTINGS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "min_p",
        "no_repeat_ngram_size",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "suppress_tokens",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
    }
)


@contextmanager
def own_settings(model: Any, kept: frozenset[str] = SPECIAL_TOKENS) -> Iterator[None]:
    """Let only the settings `kept` of the checkpoint's own count in ``model.generate`` inside the block."""
    before = model.generation_config
    settings = copy.deepcopy(before)
    for name in set(vars(settings)) - kept - {"transformers_version"}:
        setattr(settings, name, None)
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before
