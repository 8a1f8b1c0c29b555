"""What the numbers in an artifact's tensors must satisfy. Knows no files."""

from collections.abc import Mapping

import torch

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.tensors import TensorSpec, coded_sides
from pqkv_kernels.layout import RotaryLayout

# With columns of unit length; beyond it undoing the map in fp32 leaves no correct digit.
MAX_CONDITION = 1e7


def spec_faults(expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> list[str]:
    """Return what is missing, surplus, or of another type or shape."""
    faults = [f"tensor {name} is missing; expected {spec}" for name, spec in expected.items() if name not in found]
    faults += [f"tensor {name[:100]!a} is surplus; no codec of the header uses it" for name in found if name not in expected]
    for name, spec in expected.items():
        if name in found and found[name] != spec:
            faults.append(f"tensor {name} has the wrong type or shape: {found[name]}; expected {spec}")
    return faults


def value_faults(header: Header, tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return the faults in the numbers of `tensors`, and the fp32 inverse of every map of matrices."""
    infinite = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    faults = [f"tensor {name} holds a value that is not finite" for name in infinite]
    inverses: dict[str, torch.Tensor] = {}
    for index, _, prefix, codec in coded_sides(header):
        faults += _permutation_faults(f"{prefix}.permutation", tensors[f"{prefix}.permutation"])
        name = f"{prefix}.map"
        if name in infinite:
            continue
        if codec.map == "scale":
            rotary = header.geometry[index].rotary if codec.key_space == "pre_rope" else None
            faults += _scale_faults(name, tensors[name], rotary)
        elif codec.map in ("matrix", "blocks"):
            inverses[name], singular = _inverse(tensors[name])
            if singular:
                faults.append(f"tensor {name} is singular for the heads {singular}; expected matrices that can be undone")
    return faults, inverses


def _permutation_faults(name: str, permutation: torch.Tensor) -> list[str]:
    dim = permutation.shape[-1]
    wrong = (permutation.sort(dim=-1).values != torch.arange(dim)).any(dim=-1)
    if not bool(wrong.any()):
        return []
    heads = wrong.nonzero().flatten().tolist()
    return [f"tensor {name} is not a permutation of 0..{dim - 1} for the heads {heads}"]


def _scale_faults(name: str, scale: torch.Tensor, rotary: RotaryLayout | None) -> list[str]:
    if not bool(torch.isfinite(scale.reciprocal()).all()):
        return [f"tensor {name} is zero, or too near to it to be undone; expected scales with a finite reciprocal"]
    if rotary is not None:
        first, second = (list(channels) for channels in zip(*rotary.pairs(), strict=True))
        if not torch.equal(scale[:, first], scale[:, second]):
            return [f"tensor {name} differs within a rotary pair; such a scale does not commute with RoPE"]
    return []


def _inverse(matrices: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Return the fp32 inverse of [Hkv, D, D] or [Hkv, D / 2, 2, 2] and the heads whose matrix has none worth the name.

    Columns are brought to unit length before the condition is judged: their lengths follow the scale of the model's own
    channels, outliers included, and say nothing about how well the map can be undone.
    """
    wide = matrices.double()
    inverse, info = torch.linalg.inv_ex(wide)
    lengths = wide.norm(dim=-2)
    condition = (inverse * lengths[..., None]).norm(dim=(-2, -1)) * matrices.shape[-1] ** 0.5
    singular = (info != 0) | ~torch.isfinite(inverse.float()).all(dim=(-2, -1)) | ~(condition <= MAX_CONDITION)
    return inverse.float(), singular.view(len(matrices), -1).any(dim=1).nonzero().flatten().tolist()
