"""What transformers hands to an attention function, and how ours is registered. An unknown keyword is an error."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pqkv_cli.errors import UnsupportedModelError

SOFTCAP, SINK_LOGITS, CAUSAL = "softcap", "s_aux", "is_causal"
# They describe the call, its outputs or what the mask already holds, and change no attention weight.
IRRELEVANT = frozenset(
    "position_ids cache_position position_embeddings use_cache return_dict num_items_in_batch logits_to_keep "
    "output_hidden_states output_attentions output_router_logits token_type_ids mm_token_type_ids sliding_window "
    "deterministic".split()
)


@dataclass(frozen=True, slots=True)
class AttentionArguments:
    """What attention has to do beside the softmax of scaled products.

    Attributes
    ----------
    scaling
        Factor of the logits.
    softcap
        Bound of the logits' soft cap, None without one.
    sink_logits
        Learned extra logit per query head [H] that no token stands for, None without one.
    is_causal
        Whether a query sees no later key where no mask says what it sees.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    is_causal: bool = True


@dataclass(frozen=True, slots=True)
class _Declared:
    softcap: float | None
    sink_parameter: str


_declared: "WeakKeyDictionary[nn.Module, _Declared]" = WeakKeyDictionary()


def read_arguments(
    module: nn.Module, query: torch.Tensor, scaling: float | None, keywords: Mapping[str, Any]
) -> AttentionArguments:
    """Return what the `keywords` of a call of attention for `module` say.

    Parameters
    ----------
    module
        The attention module.
    query
        [B, H, T, D]; without `scaling` the logits are divided by the root of D.

    Raises
    ------
    UnsupportedModelError
        If a keyword is not known, asks for what is not done, or does not come although the model declares it.
    """
    if unknown := [name for name, value in keywords.items() if not _is_known(name, value)]:
        raise UnsupportedModelError(
            f"{type(module).__name__} hands {', '.join(map(repr, unknown))} to its attention, which pqkv does not understand; "
            f"expected no keywords but {SOFTCAP} and {SINK_LOGITS}: its answers would be those of another model. "
            "Use this model without pqkv"
        )
    softcap, sink_logits = keywords.get(SOFTCAP), keywords.get(SINK_LOGITS)
    declared = _declared.get(module)
    if declared is None:
        declared = _declared[module] = _Declared(_declared_softcap(module), _sink_parameter(module))
    if declared.softcap is not None and softcap is None:
        raise _missing(module, f"a soft cap of {declared.softcap:g} (attn_logit_softcapping)", SOFTCAP)
    if declared.sink_parameter and sink_logits is None:
        raise _missing(module, f"learned sink logits ({declared.sink_parameter})", SINK_LOGITS)
    causal = keywords.get(CAUSAL)
    return AttentionArguments(
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap,
        sink_logits,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
    )


def _is_known(name: str, value: Any) -> bool:
    return value is None or name in IRRELEVANT or name in (SOFTCAP, SINK_LOGITS, CAUSAL)


def _declared_softcap(module: nn.Module) -> float | None:
    """Return the soft cap that the module or its config declares, None for none or one without bound."""
    for home in (module, getattr(module, "config", None)):
        found = getattr(home, "attn_logit_softcapping", None)
        if isinstance(found, int | float) and math.isfinite(found):
            return float(found)
    return None


def _sink_parameter(module: nn.Module) -> str:
    """Return the name of the module's learned sink logits, empty where it has none."""
    return next((name for name, _ in module.named_parameters(recurse=False) if "sink" in name), "")


def _missing(module: nn.Module, declared: str, keyword: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} declares {declared}, but its attention was called without {keyword!r}; expected both, "
        "because without it the model is another one. Use a version of transformers that `pqkv doctor` lists as tested"
    )


def register(name: str, function: Callable[..., Any]) -> None:
    """Make `function` known to transformers as the attention `name`, with `causal_mask`; harmless when repeated."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, causal_mask)


def causal_mask(*, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask of sdpa; None only where one query sees all keys, or as many queries as keys are causal.

    sdpa also leaves it out for the first tokens of a longer, static cache. But Gemma 4 drops queries after its mask is made, so
    that fewer queries than keys without a mask must mean the last ones.
    """
    skip = kwargs.pop("allow_is_causal_skip", True) and q_length in (1, kv_length)
    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=skip, **kwargs)
    return mask


def attention_of(model: Any) -> str:
    """Return the name of the attention that `model` uses."""
    return str(model.config._attn_implementation)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Let `model` use the attention `name` while the context lasts."""
    before = attention_of(model)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


_QUERY_BLOCK = 256  # queries scored at a time, so that logits stay small in a long prompt


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    arguments: AttentionArguments,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend with `query` [B, H, Tq, D] to `key` and `value` [B, Hkv, T, D], as sdpa masks them; return [B, Tq, H, D].

    Without a mask the queries are those of the last tokens where attention is causal.
    """
    scale, softcap, sink_logits = arguments.scaling, arguments.softcap, arguments.sink_logits
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is None and arguments.is_causal and 1 < num_queries < num_keys:  # sdpa would take them for the first
        slots = torch.arange(num_keys, device=query.device)
        attention_mask = (slots <= slots[num_keys - num_queries :, None])[None, None]
    if softcap is None and sink_logits is None:
        output: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, is_causal=arguments.is_causal
        )[0]
        return output
    if attention_mask is None and not arguments.is_causal:
        attention_mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=query.device)
    mask = _additive(attention_mask, num_queries, num_keys, query.device)
    blocks = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        blocks.append(_attend(query[:, :, rows], key, value, mask[:, :, rows], scale, softcap, sink_logits))
    return torch.cat(blocks, dim=2).transpose(1, 2).to(query.dtype).contiguous()


def sink_share(lse: torch.Tensor, sink_logits: torch.Tensor) -> torch.Tensor:
    """Return what is left to the tokens when an extra logit joins their softmax.

    Parameters
    ----------
    lse
        Log-sum-exp of the tokens' logits, [B, H, T] fp32.
    sink_logits
        Extra logit per query head, [H]; it has no value, so outputs shrink by the returned factor.

    Returns
    -------
    torch.Tensor
        [B, H, T] fp32 in 0..1.
    """
    return torch.sigmoid(lse - sink_logits.float().view(1, -1, 1))


def _additive(mask: torch.Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Return what is added to the logits, [B or 1, 1 or H, Tq, T] fp32.

    Without a mask one query sees all, and as many queries as keys are causal.
    """
    if mask is None:
        last = torch.arange(num_queries, device=device) if num_queries > 1 else torch.tensor([num_keys], device=device)
        mask = (torch.arange(num_keys, device=device) <= last[:, None])[None, None]
    if mask.dtype != torch.bool:
        return mask.float()
    # The smallest number rather than minus infinity: a row that sees nothing gives numbers, which nobody reads.
    return torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    logits = (torch.matmul(grouped, key.float()[:, :, None].mT) * scaling).flatten(1, 2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + mask
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse[..., None]).unflatten(1, (key.shape[1], -1))
    output = torch.matmul(weights, value.float()[:, :, None]).flatten(1, 2)
    return output if sink_logits is None else output * sink_share(lse, sink_logits)[..., None]
