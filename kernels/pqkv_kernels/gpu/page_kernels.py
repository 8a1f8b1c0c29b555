"""The codes of one page as pairs of channels in registers, which the programs of attention read first. No queries."""

import triton
import triton.language as tl


@triton.jit
def fetched(p, BITS: tl.constexpr, ASM: tl.constexpr):
    """Load elements of 16, 32 or 64 `BITS`, to which the pointers `p` are converted, as unsigned numbers."""
    if ASM:
        if BITS == 16:
            return tl.inline_asm_elementwise("ld.global.nc.b16 $0, [$1];", "=h,l", [p], dtype=tl.uint16, is_pure=True, pack=1)
        elif BITS == 32:
            return tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [p], dtype=tl.uint32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise("ld.global.nc.b64 $0, [$1];", "=l,l", [p], dtype=tl.uint64, is_pure=True, pack=1)
    elif BITS == 16:
        return tl.load(p.to(tl.pointer_type(tl.uint16)))
    elif BITS == 32:
        return tl.load(p.to(tl.pointer_type(tl.uint32)))
    else:
        return tl.load(p.to(tl.pointer_type(tl.uint64)))


@triton.jit
def fetched_number(p, ASM: tl.constexpr):
    """Load int32."""
    return fetched(p, 32, ASM).to(tl.int32, bitcast=True)


@triton.jit
def halves(pair):
    """Return both components of planes stored as two float16 in 32 bits."""
    x = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    y = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return x, y


@triton.jit
def packed(x, y):
    """Undo `halves`."""
    return (y.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | x.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def added(a, b, ASM: tl.constexpr):
    """Add planes of two float16. `ASM`: by one instruction, which no compiler finds by itself."""
    if ASM:
        return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        a_x, a_y = halves(a)
        b_x, b_y = halves(b)
        return packed(a_x + b_x, a_y + b_y)


@triton.jit
def scaled(pair, factors, high: tl.constexpr, ASM: tl.constexpr):
    """Multiply both components of planes with one float16: the upper half of `factors` or the lower."""
    if ASM:
        if high:
            return tl.inline_asm_elementwise(
                "{.reg .b16 l, h; .reg .b32 f; mov.b32 {l, h}, $2; mov.b32 f, {h, h}; mul.rn.f16x2 $0, $1, f;}",
                "=r,r,r",
                [pair, factors],
                dtype=tl.uint32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b16 l, h; .reg .b32 f; mov.b32 {l, h}, $2; mov.b32 f, {l, l}; mul.rn.f16x2 $0, $1, f;}",
                "=r,r,r",
                [pair, factors],
                dtype=tl.uint32,
                is_pure=True,
                pack=1,
            )
    else:
        x, y = halves(pair)
        low, up = halves(factors)
        if high:
            low = up
        return packed(x * low, y * low)


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
def entries_at(p_rows, p_entries, plane, code, STRIDE: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr):
    """Look up planes: the pair of float16 twice, or both components in float32."""
    row = fetched_number(p_rows + plane, ASM)
    if WIDE:
        p_entry = p_entries + 2 * row.to(tl.int64) + 2 * STRIDE * code.to(tl.int64)
        return tl.load(tl.max_contiguous(p_entry, [1, 1, 2, 4])), tl.load(tl.max_contiguous(p_entry + 1, [1, 1, 2, 4]))
    else:
        pair = fetched(p_entries + row + STRIDE * code, 32, ASM)
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
    ASM: tl.constexpr,
):
    """Look up the even planes `plane` and the next ones of the tokens ``4 * word + j`` in the tables of one stage."""
    STRIDE: tl.constexpr = BP if PARTS // 256 == 1 else (2 if PAIRED else 1)
    code = code_at(words, j, PARTS)
    if PAIRED and not WIDE:  # one code for both, whose entries lie side by side
        both = fetched(p_entries + fetched_number(p_rows + plane, ASM) + STRIDE * code, 64, ASM)
        a, b = both.to(tl.uint32), (both >> 32).to(tl.uint32)
        return a, a, b, b
    else:
        a_x, a_y = entries_at(p_rows, p_entries, plane, code, STRIDE, WIDE, ASM)
        b_x, b_y = entries_at(p_rows, p_entries, plane + 1, code_at(words_b, j, PARTS), STRIDE, WIDE, ASM)
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
    ASM: tl.constexpr,
):
    """Return the even planes `plane` and the next ones of the tokens ``4 * word + j``, summed over stages.

    Four tiles: first planes' components and next planes', fp32 where WIDE; else their pairs of float16, each twice. `words` and
    `words_b` are the `page_words` of either, the same where they are PAIRED: where every code stands for both.
    """
    a_x, a_y, b_x, b_y = decoded_stage(p_rows, p_entries, plane, words[0], words_b[0], j, PARTS % 1024, PAIRED, BP, WIDE, ASM)
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
            ASM,
        )
        if WIDE:
            a_x, a_y, b_x, b_y = a_x + more[0], a_y + more[1], b_x + more[2], b_y + more[3]
        else:
            a_x, b_x = added(a_x, more[0], ASM), added(b_x, more[2], ASM)
            a_y, b_y = a_x, b_x
    return a_x, a_y, b_x, b_y
