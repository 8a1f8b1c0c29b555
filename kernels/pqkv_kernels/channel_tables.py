"""How every channel of the code space comes out of the vectors', for kernels that make a few channels at a time. Data only."""

from dataclasses import dataclass

import torch

from pqkv_kernels.tables import CodecTables


@dataclass(frozen=True, slots=True)
class ChannelTables:
    """What makes every channel of the code space out of at most two of the vectors'.

    Attributes
    ----------
    places
        [Hkv, 3, D] int32: the channel itself, the partner that it is turned with, and their rotary pair (the number of pairs:
        none).
    factors
        [Hkv, 3, D] fp32: the sign of the sine with which the partner is turned in, and a row of the map: the channel's own
        factor and its partner's.
    """

    places: torch.Tensor
    factors: torch.Tensor


def channel_tables(tables: CodecTables) -> ChannelTables:
    """Return the channel tables of a codec, made once; a dense map is not in them."""
    if "channels" not in tables.derived:
        tables.derived["channels"] = _make_channel_tables(tables)
    found: ChannelTables = tables.derived["channels"]
    return found


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
