"""Loads that a compiler need not lay out: every lane fetches what it asks for. Knows no codes.

Triton looks, for each of its own loads, at all that is connected with it, to choose a layout: of kernels with hundreds of loads
that takes most of the time of compiling. What is read here are whole elements, of memory that nothing writes to meanwhile.
"""

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
