"""Codes of four bits looked up in registers, in tables of sixteen bytes for each component of a plane. Knows no queries.

A GPU selects four bytes out of eight in one instruction (``prmt``), by four numbers of four bits, which is just what the codes
of four neighbouring tokens are. The lowest three bits of a number choose a byte; the highest spreads that byte's sign, which is
zero where bytes are below 128. So the lower eight bytes of a table give their bytes for codes below eight and zeros for the
others, the upper eight the other way round where the highest bits are flipped, and sums over both and over stages are bytes.
"""

import triton
import triton.language as tl

from pqkv_kernels.triton_loads import fetched_two


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
