"""TurboQuant (Zandieh et al., ICLR 2026, arXiv 2504.19874), the variant for mean squared error. Needs no calibration.

A vector is divided by its norm and turned by a random rotation, after which every coordinate has the same known density (that
of a random point on the sphere), so one set of Lloyd-Max levels serves all of them (algorithm 1, theorem 1). The norm is
kept in half precision. Keys are coded after rotary embedding. Left out: the one-bit sketch of the residual (algorithm 2),
which spends a bit on removing a bias and has been found to hurt caches, and the split of channels for rates such as 2.5.
"""

from collections.abc import Sequence

import torch

from pqkv_cli.baselines.levels import nearest_level, sphere_levels
from pqkv_cli.baselines.protocol import ExactTokens, Grouping, Payload, RivalCodec, Samples, unsupported
from pqkv_cli.specs import KeySpace, Side

LEAST_DIM = 3
NORM_BITS = 16


class SphereLevels(RivalCodec):
    """A norm and the nearest levels of the turned direction; `rotation` [D, D] comes from a seed and is not stored."""

    def __init__(self, rotation: torch.Tensor, levels: torch.Tensor, nbits: int) -> None:
        super().__init__(Grouping("token"), ExactTokens(), None, nbits + NORM_BITS / len(rotation))
        self._rotation, self._levels, self._nbits = rotation, levels, nbits

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        norm = x.norm(dim=-1)
        turned = x / norm.clamp(min=torch.finfo(torch.float32).tiny)[..., None] @ self._rotation.to(x.device).mT
        return Payload(nearest_level(turned, self._levels.to(x.device)), self._nbits, (norm.half(),))

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        device = payload.codes.device
        direction = self._levels.to(device)[payload.codes.long()] @ self._rotation.to(device)
        return direction * payload.scales[0].float()[..., None]


class TurboQuant:
    """TurboQuant at an integer rate; one rotation per side and width serves all layers and heads."""

    name = "turboquant"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded as the cache holds them."""
        return "post_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Return one codec per layer; only shapes and the seed matter."""
        made: dict[int, RivalCodec] = {}
        for dim in {layer.vectors.shape[2] for layer in layers}:
            if dim < LEAST_DIM:
                raise unsupported(self.name, f"head_dim {dim}", f"at least {LEAST_DIM} channels to turn")
            made[dim] = SphereLevels(random_rotation(dim, seed), sphere_levels(dim, 1 << self.nbits), self.nbits)
        return [made[layer.vectors.shape[2]] for layer in layers]


def random_rotation(dim: int, seed: int) -> torch.Tensor:
    """Return a uniformly random orthogonal matrix [D, D] fp32 (QR of a normal one, signs fixed)."""
    normal = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    rotation: torch.Tensor = (q * r.diagonal().sign()).float()
    return rotation
