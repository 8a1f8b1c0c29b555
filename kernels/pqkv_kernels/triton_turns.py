"""Keys of one page, turned, as operands of products on the tensor cores (`triton_queries` has the other one). Knows planes.

A key (x, y) turned by an angle meets a query (q, r) in ``c (x q + y r) + s (x r - y q)`` with the angle's cosine and sine: two
products, of keys times cosines with queries, and of keys times sines with queries turned by a quarter. So turning costs two
instructions for both components, and its sum is taken in fp32.
"""

import triton
import triton.language as tl

from pqkv_kernels.triton_halves import added, halves, mixed, packed, scaled, spread
from pqkv_kernels.triton_loads import fetched
from pqkv_kernels.triton_nibbles import page_sums
from pqkv_kernels.triton_planes import code_at, decoded, page_words, stage_words


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
    TURN: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED: tl.constexpr,
    NIBBLES: tl.constexpr,
    D2: tl.constexpr,
    BP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return eight operands: for ``j`` of 0 to 3 the tokens ``4 * word + j`` times cosines, and times sines.

    p_factors [2, BP / 8, 2, 16 words, 4, 4 tokens] are cosines and sines inside a page (`step_factors`).
    """
    a = chunk * CHUNK + tl.arange(0, CHUNK // 8)[:, None, None, None] * 8 + tl.arange(0, 4)[None, None, None, :] * 2
    b = a + 1
    word = tl.arange(0, 2)[None, :, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    if NIBBLES:
        sums = page_sums(page, p_entries, a, word, STAGES, NIBBLES, D2, BP, ASM)
        a_zero, b_zero = tl.load(p_rows + a).to(tl.uint32, bitcast=True), tl.load(p_rows + b).to(tl.uint32, bitcast=True)
    else:
        a_words = page_words(page, p_parts, a, word, STAGES, PARTS, BP, ASM)
        b_words = a_words
        if not PAIRED:
            b_words = page_words(page, p_parts, b, word, STAGES, PARTS, BP, ASM)
    if TURN == 1 and not WIDE:
        a_cosines, a_sines = step_words(p_factors, a, word, BP, ASM)
        b_cosines, b_sines = step_words(p_factors, b, word, BP, ASM)
    operands = ()
    for j in tl.static_range(4):
        if NIBBLES:
            a_x = added(spread(mixed(sums[0], sums[1], j // 2, ASM), j % 2, ASM), a_zero, ASM)
            b_x = added(spread(mixed(sums[2], sums[3], j // 2, ASM), j % 2, ASM), b_zero, ASM)
            a_y, b_y = a_x, b_x
        else:
            a_x, a_y, b_x, b_y = decoded(
                p_rows, stride, p_entries, a, a_words, b_words, j, STAGES, PARTS, PAIRED, BP, WIDE, BYTES, ASM
            )
        if TURN == 0:
            keys = key_operand(a_x, a_y, b_x, b_y, CHUNK, WIDTH) if WIDE else pair_operand(a_x, b_x, CHUNK, WIDTH)
            operands = operands + (keys, keys)
        elif TURN == 1 and not WIDE:
            a_cos, a_sin = (a_cosines >> (j // 2 * 32)).to(tl.uint32), (a_sines >> (j // 2 * 32)).to(tl.uint32)
            b_cos, b_sin = (b_cosines >> (j // 2 * 32)).to(tl.uint32), (b_sines >> (j // 2 * 32)).to(tl.uint32)
            across = times(a_x, b_x, a_cos, b_cos, j % 2, ASM, CHUNK, WIDTH)
            operands = operands + (across, times(a_x, b_x, a_sin, b_sin, j % 2, ASM, CHUNK, WIDTH))
        else:
            if TURN == 1:
                a_cos, a_sin = step_factors(p_factors, a, word, j, BP)
                b_cos, b_sin = step_factors(p_factors, b, word, j, BP)
            else:
                a_cos, a_sin = token_factors(p_cos, p_sin, p_pairs, num_pairs, a, word, j)
                b_cos, b_sin = token_factors(p_cos, p_sin, p_pairs, num_pairs, b, word, j)
            if WIDE:
                across = key_operand(a_x * a_cos, a_y * a_cos, b_x * b_cos, b_y * b_cos, CHUNK, WIDTH)
                along = key_operand(a_x * a_sin, a_y * a_sin, b_x * b_sin, b_y * b_sin, CHUNK, WIDTH)
            else:
                if NIBBLES:  # as `step_factors` are
                    a_cos, b_cos, a_sin, b_sin = a_cos * 16384.0, b_cos * 16384.0, a_sin * 16384.0, b_sin * 16384.0
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
    found = ()
    for j in tl.static_range(4):
        total = tl.zeros((CHUNK // 4, 2, 8, 4), tl.float32)
        for stage in tl.static_range(STAGES):
            words = stage_words(page, p_parts + stage * 4 * BP, plane, word, PARTS // 1024**stage % 1024, BP, ASM)
            row = tl.load(p_rows + stage * BP + plane)
            code = code_at(words, j, PARTS // 1024**stage % 1024)
            p_score = tl.max_contiguous(p_scores + row + code + plane * 0, [1, 1, 2, 4])
            total += tl.load(p_score, mask=row >= 0, other=0.0)
        sums = tl.reshape(tl.sum(tl.sum(total, 3), 0), (16,))
        found = found + (tl.zeros((16, BN), tl.float32) + sums[:, None],)
    return found
