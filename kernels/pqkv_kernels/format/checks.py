"""Whether the arguments of attention over codes, and of encoding, fit together. Says what was found; computes nothing."""

from collections.abc import Sequence

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables


def check_attention(
    query: torch.Tensor,
    key_pages: Sequence[torch.Tensor],
    value_pages: Sequence[torch.Tensor],
    key_tables: CodecTables,
    value_tables: CodecTables,
    spans: torch.Tensor,
    angles: Angles | PageAngles | None,
) -> None:
    """Check the arguments of `pqkv_kernels.dispatch.attend_codes`.

    Raises
    ------
    KernelError
        At the first that does not fit.
    """
    heads, dim = key_tables.num_heads, key_tables.layout.head_dim
    if (value_tables.num_heads, value_tables.layout.head_dim) != (heads, dim):
        found = f"[{value_tables.num_heads}, {value_tables.layout.head_dim}]"
        raise KernelError(f"value tables have heads and channels {found}; expected those of the key tables, [{heads}, {dim}]")
    if query.ndim != 4 or query.shape[3] != dim or query.shape[1] < heads or query.shape[1] % heads:
        raise KernelError(f"queries have shape {list(query.shape)}; expected [B, a multiple of {heads}, Tq, {dim}]")
    if not query.dtype.is_floating_point:
        raise KernelError(f"queries have dtype {query.dtype}; expected a float dtype")
    batch = query.shape[0]
    if spans.shape != (batch, 2) or spans.dtype != torch.int64:
        raise KernelError(f"spans have shape {list(spans.shape)} and dtype {spans.dtype}; expected [{batch}, 2] torch.int64")
    found_pages = [slab.shape[1] if slab.ndim == 4 else -1 for slab in key_pages]
    if found_pages != [slab.shape[1] if slab.ndim == 4 else -1 for slab in value_pages]:
        shapes = f"{[list(s.shape) for s in key_pages]} and {[list(s.shape) for s in value_pages]}"
        raise KernelError(f"key and value pages have shapes {shapes}; expected equal B, P, Hkv in every slab")
    for slabs, tables, side in ((key_pages, key_tables, "key"), (value_pages, value_tables, "value")):
        for slab in slabs:
            _check_slab(slab, batch, tables, side)
    _check_devices(query, [*key_pages, *value_pages, spans, key_tables.codebooks[0][0], value_tables.codebooks[0][0]])
    # A page has one angle, and a table of 64 that all share; or every token has its own.
    per_page = 1 if isinstance(angles, PageAngles) else PAGE_TOKENS
    check_angles(angles, key_tables, batch, sum(found_pages) * per_page)


def _check_slab(slab: torch.Tensor, batch: int, tables: CodecTables, side: str) -> None:
    expected = (batch, tables.num_heads, tables.layout.page_bytes)
    if slab.ndim != 4 or (slab.shape[0], *slab.shape[2:]) != expected or slab.dtype != torch.uint8:
        raise KernelError(
            f"{side} pages have shape {list(slab.shape)} and dtype {slab.dtype}; "
            f"expected [{batch}, P, {expected[1]}, {expected[2]}] torch.uint8"
        )


def _check_devices(query: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
    if any(t.device != query.device for t in others):
        devices = {str(t.device) for t in (query, *others)}
        raise KernelError(
            f"arguments lie on {', '.join(sorted(devices))}; expected one device: move tables and pages to {query.device}"
        )


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
    turning = angles.base if isinstance(angles, PageAngles) else angles
    expected = [count, tables.rotary.num_pairs]
    for found in (list(part.shape) for part in turning):
        if len(found) != 3 or found[1:] != expected or found[0] not in (1, batch):
            raise KernelError(f"angles have shape {found}; expected [{batch}, {expected[0]}, {expected[1]}]")
