"""The weights that make queries, keys, values and the output of an attention module. Knows names and shapes of modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.specs import LayerGeometry

_OUTPUTS = ("o_proj", "out_proj", "dense")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = "qkv_proj"  # rows of queries, then keys, then values
_QUERY_NORMS, _KEY_NORMS = ("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")


@dataclass(frozen=True, slots=True)
class Projections:
    """Weights and, where there are any, biases of one attention module, as views that can be written to.

    `output` holds the weight alone: its bias is added after the heads. Norms are those between projection and rotary
    embedding, None where there are none.
    """

    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    output: tuple[torch.Tensor]
    query_norm: nn.Module | None
    key_norm: nn.Module | None


def projections_of(module: nn.Module, layer: LayerGeometry, index: int) -> Projections:
    """Return the projections of an attention module.

    Raises
    ------
    UnsupportedModelError
        If they are not plain linear layers of known names and shapes, or norms are not of a kind that scales pass through.
    """
    children = dict(module.named_children())
    output = next((children[name] for name in _OUTPUTS if name in children), None)
    sizes = [layer.num_heads * layer.head_dim, *[layer.num_kv_heads * layer.head_dim] * 2]
    if all(name in children for name in _SEPARATE):
        rows = [_rows(children[name], name, size, index) for name, size in zip(_SEPARATE, sizes, strict=True)]
    elif _FUSED in children:
        fused = _rows(children[_FUSED], _FUSED, sum(sizes), index)
        rows = [tuple(parts) for parts in zip(*(tensor.split(sizes) for tensor in fused), strict=True)]
    else:
        raise _unknown(index, f"the children {', '.join(children) or 'none'}", f"{', '.join(_SEPARATE)} or {_FUSED}")
    if not isinstance(output, nn.Linear) or tuple(output.weight.shape[1:]) != (sizes[0],):
        raise _unknown(index, "no linear output projection over all heads", f"one of {', '.join(_OUTPUTS)}")
    norms = norms_of(module, index)
    query_norm, key_norm = norms if norms else (None, None)
    return Projections(rows[0], rows[1], rows[2], (output.weight.detach(),), query_norm, key_norm)


def norms_of(module: nn.Module, index: int) -> Sequence[nn.Module]:
    """Return the norms of queries and keys of an attention module, none where it has none.

    Raises
    ------
    UnsupportedModelError
        If a norm is of a kind through which scales do not pass: without a factor per channel, or with an offset.
    """
    children = dict(module.named_children())
    found = {name: child for name, child in children.items() if "norm" in name.lower()}
    if not found:
        return ()
    names = [next((n for n in known if n in found), "") for known in (_QUERY_NORMS, _KEY_NORMS)]
    if not all(names) or len(found) != len(names):
        raise _unknown(index, f"the norms {', '.join(found)}", "norms of queries and keys with a factor per channel, or none")
    for name in names:
        _check_factor(found[name], name, index)
    return [found[name] for name in names]


def _check_factor(norm: nn.Module, name: str, index: int) -> None:
    """Refuse a norm that does not multiply with its weight: entries of one have root mean square one and come out as it."""
    weight: Any = getattr(norm, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 1:
        with torch.no_grad():
            found = norm(torch.ones_like(weight)[None])[0]
        if torch.allclose(found.float(), weight.float(), rtol=1e-2, atol=1e-3):
            return
    raise _unknown(index, f"the norm {name} of type {type(norm).__name__}", "one that multiplies with a factor per channel")


def _rows(module: nn.Module, name: str, size: int, index: int) -> tuple[torch.Tensor, ...]:
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point() or module.weight.shape[0] != size:
        raise _unknown(index, f"{name} of type {type(module).__name__}", f"a floating-point linear layer with {size} outputs")
    return tuple(t.detach() for t in (module.weight, module.bias) if t is not None)


def _unknown(index: int, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {index} has {found}; expected {expected}; outliers cannot be put into this architecture without changing it"
    )
