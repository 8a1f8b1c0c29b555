"""The codes of one page as planes in registers: what the programs of attention read first. Knows pages and tables; no queries.

A pair of channels is a complex number, a plane (`device_tables`); a code of several stages is the sum of their entries.
"""

import triton
import triton.language as tl


@triton.jit
def page_codes(
    page,
    p_parts,
    t,
    m_plane,
    planes,
    HAS8: tl.constexpr,
    HAS4: tl.constexpr,
    HAS2: tl.constexpr,
    HAS1: tl.constexpr,
    D2: tl.constexpr,
):
    """Codes [BT, BP] int32 of the tokens `t` [BT, 1] of one page; parts as `layout.code_parts` orders them."""
    code = tl.zeros((t.shape[0], planes.shape[1]), tl.int32)
    low = tl.zeros((1, planes.shape[1]), tl.int32)
    if HAS8:
        o_8 = tl.load(p_parts + planes, mask=m_plane, other=-1)
        m_8 = m_plane & (o_8 >= 0)
        code = tl.load(page + o_8 + t, mask=m_8, other=0).to(tl.int32)
        low = tl.where(m_8, 8, 0)
    if HAS4:
        o_4 = tl.load(p_parts + D2 + planes, mask=m_plane, other=-1)
        m_4 = m_plane & (o_4 >= 0)
        b_4 = tl.load(page + o_4 + t // 2, mask=m_4, other=0).to(tl.int32)
        code = code | (((b_4 >> (4 * (t % 2))) & 15) << low)
        low = low + tl.where(m_4, 4, 0)
    if HAS2:
        o_2 = tl.load(p_parts + 2 * D2 + planes, mask=m_plane, other=-1)
        m_2 = m_plane & (o_2 >= 0)
        b_2 = tl.load(page + o_2 + t // 4, mask=m_2, other=0).to(tl.int32)
        code = code | (((b_2 >> (2 * (t % 4))) & 3) << low)
        low = low + tl.where(m_2, 2, 0)
    if HAS1:
        o_1 = tl.load(p_parts + 3 * D2 + planes, mask=m_plane, other=-1)
        m_1 = m_plane & (o_1 >= 0)
        b_1 = tl.load(page + o_1 + t // 8, mask=m_1, other=0).to(tl.int32)
        code = code | (((b_1 >> (t % 8)) & 1) << low)
    return code


@triton.jit
def decoded_planes(
    page,
    p_parts,
    p_rows,
    p_entries,
    t,
    m_plane,
    planes,
    heads,
    STAGES: tl.constexpr,
    HAS8: tl.constexpr,
    HAS4: tl.constexpr,
    HAS2: tl.constexpr,
    HAS1: tl.constexpr,
    WIDE: tl.constexpr,
    D2: tl.constexpr,
):
    """Both components, each [BT, BP] fp32, of the planes of the tokens `t` of one page."""
    x = tl.zeros((t.shape[0], planes.shape[1]), tl.float32)
    y = tl.zeros((t.shape[0], planes.shape[1]), tl.float32)
    for stage in tl.static_range(STAGES):
        code = page_codes(page, p_parts + stage * 4 * D2, t, m_plane, planes, HAS8, HAS4, HAS2, HAS1, D2)
        row = tl.load(p_rows + stage * heads * D2 + planes, mask=m_plane, other=0) + code
        if WIDE:
            x += tl.load(p_entries + 2 * row.to(tl.int64), mask=m_plane, other=0.0)
            y += tl.load(p_entries + 2 * row.to(tl.int64) + 1, mask=m_plane, other=0.0)
        else:
            pair = tl.load(p_entries + row, mask=m_plane, other=0)
            x += (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            y += (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return x, y
