"""Values of one page, and the weights that meet them, as operands of products on the tensor cores. Knows planes."""

import triton
import triton.language as tl

from pqkv_kernels.triton_halves import halves, spread
from pqkv_kernels.triton_nibbles import page_sums
from pqkv_kernels.triton_planes import decoded, page_words


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
def four(four_bytes, ASM: tl.constexpr):
    """Return four bytes as float16 that are smaller by ``2 ** 24``."""
    return halves(spread(four_bytes, False, ASM)) + halves(spread(four_bytes, True, ASM))


@triton.jit
def value_operands(
    page,
    p_parts,
    p_rows,
    stride,
    p_entries,
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
    first: tl.constexpr,
):
    """Return both components of sixteen planes of a page's values, each as `value_operand` [16, 64 tokens]."""
    plane = 2 * tl.arange(0, 8)[None, None, :, None]
    word = tl.arange(0, 4)[None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    if NIBBLES:
        sums = page_sums(page, p_entries, first + plane, word, STAGES, NIBBLES, D2, BP, ASM)
        a_x, a_y, b_x, b_y = four(sums[0], ASM), four(sums[1], ASM), four(sums[2], ASM), four(sums[3], ASM)
    else:
        words = page_words(page, p_parts, plane, word, STAGES, PARTS, BP, ASM)
        words_b = words
        if not PAIRED:
            words_b = page_words(page, p_parts, plane + 1, word, STAGES, PARTS, BP, ASM)
        a_x, a_y, b_x, b_y = (), (), (), ()
        for j in tl.static_range(4):
            found = decoded(p_rows, stride, p_entries, plane, words, words_b, j, STAGES, PARTS, PAIRED, BP, WIDE, BYTES, ASM)
            if WIDE:
                a_x, a_y, b_x, b_y = a_x + (found[0],), a_y + (found[1],), b_x + (found[2],), b_y + (found[3],)
            else:
                a, b = halves(found[0]), halves(found[2])
                a_x, a_y, b_x, b_y = a_x + (a[0],), a_y + (a[1],), b_x + (b[0],), b_y + (b[1],)
    return value_operand(a_x, b_x, WIDTH), value_operand(a_y, b_y, WIDTH)


@triton.jit
def weight_operand(a, b, c, d, BN: tl.constexpr, WIDTH: tl.constexpr):
    """Make weights [16 words, BN] of the tokens ``4 * word + j`` the right operand [64 tokens, BN], ordered as the left."""
    tile = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4, 4, BN, 2, 2))
    tile = tl.permute(tile, (0, 1, 3, 4, 2) if WIDTH == 4 else (0, 3, 1, 4, 2))
    return tl.reshape(tile, (64, BN))
