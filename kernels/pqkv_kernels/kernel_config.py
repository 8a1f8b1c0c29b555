"""How the kernels are cut for a GPU: data, chosen by device and shape. Knows no kernel and runs nothing.

Rows were chosen by reasoning from bandwidth, registers and occupancy unless their `origin` says that they were measured.
"""

from dataclasses import dataclass
from typing import Literal

from pqkv_kernels.errors import KernelError
from pqkv_kernels.layout import PAGE_TOKENS

TableKind = Literal["float16", "float32"]
Precision = Literal["tf32", "tf32x3", "ieee"]
KeyScores = Literal["decode", "table"]


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Launch parameters of decode attention.

    Attributes
    ----------
    tile_tokens
        Tokens decoded at a time, a power of two from 16 to 64.
    tables
        Number format of the look-up tables.
    precision
        Of the products; sums are fp32 always.
    programs_per_processor
        Splits are as many as give each multiprocessor about this many programs.
    min_split_pages
        No split is shorter, so that merging stays cheap.
    key_scores
        ``table`` looks up the product of a query with every centroid instead of decoding keys; only where keys are coded after
        rotary embedding and a program serves one query, elsewhere keys are decoded.
    origin
        Where the row comes from.

    Raises
    ------
    KernelError
        If a number is out of range.
    """

    tile_tokens: int = 32
    num_warps: int = 4
    num_stages: int = 2
    tables: TableKind = "float16"
    precision: Precision = "tf32"
    programs_per_processor: int = 4
    min_split_pages: int = 4
    key_scores: KeyScores = "decode"
    origin: str = "reasoned"

    def __post_init__(self) -> None:
        if self.tile_tokens not in (16, 32, 64):
            raise KernelError(f"tile_tokens is {self.tile_tokens}; expected 16, 32 or 64")
        if self.num_warps not in (1, 2, 4, 8):
            raise KernelError(f"num_warps is {self.num_warps}; expected 1, 2, 4 or 8")
        if self.tables not in ("float16", "float32") or self.precision not in ("tf32", "tf32x3", "ieee"):
            raise KernelError(
                f"tables are {self.tables!r} and precision {self.precision!r}; see DecodeConfig for what is known"
            )
        if self.key_scores not in ("decode", "table"):
            raise KernelError(f"key_scores is {self.key_scores!r}; expected decode or table")
        if min(self.num_stages, self.programs_per_processor, self.min_split_pages) < 1:
            raise KernelError("num_stages, programs_per_processor and min_split_pages must be at least 1")

    def split_pages(self, num_pages: int, num_heads: int, num_processors: int) -> int:
        """Return the pages of one split, for `num_heads` programs (rows times heads) per split."""
        wanted = max(1, self.programs_per_processor * num_processors // max(num_heads, 1))
        return max(self.min_split_pages, -(-num_pages // wanted), 1)


EXACT = DecodeConfig(
    tile_tokens=PAGE_TOKENS, tables="float32", precision="ieee", origin="exact: for comparison with the reference"
)

_SMALL_HEADS = DecodeConfig(tile_tokens=32, num_warps=4, origin="195 registers and no spills on sm_90; not measured")
_USUAL_HEADS = DecodeConfig(tile_tokens=32, num_warps=8, origin="247 registers and no spills on sm_90; not measured")
_LARGE_HEADS = DecodeConfig(tile_tokens=16, num_warps=8, origin="reasoned; not measured")

# (a word of the device's name, largest head_dim, row); the first that fits counts. An empty word fits every device.
TABLE: tuple[tuple[str, int, DecodeConfig], ...] = (
    ("4090", 128, DecodeConfig(tile_tokens=16, num_warps=4, origin="half the registers per processor; not measured")),
    ("L4", 128, DecodeConfig(tile_tokens=16, num_warps=4, origin="half the registers per processor; not measured")),
    ("", 64, _SMALL_HEADS),
    ("", 128, _USUAL_HEADS),
    ("", 1 << 30, _LARGE_HEADS),
)


def decode_config(device_name: str, head_dim: int) -> DecodeConfig:
    """Return the row of `TABLE` for a device by its name and for heads of `head_dim` channels."""
    return next(config for word, largest, config in TABLE if word in device_name and head_dim <= largest)
