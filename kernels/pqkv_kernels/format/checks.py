"""Whether the arguments of attention over codes, and of encoding, fit together. Says what was found; computes nothing."""

from collections.abc import Sequence

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens


def check_attention(query: torch.Tensor, tokens: CodedTokens) -> None:
    """Check the arguments of `pqkv_kernels.dispatch.attend_codes`.

    Raises
    ------
    KernelError
        At the first that does not fit.
    """
    keys, values, spans = tokens.keys, tokens.values, tokens.spans
    heads, dim = keys.num_heads, keys.layout.head_dim
    if (values.num_heads, values.layout.head_dim) != (heads, dim):
        found = f"[{values.num_heads}, {values.layout.head_dim}]"
        raise KernelError(f"value tables have heads and channels {found}; expected those of the key tables, [{heads}, {dim}]")
    if query.ndim != 4 or query.shape[3] != dim or query.shape[1] < heads or query.shape[1] % heads:
        raise KernelError(f"queries have shape {list(query.shape)}; expected [B, a multiple of {heads}, Tq, {dim}]")
    if not query.dtype.is_floating_point:
        raise KernelError(f"queries have dtype {query.dtype}; expected a float dtype")
    batch = query.shape[0]
    if spans.shape != (batch, 2) or spans.dtype != torch.int64:
        raise KernelError(f"spans have shape {list(spans.shape)} and dtype {spans.dtype}; expected [{batch}, 2] torch.int64")
    num_pages = _check_pages(tokens, batch)
    _check_devices(query, [*tokens.key_pages, *tokens.value_pages, spans, keys.codebooks[0][0], values.codebooks[0][0]])
    # A page has one angle, and a table of 64 that all share; or every token has its own.
    per_page = 1 if isinstance(tokens.angles, PageAngles) else PAGE_TOKENS
    check_angles(tokens.angles, keys, batch, num_pages * per_page)


def _check_pages(tokens: CodedTokens, batch: int) -> int:
    """Return the number of pages of either side."""
    sides = (("key", tokens.key_pages, tokens.keys), ("value", tokens.value_pages, tokens.values))
    counts = [[block.shape[1] if block.ndim == 4 else -1 for block in blocks] for _, blocks, _ in sides]
    if counts[0] != counts[1]:
        shapes = " and ".join(str([list(block.shape) for block in blocks]) for _, blocks, _ in sides)
        raise KernelError(f"key and value pages have shapes {shapes}; expected equal B, P, Hkv in every page block")
    for side, blocks, tables in sides:
        for block in blocks:
            _check_block(block, batch, tables, side)
    return sum(counts[0])


def _check_block(block: torch.Tensor, batch: int, tables: CodecTables, side: str) -> None:
    expected = (batch, tables.num_heads, tables.layout.page_bytes)
    if block.ndim != 4 or (block.shape[0], *block.shape[2:]) != expected or block.dtype != torch.uint8:
        raise KernelError(
            f"{side} pages have shape {list(block.shape)} and dtype {block.dtype}; "
            f"expected [{batch}, P, {expected[1]}, {expected[2]}] torch.uint8"
        )


def _check_devices(query: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
    if any(t.device != query.device for t in others):
        devices = {str(t.device) for t in (query, *others)}
        raise KernelError(
            f"arguments lie on {', '.join(sorted(devices))}; expected one device: move tables and pages to {query.device}"
        )


def check_encode(x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> None:
    """Check the arguments of `pqkv_kernels.dispatch.encode_pages`.

    Raises
    ------
    KernelError
        If shapes or devices do not fit, or angles are missing.
    """
    heads, dim = tables.num_heads, tables.layout.head_dim
    if x.ndim != 4 or (x.shape[1], x.shape[3]) != (heads, dim) or x.shape[2] % PAGE_TOKENS:
        raise KernelError(f"vectors have shape {list(x.shape)}; expected [B, {heads}, a multiple of {PAGE_TOKENS}, {dim}]")
    if x.device != tables.codebooks[0][0].device:
        raise KernelError(f"vectors lie on {x.device}, tables on {tables.codebooks[0][0].device}; expected one device")
    check_angles(angles, tables, x.shape[0], x.shape[2])


def check_angles(angles: Angles | PageAngles | None, tables: CodecTables, batch: int, count: int) -> None:
    """Check the `count` angles, of tokens or pages, of keys coded before rotary embedding; other vectors need none.

    Raises
    ------
    KernelError
        If they are missing or of another shape.
    """
    if tables.rotary is None:
        return
    if angles is None:
        raise KernelError("keys coded before rotary embedding need the angles of their positions; none were given")
    given = angles.base if isinstance(angles, PageAngles) else angles
    expected = [count, tables.rotary.num_pairs]
    for found in (list(part.shape) for part in given):
        if len(found) != 3 or found[1:] != expected or found[0] not in (1, batch):
            raise KernelError(f"angles have shape {found}; expected [{batch}, {expected[0]}, {expected[1]}]")
