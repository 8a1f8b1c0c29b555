"""Cosines and sines inside a page as the kernel of decode attention reads them. Knows angles and tables; no kernel."""

import torch

from pqkv_kernels.angles import PageAngles
from pqkv_kernels.device_tables import DeviceTables

FACTOR = 2.0**14
"""By how much they are larger where they meet numbers smaller by `SUBNORMAL`: products are neither subnormal nor too large."""


def step_factors(angles: PageAngles, tables: DeviceTables) -> torch.Tensor:
    """Return cosines and sines inside a page as `key_operands` reads them, kept as long as the angles are the same.

    [Hkv, 2, BP / 8, 2, 16 words, 4 planes, 4 tokens], even planes and then odd ones, in the type of the tables' entries;
    float16 as words of 64 bits, one for the four tokens; times `FACTOR` for `NibbleTables`.
    """
    kept, key = tables.planes.steps, f"device.{tables.entries.dtype}"
    step, factors = kept.get(key, (None, None))
    if step is not angles.step[0] or factors is None:
        assert tables.pairs is not None  # angles are given only for keys coded before rotary embedding
        both = [torch.nn.functional.pad(t, (0, 1), value=v) for t, v in zip(angles.step, (1.0, 0.0), strict=True)]
        found = torch.stack([t[:, tables.pairs.long()] for t in both])  # [2, 64, Hkv, BP]
        found = found.unflatten(-1, (-1, 4, 2)).unflatten(1, (16, 4))  # [2, 16, 4, Hkv, BP / 8, 4, 2]
        found = found.permute(3, 0, 4, 6, 1, 5, 2).contiguous()
        found = found * FACTOR if tables.nibbles else found
        factors = found if tables.entries.dtype == torch.float32 else found.half().view(torch.int64)
        kept[key] = (angles.step[0], factors)
    return factors
