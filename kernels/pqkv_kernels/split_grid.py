"""Which program of attention reads which pages of which head. Data only.

A GPU deals programs out to its multiprocessors in turn: programs ``i`` and ``i + processors`` run on the same one. All that one
runs at a time should read the tables of one head, since those of many do not fit into its first-level cache.
"""

from dataclasses import dataclass

from pqkv_kernels.kernel_config import DecodeConfig


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
    def numbers(self) -> tuple[int, ...]:
        """What a program finds its place by, in the order in which `split_kernel` takes it."""
        return self.width, self.columns, self.rows, self.split_pages, self.num_splits


def split_grid(config: DecodeConfig, num_pages: int, num_heads: int, num_processors: int) -> SplitGrid:
    """Return the grid for `num_heads` heads (rows times heads) of `num_pages` pages, both at least one."""
    columns = max(1, num_processors // num_heads)
    wanted = max(columns, config.programs_per_processor * min(columns * num_heads, num_processors) // num_heads)
    split_pages = max(config.min_split_pages, -(-num_pages // wanted))
    num_splits = -(-num_pages // split_pages)
    rows = -(-num_splits // columns)
    layers = -(-num_heads // (num_processors // columns))
    return SplitGrid(num_processors, columns, rows, split_pages, num_splits, num_processors * rows * layers)
