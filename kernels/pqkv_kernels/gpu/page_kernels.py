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
def fetched_two(p, ASM: tl.constexpr):
    """Load two neighbours of 64 bits at once; every second pointer to int64 is one to such a pair."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.b64 {$0, $1}, [$2];", "=l,=l,l", [p], dtype=(tl.uint64, tl.uint64), is_pure=True, pack=1
        )
    else:
        return fetched(p, 64, ASM), fetched(p + 1, 64, ASM)


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
def mixed(x, y, high: tl.constexpr, ASM: tl.constexpr):
    """Return the lower two bytes of `x` and of `y`, or the upper where `high`, in turns: x, y, x, y."""
    if ASM:
        if high:
            return tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x7362;", "=r,r,r", [x, y], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x5140;", "=r,r,r", [x, y], dtype=tl.uint32, is_pure=True, pack=1
            )
    else:
        if high:
            x, y = x >> 16, y >> 16
        return (x & 0xFF) | ((y & 0xFF) << 8) | ((x & 0xFF00) << 8) | ((y & 0xFF00) << 16)


@triton.jit
def numbered(four_bytes, high: tl.constexpr, ASM: tl.constexpr):
    """Return two bytes, the upper of four where `high`, as two float16 that are larger by 1,024: they are its lowest bits."""
    return mixed(four_bytes, tl.full(four_bytes.shape, 0x64646464, tl.uint32), high, ASM)


@triton.jit
def moved(pair, twice: tl.constexpr, ASM: tl.constexpr):
    """Add -1,152, or `twice` that, to planes of two float16: what `numbered` makes of -127 to 127, stored with 128 added."""
    if twice:
        return added(pair, tl.full(pair.shape, 0xE880E880, tl.uint32), ASM)
    else:
        return added(pair, tl.full(pair.shape, 0xE480E480, tl.uint32), ASM)


@triton.jit
def spread(four_bytes, high: tl.constexpr, ASM: tl.constexpr):
    """Return two bytes, the upper of four where `high`, as two float16 that are smaller by ``2 ** 24``, and exact."""
    return mixed(four_bytes, tl.full(four_bytes.shape, 0, tl.uint32), high, ASM)


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


@triton.jit
def selected(table, codes, ASM: tl.constexpr):
    """Return the bytes, 0 to 127, that four codes of four bits choose from a table of eight; zeros for codes above seven."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b; mov.b64 {a, b}, $1; prmt.b32 $0, a, b, $2;}",
            "=r,l,r",
            [table, codes],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        found = codes & 0
        for j in tl.static_range(4):
            code = codes >> (4 * j) & 15
            byte = (table >> (8 * (code & 7)).to(tl.uint64)).to(tl.uint32) & 127
            found = found | tl.where(code < 8, byte, 0) << (8 * j)
        return found


@triton.jit
def plane_sums(p_tables, plane, codes, BP: tl.constexpr, ASM: tl.constexpr):
    """Return both components of `plane`, of the four tokens of a word each, as sums of bytes over the stages of `codes`.

    p_tables [stages, BP, 4] int64: a table for the first component, then one for the second.
    """
    for stage in tl.static_range(len(codes)):
        p_table = p_tables + (stage * BP + plane) * 4
        low, high = fetched_two(p_table, ASM)
        x_more = selected(low, codes[stage], ASM) + selected(high, codes[stage] ^ 0x8888, ASM)
        low, high = fetched_two(p_table + 2, ASM)
        y_more = selected(low, codes[stage], ASM) + selected(high, codes[stage] ^ 0x8888, ASM)
        if stage == 0:
            x, y = x_more, y_more
        else:
            x, y = x + x_more, y + y_more
    return x, y


@triton.jit
def word_codes(page, plane, word, STAGES: tl.constexpr, NIBBLES: tl.constexpr, D2: tl.constexpr):
    """Load the codes of the words `word` of `plane`, a tuple over the stages. Every code stands for `NIBBLES` planes."""
    plane = tl.minimum(plane, D2 - 1)  # those that pad them have no codes
    p_codes = page + (plane // NIBBLES * 32 + word * 2)
    codes = ()
    for stage in tl.static_range(STAGES):
        p_stage = (p_codes + stage * (D2 // NIBBLES * 32)).to(tl.pointer_type(tl.uint16))
        codes = codes + (tl.load(tl.max_contiguous(p_stage, [1, 1, 2, 4])).to(tl.uint32),)
    return codes


@triton.jit
def page_sums(
    page,
    p_tables,
    plane,
    word,
    STAGES: tl.constexpr,
    NIBBLES: tl.constexpr,
    D2: tl.constexpr,
    BP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the `plane_sums` of the even planes `plane` and of the next ones, of the words `word` of a page: four tiles."""
    codes = word_codes(page, plane, word, STAGES, NIBBLES, D2)
    codes_b = codes
    if NIBBLES % 2 != 0:
        codes_b = word_codes(page, plane + 1, word, STAGES, NIBBLES, D2)
    a_x, a_y = plane_sums(p_tables, plane, codes, BP, ASM)
    b_x, b_y = plane_sums(p_tables, plane + 1, codes_b, BP, ASM)
    return a_x, a_y, b_x, b_y
