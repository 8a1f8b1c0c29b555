"""Shapes of well-known models and code formats, filled with random numbers: speed depends on neither weights nor text.

Knows transformers' configs and codec tables; times nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pqkv_kernels.format.layout import CodeLayout, RotaryLayout
from pqkv_kernels.format.tables import CodecTables


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a Llama model that decide how fast it decodes."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    def dense_bytes(self, batch: int, context: int, itemsize: int) -> int:
        """Return the bytes of one layer's uncompressed keys and values."""
        return 2 * batch * self.num_kv_heads * context * self.head_dim * itemsize


SHAPES: Mapping[str, ModelShape] = {
    "llama-2-7b": ModelShape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-3-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
    "small": ModelShape(2, 256, 736, 4, 2, 64, 2048),
}

# name: (codes per head vector as a share of its channels, bits per code, additive stages)
FORMATS: Mapping[str, tuple[int, int, int]] = {
    "quality 4 b/ch": (2, 8, 1),
    "speed 4 b/ch": (2, 4, 2),
    "speed 2 b/ch": (4, 4, 2),
}


def random_tables(shape: ModelShape, format_name: str, device: torch.device) -> tuple[CodecTables, CodecTables]:
    """Return random tables of keys before rotary embedding and of values, in the format of `FORMATS`."""
    subspace_dim, nbits, stages = FORMATS[format_name]
    layout = CodeLayout.uniform(shape.head_dim, shape.head_dim // subspace_dim, nbits, stages)
    generator = torch.Generator().manual_seed(0)
    sides = []
    for _ in range(2):
        size = (shape.num_kv_heads, shape.head_dim // subspace_dim, 1 << nbits, subspace_dim)
        sides.append(tuple((torch.randn(size, generator=generator).half(),) for _ in range(stages)))
    rotary = RotaryLayout(shape.head_dim)
    # Rotary pairs side by side, as fitted tables have them: only whole pairs in every subspace are read fast.
    order = torch.tensor(rotary.blocks(shape.head_dim)).flatten().to(torch.int16).expand(shape.num_kv_heads, -1).contiguous()
    keys = CodecTables(layout, sides[0], permutation=order, rotary=rotary)
    return keys.to(device), CodecTables(layout, sides[1]).to(device)


def random_model(shape: ModelShape, max_positions: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a Llama of `shape` with random weights."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()
