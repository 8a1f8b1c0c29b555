"""How the kernels are cut for a GPU, and which program reads which pages of which head. Data only."""

from dataclasses import dataclass
from typing import Literal

import torch

from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.gpu.tables import TableKind

KeyScores = Literal["decode", "table"]


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Launch parameters of decode attention.

    Attributes
    ----------
    num_warps
        Of programs that serve up to sixteen queries. One needs no other: what several decode travels between them.
    max_registers
        Registers per thread that the compiler may use in programs of up to eight queries, a multiple of 8 from 64 to 248; 0
        leaves it to the compiler. Fewer let more programs wait for memory at a time.
    tables
        Number format of the look-up tables; products are of float16, or fp32 where tables are, and sums are fp32 always.
    programs_per_processor
        Splits are as many as give each multiprocessor about this many programs (`split_grid`).
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

    num_warps: int = 1
    max_registers: int = 168
    tables: TableKind = "float16"
    programs_per_processor: int = 12
    min_split_pages: int = 2
    key_scores: KeyScores = "decode"
    origin: str = "reasoned"

    def __post_init__(self) -> None:
        if self.num_warps not in (1, 2, 4, 8):
            raise KernelError(f"num_warps is {self.num_warps}; expected 1, 2, 4 or 8")
        if self.max_registers and (self.max_registers % 8 or not 64 <= self.max_registers <= 248):
            raise KernelError(f"max_registers is {self.max_registers}; expected 0 or a multiple of 8 from 64 to 248")
        if self.tables not in ("float16", "float32"):
            gone = ", which this version no longer has" if str(self.tables) == "int8" else ""
            raise KernelError(f"tables are {self.tables!r}{gone}; expected float16 or float32")
        if self.key_scores not in ("decode", "table"):
            raise KernelError(f"key_scores is {self.key_scores!r}; expected decode or table")
        if min(self.programs_per_processor, self.min_split_pages) < 1:
            raise KernelError("programs_per_processor and min_split_pages must be at least 1")


EXACT = DecodeConfig(tables="float32", origin="exact: for comparison with the reference")

# (a word of the device's name, largest head_dim, row); the first that fits counts. An empty word fits every device. A program
# is one warp: twelve of 168 registers fit a processor of 65,536, and the compiler needs 5 % more instructions for it.
TABLE: tuple[tuple[str, int, DecodeConfig], ...] = (
    ("", 64, DecodeConfig(origin="6 instructions per channel on sm_90, counted; not measured")),
    ("", 128, DecodeConfig(origin="5.3 instructions per channel on sm_90, counted; not measured")),
    ("", 1 << 30, DecodeConfig(origin="5.1 instructions per channel on sm_90, counted; not measured")),
)


def decode_config(device_name: str, head_dim: int) -> DecodeConfig:
    """Return the row of `TABLE` for a device by its name and for heads of `head_dim` channels."""
    return next(config for word, largest, config in TABLE if word in device_name and head_dim <= largest)


def use_config(tables: CodecTables, config: DecodeConfig) -> None:
    """Attend with `config` wherever `tables` are the keys'."""
    tables.derived["decode_config"] = config


def config_of(tables: CodecTables) -> DecodeConfig:
    """Return how keys of `tables` are attended to: as `use_config` said, else by their device; exactly in the interpreter."""
    device, chosen = tables.codebooks[0][0].device, tables.derived.get("decode_config")
    if isinstance(chosen, DecodeConfig):
        return chosen
    return EXACT if device.type == "cpu" else decode_config(torch.cuda.get_device_name(device), tables.layout.head_dim)


@dataclass(frozen=True, slots=True)
class SplitGrid:
    """Programs as rows of `width`, one per multiprocessor; ``width // columns`` heads lie side by side in `rows` rows.

    Attributes
    ----------
    width
        Multiprocessors.
    columns
        Of them, those that serve one head; what is left over of `width` stays idle.
    rows
        Programs of one head on one multiprocessor.
    split_pages
        Pages of one split, of which program ``row * columns + column`` of a head reads one.
    num_splits
        Of every head; the last programs of a head may have none.
    num_programs
        All of them, for all heads.
    """

    width: int
    columns: int
    rows: int
    split_pages: int
    num_splits: int
    num_programs: int

    @property
    def arguments(self) -> dict[str, int]:
        """The arguments of `split_kernel` by which a program finds its pages."""
        return {name: getattr(self, name) for name in ("width", "columns", "rows", "split_pages", "num_splits")}


def split_grid(config: DecodeConfig, num_pages: int, num_heads: int, num_processors: int) -> SplitGrid:
    """Return the grid for `num_heads` heads (rows times heads) of `num_pages` pages, both at least one."""
    columns = max(1, num_processors // num_heads)
    wanted = max(columns, config.programs_per_processor * min(columns * num_heads, num_processors) // num_heads)
    split_pages = max(config.min_split_pages, -(-num_pages // wanted))
    num_splits = -(-num_pages // split_pages)
    rows = -(-num_splits // columns)
    layers = -(-num_heads // (num_processors // columns))
    return SplitGrid(num_processors, columns, rows, split_pages, num_splits, num_processors * rows * layers)
