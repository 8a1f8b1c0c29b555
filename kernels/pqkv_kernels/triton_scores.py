"""Which of many centroids are near to points, on the tensor cores (`triton_lines` says how). Knows no codes.

Scores are compared as integers, in the order of which floats that are not negative lie too: a processor has an instruction for
the largest of three integers, and none for floats. Of every point the largest is positive, so that others may be anything.
"""

import triton
import triton.language as tl

TOKENS = tl.constexpr(32)  # that a warp looks at together


@triton.jit
def point_tile(
    p_points,
    t,
    num_tokens,
    p_prototypes,
    p_chosen,
    step: tl.constexpr,
    DSUB: tl.constexpr,
    D: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """Load four channels [2, 2, 8, 4] of 32 tokens from `t` on, less those of prototypes where they are CHOSEN; 0 beyond DSUB.

    `p_points` [DSUB, T] and `p_prototypes` [K, D] begin with the subspace's first channel, `p_chosen` [T] with the first token.
    """
    token = tl.arange(0, 2)[:, None, None, None] * 16 + tl.arange(0, 2)[None, :, None, None] * 8
    token = t + token + tl.arange(0, 8)[None, None, :, None]
    channel = 4 * step + tl.arange(0, 4)[None, None, None, :]
    # The last dimensions are a warp's lanes, says the hint (see `triton_planes`), and that nothing is known of alignment: or a
    # lane would take for neighbours what lies side by side, other tokens.
    p_point = tl.multiple_of(tl.max_contiguous(p_points + channel * num_tokens + token, [1, 1, 2, 4]), [1, 1, 1, 1])
    point = tl.load(p_point, mask=channel < DSUB, other=0.0)
    if CHOSEN:
        row = tl.load(p_chosen + token)
        p_prototype = tl.multiple_of(tl.max_contiguous(p_prototypes + row * D + channel, [1, 1, 2, 4]), [1, 1, 1, 1])
        point -= tl.load(p_prototype, mask=channel < DSUB, other=0.0).to(tl.float32)
    return point


@triton.jit
def point_operand(point, WIDTH: tl.constexpr):
    """Make a `point_tile` the left operand [32, 16] of a product with `line_operand`."""
    point = tl.minimum(tl.maximum(point, -60000.0), 60000.0)  # float16 ends there, which is far outside of every table
    high = point.to(tl.float16)
    low = (point - high.to(tl.float32)).to(tl.float16)
    tile = tl.join(tl.join(high, low), tl.join(high, tl.full(high.shape, 1.0, tl.float16)))  # [2, 2, 8, 4, 2, 2]
    tile = tl.permute(tile, (0, 1, 2, 5, 3, 4) if WIDTH == 2 else (0, 1, 2, 3, 5, 4))
    return tl.reshape(tile, (TOKENS, 16))


@triton.jit
def tile_operands(
    p_points,
    t,
    num_tokens,
    p_prototypes,
    p_chosen,
    shrink,
    p_shift,
    D: tl.constexpr,
    DSUB: tl.constexpr,
    CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the operands of 32 points, four channels each; `shrink` and `p_shift` [DSUB] are `lines_kernel`'s."""
    operands = ()
    for step in tl.static_range((DSUB + 3) // 4):
        point = point_tile(p_points, t, num_tokens, p_prototypes, p_chosen, step, DSUB, D, CHOSEN)
        channel = 4 * step + tl.arange(0, 4)[None, None, None, :]
        shift = tl.load(p_shift + channel, mask=channel < DSUB, other=0.0)
        operands = operands + (point_operand(shrink * point - shift, WIDTH),)
    return operands


@triton.jit
def line_operand(p_lines, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Load `CHUNK` lines as the right operand [16, CHUNK] of a product."""
    o_i, o_g = tl.arange(0, CHUNK // 16)[:, None, None, None], tl.arange(0, 8)[None, :, None, None]
    o_q, o_place = tl.arange(0, 4)[None, None, :, None], tl.arange(0, 8)[None, None, None, :]
    p_line = tl.max_contiguous(p_lines + o_i * 256 + o_g * 32 + o_q * 8 + o_place, [1, 2, 4, 8])
    tile = tl.reshape(tl.load(p_line), (CHUNK // 16, 8, 4, 2, 2, 2))
    tile = tl.permute(tile, (4, 2, 5, 0, 3, 1) if WIDTH == 2 else (2, 4, 5, 0, 3, 1))
    return tl.reshape(tile, (16, CHUNK))


@triton.jit
def larger(best, operands, p_lines, STEPS: tl.constexpr, LINES: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Return `best` or the largest scores [32, 8] of a chunk of lines, as int32: in column ``i`` of those ``8 j + i``."""
    scores = tl.dot(operands[0], line_operand(p_lines, CHUNK, WIDTH))
    for step in tl.static_range(1, STEPS):
        scores = tl.dot(operands[step], line_operand(p_lines + step * (LINES * 16), CHUNK, WIDTH), scores)
    return tl.maximum(tl.max(tl.reshape(scores.to(tl.int32, bitcast=True), (TOKENS, CHUNK // 8, 8)), 1), best)


@triton.jit
def nearest_lines(operands, p_lines, STEPS: tl.constexpr, LINES: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Return for 32 points, [32] int32, the first of the ``CHUNK / 8`` lines, eight apart, of which one is the nearest."""
    best = tl.full((TOKENS, 8), -1, tl.int32)
    first = tl.zeros((TOKENS, 8), tl.int32)
    if LINES <= 4 * CHUNK:
        for chunk in tl.static_range(LINES // CHUNK):
            largest = larger(best, operands, p_lines + chunk * (CHUNK * 16), STEPS, LINES, CHUNK, WIDTH)
            first = tl.where(largest > best, chunk * CHUNK, first)
            best = largest
    else:
        for chunk in range(LINES // CHUNK):
            largest = larger(best, operands, p_lines + chunk * (CHUNK * 16), STEPS, LINES, CHUNK, WIDTH)
            first = tl.where(largest > best, chunk * CHUNK, first)
            best = largest
    largest = tl.max(best, 1)[:, None]
    return tl.min(tl.where(best == largest, first + tl.arange(0, 8)[None, :], LINES), 1)
