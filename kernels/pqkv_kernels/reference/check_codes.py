"""Are these the codes that the reference stores? Other codes are right only where rounding decides between two as near."""

import torch

from pqkv_kernels.format.layout import PAGE_TOKENS, CodeLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import Codebooks, dequantize, page_codes, quantize
from pqkv_kernels.reference.merged_stages import joint_layout

ROUNDING = 1e-5  # of a vector's squared length: some hundred roundings of fp32


def wrong_vectors(x: torch.Tensor, pages: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    """Return which vectors' codes in `pages` [B, P, Hkv, page_bytes] are not the reference's, [B, Hkv, 64 * P] bool.

    Codes may differ where the vectors they stand for are as near to code-space `x` [B, Hkv, 64 * P, D] within `ROUNDING`. A
    stage is compared as long as the stages before it have the same codes: it codes what they leave over.
    """
    assert x.shape[2] == pages.shape[1] * PAGE_TOKENS
    layout, codebooks = tables.layout, tables.codebooks
    codes, expected = page_codes(pages, layout), quantize(x, layout, codebooks)
    allowed = ROUNDING * x.double().square().sum(-1)
    same = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    wrong = ~same
    for count in _compared(layout):
        farther = _error(x, codes, layout, codebooks, count) - _error(x, expected, layout, codebooks, count)
        wrong |= same & ~(farther <= allowed)  # a comparison with NaN is false
        groups = sum(len(stage) for stage in layout.stages[:count])
        for code, right in zip(codes[:groups], expected[:groups], strict=True):
            same &= (code == right).all(2)
    return wrong


def _compared(layout: CodeLayout) -> list[int]:
    """Return after how many stages an encoder has chosen among all the codes so far: those it searches together are one."""
    joint = joint_layout(layout)
    if joint.layout.has_prototypes:
        return [len(layout.stages)]
    return [1 + max(share.stage for shares in stage for share in shares) for stage in joint.shares]


def _error(x: torch.Tensor, codes: list[torch.Tensor], layout: CodeLayout, codebooks: Codebooks, count: int) -> torch.Tensor:
    """Return the squared distances [B, Hkv, T] fp64 of `x` from the sums of the first `count` stages."""
    first = CodeLayout(layout.stages[:count])
    return (x.double() - dequantize(codes, first, codebooks[:count])).square().sum(-1)
