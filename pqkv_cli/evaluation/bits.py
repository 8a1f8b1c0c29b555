"""Counts the bits of a cache as it lies in memory, or of its codes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.evaluation.record import BitsPerChannel
from pqkv_cli.specs import SIDES
from pqkv_kernels.format.tables import CodecTables


def codec_bits(artifact: Artifact) -> BitsPerChannel:
    """Return the bits of mode `all`: codes and nothing else."""
    codes = _asymptotic([tables[side] for tables in artifact.tables if tables for side in SIDES])
    return BitsPerChannel(codes=codes, exact_tokens=0.0, positions=0.0, asymptotic=codes)


def cache_bits(cache: QuantizedCache) -> BitsPerChannel:
    """Return the bits of the quantized layers of a filled `cache`, from the bytes of the tensors it holds."""
    layers = cache.quantized_layers
    held = cache.num_bytes()
    windows = [layer.window[side] for layer in layers for side in SIDES]
    num_tokens = cache.get_seq_length()
    channels = sum(w.shape[0] * w.shape[1] * w.shape[3] for w in windows) * num_tokens
    return BitsPerChannel(
        codes=8 * held.codes / channels,
        exact_tokens=8 * held.exact / channels,
        positions=8 * held.positions / channels,
        asymptotic=_asymptotic([layer.tables[side] for layer in layers for side in SIDES]),
        num_tokens=num_tokens,
        cache_bytes={"baseline": channels * windows[0].element_size(), "quantized": held.total - held.dense},
        num_read_as_codes=num_read_as_codes(cache),
    )


def num_read_as_codes(cache: QuantizedCache) -> int:
    """Return how many tokens of all rows the newest step of `cache` read as codes; each layer reads the same ones."""
    slots = cache.slots
    if slots.coded_stop is None:
        return 0
    sinks = min((layer.spec.num_sinks for layer in cache.quantized_layers), default=0)
    return int((slots.stops() - slots.starts() - sinks).clamp(min=0).sum())


def _asymptotic(tables: Sequence[CodecTables]) -> float:
    channels = [t.num_heads * t.layout.head_dim for t in tables]
    return fmean([t.layout.bits_per_channel for t in tables], weights=channels)


def fullest_bits(held: Sequence[Mapping[str, Any] | None], artifact: Artifact) -> BitsPerChannel:
    """Return the bits of the fullest cache among those `held` (their fields as plain data), or of the codes where none was."""
    found = [BitsPerChannel(**fields) for fields in held if fields]
    if not found:
        return codec_bits(artifact)
    read = max((bits.num_read_as_codes for bits in found if bits.num_read_as_codes is not None), default=None)
    return replace(max(found, key=lambda bits: bits.num_tokens), num_read_as_codes=read)
