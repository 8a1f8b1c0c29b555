"""Attention in parts that merge exactly: over codes, over exact tokens. Plain fp32 torch; defines the meaning."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles, page_range, token_angles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens, ExactTokens, Part
from pqkv_kernels.reference.encode import decode, from_code_space
from pqkv_kernels.reference.prediction import decode_values

_LOWEST, _TINY = -1e30, 1e-30  # stand in for minus infinity and zero where differences and quotients are taken
_BLOCK_PAGES = 32  # tokens decoded at a time: bounds the temporary to one block of keys and values


def code_queries(query: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    """Return queries [B, Hkv, G, Tq, D] fp32 that score the keys `code_attention` reads as `query` [B, H, Tq, D] scores keys.

    Keys coded before rotary embedding are decoded to model space (their map folds into the centroids), so their queries stay.
    Other keys stay in the mapped space: with ``k' = A k`` the logit is ``q . k = (A^-T q) . k'``.
    """
    grouped: torch.Tensor = query.float().unflatten(1, (tables.num_heads, query.shape[1] // tables.num_heads))
    if tables.map is None or tables.rotary is not None:
        return grouped
    if tables.inverse is None:
        return grouped / tables.map[:, None, None]
    return grouped @ tables.inverse[:, None]


def code_attention(query: torch.Tensor, tokens: CodedTokens, scaling: float, softcap: float | None = None) -> Part:
    """Attend to coded tokens; all of them precede all queries.

    Parameters
    ----------
    query
        As `code_queries` returns them, [B, Hkv, G, Tq, D] fp32.
    tokens
        The pages, their codecs, spans and angles.
    scaling
        Factor on the logits.
    softcap
        Logits are squashed to ``softcap * tanh(logit / softcap)`` where given.

    Returns
    -------
    tuple
        Output in the values' code space [B, Hkv, G, Tq, D] fp32 (see `leave_code_space`) and log-sum-exp [B, Hkv, G, Tq].

    Raises
    ------
    KernelError
        If keys and values have different numbers of pages or batch rows.
    """
    parts, first = [], 0
    for key_pages, value_pages in zip(tokens.key_pages, tokens.value_pages, strict=True):
        if key_pages.shape[:3] != value_pages.shape[:3]:
            raise KernelError(
                f"key pages {list(key_pages.shape)} and value pages {list(value_pages.shape)} differ; expected equal B, P, Hkv"
            )
        for start in range(0, key_pages.shape[1], _BLOCK_PAGES):
            block = slice(start, start + _BLOCK_PAGES)
            parts.append(_page_part(query, key_pages[:, block], value_pages[:, block], first + start, tokens, scaling, softcap))
        first += key_pages.shape[1]
    return merge(parts) if parts else _nothing(query)


def _page_part(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    first: int,
    tokens: CodedTokens,
    scaling: float,
    softcap: float | None,
) -> Part:
    """Attend to pages of `tokens` that begin with the page `first`."""
    angles = token_angles(page_range(tokens.angles, first, first + key_pages.shape[1]))
    keys = _scored_keys(key_pages, tokens.keys, angles)
    slots = first * PAGE_TOKENS + torch.arange(keys.shape[2], device=keys.device)
    valid = ((slots >= tokens.spans[:, :1]) & (slots < tokens.spans[:, 1:]))[:, None, None, None]
    values = decode_values(key_pages, value_pages, tokens.keys, tokens.values)
    return _attend(query, keys, values, valid, scaling, softcap)


def leave_code_space(output: torch.Tensor, value_tables: CodecTables) -> torch.Tensor:
    """Return model-space outputs [B, H, Tq, D] fp32 of `code_attention` outputs [B, Hkv, G, Tq, D]."""
    num_queries = output.shape[2:4]
    left = from_code_space(output.flatten(2, 3), value_tables)
    return left.reshape(*left.shape[:2], *num_queries, left.shape[-1]).flatten(1, 2)


def exact_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Part:
    """Attend to exact tokens.

    Parameters
    ----------
    query
        Model-space queries [B, H, Tq, D].
    keys, values
        [B, Hkv, T, D].
    valid
        Which token counts for which query, [B, 1 or Tq, T] bool.

    Returns
    -------
    tuple
        Output [B, H, Tq, D] fp32 and log-sum-exp [B, H, Tq] fp32.
    """
    grouped = query.float().unflatten(1, (keys.shape[1], query.shape[1] // keys.shape[1]))
    output, lse = _attend(grouped, keys.float(), values.float(), valid[:, None, None], scaling, softcap)
    return output.flatten(1, 2), lse.flatten(1, 2)


def merge(parts: Sequence[Part]) -> Part:
    """Combine parts over disjoint tokens: outputs [..., D] weighted by their shares of the softmax, log-sum-exp [...]."""
    if len(parts) == 1:
        return parts[0]
    weights, total, lse = softmax_parts(torch.stack([lse for _, lse in parts], dim=-1))
    shares = (weights / total).unbind(-1)
    output = sum(share[..., None] * out for share, (out, _) in zip(shares, parts, strict=True))
    assert isinstance(output, torch.Tensor)
    return output, lse


def _scored_keys(pages: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
    """Return keys as `code_queries` score them."""
    if tables.rotary is None:
        tables = replace(tables, map=None, inverse=None)
    return decode(pages, tables, angles)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, scaling: float, softcap: float | None
) -> Part:
    logits = torch.matmul(query, keys[:, :, None].mT) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~valid, -torch.inf)
    weights, total, lse = softmax_parts(logits)
    return torch.matmul(weights, values[:, :, None]) / total, lse


def softmax_parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights [..., N], what to divide their sums by [..., 1], and the log-sum-exp [...] of `logits` [..., N].

    A row of minus infinities has weights 0 and log-sum-exp minus infinity.
    """
    if not logits.shape[-1]:
        return logits, logits.new_ones(*logits.shape[:-1], 1), logits.new_full(logits.shape[:-1], -torch.inf)
    high = logits.detach().amax(-1, keepdim=True).clamp(min=_LOWEST)
    weights = torch.exp(logits - high)
    total = weights.sum(-1, keepdim=True)
    return weights, total.clamp(min=_TINY), (total.log() + high)[..., 0]


def _nothing(query: torch.Tensor) -> Part:
    return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf)


_QUERY_BLOCK = 256  # queries scored at a time, so that logits stay small in a long chunk


def add_exact(coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None = None) -> Part:
    """Return attention over coded and exact tokens together.

    Parameters
    ----------
    coded
        What the codes gave: output [B, H, Tq, D] fp32 in model space and log-sum-exp [B, H, Tq] fp32.
    query
        Model-space queries [B, H, Tq, D]; each sees the tokens up to its own.

    Returns
    -------
    tuple
        Output [B, H, Tq, D] fp32 and log-sum-exp [B, H, Tq] fp32.
    """
    parts = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, min(start + _QUERY_BLOCK, query.shape[2]))
        part = _exact_part(query, block, exact, scaling, softcap)
        parts.append(merge([part, (coded[0][:, :, block], coded[1][:, :, block])]))
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _exact_part(query: torch.Tensor, block: slice, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
    keys, values = exact.recent
    slots = exact.first_slot + torch.arange(keys.shape[2], device=query.device)
    causal = slots[None, :] <= exact.query_slots(query.shape[2])[block, None]
    valid = causal[None] & (slots >= exact.stops[:, None])[:, None]
    if num_sinks := exact.sinks[0].shape[2]:
        sink_slots = exact.starts[:, None] + torch.arange(num_sinks, device=query.device)
        coded = (sink_slots < exact.stops[:, None])[:, None].expand(-1, valid.shape[1], -1)
        keys, values = (torch.cat(both, dim=2) for both in zip(exact.sinks, exact.recent, strict=True))
        valid = torch.cat((coded, valid), dim=-1)
    return exact_attention(query[:, :, block], keys, values, valid, scaling, softcap)
