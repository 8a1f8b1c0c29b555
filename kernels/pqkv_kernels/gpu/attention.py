"""Launches the decode kernels: the meaning of `reference.attention.code_attention`, on a GPU or in the interpreter."""

from typing import Any

import torch
import triton

from pqkv_kernels.format.addresses import page_addresses, whole_blocks
from pqkv_kernels.format.rotary import PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens, Part
from pqkv_kernels.gpu.attention_kernels import merge_kernel, split_kernel
from pqkv_kernels.gpu.config import DecodeConfig, config_of, split_grid
from pqkv_kernels.gpu.tables import CHUNK_PLANES, DeviceTables, device_tables, step_factors
from pqkv_kernels.gpu.version import dot_width, launch_options, least_columns
from pqkv_kernels.reference.prediction import plane_prediction
from pqkv_kernels.reference.score_tables import score_rows, score_tables

_MAX_QUERIES = 64  # queries per program: more would not fit into registers beside a decoded page
_MANY_WARPS = 4  # of programs of more than sixteen queries, which share what they decode


def triton_attention(
    query: torch.Tensor,
    tokens: CodedTokens,
    scaling: float,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
) -> Part:
    """Attend as `pqkv_kernels.reference.attention.code_attention` does; arguments are checked already.

    `config` is by default what was measured for the key tables here (`use_config`), else that of the device
    (`gpu.config`), and exact in the interpreter.
    """
    batch, heads, group, num_tokens, dim = query.shape
    num_pages, num_queries = tokens.num_pages, group * num_tokens
    if num_pages == 0 or num_queries == 0 or batch == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf)
    config = config or config_of(tokens.keys)
    keys, values = (device_tables(tables, config.tables) for tables in (tokens.keys, tokens.values))
    grid = split_grid(config, num_pages, batch * heads, _num_processors(query.device))
    predicted = int(tokens.values.prediction is not None)
    sizes = ((1 + predicted, 2 * keys.num_planes), ())
    parts, part_lse = (query.new_empty(batch, heads, grid.num_splits, num_queries, *size) for size in sizes)
    block = query_block(num_queries)
    scored = _plane_queries(query, keys, keys.scale * scaling)
    rotation = _rotation(tokens, keys, query)
    # Alive until the kernel is launched.
    pages = {"p_key_pages": whole_blocks(tokens.key_pages), "p_value_pages": whole_blocks(tokens.value_pages)}
    split_kernel[(grid.num_programs, triton.cdiv(num_queries, block))](
        p_query=scored,
        p_spans=tokens.spans.contiguous(),
        p_out=parts,
        p_lse=part_lse,
        **{name: page_addresses(blocks) for name, blocks in pages.items()},
        **_codes("key", keys, tokens.keys),
        **_codes("value", values, tokens.values),
        **rotation,
        **_scores(scored, keys, config.key_scores == "table" and not rotation["ROTATION"] and num_queries == 1),
        **_sizes(batch, heads, num_queries, num_pages, softcap),
        **grid.arguments,
        BN=block,
        PREDICTED=predicted,
        **_constants(config, dim, keys),
        **_launch(config, block),
    )
    return _outputs(query, parts, part_lse, tokens, keys, values)


def _sizes(batch: int, heads: int, num_queries: int, num_pages: int, softcap: float | None) -> dict[str, Any]:
    counts = {"num_heads": batch * heads, "heads": heads, "num_queries": num_queries, "num_pages": num_pages}
    return counts | {"softcap": 1.0 if softcap is None else softcap, "HAS_CAP": softcap is not None, "zero": 0}


def _constants(config: DecodeConfig, dim: int, keys: DeviceTables) -> dict[str, int]:
    numbers = {"WIDE": config.tables == "float32", "ASM": not is_interpreted(), "WIDTH": dot_width()}
    return numbers | {"D2": dim // 2, "BP": keys.num_planes, "CHUNK": CHUNK_PLANES}


def _codes(side: str, device: DeviceTables, tables: CodecTables) -> dict[str, Any]:
    """Return the arguments of one side's codes."""
    data = {f"p_{side}_parts": device.part_bytes, f"p_{side}_rows": device.rows, f"p_{side}_entries": device.entries}
    constants = {"STAGES": device.num_stages, "PARTS": device.parts, "PAIRED": device.paired}
    known = {f"{side[0].upper()}_{name}": value for name, value in constants.items()}
    return {**data, f"{side}_page_bytes": tables.layout.page_bytes, **known}


def query_block(num_queries: int) -> int:
    """Return how many queries a program serves: as few as products on the tensor cores take, or many that share their keys."""
    return next((n for n in (8, 16) if least_columns() <= n and num_queries <= n), _MAX_QUERIES)


def _launch(config: DecodeConfig, block: int) -> dict[str, int]:
    num_warps = config.num_warps if block <= 16 else _MANY_WARPS
    return launch_options(num_warps, max_registers=config.max_registers if block <= 8 else 0)


def _outputs(
    query: torch.Tensor,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    tokens: CodedTokens,
    keys: DeviceTables,
    values: DeviceTables,
) -> Part:
    """Merge sums of values and, where these are predicted, add what the sums of keys behind them say."""
    out, lse = _merged(query, parts, part_lse, values)
    if tokens.values.prediction is None:
        return out, lse
    sums, _ = _merged(query, parts[..., 1:, :], part_lse, keys)
    return out + (sums.flatten(2, 3) @ plane_prediction(tokens.keys, tokens.values)).view(out.shape), lse


def _merged(query: torch.Tensor, parts: torch.Tensor, part_lse: torch.Tensor, tables: DeviceTables) -> Part:
    """Merge the first sums of `parts` [B, Hkv, S, N, 1 or 2, 2 * BP], of vectors of `tables`."""
    batch, heads, num_splits, num_queries = part_lse.shape
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:-1])
    merge_kernel[(batch * heads, num_queries)](
        p_part=parts,
        p_part_lse=part_lse,
        p_scale=tables.scale,
        p_out=out,
        p_lse=lse,
        heads=heads,
        num_queries=num_queries,
        num_splits=num_splits,
        row=parts.stride(3),
        D2=query.shape[-1] // 2,
        BP=tables.num_planes,
        COLUMNS=triton.next_power_of_2(tables.num_planes),
        BS=16,
        **launch_options(4),
    )
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


def _scores(scored: torch.Tensor, keys: DeviceTables, looked_up: bool) -> dict[str, Any]:
    """Return the arguments of `looked_up` scores: the products of a plane query per head with every centroid.

    They are [B, Hkv, S] fp32, and rows say where codes find theirs.
    """
    if not looked_up:
        return {"p_scores": scored, "p_score_rows": keys.rows, "num_scores": 0, "LOOKED_UP": False}  # never read
    rows = torch.nn.functional.pad(score_rows(keys.planes), (0, keys.num_planes - keys.planes.num_planes), value=-1)
    query = (scored / keys.scale[:, None, None]).transpose(-1, -2).contiguous()
    scores = score_tables(query, keys.planes)[:, :, 0].contiguous()
    return {"p_scores": scores, "p_score_rows": rows, "num_scores": scores.shape[-1], "LOOKED_UP": True}


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter, on any device; decided when this module is first imported."""
    return not isinstance(split_kernel, triton.runtime.JITFunction)


def _rotation(tokens: CodedTokens, keys: DeviceTables, query: torch.Tensor) -> dict[str, Any]:
    """Return `ROTATION` (see `split_kernel`), the arguments that it reads, and stand-ins for those that it does not."""
    names = ("p_pairs", "p_base_cos", "p_base_sin", "p_factors", "p_cos", "p_sin")
    unread = dict.fromkeys(names, query) | {"num_pairs": 0, "angle_row": 0, "ROTATION": 0}
    angles = tokens.angles
    if keys.pairs is None or angles is None:
        return unread | {"p_pairs": keys.part_bytes}
    first = angles.base[0] if isinstance(angles, PageAngles) else angles[0]
    # Angles from one row to the next: none where all rows share them.
    row = first.shape[1] if first.shape[0] > 1 or len(query) == 1 else 0
    unread |= {"p_pairs": keys.pairs, "num_pairs": first.shape[2], "angle_row": row}
    if isinstance(angles, PageAngles):
        base_cos, base_sin = (t.contiguous() for t in angles.base)
        factors = step_factors(angles, keys)
        return unread | {"ROTATION": 1, "p_base_cos": base_cos, "p_base_sin": base_sin, "p_factors": factors}
    cos, sin = (t.contiguous() for t in angles)
    return unread | {"ROTATION": 2, "p_cos": cos, "p_sin": sin}


def _num_processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
