"""The kernels of attention over codes: split over pages, merged by log-sum-exp. `triton_attention` launches them.

One program reads the codes of one key/value head over a run of pages and serves all its queries: codes are read once whatever
the group size. A page is decoded in registers, plane by plane (`device_tables`): a pair of channels is a complex number, its
rotation inside the page a constant factor, the rotation of the page's first token is folded into the queries. All sums are
fp32, all addresses int64.
"""

import triton
import triton.language as tl

from pqkv_kernels.triton_planes import decoded_planes, page_codes


@triton.jit
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
    p_cos,
    p_sin,
    p_scores,
    p_score_rows,
    p_out,
    p_lse,
    heads,
    num_queries,
    num_pages,
    split_pages,
    key_page_bytes,
    value_page_bytes,
    num_pairs,
    angle_row,
    softcap,
    num_scores,
    LOOKED_UP: tl.constexpr,
    TURN: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    K_STAGES: tl.constexpr,
    K8: tl.constexpr,
    K4: tl.constexpr,
    K2: tl.constexpr,
    K1: tl.constexpr,
    V_STAGES: tl.constexpr,
    V8: tl.constexpr,
    V4: tl.constexpr,
    V2: tl.constexpr,
    V1: tl.constexpr,
    D2: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    """Attend with `BN` queries of one head to the pages of one split.

    p_query [B, Hkv, N, 2, D2] fp32, scaled; p_*_pages [B, P] int64 addresses; p_spans [B, 2] int64. TURN 0: keys are not
    turned, 1: by page and step, 2: by token. LOOKED_UP: one query, whose products with the centroids are in p_scores
    [B, Hkv, num_scores]. p_out [B, Hkv, S, N, 2, D2] fp32, p_lse [B, Hkv, S, N] fp32 in base 2.
    """
    i_head = tl.program_id(0).to(tl.int64)  # row * heads + head
    i_split = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    i_b = i_head // heads
    i_h = i_head % heads
    o_n = i_n * BN + tl.arange(0, BN)[:, None]
    planes = tl.arange(0, BP)[None, :]
    m_plane = planes < D2
    m_query = (o_n < num_queries) & m_plane
    p_q = p_query + (i_head * num_queries + o_n) * (2 * D2) + planes
    q_x = tl.load(p_q, mask=m_query, other=0.0)
    q_y = tl.load(p_q + D2, mask=m_query, other=0.0)
    first = tl.load(p_spans + 2 * i_b)
    stop = tl.load(p_spans + 2 * i_b + 1)
    pair = tl.zeros((1, BP), tl.int32)
    m_turn = m_plane
    o_t = tl.arange(0, BT)[:, None]
    if TURN != 0:
        pair = tl.load(p_pairs + i_h * D2 + planes, mask=m_plane, other=0).to(tl.int32)
        m_turn = m_plane & (pair < num_pairs)
    step_cos = tl.full((BT, BP), 1.0, tl.float32)
    step_sin = tl.zeros((BT, BP), tl.float32)
    if TURN == 1:
        step_cos = tl.load(p_cos + o_t * num_pairs + pair, mask=m_turn, other=1.0)
        step_sin = tl.load(p_sin + o_t * num_pairs + pair, mask=m_turn, other=0.0)
    acc_x = tl.zeros((BN, BP), tl.float32)
    acc_y = tl.zeros((BN, BP), tl.float32)
    high = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    low_page = tl.maximum(i_split * split_pages, tl.maximum(first, 0) // 64)
    high_page = tl.minimum((i_split + 1) * split_pages, tl.minimum((stop + 63) // 64, num_pages))
    for i_tile in range(low_page * (64 // BT), high_page * (64 // BT)):
        i_page, part = i_tile // (64 // BT), i_tile % (64 // BT)
        key_page = tl.load(p_key_pages + i_b * num_pages + i_page).to(tl.pointer_type(tl.uint8)) + i_h * key_page_bytes
        value_page = tl.load(p_value_pages + i_b * num_pages + i_page).to(tl.pointer_type(tl.uint8)) + i_h * value_page_bytes
        t = part * BT + o_t
        if LOOKED_UP:
            looked = tl.zeros((BT,), tl.float32)
            for stage in tl.static_range(K_STAGES):
                code = page_codes(key_page, p_key_parts + stage * 4 * D2, t, m_plane, planes, K8, K4, K2, K1, D2)
                row = tl.load(p_score_rows + stage * D2 + planes, mask=m_plane, other=-1)
                found = tl.load(p_scores + i_head * num_scores + (row + code), mask=row >= 0, other=0.0)
                looked += tl.sum(found, 1)
            score = tl.zeros((BN, BT), tl.float32) + looked[None, :]
        else:
            k_x, k_y = decoded_planes(
                key_page,
                p_key_parts,
                p_key_rows + i_h * D2,
                p_key_entries,
                t,
                m_plane,
                planes,
                heads,
                K_STAGES,
                K8,
                K4,
                K2,
                K1,
                WIDE,
                D2,
            )
            turned_x, turned_y = q_x, q_y
            if TURN == 1:
                p_base = (i_b * angle_row + i_page) * num_pairs + pair
                base_cos = tl.load(p_base_cos + p_base, mask=m_turn, other=1.0)
                base_sin = tl.load(p_base_sin + p_base, mask=m_turn, other=0.0)
                if BT < 64:  # the part's first token stands `part * BT` steps after the page's
                    c = tl.load(p_cos + part * BT * num_pairs + pair, mask=m_turn, other=1.0)
                    s = tl.load(p_sin + part * BT * num_pairs + pair, mask=m_turn, other=0.0)
                    base_cos, base_sin = base_cos * c - base_sin * s, base_sin * c + base_cos * s
                turned_x, turned_y = q_x * base_cos + q_y * base_sin, q_y * base_cos - q_x * base_sin
                k_x, k_y = k_x * step_cos - k_y * step_sin, k_y * step_cos + k_x * step_sin
            if TURN == 2:
                p_token = (i_b * angle_row + i_page * 64 + t) * num_pairs + pair
                c = tl.load(p_cos + p_token, mask=m_turn, other=1.0)
                s = tl.load(p_sin + p_token, mask=m_turn, other=0.0)
                k_x, k_y = k_x * c - k_y * s, k_y * c + k_x * s
            # [BN, BT]
            score = tl.dot(turned_x, tl.trans(k_x), input_precision=PRECISION)
            score += tl.dot(turned_y, tl.trans(k_y), input_precision=PRECISION)
        if HAS_CAP:  # tanh by its exponential; far out both ends saturate without overflow
            squashed = tl.exp2(-2.8853900817779268 * tl.abs(score / softcap))
            score = tl.where(score < 0, -softcap, softcap) * (1 - squashed) / (1 + squashed)
        score = score * 1.4426950408889634
        token = i_page * 64 + part * BT + tl.arange(0, BT)
        score = tl.where((token[None, :] >= first) & (token[None, :] < stop), score, float("-inf"))
        higher = tl.maximum(high, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - safe[:, None])
        keep = tl.exp2(high - safe)
        total = total * keep + tl.sum(weight, 1)
        v_x, v_y = decoded_planes(
            value_page,
            p_value_parts,
            p_value_rows + i_h * D2,
            p_value_entries,
            t,
            m_plane,
            planes,
            heads,
            V_STAGES,
            V8,
            V4,
            V2,
            V1,
            WIDE,
            D2,
        )
        acc_x = acc_x * keep[:, None] + tl.dot(weight, v_x, input_precision=PRECISION)
        acc_y = acc_y * keep[:, None] + tl.dot(weight, v_y, input_precision=PRECISION)
        high = higher
    norm = tl.where(total > 0, total, 1.0)[:, None]
    o_part = (i_head * tl.num_programs(1) + i_split) * num_queries + o_n
    tl.store(p_out + o_part * (2 * D2) + planes, acc_x / norm, mask=m_query)
    tl.store(p_out + o_part * (2 * D2) + D2 + planes, acc_y / norm, mask=m_query)
    lse = tl.where(total > 0, high + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    rows = i_n * BN + tl.arange(0, BN)
    p_l = p_lse + (i_head * tl.num_programs(1) + i_split) * num_queries + rows
    tl.store(p_l, lse, mask=rows < num_queries)


@triton.jit
def merge_kernel(p_part, p_part_lse, p_scale, p_out, p_lse, heads, num_queries, num_splits, D2: tl.constexpr, BP: tl.constexpr):
    """Merge the splits of one query of one head, and give the planes their scales back.

    p_out [B, Hkv, N, D] fp32 with the planes' components side by side; p_lse [B, Hkv, N] fp32, natural logarithm.
    """
    i_head = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    planes = tl.arange(0, BP)
    m_plane = planes < D2
    high = float("-inf")
    total = 0.0
    acc_x = tl.zeros((BP,), tl.float32)
    acc_y = tl.zeros((BP,), tl.float32)
    for i_split in range(0, num_splits):
        o_part = (i_head * num_splits + i_split) * num_queries + i_n
        lse = tl.load(p_part_lse + o_part)
        higher = tl.maximum(high, lse)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        keep, weight = tl.exp2(high - safe), tl.exp2(lse - safe)
        acc_x = acc_x * keep + weight * tl.load(p_part + o_part * (2 * D2) + planes, mask=m_plane, other=0.0)
        acc_y = acc_y * keep + weight * tl.load(p_part + o_part * (2 * D2) + D2 + planes, mask=m_plane, other=0.0)
        total = total * keep + weight
        high = higher
    norm = tl.where(total > 0, total, 1.0)
    scale = tl.load(p_scale + (i_head % heads) * D2 + planes, mask=m_plane, other=0.0)
    p_o = p_out + (i_head * num_queries + i_n) * (2 * D2) + 2 * planes
    tl.store(p_o, acc_x / norm * scale, mask=m_plane)
    tl.store(p_o + 1, acc_y / norm * scale, mask=m_plane)
    lse = tl.where(total > 0, (high + tl.log2(norm)) * 0.6931471805599453, float("-inf"))
    tl.store(p_lse + i_head * num_queries + i_n, lse)
