"""Angles as factors of planes: what rotary embedding multiplies a pair of channels by, as a complex number. Knows no codes."""

import torch

from pqkv_kernels.angles import Angles, PageAngles
from pqkv_kernels.planes import Planes


def plane_factors(angles: Angles, planes: Planes) -> torch.Tensor:
    """Return complex factors [..., Hkv, N, D / 2] of `angles` [..., N, R / 2]: one where a plane is not rotated."""
    assert planes.pairs is not None  # angles are given only for keys coded before rotary embedding
    factors = torch.nn.functional.pad(torch.complex(*angles), (0, 1), value=1.0)
    return (
        factors[..., None, :, :]
        .expand(*factors.shape[:-2], len(planes.pairs), -1, -1)
        .gather(-1, planes.pairs[:, None].expand(*factors.shape[:-2], -1, factors.shape[-2], -1))
    )


def step_factors(angles: PageAngles, planes: Planes) -> torch.Tensor:
    """Return the factors [Hkv, D / 2, 64] inside a page, kept with the planes as long as the angles are the same."""
    cos, factors = planes.steps.get("kept", (None, None))
    if cos is not angles.step[0] or factors is None:
        factors = plane_factors(angles.step, planes).mT.contiguous()
        planes.steps["kept"] = (angles.step[0], factors)
    return factors
