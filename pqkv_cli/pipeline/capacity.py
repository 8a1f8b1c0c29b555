"""How many tokens fit on a device, before anything is calibrated. Pure arithmetic; loads no weights.

What is counted: the weights; the cache of every layer (codes or bf16, sliding windows at most their window); sinks and window
of every quantized layer exact; codebooks; the exact keys and values that one layer holds while a prompt is read; and a share
of the device left to activations and the allocator.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from pqkv_cli.cache.schedule import most_exact
from pqkv_cli.errors import UsageError
from pqkv_cli.models.footprint import LayerFootprint, layer_footprints, weights
from pqkv_cli.models.geometry import geometry
from pqkv_cli.rates import TABLE_NUMBER_BYTES, key_layout, rate_layout
from pqkv_cli.specs import CacheSpec, LayerGeometry
from pqkv_kernels.format.layout import PAGE_TOKENS, CodeLayout

BATCHES = (1, 2, 4, 8, 16, 32)
SHOWN_RATES = (4, 3.5, 3, 2.5, 2, 1.5, 1)
RESERVED_SHARE = 0.08
_BF16_BYTES = 2
_POSITION_BYTES = 4
_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class CapacityRow:
    """One cache format.

    Attributes
    ----------
    bits
        Bits of code per channel; 16 is the uncompressed bf16 cache.
    bytes_per_token
        Bytes that one more token of one row takes in a long text.
    table_bytes
        Codebooks; transforms are not counted.
    tokens
        Tokens of each row that fit, for every batch of `BATCHES`.
    """

    bits: float
    bytes_per_token: float
    table_bytes: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits on a device of `device_bytes`; a rate that does not fit the model's head size has no row."""

    device_bytes: int
    weight_bytes: int
    reserved_bytes: int
    cache: CacheSpec
    batches: tuple[int, ...]
    rows: tuple[CapacityRow, ...]


def parse_device_bytes(word: str, option: str = "--gpu") -> int:
    """Return the bytes that a word such as ``24GB`` or ``80GiB``, given with `option`, means.

    Raises
    ------
    UsageError
        If it is no positive size with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", word)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"{option} is {word!r}; expected a size with its unit, such as 24GB or 80GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def capacity(config: PretrainedConfig, device_bytes: int, cache: CacheSpec | None = None) -> Capacity:
    """Return how many tokens of the model that `config` describes fit on a device.

    Raises
    ------
    ModelError, UnsupportedModelError
        If the model's shape cannot be read.
    """
    spec = CacheSpec() if cache is None else cache
    layers, footprints = geometry(config).layers, layer_footprints(config)
    held = weights(config).num_bytes
    reserved = int(device_bytes * RESERVED_SHARE)
    rows = []
    for bits in (16, *SHOWN_RATES):
        layouts = _layouts(layers, bits)
        if layouts is None:
            continue
        numbers = sum(layout.table_numbers * layer.num_kv_heads for layer, pair in layouts for layout in pair)
        table_bytes = TABLE_NUMBER_BYTES * numbers
        free = device_bytes - reserved - held - table_bytes
        shape = _Shape.of(layers, footprints, layouts, spec)
        tokens = tuple(shape.most_tokens(free, batch) for batch in BATCHES)
        rows.append(CapacityRow(bits, shape.per_token, table_bytes, tokens))
    return Capacity(device_bytes, held, reserved, spec, BATCHES, tuple(rows))


Layouts = list[tuple[LayerGeometry, tuple[CodeLayout, CodeLayout]]]


@dataclass(frozen=True, slots=True)
class _Shape:
    """Bytes of one row of the cache as a function of its tokens."""

    per_token: float
    fixed: int
    windows: tuple[tuple[int, int], ...]  # channels and tokens of layers that slide
    reading_per_token: int  # exact keys and values of the one layer that a prompt passes through

    @classmethod
    def of(
        cls, layers: Sequence[LayerGeometry], footprints: Sequence[LayerFootprint], layouts: Layouts, spec: CacheSpec
    ) -> "_Shape":
        coded = [2 * layer.num_kv_heads * layer.head_dim for layer, _ in layouts]
        code_bytes = sum(layer.num_kv_heads * layout.page_bytes / PAGE_TOKENS for layer, pair in layouts for layout in pair)
        dense = [f for f, layer in zip(footprints, layers, strict=True) if layer.dense_reason or not layouts]
        growing = sum(f.channels for f in dense if not f.window_tokens)
        exact_tokens = spec.num_sinks + most_exact(spec.window_tokens)
        return cls(
            code_bytes + growing * _BF16_BYTES + (_POSITION_BYTES if coded else 0),
            sum(coded) * exact_tokens * _BF16_BYTES,
            tuple((f.channels, f.window_tokens) for f in dense if f.window_tokens),
            max(coded, default=0) * _BF16_BYTES,
        )

    def num_bytes(self, tokens: int) -> float:
        sliding = sum(channels * min(tokens, window) for channels, window in self.windows) * _BF16_BYTES
        return (self.per_token + self.reading_per_token) * tokens + self.fixed + sliding

    def most_tokens(self, free: float, batch: int) -> int:
        """Return the most tokens per row whose cache fits in `free` bytes, by bisection: windows bend the line."""
        low, high = 0, 1
        while high < 1 << 40 and batch * self.num_bytes(high) <= free:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if batch * self.num_bytes(middle) <= free else (low, middle)
        return low


def _layouts(layers: Sequence[LayerGeometry], bits: float) -> Layouts | None:
    """Return keys' and values' layouts of every coded layer; no layer at 16 bits, None where the rate does not fit."""
    if bits == 16:
        return []
    found = []
    try:
        for layer in layers:
            if not layer.dense_reason:
                plain = rate_layout(bits, layer.head_dim)
                keys = plain if layer.rotary is None else key_layout(bits, layer.head_dim)
                found.append((layer, (keys, plain)))
    except UsageError:
        return None
    return found
