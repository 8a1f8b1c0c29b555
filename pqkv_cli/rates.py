"""Code layouts of the rates that `--bits` names. Integers only: knows no torch, no data and no files."""

from collections.abc import Mapping
from typing import Final

from pqkv_cli.errors import UsageError
from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import SUPPORTED_NBITS, CodeGroup, CodeLayout

# --bits N: (channels per subspace, bits per code), DESIGN rates of 256-entry tables.
RATES: Mapping[float, tuple[int, int]] = {
    4: (2, 8),
    3.5: (2, 7),
    3: (2, 6),
    2.5: (2, 5),
    2: (4, 8),
    1.5: (4, 6),
    1: (8, 8),
}

# Bits of the code of a whole vector. More entries than 1,024 would need more calibration vectors than are kept by default.
PROTOTYPE_NBITS = (0, 8, 10)
USUAL_PROTOTYPE_NBITS: Final = 10


def key_layout(bits: float, head_dim: int, prototype_bits: int = 0) -> CodeLayout:
    """Return the code layout of ``--bits`` for keys before rotary embedding.

    Where a code covers one rotary pair, no grouping can balance the pairs' energies, so the bits are spread instead: about a
    quarter of the pairs, those with most energy, get two bits more and those with least two fewer.

    Raises
    ------
    UsageError
        As `rate_layout`.
    """
    layout = rate_layout(bits, head_dim, prototype_bits)
    subspace_dim, nbits = RATES[bits]
    num_codes = head_dim // subspace_dim
    quarter, rest = divmod(num_codes, 4)
    missing, odd = divmod(prototype_nbits(bits, head_dim, prototype_bits), 2)
    most, least = quarter - missing // 2, quarter + missing - missing // 2
    if subspace_dim != 2 or rest or odd or most < 0 or nbits + 2 not in SUPPORTED_NBITS:
        return layout
    spread = ((most, nbits + 2), (num_codes - most - least, nbits), (least, nbits - 2))
    groups = tuple(CodeGroup(count, n, subspace_dim) for count, n in spread if count)
    return CodeLayout((*layout.stages[:-1], groups))


def rate_layout(bits: float, head_dim: int, prototype_bits: int = 0) -> CodeLayout:
    """Return the code layout of ``--bits`` for heads of `head_dim` channels, exactly at that rate.

    With `prototype_bits` a code of the whole vector comes first (of fewer bits where vectors are short), and the codes of its
    parts share what is left as evenly as whole bits allow.

    Raises
    ------
    UsageError
        If the rate is unknown or its subspaces do not divide `head_dim`.
    """
    if bits not in RATES:
        raise UsageError(f"--bits is {bits:g}; expected one of {', '.join(f'{rate:g}' for rate in RATES)}")
    subspace_dim, _ = RATES[bits]
    try:
        if head_dim % subspace_dim:
            raise KernelError(f"subspaces of {subspace_dim} channels")
        first = prototype_nbits(bits, head_dim, prototype_bits)
        lower, more = divmod(round(bits * head_dim) - first, head_dim // subspace_dim)
        shares = ((more, lower + 1), (head_dim // subspace_dim - more, lower))
        parts = tuple(CodeGroup(count, nbits, subspace_dim) for count, nbits in shares if count)
        return CodeLayout((((CodeGroup(1, first, head_dim),),) if first else ()) + (parts,))
    except KernelError as error:
        fitting = [b for b, (dim, _) in RATES.items() if head_dim % dim == 0]
        hint = f"choose --bits {' or '.join(f'{rate:g}' for rate in fitting)}" if fitting else "no rate fits this model"
        raise UsageError(
            f"head_dim {head_dim} is not divisible by the {subspace_dim} channels a code covers at --bits {bits:g}; {hint}"
        ) from error


def prototype_nbits(bits: float, head_dim: int, most: int) -> int:
    """Return the bits of the prototype code: of `PROTOTYPE_NBITS` the largest up to `most` and half of a vector's bits."""
    return max((nbits for nbits in PROTOTYPE_NBITS if nbits <= most and 2 * nbits <= bits * head_dim), default=0)
