"""How codebooks are fitted, as frozen data. Knows no tensors and no files."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from pqkv_cli.errors import UsageError
from pqkv_cli.specs import Side

Weighting = Literal["none", "sqrt", "mass", "fisher"]
WEIGHTINGS: tuple[Weighting, ...] = ("none", "sqrt", "mass", "fisher")


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Settings of one fit.

    Attributes
    ----------
    seed
        Source of all randomness; each layer and side derives its own seed from it, so layers fit in any order.
    iterations
        Largest number of k-means steps.
    key_weighting, value_weighting
        What a vector counts for: all the same, the attention mass it received (relative to the head's mean), or its root.
        For values the mass (a sum of squared probabilities) is the factor of a value's error in the output's. For keys it
        is a proxy: a logit's error moves the output by about p (1 - p). ``fisher`` takes what gradients say of either
        (`pqkv_cli.fitting.fit`) where calibration measured them.
    damping
        Added to the relative mass, so that vectors which calibration queries passed over are still coded.
    rotate_values
        Turn the mapped values so that their subspaces carry balanced energy; without it only the metric is applied.

    Raises
    ------
    UsageError
        If a field is out of range.
    """

    seed: int = 0
    iterations: int = 10
    key_weighting: Weighting = "sqrt"
    value_weighting: Weighting = "sqrt"
    damping: float = 0.1
    rotate_values: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UsageError(f"iterations is {self.iterations}; expected at least 1")
        if not 0 <= self.damping < float("inf"):
            raise UsageError(f"damping is {self.damping}; expected a finite number >= 0")
        for name in (self.key_weighting, self.value_weighting):
            if name not in WEIGHTINGS:
                raise UsageError(f"weighting is {name!r}; expected one of {', '.join(WEIGHTINGS)}")

    def weighting(self, side: Side) -> Weighting:
        """Return the weighting of keys or values."""
        return self.key_weighting if side == "keys" else self.value_weighting

    def derived_seed(self, layer: int, side: Side) -> int:
        """Return the seed of one layer's keys or values, the same whatever else is fitted."""
        digest = hashlib.sha256(f"{self.seed}/{layer}/{side}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1
