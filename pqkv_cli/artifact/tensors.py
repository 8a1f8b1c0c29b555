"""Which tensors an artifact holds, from its header alone, and how they become `CodecTables`. Knows no files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from pqkv_cli.artifact.schema import Header
from pqkv_cli.errors import ArtifactError
from pqkv_cli.specs import SIDES, CodecSpec, Side
from pqkv_kernels.tables import CodecTables

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
        if found.layout != codec.layout or found.rotary != rotary:
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
        )
        layers[index][side] = tables if device.type == "cpu" else tables.to(device)
    return tuple(layer or None for layer in layers)
