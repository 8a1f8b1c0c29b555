"""Ways to generate, and the families that leave one out: what the tests go through and docs/models.md lists."""

from typing import Any

# Path: options of `generate`, beside the number of rows and whether the first one is padded on the left.
PATHS: dict[str, dict[str, Any]] = {
    "greedy": dict(rows=2, padded=True),
    "sampling": dict(rows=2, padded=True, do_sample=True, top_k=8),
    "beam search": dict(rows=2, padded=True, num_beams=2),
    "several sequences": dict(rows=1, do_sample=True, num_return_sequences=2),
    "prompt lookup": dict(rows=1, prompt_lookup_num_tokens=3),
    "assistant": dict(rows=1, assistant_model="llama"),
    "chunked prefill": dict(rows=2, padded=True, prefill_chunk_size=80),
}
# Paths with a test of their own, because they are more than one call of `generate`.
OTHER_PATHS = ("turns, streaming, deepcopy", "reset, offload")

_STATEFUL = "not supported with stateful models"
# What transformers itself refuses, with what it says: a recurrent state cannot go back to an earlier token.
UNSUPPORTED: dict[tuple[str, str], str] = {
    ("qwen3_next", "prompt lookup"): _STATEFUL,
    ("qwen3_next", "assistant"): _STATEFUL,
}
