"""Look-up tables for codes of four bits, small enough for registers: sixteen bytes for each component of a plane.

Knows planes; no kernel. `triton_nibbles` reads them.
"""

from dataclasses import dataclass

import torch

from pqkv_kernels.planes import Planes

SUBNORMAL = 2.0**24
"""By how much a float16 whose bits are a small number is smaller than the number."""
_ENTRIES = 16
_LARGEST_BYTE, _LARGEST_SUM = 127, 255
_LARGEST_NUMBER = 1023  # which a subnormal float16 holds exactly


@dataclass(frozen=True, slots=True)
class NibbleTables:
    """Tables of bytes whose sums over the stages are bytes, too.

    Attributes
    ----------
    entries
        [Hkv, stages, D / 2, 4] int64: bytes for the codes 0 to 7 and 8 to 15 of the first component, then of the second.
    offset
        What is to be added to a plane's sums, [Hkv, D / 2, 2] fp32, whole numbers from -1,023 to 1,023.
    step
        What one is worth, [Hkv, D / 2] fp32.
    """

    entries: torch.Tensor
    offset: torch.Tensor
    step: torch.Tensor


def planes_per_code(planes: Planes) -> int:
    """Return how many planes each code stands for where all have four bits and all stages are alike, else 0."""
    forms = {(part.group.nbits, part.planes_per_code) for stage in planes.stages for part in stage.groups}
    alike = len(forms) == 1 and all(len(stage.groups) == 1 for stage in planes.stages)
    nbits, count = forms.pop()
    return count if alike and nbits == 4 else 0


def nibble_tables(planes: Planes) -> NibbleTables:
    """Return tables for `planes` whose codes have four bits, in the smallest steps that bytes and their sums allow."""
    rows = torch.stack([stage.first_row for stage in planes.stages]).long()  # [stages, Hkv, D / 2, 1]
    rows = rows + torch.arange(_ENTRIES, device=rows.device)
    values = torch.stack(
        [stage.entries.view(torch.float32).view(-1, 2)[at] for stage, at in zip(planes.stages, rows, strict=True)]
    )  # [stages, Hkv, D / 2, 16, 2]
    step = _steps(values)
    numbers = (values / step[..., None, None]).round()
    lowest = numbers.amin(3)
    found = (numbers - lowest[:, :, :, None]).to(torch.uint8)
    entries = found.permute(1, 0, 2, 4, 3).contiguous().view(torch.int64).flatten(-2)
    return NibbleTables(entries, lowest.sum(0), step)


def _steps(values: torch.Tensor) -> torch.Tensor:
    """Return `NibbleTables.step`; rounding may widen the range of every stage by one, and move what it adds by a half."""
    stages = len(values)
    ranges = values.amax(3) - values.amin(3)
    widest = ranges.amax((0, -1)) / (_LARGEST_BYTE - 1)
    summed = ranges.sum(0).amax(-1) / (_LARGEST_SUM - stages)
    farthest = values.abs().amax((3, 4)).sum(0) / (_LARGEST_NUMBER - stages)
    return torch.stack((widest, summed, farthest)).amax(0).clamp(min=torch.finfo(torch.float32).tiny)
