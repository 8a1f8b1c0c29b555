"""The codes of one page as planes in registers: what the programs of attention read first. Knows pages and tables; no queries.

A pair of channels is a complex number, a plane (`device_tables`); a code of several stages is the sum of their entries. Tiles
are four-dimensional, [groups of planes, groups of words, 8, 4]: the last two are the lanes of a warp and stand where the
operands of a product on the tensor cores want them, so that what is looked up is multiplied where it arrived. A word holds the
codes of four neighbouring tokens, so codes are loaded once for four.

``tl.max_contiguous(address, [1, 1, 2, 4])`` says to the compiler that the last dimension, then the third, are a warp's lanes:
where codes lead to it cannot know, and its guess changes with its version. The hint claims neighbours that are none, which
only orders the lanes: of their alignment nothing is known, so every lane loads for itself. It holds only where the address is
computed.
"""

import triton
import triton.language as tl

from pqkv_kernels.triton_halves import added, moved, numbered
from pqkv_kernels.triton_loads import fetched, fetched_number


@triton.jit
def code_words(page, p_parts, plane, word, PARTS: tl.constexpr, BP: tl.constexpr, ASM: tl.constexpr):
    """Load the words `word` (0 to 15, four tokens each) of the codes of `plane`, as `code_at` takes them.

    `p_parts` [4, BP] int32 are first bytes of the parts of 8, 4, 2 and 1 bits, -1 where a plane has none; two bits of `PARTS`
    for each say whether no plane has it, some, or all.
    """
    w_8 = tl.zeros((1, 1, 1, 1), tl.uint32)
    w_4, w_2, w_1, low_4 = w_8, w_8, w_8, w_8
    if PARTS % 4 != 0:
        o_8 = fetched_number(p_parts + plane, ASM)
        p_8 = tl.max_contiguous((page + (o_8 + word * 4)).to(tl.pointer_type(tl.uint32)), [1, 1, 2, 4])
        if PARTS % 4 == 1:
            w_8 = tl.load(p_8, mask=o_8 >= 0, other=0)
            low_4 = tl.where(o_8 >= 0, 8, 0).to(tl.uint32)
        else:
            w_8 = fetched(p_8, 32, ASM)
            low_4 = low_4 + 8
    low_2 = low_4
    if PARTS // 4 % 4 != 0:
        o_4 = fetched_number(p_parts + BP + plane, ASM)
        p_4 = tl.max_contiguous((page + (o_4 + word * 2)).to(tl.pointer_type(tl.uint16)), [1, 1, 2, 4])
        if PARTS // 4 % 4 == 1:
            w_4 = tl.load(p_4, mask=o_4 >= 0, other=0).to(tl.uint32)
            low_2 = low_4 + tl.where(o_4 >= 0, 4, 0).to(tl.uint32)
        else:
            w_4 = fetched(p_4, 16, ASM).to(tl.uint32)
            low_2 = low_4 + 4
    low_1 = low_2
    if PARTS // 16 % 4 != 0:
        o_2 = fetched_number(p_parts + 2 * BP + plane, ASM)
        p_2 = tl.max_contiguous((page + (o_2 + word // 2 * 2)).to(tl.pointer_type(tl.uint16)), [1, 1, 2, 4])
        if PARTS // 16 % 4 == 1:
            w_2 = tl.load(p_2, mask=o_2 >= 0, other=0).to(tl.uint32)
            low_1 = low_2 + tl.where(o_2 >= 0, 2, 0).to(tl.uint32)
        else:
            w_2 = fetched(p_2, 16, ASM).to(tl.uint32)
            low_1 = low_2 + 2
        w_2 = w_2 >> (word % 2 * 8).to(tl.uint32)
    if PARTS // 64 % 4 != 0:
        o_1 = tl.load(p_parts + 3 * BP + plane)
        p_1 = tl.max_contiguous((page + (o_1 + word // 4 * 2)).to(tl.pointer_type(tl.uint16)), [1, 1, 2, 4])
        w_1 = tl.load(p_1, mask=o_1 >= 0, other=0).to(tl.uint32) >> (word % 4 * 4).to(tl.uint32)
    return w_8, w_4, w_2, w_1, low_4, low_2, low_1


@triton.jit
def code_at(words, j: tl.constexpr, PARTS: tl.constexpr):
    """Return the codes of the tokens ``4 * word + j``, uint32."""
    code = tl.zeros((1, 1, 1, 1), tl.uint32)
    if PARTS % 4 != 0:
        code = words[0] >> (8 * j) & 255
    if PARTS // 4 % 4 != 0:
        code = code | (words[1] >> (4 * j) & 15) << words[4]
    if PARTS // 16 % 4 != 0:
        code = code | (words[2] >> (2 * j) & 3) << words[5]
    if PARTS // 64 % 4 != 0:
        code = code | (words[3] >> j & 1) << words[6]
    return code


@triton.jit
def stage_words(page, p_parts, plane, word, PARTS: tl.constexpr, BP: tl.constexpr, ASM: tl.constexpr):
    """Load one stage's `code_words`; those of a code of the whole vector once for all planes."""
    if PARTS // 256 == 1:
        return code_words(page, p_parts, tl.zeros((1, 1, 1, 1), tl.int32), word, PARTS, BP, ASM)
    else:
        return code_words(page, p_parts, plane, word, PARTS, BP, ASM)


@triton.jit
def page_words(page, p_parts, plane, word, STAGES: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, ASM: tl.constexpr):
    """Return the `stage_words` of every stage: `PARTS` holds ten bits for each."""
    words = (stage_words(page, p_parts, plane, word, PARTS % 1024, BP, ASM),)
    for stage in tl.static_range(1, STAGES):
        words = words + (stage_words(page, p_parts + stage * 4 * BP, plane, word, PARTS // 1024**stage % 1024, BP, ASM),)
    return words


@triton.jit
def entries_at(
    p_rows, p_entries, plane, code, STRIDE: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, ASM: tl.constexpr
):
    """Look up planes: the pair of float16 twice, that of bytes as `numbered` returns it, or both components in float32."""
    row = fetched_number(p_rows + plane, ASM)
    if WIDE:
        p_entry = p_entries + 2 * row.to(tl.int64) + 2 * STRIDE * code.to(tl.int64)
        return tl.load(tl.max_contiguous(p_entry, [1, 1, 2, 4])), tl.load(tl.max_contiguous(p_entry + 1, [1, 1, 2, 4]))
    else:
        p_entry = p_entries + row + STRIDE * code
        if BYTES:
            entry = fetched(p_entry, 16, ASM).to(tl.uint32)
            pair = numbered(entry, False, ASM)
        else:
            pair = fetched(p_entry, 32, ASM)
        return pair, pair


@triton.jit
def decoded_stage(
    p_rows,
    p_entries,
    plane,
    words,
    words_b,
    j: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED: tl.constexpr,
    BP: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Look up the even planes `plane` and the next ones of the tokens ``4 * word + j`` in the tables of one stage."""
    STRIDE: tl.constexpr = BP if PARTS // 256 == 1 else (2 if PAIRED else 1)
    code = code_at(words, j, PARTS)
    if PAIRED and not WIDE:  # one code for both, whose entries lie side by side
        p_both = p_entries + fetched_number(p_rows + plane, ASM) + STRIDE * code
        if BYTES:
            both = fetched(p_both, 32, ASM)
            a, b = numbered(both, False, ASM), numbered(both, True, ASM)
        else:
            both = fetched(p_both, 64, ASM)
            a, b = both.to(tl.uint32), (both >> 32).to(tl.uint32)
        return a, a, b, b
    else:
        a_x, a_y = entries_at(p_rows, p_entries, plane, code, STRIDE, WIDE, BYTES, ASM)
        b_x, b_y = entries_at(p_rows, p_entries, plane + 1, code_at(words_b, j, PARTS), STRIDE, WIDE, BYTES, ASM)
        return a_x, a_y, b_x, b_y


@triton.jit
def decoded(
    p_rows,
    stride,
    p_entries,
    plane,
    words,
    words_b,
    j: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED: tl.constexpr,
    BP: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the even planes `plane` and the next ones of the tokens ``4 * word + j``, summed over stages.

    Four tiles: first planes' components and next planes', fp32 where WIDE; else their pairs of float16, each twice, which are
    whole numbers where tables are BYTES: none of their sums is above 2,048, so they are exact. `words` and `words_b` are the
    `page_words` of either, the same where they are PAIRED: where every code stands for both.
    """
    a_x, a_y, b_x, b_y = decoded_stage(
        p_rows, p_entries, plane, words[0], words_b[0], j, PARTS % 1024, PAIRED, BP, WIDE, BYTES, ASM
    )
    if BYTES:
        a_x, b_x = moved(a_x, STAGES > 1, ASM), moved(b_x, STAGES > 1, ASM)
        a_y, b_y = a_x, b_x
    for stage in tl.static_range(1, STAGES):
        more = decoded_stage(
            p_rows + stage * stride,
            p_entries,
            plane,
            words[stage],
            words_b[stage],
            j,
            PARTS // 1024**stage % 1024,
            PAIRED,
            BP,
            WIDE,
            BYTES,
            ASM,
        )
        if WIDE:
            a_x, a_y, b_x, b_y = a_x + more[0], a_y + more[1], b_x + more[2], b_y + more[3]
        elif BYTES and stage > 1:
            a_x, b_x = added(a_x, moved(more[0], False, ASM), ASM), added(b_x, moved(more[2], False, ASM), ASM)
            a_y, b_y = a_x, b_x
        else:
            a_x, b_x = added(a_x, more[0], ASM), added(b_x, more[2], ASM)
            a_y, b_y = a_x, b_x
    return a_x, a_y, b_x, b_y
