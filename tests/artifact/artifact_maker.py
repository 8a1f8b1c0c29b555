"""Makes tiny artifacts, and broken ones whose hash is right."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from pqkv_cli.artifact.schema import CalibrationInfo, Header, LayerError, ModelInfo, canonical_json
from pqkv_cli.artifact.store import content_sha256, read_data, read_head
from pqkv_cli.artifact.tensors import LayerTables
from pqkv_cli.specs import CacheSpec, CodecSpec, CompressionPlan, LayerGeometry, LayerPlan, Side
from pqkv_kernels.format.layout import CodeGroup, CodeLayout, RotaryLayout
from pqkv_kernels.format.tables import CodecTables

HEADS, DIM = 2, 8
ROTARY = RotaryLayout(DIM)


def make_header() -> Header:
    attention = LayerGeometry(4, HEADS, DIM, ROTARY)
    uneven = CodeLayout(((CodeGroup(2, 2, 2), CodeGroup(1, 3, 4)), (CodeGroup(4, 1, 2),)))
    codecs = {
        "k2": CodecSpec(CodeLayout.uniform(DIM, 4, 2), "scale", "pre_rope"),
        "k3": CodecSpec(CodeLayout.uniform(DIM, 4, 2), "blocks", "pre_rope"),
        "v2": CodecSpec(uneven, "matrix"),
        "v1": CodecSpec(CodeLayout.uniform(DIM, 2, 3), "identity"),
    }
    error = LayerError((0.25, 0.125), (1e-07, 0.1))
    return Header(
        model=ModelInfo("demo", "llama", "c" * 64, "d" * 64),
        geometry=(attention, attention, LayerGeometry(4, HEADS, DIM, None, "sliding window")),
        plan=CompressionPlan(
            codecs,
            (LayerPlan("k2", "v2"), LayerPlan("k3", "v1"), LayerPlan(dense_reason="sliding window")),
            CacheSpec(4, 64),
        ),
        relative_error=(error, error, None),
        calibration=CalibrationInfo("e" * 64, 32, 4, 512, 16384, 0),
        recipe_sha256="a" * 64,
        pqkv_version="0.1.0",
        kernels={"decode": {"num_warps": 4, "backend": "triton", "pipelined": True}},
    )


def make_tables(header: Header, seed: int = 0) -> list[LayerTables | None]:
    generator = torch.Generator().manual_seed(seed)
    layers: list[LayerTables | None] = []
    for index, geometry in enumerate(header.geometry):
        layer: dict[Side, CodecTables] = {}
        for side in ("keys", "values"):
            codec = header.plan.codec(index, side)
            if codec is not None:
                layer[side] = _tables(codec, geometry, generator)
        layers.append(layer or None)
    return layers


def _tables(codec: CodecSpec, geometry: LayerGeometry, generator: torch.Generator) -> CodecTables:
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    books = tuple(
        tuple(torch.randn(heads, g.num_subspaces, g.num_centroids, g.subspace_dim, generator=generator).half() for g in stage)
        for stage in codec.layout.stages
    )
    scale = (torch.rand(heads, dim // 2, generator=generator) + 0.5).repeat(1, 2)
    matrix = torch.randn(heads, dim, dim, generator=generator) + 4 * torch.eye(dim)
    blocks = torch.randn(heads, dim // 2, 2, 2, generator=generator) + 4 * torch.eye(2)
    permutation = torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)]).to(torch.int16)
    return CodecTables(
        codec.layout,
        books,
        {"identity": None, "scale": scale, "blocks": blocks, "matrix": matrix}[codec.map],
        None if codec.map == "identity" else permutation,
        geometry.rotary if codec.key_space == "pre_rope" else None,
    )


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pqkv"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_signed(path: Path, document: object, tensors: dict[str, torch.Tensor]) -> None:
    """Write an artifact without asking the laws, its hash right as far as there can be one."""
    text = canonical_json(document)
    if isinstance(document, dict) and "sha256" in document:
        unsigned = canonical_json({**document, "sha256": ""})
        blob = io.BytesIO(save(tensors, metadata={"pqkv": unsigned}))
        head = read_head(blob, blob.getbuffer().nbytes)
        with contextlib.suppress(KeyError):  # a tensor of a type without a place in the format
            text = canonical_json({**document, "sha256": content_sha256(unsigned, head, read_data(blob, head))})
    path.write_bytes(save(tensors, metadata={"pqkv": text}))


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to header and tensors of the artifact at `path` and sign it anew."""
    document, tensors = read_parts(path)
    change(document, tensors)
    write_signed(path, document, tensors)
