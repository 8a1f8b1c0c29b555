"""Small synthetic calibration samples."""

from dataclasses import replace

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.specs import CodecSpec, CompressionPlan, LayerGeometry, LayerPlan, ModelGeometry
from pqkv_kernels.format.layout import CodeLayout, RotaryLayout

HEADS, DIM, POINTS = 2, 8, 700
LAYER = LayerGeometry(4, HEADS, DIM, RotaryLayout(DIM))
KEYS = CodecSpec(CodeLayout.uniform(DIM, 2, 5), "blocks", "pre_rope")
VALUES = CodecSpec(CodeLayout.uniform(DIM, 4, 4), "matrix")
SPECS = {"keys": KEYS, "values": VALUES}


def samples(seed: int, dim: int = DIM) -> LayerSamples:
    g = torch.Generator().manual_seed(seed)
    spread = torch.rand(HEADS, 1, dim, generator=g) + 0.1
    queries = torch.randn(HEADS, 50, dim, generator=g).double() * torch.rand(dim, generator=g)
    met = torch.randn(HEADS, dim // 2, 3, 2, generator=g).double()
    output = torch.randn(HEADS, 40, dim, generator=g).double()
    return LayerSamples(
        keys=(torch.randn(HEADS, POINTS, dim, generator=g) * spread).half(),
        values=torch.randn(HEADS, POINTS, dim, generator=g).half(),
        positions=torch.arange(POINTS, dtype=torch.int32),
        attention_mass=torch.rand(HEADS, POINTS, generator=g) ** 4,
        query_moment=queries.mT @ queries / 50,
        pair_moment=met.mT @ met,
        output_gram=output.mT @ output,
    )


class Store:
    """Calibration samples made up on the spot; `fail_at` stands for a kill."""

    def __init__(self, seed: int = 0, fail_at: int | None = None) -> None:
        self.seed, self.fail_at, self.asked = seed, fail_at, []

    def layer(self, index: int) -> LayerSamples:
        if index == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(index)
        return samples(100 * self.seed + index)


def plan(num_layers: int = 3, dense: int | None = 1) -> tuple[ModelGeometry, CompressionPlan]:
    layers = [LayerPlan("k", "v") for _ in range(num_layers)]
    geometry = [LAYER] * num_layers
    if dense is not None:
        layers[dense] = LayerPlan(dense_reason="sliding window")
        geometry[dense] = replace(LAYER, dense_reason="sliding window")
    return ModelGeometry("test", tuple(geometry), 512), CompressionPlan({"k": KEYS, "v": VALUES}, tuple(layers))
