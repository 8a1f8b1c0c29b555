"""What reading a long prompt needs at most: the codes of all layers, and the exact keys and values of one, by the allocator."""

from typing import Any

import torch
from tests_support import DIM, HEADS, key_tables, value_tables
from transformers import LlamaConfig

from pqkv_cli.cache.cache import quantized_cache
from pqkv_cli.specs import CacheSpec
from pqkv_kernels.dispatch import choose_backend

LAYERS, TOKENS = 8, 32768
ONE_LAYER = 2 * HEADS * DIM * TOKENS * 4  # exact keys and values in fp32


def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    turned = positions[..., None] * torch.linspace(1, 0.01, DIM // 2)
    return turned.cos(), turned.sin()


def peak_bytes(work: Any) -> int:
    """Return the most bytes that tensors made in `work` held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_peak_is_the_codes_and_one_layer(generator: torch.Generator) -> None:
    tables = {"keys": key_tables(generator), "values": value_tables(generator)}
    config = LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=DIM)
    cache = quantized_cache(config, [tables] * LAYERS, CacheSpec(4, 64), [angles] * LAYERS)
    for layer in cache.quantized_layers:
        layer.backend = choose_backend("auto", torch.device("cpu")).name  # as `attach` does

    def read_prompt() -> None:
        cache.begin_step(torch.arange(TOKENS)[None], None)
        for index in range(LAYERS):
            shape = (1, HEADS, TOKENS, DIM)
            cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), index)

    peak, held = peak_bytes(read_prompt), cache.num_bytes().total
    angles_of_prompt = TOKENS * DIM * 4  # of all heads and layers
    assert ONE_LAYER < peak - held < 1.5 * ONE_LAYER + angles_of_prompt, (peak / ONE_LAYER, held / ONE_LAYER)
