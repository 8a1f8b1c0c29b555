"""What codes add to the time until the first token: the same prompt over a dense cache and over codes. Knows no contexts."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from pqkv_cli.benchmarks.decode_speed import wall_ms
from pqkv_cli.hf.attention import attention_of
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.runtime.attach import Attached
from pqkv_kernels.bench import Quantiles, quantiles
from pqkv_kernels.dispatch import encode_pages
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables

MOST_REPEATS = 5  # a prompt takes seconds where a step takes milliseconds


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """Reading a prompt of `tokens`.

    `prefill_ms` is over transformers' DynamicCache, `codes_prefill_ms` over codes; `encode_ms` is encoding alone, of the whole
    pages of all layers.
    """

    tokens: int
    prefill_ms: Quantiles
    codes_prefill_ms: Quantiles
    encode_ms: Quantiles

    def row(self) -> dict[str, Any]:
        """Return the measurement and what follows from it, as JSON can hold it."""
        plain = self.prefill_ms.p50
        return asdict(self) | {"share": self.encode_ms.p50 / plain, "overhead": self.codes_prefill_ms.p50 / plain - 1}


@torch.no_grad()
def time_prefill(attached: Attached, keys: CodecTables, values: CodecTables, num_tokens: int, repeats: int) -> PrefillTimes:
    """Read `num_tokens` in turns over both caches; `keys` and `values` are the tables of all layers."""
    model, ours = attached.model, attention_of(attached.model)
    device, num_layers = torch.device(model.device), model.config.get_text_config().num_hidden_layers
    ids = torch.ones(1, num_tokens, dtype=torch.int64, device=device)
    states, angles = _states(keys, num_tokens, device, model.dtype)
    dense: list[float] = []
    coded: list[float] = []
    alone: list[float] = []

    def read(attention: str, cache: Any) -> float:
        model.set_attn_implementation(attention)
        return wall_ms(lambda: model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1), device)

    def encode() -> None:
        encode_pages(attached.backend.name, states, keys, angles)
        encode_pages(attached.backend.name, states, values)

    try:
        for repeat in range(min(repeats, MOST_REPEATS) + 1):  # the first warms up
            found = read("sdpa", DynamicCache(config=model.config)), read(ours, attached.new_cache()), wall_ms(encode, device)
            for times, ms in zip((dense, coded, alone), found, strict=True):
                times += [ms] if repeat else []
    finally:
        model.set_attn_implementation(ours)
    return PrefillTimes(num_tokens, quantiles(dense), quantiles(coded), quantiles([ms * num_layers for ms in alone]))


def _states(keys: CodecTables, num_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, Angles | None]:
    """Return random states of one layer's whole pages, and their angles."""
    whole = num_tokens // PAGE_TOKENS * PAGE_TOKENS
    states = torch.randn(1, keys.num_heads, whole, keys.layout.head_dim, device=device).to(dtype)
    if keys.rotary is None:
        return states, None
    rates = torch.logspace(0, -4, keys.rotary.num_pairs, device=device)
    angle = torch.arange(whole, device=device)[None, :, None] * rates
    return states, (angle.cos(), angle.sin())
