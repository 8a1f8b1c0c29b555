"""What a model tells its attention function beside queries, keys, values and mask. A word that is not known is an error.

Attention that ignores a keyword computes another model without a word: a soft cap, a learned sink, a bias of positions, a
choice of blocks. So every keyword is on a list here, and what a model declares must arrive.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pqkv_cli.errors import UnsupportedModelError

SOFTCAP, SINKS, CAUSAL = "softcap", "s_aux", "is_causal"
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
    sinks
        Learned extra logit per query head [H], None without one.
    is_causal
        Whether a query sees no later key where no mask says what it sees.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    is_causal: bool = True


@dataclass(frozen=True, slots=True)
class _Declared:
    softcap: float | None
    sinks: str


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
            f"expected no keywords but {SOFTCAP} and {SINKS}: its answers would be those of another model. "
            "Use this model without pqkv"
        )
    softcap, sinks = keywords.get(SOFTCAP), keywords.get(SINKS)
    declared = _declared.get(module)
    if declared is None:
        declared = _declared[module] = _Declared(_declared_softcap(module), _declared_sinks(module))
    if declared.softcap is not None and softcap is None:
        raise _missing(module, f"a soft cap of {declared.softcap:g} (attn_logit_softcapping)", SOFTCAP)
    if declared.sinks and sinks is None:
        raise _missing(module, f"learned sinks ({declared.sinks})", SINKS)
    causal = keywords.get(CAUSAL)
    return AttentionArguments(
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap,
        sinks,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
    )


def _is_known(name: str, value: Any) -> bool:
    return value is None or name in IRRELEVANT or name in (SOFTCAP, SINKS, CAUSAL)


def _declared_softcap(module: nn.Module) -> float | None:
    """Return the soft cap that the module or its config declares, None for none or one without bound."""
    for home in (module, getattr(module, "config", None)):
        found = getattr(home, "attn_logit_softcapping", None)
        if isinstance(found, int | float) and math.isfinite(found):
            return float(found)
    return None


def _declared_sinks(module: nn.Module) -> str:
    """Return the name of the module's learned sinks, empty where it has none."""
    return next((name for name, _ in module.named_parameters(recurse=False) if "sink" in name), "")


def _missing(module: nn.Module, declared: str, keyword: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} declares {declared}, but its attention was called without {keyword!r}; expected both, "
        "because without it the model is another one. Use a version of transformers that `pqkv doctor` lists as tested"
    )
