"""Arithmetic of two float16 side by side in 32 bits, such as a pair of channels. Knows no codes and no tables."""

import triton
import triton.language as tl


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
