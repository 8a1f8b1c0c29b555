"""How long a GPU's first-level cache may take over the look-ups of decode attention: a model of it, and random codes.

    python tests/studies/look_ups.py

The cache finds four lines of 128 bytes per cycle, as NVIDIA has said of Volta's, and reads one word of four bytes from each of
32 banks; of entries of eight bytes half a warp's at a time. Both go on side by side, so the longer one counts.
"""

import torch

LANES, LINE, BANKS, LINES_PER_CYCLE = 32, 128, 32, 4
UNCOMPRESSED = 128 / (3.8e12 / 132 / 1.75e9)  # cycles in which a processor of an H200 reads 64 channels of bfloat16
# entries, bytes of one, its channels, stages
FORMATS = {
    "quality 4 b/ch": (256, 4, 2, 1),
    "speed 4 b/ch": (16, 4, 2, 2),
    "speed 2 b/ch": (16, 8, 4, 2),
}


def cycles(addresses: torch.Tensor, size: int) -> int:
    """Return the cycles of one look-up of entries of `size` bytes at `addresses` [32]."""
    lines = len(torch.unique(addresses // LINE))
    reads = 0
    for part in addresses.split(LANES // 2 if size == 8 else LANES):
        words = torch.unique(torch.cat([(part + at) // 4 for at in range(0, size, 4)]))
        reads += int(torch.bincount(words % BANKS).max())
    return max(-(-lines // LINES_PER_CYCLE), reads)


def mean_cycles(entries: int, size: int, tables: int, *, keys: bool, trials: int = 2000) -> float:
    """Return the mean for random codes, of `tables` that lie side by side."""
    lane = torch.arange(LANES)
    table = lane % tables if keys else lane // (LANES // tables)
    codes = torch.randint(entries, (trials, LANES), generator=torch.Generator().manual_seed(0))
    return sum(cycles(row, size) for row in (table * entries + codes) * size) / trials


def main() -> None:
    for name, (entries, size, channels, stages) in FORMATS.items():
        scale = stages * 64 / (LANES * channels)
        keys, values, fewer = (
            scale * mean_cycles(entries, size, tables, keys=is_key) for tables, is_key in ((4, True), (8, False), (2, True))
        )
        ratio = 2 * UNCOMPRESSED / (keys + values)
        print(
            f"{name}: {keys:.1f} cycles for 64 channels of keys, {values:.1f} of values: {ratio:.1f} x; two tables: {fewer:.1f}"
        )


if __name__ == "__main__":
    main()
