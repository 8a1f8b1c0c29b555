"""Which tensors an artifact holds, what their numbers must satisfy, and how they become `CodecTables`. Knows no files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from pqkv_cli.artifact.schema import Header
from pqkv_cli.errors import ArtifactError
from pqkv_cli.specs import SIDES, CodecSpec, Side
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.tables import CodecTables

LayerTables = Mapping[Side, CodecTables]
DTYPES: Mapping[str, torch.dtype] = {"F16": torch.float16, "F32": torch.float32, "I16": torch.int16}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of one tensor; `dtype` is the safetensors word."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


def coded_sides(header: Header) -> Iterator[tuple[int, Side, str, CodecSpec]]:
    """Yield ``(layer, side, tensor name prefix, codec)`` of everything that is coded."""
    for index, layer in enumerate(header.plan.layers):
        for side in SIDES:
            codec = header.plan.codec(index, side)
            if codec is not None:
                yield index, side, f"layers.{index}.{side}.{getattr(layer, side)}", codec


def expected_tensors(header: Header) -> dict[str, TensorSpec]:
    """Return the tensors that `header` calls for, by name in sorted order."""
    expected: dict[str, TensorSpec] = {}
    for index, _, prefix, codec in coded_sides(header):
        num_heads, dim = header.geometry[index].num_kv_heads, header.geometry[index].head_dim
        for stage, group_index, group, _, _ in codec.layout.spans():
            shape = (num_heads, group.num_subspaces, group.num_centroids, group.subspace_dim)
            expected[f"{prefix}.codebooks.{stage}.{group_index}"] = TensorSpec("F16", shape)
        if codec.map != "identity":
            shapes = {"matrix": (num_heads, dim, dim), "blocks": (num_heads, dim // 2, 2, 2), "scale": (num_heads, dim)}
            expected[f"{prefix}.map"] = TensorSpec("F32", shapes[codec.map])
        expected[f"{prefix}.permutation"] = TensorSpec("I16", (num_heads, dim))
        if codec.predicted:
            expected[f"{prefix}.prediction"] = TensorSpec("F16", (num_heads, dim, dim))
    return dict(sorted(expected.items()))


def tensor_bytes(header: Header) -> int:
    """Return the bytes of all tensors that `header` calls for."""
    return sum(spec.num_bytes for spec in expected_tensors(header).values())


def flatten_tables(header: Header, tables: Sequence[LayerTables | None]) -> dict[str, torch.Tensor]:
    """Return the tensors of `tables` under their names, on the CPU and contiguous.

    Codebooks and maps keep their type, permutations become int16; a missing permutation is written as the identity.

    Raises
    ------
    ArtifactError
        If `tables` do not have the layers, sides or stages that the header names.
    """
    if len(tables) != len(header.geometry):
        raise ArtifactError(f"tables are given for {len(tables)} layers; expected {len(header.geometry)}, as the header has")
    surplus = [i for i, layer in enumerate(tables) if layer is not None and header.plan.layers[i].dense_reason]
    if surplus:
        raise ArtifactError(f"tables are given for the layers {surplus}, which the header leaves dense; expected None")
    tensors: dict[str, torch.Tensor] = {}
    for index, side, prefix, codec in coded_sides(header):
        layer = tables[index]
        if layer is None or side not in layer:
            raise ArtifactError(f"layer {index} has no tables for its {side}; fit the layer again")
        found, rotary = layer[side], header.geometry[index].rotary if codec.key_space == "pre_rope" else None
        if found.layout != codec.layout or found.rotary != rotary or (found.prediction is not None) != codec.predicted:
            raise ArtifactError(f"layer {index} has tables for its {side} that are not of the codec the header names")
        tensors |= _flatten_side(prefix, found)
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _flatten_side(prefix: str, tables: CodecTables) -> dict[str, torch.Tensor]:
    named = {
        f"{prefix}.codebooks.{stage}.{index}": tables.codebooks[stage][index] for stage, index, _, _, _ in tables.layout.spans()
    }
    if tables.map is not None:
        named[f"{prefix}.map"] = tables.map
    permutation = tables.permutation
    if permutation is None:
        permutation = torch.arange(tables.layout.head_dim).expand(tables.num_heads, -1)
    named[f"{prefix}.permutation"] = permutation.to(torch.int16)
    if tables.prediction is not None:
        named[f"{prefix}.prediction"] = tables.prediction
    return named


def assemble_tables(
    header: Header, tensors: Mapping[str, torch.Tensor], inverses: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[LayerTables | None, ...]:
    """Return the tables of every layer on `device`, None where it is dense; an identity permutation becomes None."""
    layers: list[dict[Side, CodecTables]] = [{} for _ in header.geometry]
    for index, side, prefix, codec in coded_sides(header):
        permutation = tensors[f"{prefix}.permutation"]
        moves = bool((permutation != torch.arange(permutation.shape[-1])).any())
        tables = CodecTables(
            codec.layout,
            tuple(
                tuple(tensors[f"{prefix}.codebooks.{stage}.{group}"] for group in range(len(row)))
                for stage, row in enumerate(codec.layout.stages)
            ),
            tensors.get(f"{prefix}.map"),
            permutation if moves else None,
            header.geometry[index].rotary if codec.key_space == "pre_rope" else None,
            inverses.get(f"{prefix}.map"),
            tensors.get(f"{prefix}.prediction"),
        )
        layers[index][side] = tables if device.type == "cpu" else tables.to(device)
    return tuple(layer or None for layer in layers)


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
