"""Launches the decode kernels: the meaning of `reference.attention.code_attention`, on a GPU or in the interpreter."""

from collections.abc import Sequence

import torch
import triton

from pqkv_kernels.format.addresses import page_addresses, whole_blocks
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu.attention_kernels import merge_kernel, split_kernel
from pqkv_kernels.gpu.config import DecodeConfig, config_of, split_grid
from pqkv_kernels.gpu.tables import CHUNK_PLANES, DeviceTables, device_tables, step_factors
from pqkv_kernels.gpu.version import dot_width, launch_options, least_columns
from pqkv_kernels.reference.attention import Part
from pqkv_kernels.reference.score_tables import score_rows, score_tables

_MAX_QUERIES = 64  # queries per program: more would not fit into registers beside a decoded page
_MANY_WARPS = 4  # of programs of more than sixteen queries, which share what they decode


def triton_attention(
    query: torch.Tensor,
    key_pages: Sequence[torch.Tensor],
    value_pages: Sequence[torch.Tensor],
    key_tables: CodecTables,
    value_tables: CodecTables,
    spans: torch.Tensor,
    scaling: float,
    angles: Angles | PageAngles | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
) -> Part:
    """Attend as `pqkv_kernels.reference.attention.code_attention` does, over slabs of pages; arguments are checked already.

    `config` is by default what was measured for the key tables here (`use_config`), else that of the device
    (`gpu.config`), and exact in the interpreter.
    """
    batch, heads, group, tokens, dim = query.shape
    num_pages, num_queries = sum(slab.shape[1] for slab in key_pages), group * tokens
    if num_pages == 0 or num_queries == 0 or batch == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf)
    config = config or config_of(key_tables)
    key_pages, value_pages = whole_blocks(key_pages), whole_blocks(value_pages)  # alive until the kernel is launched
    keys, values = device_tables(key_tables, config.tables), device_tables(value_tables, config.tables)
    grid = split_grid(config, num_pages, batch * heads, _num_processors(query.device))
    parts, part_lse = (query.new_empty(batch, heads, grid.num_splits, num_queries, *n) for n in ((2 * keys.num_planes,), ()))
    block = query_block(num_queries)
    turn, turning = _turning(keys, angles, query)
    scored = _plane_queries(query, keys, keys.scale * scaling)
    looked_up = config.key_scores == "table" and turn == 0 and num_queries == 1
    scores, score_row = _score_tables(scored / keys.scale[:, None, None], keys) if looked_up else (query, keys.rows)
    split_kernel[(grid.num_programs, triton.cdiv(num_queries, block))](
        *(scored, page_addresses(key_pages), page_addresses(value_pages), spans.contiguous()),
        *(keys.part_bytes, keys.rows, keys.entries, values.part_bytes, values.rows, values.entries),
        *(*turning, scores, score_row, parts, part_lse),
        *(batch * heads, heads, num_queries, num_pages, *grid.numbers),
        *(key_tables.layout.page_bytes, value_tables.layout.page_bytes),
        *(0 if key_tables.rotary is None else key_tables.rotary.num_pairs, _angle_row(angles, batch)),
        *(1.0 if softcap is None else softcap, scores.shape[-1], 0),
        **{"LOOKED_UP": looked_up, "TURN": turn, "HAS_CAP": softcap is not None, "BN": block},
        **{**_numbers(config), **_codes("K", keys), **_codes("V", values)},
        **{"D2": dim // 2, "BP": keys.num_planes, "CHUNK": CHUNK_PLANES, **_launch(config, block)},
    )
    return _merged(query, parts, part_lse, values)


def _numbers(config: DecodeConfig) -> dict[str, int]:
    return {"WIDE": config.tables == "float32", "ASM": not is_interpreted(), "WIDTH": dot_width()}


def _codes(side: str, tables: DeviceTables) -> dict[str, int]:
    found = {"STAGES": tables.num_stages, "PARTS": tables.parts, "PAIRED": tables.paired}
    return {f"{side}_{name}": value for name, value in found.items()}


def query_block(num_queries: int) -> int:
    """Return how many queries a program serves: as few as products on the tensor cores take, or many that share their keys."""
    return next((n for n in (8, 16) if least_columns() <= n and num_queries <= n), _MAX_QUERIES)


def _launch(config: DecodeConfig, block: int) -> dict[str, int]:
    num_warps = config.num_warps if block <= 16 else _MANY_WARPS
    return launch_options(num_warps, max_registers=config.max_registers if block <= 8 else 0)


def _merged(query: torch.Tensor, parts: torch.Tensor, part_lse: torch.Tensor, values: DeviceTables) -> Part:
    batch, heads, num_splits, num_queries = part_lse.shape
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:-1])
    rows = (parts, part_lse, values.scale, out, lse, heads, num_queries, num_splits)
    columns = triton.next_power_of_2(values.num_planes)
    shape = {"D2": query.shape[-1] // 2, "BP": values.num_planes, "COLUMNS": columns, "BS": 16}
    merge_kernel[(batch * heads, num_queries)](*rows, **shape, **launch_options(4))
    return out, lse


def prepare(tables: CodecTables) -> None:
    """Make the tables that `triton_attention` reads, once."""
    device_tables(tables, config_of(tables).tables)


def _plane_queries(query: torch.Tensor, keys: DeviceTables, scale: torch.Tensor) -> torch.Tensor:
    """Return the queries [B, Hkv, N, 2, D / 2] in the planes' order, times `scale` [Hkv, D / 2]."""
    batch, heads, group, tokens, dim = query.shape
    channels = keys.planes.channels.mT.reshape(1, heads, 1, dim).expand(batch, -1, group * tokens, -1)
    rows = query.flatten(2, 3).gather(3, channels).unflatten(-1, (2, dim // 2))
    scaled: torch.Tensor = rows * scale[:, None, None]
    return scaled.contiguous()


def _score_tables(query: torch.Tensor, keys: DeviceTables) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the products of a plane query per head with every centroid, [B, Hkv, S] fp32, and where codes find theirs."""
    rows = torch.nn.functional.pad(score_rows(keys.planes), (0, keys.num_planes - keys.planes.num_planes), value=-1)
    return score_tables(query.transpose(-1, -2).contiguous(), keys.planes)[:, :, 0].contiguous(), rows


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter, on any device; decided when this module is first imported."""
    return not isinstance(split_kernel, triton.runtime.JITFunction)


def _turning(
    keys: DeviceTables, angles: Angles | PageAngles | None, query: torch.Tensor
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Return how keys are turned (see `split_kernel`) and pairs, base cos, base sin, step factors, cos and sin."""
    if keys.pairs is None or angles is None:
        return 0, (keys.part_bytes, *(query,) * 5)  # never read
    if isinstance(angles, PageAngles):
        factors = step_factors(angles, keys)
        return 1, (keys.pairs, *(t.contiguous() for t in angles.base), factors, query, query)
    return 2, (keys.pairs, query, query, query, *(t.contiguous() for t in angles))


def _angle_row(angles: Angles | PageAngles | None, batch: int) -> int:
    """Return how many angles one row is away from the next: none where all rows share them."""
    if angles is None:
        return 0
    first = angles.base[0] if isinstance(angles, PageAngles) else angles[0]
    return int(first.shape[1]) if first.shape[0] > 1 or batch == 1 else 0


def _num_processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
