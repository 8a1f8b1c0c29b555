"""The kernels of attention over codes: split over pages, merged by log-sum-exp. `gpu.attention` launches them."""

import triton
import triton.language as tl

from pqkv_kernels.gpu.page_kernels import (
    code_at,
    decoded,
    fetched,
    halves,
    packed,
    page_words,
    scaled,
    stage_words,
)


@triton.jit
def query_scales(p_query, m_n, D2: tl.constexpr, BP: tl.constexpr, CHUNK: tl.constexpr):
    """Return powers of two [1, BN] that no plane of a query exceeds, so that float16 holds them, and their inverses."""
    largest = tl.full(m_n.shape, 1e-37, tl.float32)
    for chunk in tl.static_range(BP // CHUNK):
        i = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
        q_x = tl.load(p_query + i, mask=m_n & (i < D2), other=0.0)
        q_y = tl.load(p_query + D2 + i, mask=m_n & (i < D2), other=0.0)
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(q_x), tl.abs(q_y)), 0)[None, :])
    exponent = tl.minimum(tl.ceil(tl.log2(largest)), 126.0)
    return tl.exp2(exponent), tl.exp2(-exponent)


@triton.jit
def query_operand(a_x, a_y, b_x, b_y, CHUNK: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr):
    """Make tiles [G, BN / 8, 8, 4] of even planes (`a`) and of the next (`b`) the right operand, see `key_operand`."""
    tile = tl.join(tl.join(a_x, b_x), tl.join(a_y, b_y))  # [G, BN / 8, 8, 4, b, y]
    tile = tl.permute(tile, (0, 3, 4, 5, 1, 2) if WIDTH == 4 else (0, 4, 3, 5, 1, 2))
    return tl.reshape(tile, (2 * CHUNK, BN))


@triton.jit
def rotated_query(
    p_query,
    n,
    stop,
    shrink,
    p_pairs,
    p_base_cos,
    p_base_sin,
    num_pairs,
    plane,
    ROTATION: tl.constexpr,
    WIDE: tl.constexpr,
    D2: tl.constexpr,
):
    """Return both components of the planes `plane` of the queries `n` before `stop`, see `rotated_queries`."""
    m_q = (n < stop) & (plane < D2)
    p_x = tl.max_contiguous(p_query + (n * (2 * D2) + plane), [1, 1, 2, 4])
    q_x = tl.load(p_x, mask=m_q, other=0.0) * shrink
    q_y = tl.load(tl.max_contiguous(p_x + D2, [1, 1, 2, 4]), mask=m_q, other=0.0) * shrink
    if ROTATION == 1:
        pair = tl.load(p_pairs + plane)
        cos = tl.load(p_base_cos + pair, mask=pair < num_pairs, other=1.0)
        sin = tl.load(p_base_sin + pair, mask=pair < num_pairs, other=0.0)
        q_x, q_y = q_x * cos + q_y * sin, q_y * cos - q_x * sin
    kind = tl.float32 if WIDE else tl.float16
    return q_x.to(kind), q_y.to(kind)


@triton.jit
def rotated_queries(
    p_query,
    first,
    stop,
    shrink,
    p_pairs,
    p_base_cos,
    p_base_sin,
    num_pairs,
    chunk: tl.constexpr,
    ROTATION: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    D2: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
):
    """Return queries [2 CHUNK, BN] times `shrink`, rotated back by the page's base (ROTATION 1); and the same a quarter on."""
    a = chunk * CHUNK + tl.arange(0, CHUNK // 8)[:, None, None, None] * 8 + tl.arange(0, 4)[None, None, None, :] * 2
    n = first + tl.arange(0, BN // 8)[None, :, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    shrink = tl.reshape(shrink, (1, BN // 8, 8, 1))
    a_x, a_y = rotated_query(p_query, n, stop, shrink, p_pairs, p_base_cos, p_base_sin, num_pairs, a, ROTATION, WIDE, D2)
    b_x, b_y = rotated_query(p_query, n, stop, shrink, p_pairs, p_base_cos, p_base_sin, num_pairs, a + 1, ROTATION, WIDE, D2)
    across = query_operand(a_x, a_y, b_x, b_y, CHUNK, BN, WIDTH)
    return across, query_operand(a_y, -a_x, b_y, -b_x, CHUNK, BN, WIDTH)


@triton.jit
def key_operand(a_x, a_y, b_x, b_y, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Make tiles [G, 2, 8, 4] of even planes (`a`) and of the next (`b`) the left operand [16 words, 2 CHUNK] of a product."""
    tile = tl.join(tl.join(a_x, b_x), tl.join(a_y, b_y))  # [G, 2, 8, 4, b, y]
    tile = tl.permute(tile, (1, 2, 0, 3, 4, 5) if WIDTH == 4 else (1, 2, 0, 4, 3, 5))
    return tl.reshape(tile, (16, 2 * CHUNK))


@triton.jit
def pair_operand(a, b, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """`key_operand` of pairs of float16."""
    a_x, a_y = halves(a)
    b_x, b_y = halves(b)
    return key_operand(a_x, a_y, b_x, b_y, CHUNK, WIDTH)


@triton.jit
def token_factors(p_cos, p_sin, p_pairs, num_pairs, plane, word, j: tl.constexpr):
    """Return cosines and sines of the tokens ``4 * word + j``, each with angles of its own, fp32."""
    pair = tl.load(p_pairs + plane)
    at = (4 * word + j).to(tl.int64) * num_pairs + pair
    cos = tl.load(tl.max_contiguous(p_cos + at, [1, 1, 2, 4]), mask=pair < num_pairs, other=1.0)
    sin = tl.load(tl.max_contiguous(p_sin + at, [1, 1, 2, 4]), mask=pair < num_pairs, other=0.0)
    return cos, sin


@triton.jit
def step_words(p_factors, plane, word, BP: tl.constexpr, ASM: tl.constexpr):
    """Return cosines and sines of the steps of four tokens of a page, four float16 in 64 bits."""
    at = plane // 8 * 128 + plane % 2 * 64 + word * 4 + plane // 2 % 4
    return fetched(p_factors + at, 64, ASM), fetched(p_factors + at + BP * 16, 64, ASM)


@triton.jit
def step_factors(p_factors, plane, word, j: tl.constexpr, BP: tl.constexpr):
    """Return cosines and sines of the steps of the tokens ``4 * word + j``, fp32."""
    at = (plane // 8 * 128 + plane % 2 * 64 + word * 4 + plane // 2 % 4) * 4 + j
    return tl.load(p_factors + at), tl.load(p_factors + at + BP * 64)


@triton.jit
def times(a, b, a_factors, b_factors, high: tl.constexpr, ASM: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Return the operand of pairs of float16 times float16 factors, see `scaled`."""
    return pair_operand(scaled(a, a_factors, high, ASM), scaled(b, b_factors, high, ASM), CHUNK, WIDTH)


@triton.jit
def twice(factor):
    """Return a float16 of `factor` in both halves of 32 bits."""
    half = factor.to(tl.float16)
    return packed(half, half)


@triton.jit
def key_operands(
    page,
    p_parts,
    p_rows,
    stride,
    p_entries,
    p_pairs,
    p_factors,
    p_cos,
    p_sin,
    num_pairs,
    chunk: tl.constexpr,
    ROTATION: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED: tl.constexpr,
    BP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return eight operands: for ``j`` of 0 to 3 the tokens ``4 * word + j`` times cosines, and times sines.

    p_factors [2, BP / 8, 2, 16 words, 4, 4 tokens] are cosines and sines inside a page (`step_factors`).
    """
    a = chunk * CHUNK + tl.arange(0, CHUNK // 8)[:, None, None, None] * 8 + tl.arange(0, 4)[None, None, None, :] * 2
    b = a + 1
    word = tl.arange(0, 2)[None, :, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    a_words = page_words(page, p_parts, a, word, STAGES, PARTS, BP, ASM)
    b_words = a_words
    if not PAIRED:
        b_words = page_words(page, p_parts, b, word, STAGES, PARTS, BP, ASM)
    if ROTATION == 1 and not WIDE:
        a_cosines, a_sines = step_words(p_factors, a, word, BP, ASM)
        b_cosines, b_sines = step_words(p_factors, b, word, BP, ASM)
    operands = ()
    for j in tl.static_range(4):
        a_x, a_y, b_x, b_y = decoded(p_rows, stride, p_entries, a, a_words, b_words, j, STAGES, PARTS, PAIRED, BP, WIDE, ASM)
        if ROTATION == 0:
            keys = key_operand(a_x, a_y, b_x, b_y, CHUNK, WIDTH) if WIDE else pair_operand(a_x, b_x, CHUNK, WIDTH)
            operands = operands + (keys, keys)
        elif ROTATION == 1 and not WIDE:
            a_cos, a_sin = (a_cosines >> (j // 2 * 32)).to(tl.uint32), (a_sines >> (j // 2 * 32)).to(tl.uint32)
            b_cos, b_sin = (b_cosines >> (j // 2 * 32)).to(tl.uint32), (b_sines >> (j // 2 * 32)).to(tl.uint32)
            across = times(a_x, b_x, a_cos, b_cos, j % 2, ASM, CHUNK, WIDTH)
            operands = operands + (across, times(a_x, b_x, a_sin, b_sin, j % 2, ASM, CHUNK, WIDTH))
        else:
            if ROTATION == 1:
                a_cos, a_sin = step_factors(p_factors, a, word, j, BP)
                b_cos, b_sin = step_factors(p_factors, b, word, j, BP)
            else:
                a_cos, a_sin = token_factors(p_cos, p_sin, p_pairs, num_pairs, a, word, j)
                b_cos, b_sin = token_factors(p_cos, p_sin, p_pairs, num_pairs, b, word, j)
            if WIDE:
                across = key_operand(a_x * a_cos, a_y * a_cos, b_x * b_cos, b_y * b_cos, CHUNK, WIDTH)
                along = key_operand(a_x * a_sin, a_y * a_sin, b_x * b_sin, b_y * b_sin, CHUNK, WIDTH)
            else:
                across = times(a_x, b_x, twice(a_cos), twice(b_cos), 0, ASM, CHUNK, WIDTH)
                along = times(a_x, b_x, twice(a_sin), twice(b_sin), 0, ASM, CHUNK, WIDTH)
            operands = operands + (across, along)
    return operands


@triton.jit
def looked_up(
    page,
    p_parts,
    p_rows,
    p_scores,
    chunk: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    BP: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the scores of the tokens ``4 * word + j``, for ``j`` of 0 to 3, as sums of looked-up products, each [16, BN].

    p_rows [stages, BP] int32 are first products of the codes, -1 but for a code's first plane.
    """
    plane = chunk * CHUNK + tl.arange(0, CHUNK // 4)[:, None, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    word = tl.arange(0, 2)[None, :, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    scores = ()
    for j in tl.static_range(4):
        total = tl.zeros((CHUNK // 4, 2, 8, 4), tl.float32)
        for stage in tl.static_range(STAGES):
            words = stage_words(page, p_parts + stage * 4 * BP, plane, word, PARTS // 1024**stage % 1024, BP, ASM)
            row = tl.load(p_rows + stage * BP + plane)
            code = code_at(words, j, PARTS // 1024**stage % 1024)
            p_score = tl.max_contiguous(p_scores + row + code + plane * 0, [1, 1, 2, 4])
            total += tl.load(p_score, mask=row >= 0, other=0.0)
        sums = tl.reshape(tl.sum(tl.sum(total, 3), 0), (16,))
        scores = scores + (tl.zeros((16, BN), tl.float32) + sums[:, None],)
    return scores


@triton.jit
def value_operand(a, b, WIDTH: tl.constexpr):
    """Make tiles [1, 4, 8, 4] of even planes (`a`) and of the next the left operand [16, 64 tokens] of a product (`dot_width`).

    `a` and `b` hold the tokens ``4 * word + j`` for ``j`` of 0 to 3. The even planes come first.
    """
    even = tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3]))  # j = 2 h + e: [1, word / 4, 8, word % 4, h, e]
    odd = tl.join(tl.join(b[0], b[2]), tl.join(b[1], b[3]))
    tile = tl.join(even, odd)
    tile = tl.permute(tile, (0, 6, 2, 1, 3, 4, 5) if WIDTH == 4 else (0, 6, 2, 1, 4, 3, 5))
    return tl.reshape(tile, (16, 64))


@triton.jit
def value_operands(
    page,
    p_parts,
    p_rows,
    stride,
    p_entries,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED: tl.constexpr,
    BP: tl.constexpr,
):
    """Return both components of sixteen planes of a page's values, each as `value_operand` [16, 64 tokens]."""
    plane = 2 * tl.arange(0, 8)[None, None, :, None]
    word = tl.arange(0, 4)[None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    words = page_words(page, p_parts, plane, word, STAGES, PARTS, BP, ASM)
    words_b = words
    if not PAIRED:
        words_b = page_words(page, p_parts, plane + 1, word, STAGES, PARTS, BP, ASM)
    a_x, a_y, b_x, b_y = (), (), (), ()
    for j in tl.static_range(4):
        pairs = decoded(p_rows, stride, p_entries, plane, words, words_b, j, STAGES, PARTS, PAIRED, BP, WIDE, ASM)
        if WIDE:
            a_x, a_y, b_x, b_y = a_x + (pairs[0],), a_y + (pairs[1],), b_x + (pairs[2],), b_y + (pairs[3],)
        else:
            a, b = halves(pairs[0]), halves(pairs[2])
            a_x, a_y, b_x, b_y = a_x + (a[0],), a_y + (a[1],), b_x + (b[0],), b_y + (b[1],)
    return value_operand(a_x, b_x, WIDTH), value_operand(a_y, b_y, WIDTH)


@triton.jit
def weight_operand(a, b, c, d, BN: tl.constexpr, WIDTH: tl.constexpr):
    """Make weights [16 words, BN] of the tokens ``4 * word + j`` the right operand [64 tokens, BN], ordered as the left."""
    tile = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4, 4, BN, 2, 2))
    tile = tl.permute(tile, (0, 1, 3, 4, 2) if WIDTH == 4 else (0, 3, 1, 4, 2))
    return tl.reshape(tile, (64, BN))


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
    ROTATION: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    K_STAGES: tl.constexpr,
    K_PARTS: tl.constexpr,
    K_PAIRED: tl.constexpr,
    V_STAGES: tl.constexpr,
    V_PARTS: tl.constexpr,
    V_PAIRED: tl.constexpr,
    PREDICTED: tl.constexpr,
    D2: tl.constexpr,
    BP: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
):
    """Attend with `BN` queries of one head to the pages of one split (`split_grid`), `CHUNK` planes at a time.

    p_query [B, Hkv, N, 2, D2] fp32; p_*_pages [B, P] int64 addresses; p_spans [B, 2] int64. ROTATION 0: keys are not rotated,
    1: by page and step, 2: by token. LOOKED_UP: one query, whose products with the centroids are in p_scores [B, Hkv,
    num_scores]. WIDE: float32 tables and products instead of float16. ASM: see `scaled`. WIDTH: see `dot_width`. PREDICTED: 1
    where sums of keys, unrotated, are wanted beside those of values, else 0. p_out [B, Hkv, S, N, 1 + PREDICTED, 2, BP] fp32,
    p_lse [B, Hkv, S, N] fp32 in base 2. `zero` is 0, which the compiler must not know: what belongs to
    planes alone is loaded anew for every page, since registers to keep it are too few.
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
    for _ in tl.static_range(1, BP // CHUNK * (1 + PREDICTED)):
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
                products = looked_up(
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
                s_0, s_1, s_2, s_3 = s_0 + products[0], s_1 + products[1], s_2 + products[2], s_3 + products[3]
            else:
                across, along = rotated_queries(
                    p_query + i_head * num_queries * (2 * D2) + anew,
                    i_n * BN,
                    tl.where(works, num_queries, 0),
                    shrink,
                    p_pairs + i_h * BP + anew,
                    p_base_cos + (i_b * angle_row + i_page) * num_pairs,
                    p_base_sin + (i_b * angle_row + i_page) * num_pairs,
                    num_pairs,
                    chunk,
                    ROTATION,
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
                    p_key_entries,
                    p_pairs + i_h * BP + anew,
                    p_factors + i_h * (BP * 32) * (4 if WIDE else 1) + anew,
                    p_cos + (i_b * angle_row + i_page * 64) * num_pairs,
                    p_sin + (i_b * angle_row + i_page * 64) * num_pairs,
                    num_pairs,
                    chunk,
                    ROTATION,
                    WIDE,
                    ASM,
                    WIDTH,
                    K_STAGES,
                    K_PARTS,
                    K_PAIRED,
                    BP,
                    CHUNK,
                )
                s_0 = tl.dot(keys[0], across, s_0, input_precision="ieee")
                s_1 = tl.dot(keys[2], across, s_1, input_precision="ieee")
                s_2 = tl.dot(keys[4], across, s_2, input_precision="ieee")
                s_3 = tl.dot(keys[6], across, s_3, input_precision="ieee")
                if ROTATION != 0:
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
                p_value_entries,
                WIDE,
                ASM,
                WIDTH,
                V_STAGES,
                V_PARTS,
                V_PAIRED,
                BP,
            )
            added_to = added_to + (
                tl.dot(x, weight, sums[2 * chunk] * keep, input_precision="ieee"),
                tl.dot(y, weight, sums[2 * chunk + 1] * keep, input_precision="ieee"),
            )
        if PREDICTED:
            for chunk in tl.static_range(BP // CHUNK):
                x, y = value_operands(
                    key_page,
                    p_key_parts + chunk * CHUNK + anew,
                    p_key_rows + i_h * BP + chunk * CHUNK + anew,
                    heads * BP,
                    p_key_entries,
                    WIDE,
                    ASM,
                    WIDTH,
                    K_STAGES,
                    K_PARTS,
                    K_PAIRED,
                    BP,
                )
                added_to = added_to + (
                    tl.dot(x, weight, sums[2 * (BP // CHUNK + chunk)] * keep, input_precision="ieee"),
                    tl.dot(y, weight, sums[2 * (BP // CHUNK + chunk) + 1] * keep, input_precision="ieee"),
                )
        sums = added_to
    norm = tl.where(total > 0, total, 1.0)
    o_part = (i_head * num_splits + i_split) * num_queries + o_n
    planes = tl.arange(0, CHUNK)[:, None]
    planes = planes // 16 * 16 + planes % 8 * 2 + planes % 16 // 8  # `value_operand` has the even ones first
    for chunk in tl.static_range(BP // CHUNK * (1 + PREDICTED)):
        p_o = p_out + o_part * (2 * BP * (1 + PREDICTED)) + chunk // (BP // CHUNK) * BP + chunk * CHUNK + planes
        tl.store(p_o, sums[2 * chunk] / norm, mask=m_n)
        tl.store(p_o + BP, sums[2 * chunk + 1] / norm, mask=m_n)
    lse = tl.where(total > 0, high + tl.log2(norm), float("-inf"))
    tl.store(p_lse + o_part, lse, mask=m_n)


@triton.jit
def merge_kernel(
    p_part,
    p_part_lse,
    p_scale,
    p_out,
    p_lse,
    heads,
    num_queries,
    num_splits,
    row,
    D2: tl.constexpr,
    BP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BS: tl.constexpr,
):
    """Merge the splits of one query of one head, `BS` at a time, and give the planes their scales back.

    p_part [B, Hkv, S, N] rows of [2, BP] fp32, `row` numbers from each to the next, p_part_lse [B, Hkv, S, N] fp32 in base 2,
    p_scale [Hkv, D2] fp32; p_out [B, Hkv, N, D] fp32 with the planes' components side by side; p_lse [B, Hkv, N] fp32, natural
    logarithm. COLUMNS is at least BP.
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
        p_x = p_part + o_part[:, None] * row + planes
        mask = m_split[:, None] & m_plane
        sum_x = sum_x * keep + tl.sum(weight[:, None] * tl.load(p_x, mask=mask, other=0.0), 0)
        sum_y = sum_y * keep + tl.sum(weight[:, None] * tl.load(p_x + BP, mask=mask, other=0.0), 0)
        total = total * keep + tl.sum(weight, 0)
        high = higher
    norm = tl.where(total > 0, total, 1.0)
    columns = tl.arange(0, COLUMNS)
    scale = tl.load(p_scale + (i_head % heads) * D2 + columns, mask=columns < D2, other=0.0)
    x, y = sum_x / norm, sum_y / norm
    p_o = p_out + (i_head * num_queries + i_n) * (2 * D2) + 2 * columns
    tl.store(p_o, x * scale, mask=columns < D2)
    tl.store(p_o + 1, y * scale, mask=columns < D2)
    lse = tl.where(total > 0, (high + tl.log2(norm)) * 0.6931471805599453, float("-inf"))
    tl.store(p_lse + i_head * num_queries + i_n, lse)
