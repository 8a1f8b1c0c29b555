"""The kernels of attention over codes: split over pages, merged by log-sum-exp. `triton_attention` launches them.

One program reads the codes of one key/value head over a run of pages and serves all its queries: codes are read once whatever
the group size. A page is decoded in registers, plane by plane (`triton_planes`), and multiplied on the tensor cores: a pair of
channels is a complex number, its rotation inside the page a constant factor (`triton_turns`), the rotation of the page's first
token is folded into the queries. All sums are fp32, all addresses int64.
"""

import triton
import triton.language as tl

from pqkv_kernels.triton_queries import query_scales, turned_queries
from pqkv_kernels.triton_turns import key_operands, looked_up
from pqkv_kernels.triton_values import value_operands, weight_operand


@triton.jit
def ready(score, scale, softcap, lowest, highest, j: tl.constexpr, HAS_CAP: tl.constexpr):
    """Return scores [16 words, BN] in base 2, capped, and minus infinity outside the slots ``lowest:highest`` of the page."""
    score = score * scale
    if HAS_CAP:  # tanh by its exponential; far out both ends saturate without overflow
        squashed = tl.exp2(-2.8853900817779268 * tl.abs(score / softcap))
        score = tl.where(score < 0, -softcap, softcap) * (1 - squashed) / (1 + squashed)
    slot = 4 * tl.arange(0, 16)[:, None] + j
    return tl.where((slot >= lowest) & (slot < highest), score * 1.4426950408889634, float("-inf"))


@triton.jit(do_not_specialize=["zero"])
def split_kernel(
    p_query,
    p_key_pages,
    p_value_pages,
    p_spans,
    p_key_parts,
    p_key_rows,
    p_key_entries,
    p_value_parts,
    p_value_rows,
    p_value_entries,
    p_pairs,
    p_base_cos,
    p_base_sin,
    p_factors,
    p_cos,
    p_sin,
    p_scores,
    p_score_rows,
    p_out,
    p_lse,
    num_heads,
    heads,
    num_queries,
    num_pages,
    width,
    columns,
    rows,
    split_pages,
    num_splits,
    key_page_bytes,
    value_page_bytes,
    num_pairs,
    angle_row,
    softcap,
    num_scores,
    zero,
    LOOKED_UP: tl.constexpr,
    TURN: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    K_STAGES: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_PAIRED: tl.constexpr,
    K_NIBBLES: tl.constexpr,
    V_STAGES: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_PAIRED: tl.constexpr,
    V_NIBBLES: tl.constexpr,
    D2: tl.constexpr,
    BP: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
):
    """Attend with `BN` queries of one head to the pages of one split (`split_grid`), `CHUNK` planes at a time.

    p_query [B, Hkv, N, 2, D2] fp32; p_*_pages [B, P] int64 addresses; p_spans [B, 2] int64. TURN 0: keys are not turned, 1: by
    page and step, 2: by token. LOOKED_UP: one query, whose products with the centroids are in p_scores [B, Hkv, num_scores].
    WIDE: float32 tables and products instead of float16. BYTES: tables of bytes. ASM: see `scaled`. WIDTH: see `dot_width`.
    p_out [B, Hkv, S, N, 2, BP] fp32, p_lse [B, Hkv, S, N] fp32 in base 2. `zero` is 0, which the compiler must not know: what
    belongs to planes alone is loaded anew for every page, since registers to keep it are too few.
    """
    i_column, i_row = tl.program_id(0) % width, tl.program_id(0) // width
    i_split = i_row % rows * columns + i_column % columns
    i_place = i_row // rows * (width // columns) + i_column // columns  # row * heads + head
    works = (i_column < width // columns * columns) & (i_place < num_heads) & (i_split < num_splits)
    i_head = tl.minimum(i_place, num_heads - 1).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    i_b = i_head // heads
    i_h = i_head % heads
    o_n = i_n * BN + tl.arange(0, BN)[None, :]
    m_n = o_n < tl.where(works, num_queries, 0)
    p_q = p_query + (i_head * num_queries + o_n) * (2 * D2)
    scale, shrink = tl.full((1, BN), 1.0, tl.float32), tl.full((1, BN), 1.0, tl.float32)
    if not LOOKED_UP:
        scale, shrink = query_scales(p_q, m_n, D2, BP, CHUNK)
    first = tl.load(p_spans + 2 * i_b)
    stop = tl.load(p_spans + 2 * i_b + 1)
    sums = (tl.zeros((CHUNK, BN), tl.float32), tl.zeros((CHUNK, BN), tl.float32))
    for _ in tl.static_range(1, BP // CHUNK):
        sums = sums + (tl.zeros((CHUNK, BN), tl.float32), tl.zeros((CHUNK, BN), tl.float32))
    high = tl.full((1, BN), float("-inf"), tl.float32)
    total = tl.zeros((1, BN), tl.float32)
    low_page = tl.maximum(i_split * split_pages, tl.maximum(first, 0) // 64)
    high_page = tl.where(works, tl.minimum((i_split + 1) * split_pages, tl.minimum((stop + 63) // 64, num_pages)), 0)
    for i_page in range(low_page, high_page):
        key_page = tl.load(p_key_pages + i_b * num_pages + i_page).to(tl.pointer_type(tl.uint8)) + i_h * key_page_bytes
        value_page = tl.load(p_value_pages + i_b * num_pages + i_page).to(tl.pointer_type(tl.uint8)) + i_h * value_page_bytes
        anew = i_page * zero
        s_0 = tl.zeros((16, BN), tl.float32)
        s_1, s_2, s_3 = s_0, s_0, s_0
        for chunk in tl.static_range(BP // CHUNK):
            if LOOKED_UP:
                found = looked_up(
                    key_page,
                    p_key_parts + anew,
                    p_score_rows + anew,
                    p_scores + i_head * num_scores,
                    chunk,
                    K_STAGES,
                    K_PARTS,
                    BP,
                    CHUNK,
                    BN,
                    ASM,
                )
                s_0, s_1, s_2, s_3 = s_0 + found[0], s_1 + found[1], s_2 + found[2], s_3 + found[3]
            else:
                across, along = turned_queries(
                    p_query + i_head * num_queries * (2 * D2) + anew,
                    i_n * BN,
                    tl.where(works, num_queries, 0),
                    shrink,
                    p_pairs + i_h * BP + anew,
                    p_base_cos + (i_b * angle_row + i_page) * num_pairs,
                    p_base_sin + (i_b * angle_row + i_page) * num_pairs,
                    num_pairs,
                    chunk,
                    TURN,
                    WIDE,
                    WIDTH,
                    D2,
                    CHUNK,
                    BN,
                )
                keys = key_operands(
                    key_page,
                    p_key_parts + anew,
                    p_key_rows + i_h * BP + anew,
                    heads * BP,
                    p_key_entries + (i_h * K_STAGES * BP * 4 + anew if K_NIBBLES else 0),
                    p_pairs + i_h * BP + anew,
                    p_factors + i_h * (BP * 32) * (4 if WIDE else 1) + anew,
                    p_cos + (i_b * angle_row + i_page * 64) * num_pairs,
                    p_sin + (i_b * angle_row + i_page * 64) * num_pairs,
                    num_pairs,
                    chunk,
                    TURN,
                    WIDE,
                    BYTES,
                    ASM,
                    WIDTH,
                    K_STAGES,
                    K_PARTS,
                    K_PAIRED,
                    K_NIBBLES,
                    D2,
                    BP,
                    CHUNK,
                )
                s_0 = tl.dot(keys[0], across, s_0, input_precision="ieee")
                s_1 = tl.dot(keys[2], across, s_1, input_precision="ieee")
                s_2 = tl.dot(keys[4], across, s_2, input_precision="ieee")
                s_3 = tl.dot(keys[6], across, s_3, input_precision="ieee")
                if TURN != 0:
                    s_0 = tl.dot(keys[1], along, s_0, input_precision="ieee")
                    s_1 = tl.dot(keys[3], along, s_1, input_precision="ieee")
                    s_2 = tl.dot(keys[5], along, s_2, input_precision="ieee")
                    s_3 = tl.dot(keys[7], along, s_3, input_precision="ieee")
        lowest = tl.maximum(first - i_page * 64, 0).to(tl.int32)
        highest = tl.minimum(stop - i_page * 64, 64).to(tl.int32)
        s_0 = ready(s_0, scale, softcap, lowest, highest, 0, HAS_CAP)
        s_1 = ready(s_1, scale, softcap, lowest, highest, 1, HAS_CAP)
        s_2 = ready(s_2, scale, softcap, lowest, highest, 2, HAS_CAP)
        s_3 = ready(s_3, scale, softcap, lowest, highest, 3, HAS_CAP)
        highs = tl.maximum(tl.maximum(s_0, s_1), tl.maximum(s_2, s_3))
        higher = tl.maximum(high, tl.max(highs, 0)[None, :])
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        s_0, s_1, s_2, s_3 = tl.exp2(s_0 - safe), tl.exp2(s_1 - safe), tl.exp2(s_2 - safe), tl.exp2(s_3 - safe)
        keep = tl.exp2(high - safe)
        kind = tl.float32 if WIDE else tl.float16
        w_0, w_1, w_2, w_3 = s_0.to(kind), s_1.to(kind), s_2.to(kind), s_3.to(kind)
        if V_NIBBLES != 0:  # offsets are added to the values' mean: their weights must be one together
            s_0, s_1, s_2, s_3 = w_0.to(tl.float32), w_1.to(tl.float32), w_2.to(tl.float32), w_3.to(tl.float32)
        total = total * keep + tl.sum((s_0 + s_1) + (s_2 + s_3), 0)[None, :]
        high = higher
        weight = weight_operand(w_0, w_1, w_2, w_3, BN, WIDTH)
        added_to = ()
        for chunk in tl.static_range(BP // CHUNK):
            x, y = value_operands(
                value_page,
                p_value_parts + chunk * CHUNK + anew,
                p_value_rows + i_h * BP + chunk * CHUNK + anew,
                heads * BP,
                p_value_entries + (i_h * V_STAGES * BP * 4 + anew if V_NIBBLES else 0),
                WIDE,
                BYTES,
                ASM,
                WIDTH,
                V_STAGES,
                V_PARTS,
                V_PAIRED,
                V_NIBBLES,
                D2,
                BP,
                chunk * CHUNK,
            )
            added_to = added_to + (
                tl.dot(x, weight, sums[2 * chunk] * keep, input_precision="ieee"),
                tl.dot(y, weight, sums[2 * chunk + 1] * keep, input_precision="ieee"),
            )
        sums = added_to
    norm = tl.where(total > 0, total, 1.0)
    o_part = (i_head * num_splits + i_split) * num_queries + o_n
    planes = tl.arange(0, CHUNK)[:, None]
    planes = planes // 16 * 16 + planes % 8 * 2 + planes % 16 // 8  # `value_operand` has the even ones first
    for chunk in tl.static_range(BP // CHUNK):
        p_o = p_out + o_part * (2 * BP) + chunk * CHUNK + planes
        tl.store(p_o, sums[2 * chunk] / norm, mask=m_n)
        tl.store(p_o + BP, sums[2 * chunk + 1] / norm, mask=m_n)
    lse = tl.where(total > 0, high + tl.log2(norm), float("-inf"))
    tl.store(p_lse + o_part, lse, mask=m_n)
