"""Code layouts of the rates that `--bits` names. Integers only: knows no torch, no data and no files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pqkv_cli.errors import UsageError
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import MOST_JOINT_NBITS, CodeGroup, CodeLayout

# --bits N: channels per subspace. Tables of 64 to 1,024 entries where that can be: more need more calibration vectors than
# are kept, fewer leave out what the channels of a wider subspace have in common.
RATES: Mapping[float, int] = {5: 2, 4.5: 2, 4: 2, 3.5: 2, 3: 2, 2.5: 4, 2: 4, 1.5: 4, 1.25: 8, 1: 8, 0.75: 16, 0.5: 16}

MOST_NBITS: Final = 10

# Profile speed, --bits N: channels per subspace, and bits of each additive stage of its codes. Tables of up to 16 entries can
# be read without bank conflicts; what one cannot follow, sums of two or three of them can (`reference.merged_stages`).
SPEED_RATES: Mapping[float, tuple[int, tuple[int, ...]]] = {
    5: (2, (4, 4, 2)),
    4: (2, (4, 4)),
    3.5: (2, (4, 3)),
    3: (2, (4, 2)),
    2.5: (4, (4, 4, 2)),
    2: (4, (4, 4)),
    1.5: (4, (4, 2)),
    1: (8, (4, 4)),
    0.75: (8, (4, 2)),
    0.5: (16, (4, 4)),
}
MOST_SPEED_NBITS: Final = 4

# Bits of the code of a whole vector. More entries than 1,024 would need more calibration vectors than are kept by default.
PROTOTYPE_NBITS = (0, 8, 10)
USUAL_PROTOTYPE_NBITS: Final = 8

TABLE_NUMBER_BYTES: Final = 2  # codebooks are kept in float16

Profile = Literal["quality", "speed"]


@dataclass(frozen=True, slots=True)
class CodeStyle:
    """What codes of a rate are made of.

    Attributes
    ----------
    profile
        Which tables.
    prototype_bits
        Bits of the code of the whole vector; None: what the profile has.
    key_map, value_map
        Names of what is applied to keys and values before (`specs.CODEC_MAPS`); None: what is usual for them.
    predict_values
        Whether values are predicted from their keys, and only the rest is coded.
    """

    profile: Profile = "quality"
    prototype_bits: int | None = None
    key_map: str | None = None
    value_map: str | None = None
    predict_values: bool = False

    @property
    def whole_vector_bits(self) -> int:
        """Most bits of the code of the whole vector; a table of whole vectors is no small one, so ``speed`` has none."""
        if self.prototype_bits is None:
            return USUAL_PROTOTYPE_NBITS if self.profile == "quality" else 0
        return self.prototype_bits

    @property
    def rates(self) -> Iterable[float]:
        """The rates there are."""
        return RATES if self.profile == "quality" else SPEED_RATES

    def subspace_dim(self, bits: float) -> int:
        """Return the channels that a code of a part covers at one of the `rates`."""
        return RATES[bits] if self.profile == "quality" else SPEED_RATES[bits][0]

    def first_nbits(self, bits: float) -> tuple[int, ...]:
        """Return the bits of every stage of parts but the last, which gets what is left at one of the `rates`."""
        return () if self.profile == "quality" else SPEED_RATES[bits][1][:-1]

    def most_nbits(self, bits: float) -> int:
        """Return the most bits of a code of the last stage at one of the `rates`."""
        if self.profile == "quality":
            return MOST_NBITS
        return min(MOST_SPEED_NBITS, MOST_JOINT_NBITS - sum(self.first_nbits(bits)))


USUAL_STYLE: Final = CodeStyle()


def key_layout(bits: float, head_dim: int, style: CodeStyle = USUAL_STYLE) -> CodeLayout:
    """Return the code layout of ``--bits`` for keys before rotary embedding.

    Where a code covers one rotary pair, no grouping can balance the pairs' energies, so the bits are spread instead: codes (of
    the last stage) of three neighbouring sizes, for pairs with much, usual and little energy.

    Raises
    ------
    UsageError
        As `rate_layout`.
    """
    layout = rate_layout(bits, head_dim, style)
    count = head_dim // 2
    lower, more = divmod(sum(group.num_subspaces * group.nbits for group in layout.stages[-1]), count)
    upwards = 2 * more >= count
    if style.subspace_dim(bits) != 2 or lower + 1 + upwards > style.most_nbits(bits) or lower + upwards < 2:
        return layout
    some = round(count * 3 / 16)
    if upwards:
        spread = ((some, lower + 2), (more - 2 * some, lower + 1), (count - more + some, lower))
    else:
        spread = ((more + some, lower + 1), (count - more - 2 * some, lower), (some, lower - 1))
    return CodeLayout((*layout.stages[:-1], tuple(CodeGroup(codes, nbits, 2) for codes, nbits in spread if codes)))


def rate_layout(bits: float, head_dim: int, style: CodeStyle = USUAL_STYLE) -> CodeLayout:
    """Return the code layout of ``--bits`` for heads of `head_dim` channels, exactly at that rate.

    With prototypes a code of the whole vector comes first (of fewer bits where vectors are short), and the codes of its parts
    share what is left as evenly as whole bits allow; with profile ``speed`` those of the last stage do.

    Raises
    ------
    UsageError
        If the rate is unknown or its subspaces do not divide `head_dim`.
    """
    if bits not in style.rates:
        raise UsageError(
            f"--bits is {bits:g}; expected one of {rate_names(style.rates)} with profile {style.profile}, or --budget {bits:g} "
            "for a mean of them"
        )
    subspace_dim, nbits = style.subspace_dim(bits), style.first_nbits(bits)
    try:
        if head_dim % subspace_dim:
            raise KernelError(f"subspaces of {subspace_dim} channels")
        count = head_dim // subspace_dim
        room = round(bits * head_dim) - count * (sum(nbits) + 1)  # every code of the last stage has a bit
        first = prototype_nbits(bits, head_dim, min(style.whole_vector_bits, room))
        whole = ((CodeGroup(1, first, head_dim),),) if first else ()
        stages = tuple((CodeGroup(count, size, subspace_dim),) for size in nbits)
        lower, more = divmod(round(bits * head_dim) - first - count * sum(nbits), count)
        shares = ((more, lower + 1), (count - more, lower))
        return CodeLayout((*whole, *stages, tuple(CodeGroup(n, size, subspace_dim) for n, size in shares if n)))
    except KernelError as error:
        fitting = [rate for rate in style.rates if head_dim % style.subspace_dim(rate) == 0]
        hint = f"choose --bits {rate_names(fitting, ' or ')}" if fitting else "no rate fits this model"
        raise UsageError(
            f"head_dim {head_dim} is not divisible by the {subspace_dim} channels a code covers at --bits {bits:g}; {hint}"
        ) from error


def prototype_nbits(bits: float, head_dim: int, most: int) -> int:
    """Return the bits of the prototype code: of `PROTOTYPE_NBITS` the largest up to `most` and half of a vector's bits."""
    return max((nbits for nbits in PROTOTYPE_NBITS if nbits <= most and 2 * nbits <= bits * head_dim), default=0)


def rate_names(rates: Iterable[float], joint: str = ", ") -> str:
    """Return rates as people write them, joined."""
    return joint.join(f"{rate:g}" for rate in rates)
