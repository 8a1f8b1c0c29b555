"""The tensors that turn one layer's keys or values into codes and back, and the same by channel. Data only."""

from dataclasses import dataclass, field
from typing import Any

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import CodeLayout, RotaryLayout


@dataclass(frozen=True, slots=True)
class CodecTables:
    """Codebooks and transform of one layer's keys or values.

    A model-space vector `x` [D] of head `h` becomes a code-space vector in three steps, each optional but the order fixed:
    un-rotate (if `rotary`), map (``map[h] * x`` for a scale, ``map[h] @ x`` for a matrix, ``map[h, p] @ x[block p]`` for
    blocks of two channels), permute (``x[permutation[h]]``).

    Attributes
    ----------
    layout
        How channels are grouped into codes.
    codebooks
        ``codebooks[stage][group]`` is [Hkv, M, ksub, dsub], any float dtype.
    map
        None, a scale [Hkv, D] fp32, an invertible matrix [Hkv, D, D] fp32, or, where `rotary` is set, one invertible 2 x 2
        matrix for each of ``rotary.blocks(D)``, [Hkv, D / 2, 2, 2] fp32. Subspaces hold whole blocks, so that undoing blocks
        can be folded into the centroids: it costs nothing per token.
    permutation
        None or [Hkv, D] integers.
    rotary
        Set where keys are coded before rotary embedding; None codes what the cache is given.
    inverse
        Inverse of a `map` of matrices or blocks, of its shape, fp32; derived in fp64 when not given.
    prediction
        None, or of values what keys say of them, [Hkv, D, D], any float dtype: the codes stand for what is left of a value when
        ``prediction[h] @ k`` is taken off it, both in their code spaces and `k` the key of the same token and head as decoded.
    derived
        What readers of the codes have worked out of these tables and keep with them; never part of an artifact.

    Raises
    ------
    KernelError
        If shapes do not fit each other.
    """

    layout: CodeLayout
    codebooks: tuple[tuple[torch.Tensor, ...], ...]
    map: torch.Tensor | None = None
    permutation: torch.Tensor | None = None
    rotary: RotaryLayout | None = None
    inverse: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_heads, dim = self.num_heads, self.layout.head_dim
        for stage, index, group, _, _ in self.layout.spans():
            found = tuple(self.codebooks[stage][index].shape)
            expected = (num_heads, group.num_subspaces, group.num_centroids, group.subspace_dim)
            if found != expected:
                raise KernelError(f"codebook {stage}.{index} has shape {list(found)}; expected {list(expected)}")
        if self.map is not None and tuple(self.map.shape) not in self._map_shapes():
            expected_maps = " or ".join(str(list(shape)) for shape in self._map_shapes())
            raise KernelError(f"map has shape {list(self.map.shape)}; expected {expected_maps}")
        if self.permutation is not None and tuple(self.permutation.shape) != (num_heads, dim):
            raise KernelError(f"permutation has shape {list(self.permutation.shape)}; expected [{num_heads}, {dim}]")
        if self.rotary is not None and (self.rotary.rotary_dim > dim or (self.map is not None and self.map.ndim == 3)):
            raise KernelError(
                "keys coded before rotary embedding need rotary_dim <= head_dim and a scale or blocks, not a matrix"
            )
        if self.prediction is not None and (self.rotary is not None or tuple(self.prediction.shape) != (num_heads, dim, dim)):
            raise KernelError(
                f"prediction has shape {list(self.prediction.shape)}{' for keys' if self.rotary is not None else ''}; expected "
                f"[{num_heads}, {dim}, {dim}] for values"
            )
        if self.inverse is None and self.map is not None and self.map.ndim > 2:
            object.__setattr__(self, "inverse", torch.linalg.inv(self.map.double()).float())

    def _map_shapes(self) -> list[tuple[int, ...]]:
        heads, dim = self.num_heads, self.layout.head_dim
        blocks = [] if self.rotary is None else [(heads, dim // 2, 2, 2)]
        return [(heads, dim), (heads, dim, dim), *blocks]

    @property
    def num_heads(self) -> int:
        """Key/value heads."""
        return int(self.codebooks[0][0].shape[0])

    @property
    def table_bytes(self) -> int:
        """Bytes of codebooks and transforms, as stored in an artifact."""
        tensors = [t for stage in self.codebooks for t in stage]
        tensors += [t for t in (self.map, self.permutation, self.prediction) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def inverse_permutation(self) -> torch.Tensor:
        """Return what undoes `permutation`, [Hkv, D] int64, sorted out once: every step over codes asks for it."""
        assert self.permutation is not None  # or there is nothing to undo
        if "inverse_permutation" not in self.derived:
            with torch.inference_mode(False):  # or gradients could not pass later
                self.derived["inverse_permutation"] = self.permutation.long().argsort(-1)
        inverse: torch.Tensor = self.derived["inverse_permutation"]
        return inverse

    def __deepcopy__(self, memo: dict[int, Any]) -> "CodecTables":
        """Return these tables themselves: nothing changes them, so copies of a cache share them."""
        return self

    def to(self, device: torch.device) -> "CodecTables":
        """Return the same tables on `device`, moved once; themselves, if they lie there already."""
        if self.codebooks[0][0].to(device) is self.codebooks[0][0]:
            return self
        if f"on {device}" not in self.derived:
            self.derived[f"on {device}"] = self._moved(device)
        moved: CodecTables = self.derived[f"on {device}"]
        return moved

    def _moved(self, device: torch.device) -> "CodecTables":
        return CodecTables(
            self.layout,
            tuple(tuple(t.to(device) for t in stage) for stage in self.codebooks),
            None if self.map is None else self.map.to(device),
            None if self.permutation is None else self.permutation.to(device),
            self.rotary,
            None if self.inverse is None else self.inverse.to(device),
            None if self.prediction is None else self.prediction.to(device),
        )


@dataclass(frozen=True, slots=True)
class ChannelTables:
    """What makes every channel of the code space out of at most two of the vectors'.

    Attributes
    ----------
    places
        [Hkv, 3, D] int32: the channel itself, the partner that it is rotated with, and their rotary pair (the number of pairs:
        none).
    factors
        [Hkv, 3, D] fp32: the sign of the sine with which the partner is added, and a row of the map: the channel's own
        factor and its partner's.
    """

    places: torch.Tensor
    factors: torch.Tensor


def channel_tables(tables: CodecTables) -> ChannelTables:
    """Return the channel tables of a codec, made once; a dense map is not in them."""
    if "channels" not in tables.derived:
        tables.derived["channels"] = _make_channel_tables(tables)
    made: ChannelTables = tables.derived["channels"]
    return made


def _make_channel_tables(tables: CodecTables) -> ChannelTables:
    heads, dim, device = tables.num_heads, tables.layout.head_dim, tables.codebooks[0][0].device
    every = torch.arange(dim, device=device)
    own = every.expand(heads, dim) if tables.permutation is None else tables.permutation.long()
    partner, pair, sign, num_pairs = every.clone(), torch.zeros_like(every), torch.ones_like(every), 0
    factor = torch.ones(heads, dim, device=device)
    partner_factor = torch.zeros(heads, dim, device=device)
    if tables.rotary is not None:
        num_pairs = tables.rotary.num_pairs
        blocks = tables.rotary.blocks(dim) if (dim - tables.rotary.rotary_dim) % 2 == 0 else tables.rotary.pairs()
        first, second = torch.tensor(blocks, device=device).unbind(1)
        partner[first], partner[second], sign[second] = second, first, -1
        pair = torch.full_like(every, num_pairs)
        pair[first] = pair[second] = torch.arange(len(first), device=device).clamp(max=num_pairs)
        if tables.map is not None and tables.map.ndim == 4:
            rows = tables.map
            factor[:, first], partner_factor[:, first] = rows[..., 0, 0], rows[..., 0, 1]
            factor[:, second], partner_factor[:, second] = rows[..., 1, 1], rows[..., 1, 0]
    if tables.map is not None and tables.map.ndim == 2:
        factor = tables.map
    places = torch.stack([own, *(t.expand(heads, dim).gather(1, own) for t in (partner, pair))], dim=1)
    factors = torch.stack([t.expand(heads, dim).gather(1, own).float() for t in (sign, factor, partner_factor)], dim=1)
    return ChannelTables(places.to(torch.int32).contiguous(), factors.contiguous())
