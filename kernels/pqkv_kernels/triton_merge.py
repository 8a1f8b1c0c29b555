"""The kernel that merges the splits of attention over codes by log-sum-exp. `triton_attention` launches it."""

import triton
import triton.language as tl

from pqkv_kernels.triton_halves import halves


@triton.jit
def merge_kernel(
    p_part,
    p_part_lse,
    p_scale,
    p_offset,
    p_out,
    p_lse,
    heads,
    num_queries,
    num_splits,
    D2: tl.constexpr,
    BP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BS: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    """Merge the splits of one query of one head, `BS` at a time, and give the planes their scales back.

    p_part [B, Hkv, S, N, 2, BP] fp32, p_part_lse [B, Hkv, S, N] fp32 in base 2, p_scale [Hkv, D2] fp32; p_out [B, Hkv, N, D]
    fp32 with the planes' components side by side; p_lse [B, Hkv, N] fp32, natural logarithm. COLUMNS is at least BP. NIBBLES:
    parts are sums of bytes, see `four`, and lack the offset p_offset [Hkv, BP] int32 (`DeviceTables.rows`).
    """
    i_head = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    planes = tl.arange(0, COLUMNS)[None, :]
    m_plane = planes < D2
    high = float("-inf")
    total = 0.0
    sum_x = tl.zeros((COLUMNS,), tl.float32)
    sum_y = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_splits, BS):
        splits = start + tl.arange(0, BS)
        o_part = (i_head * num_splits + splits) * num_queries + i_n
        m_split = splits < num_splits
        lse = tl.load(p_part_lse + o_part, mask=m_split, other=float("-inf"))
        higher = tl.maximum(high, tl.max(lse, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        keep, weight = tl.exp2(high - safe), tl.exp2(lse - safe)
        p_x = p_part + o_part[:, None] * (2 * BP) + planes
        mask = m_split[:, None] & m_plane
        sum_x = sum_x * keep + tl.sum(weight[:, None] * tl.load(p_x, mask=mask, other=0.0), 0)
        sum_y = sum_y * keep + tl.sum(weight[:, None] * tl.load(p_x + BP, mask=mask, other=0.0), 0)
        total = total * keep + tl.sum(weight, 0)
        high = higher
    norm = tl.where(total > 0, total, 1.0)
    columns = tl.arange(0, COLUMNS)
    scale = tl.load(p_scale + (i_head % heads) * D2 + columns, mask=columns < D2, other=0.0)
    x, y = sum_x / norm, sum_y / norm
    if NIBBLES:
        offset = tl.load(p_offset + (i_head % heads) * BP + columns, mask=columns < D2, other=0).to(tl.uint32, bitcast=True)
        more_x, more_y = halves(offset)
        present = tl.where(total > 0, 16777216.0, 0.0)
        x, y = (x + more_x.to(tl.float32)) * present, (y + more_y.to(tl.float32)) * present
    p_o = p_out + (i_head * num_queries + i_n) * (2 * D2) + 2 * columns
    tl.store(p_o, x * scale, mask=columns < D2)
    tl.store(p_o + 1, y * scale, mask=columns < D2)
    lse = tl.where(total > 0, (high + tl.log2(norm)) * 0.6931471805599453, float("-inf"))
    tl.store(p_lse + i_head * num_queries + i_n, lse)
