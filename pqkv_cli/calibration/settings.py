"""What a calibration is made of. Knows no tensors and no files."""

from dataclasses import dataclass

from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.specs import ModelGeometry

# A commit waits for the disk: small models would spend more time there than in their forward passes.
PART_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class CollectSettings:
    """All that decides the result of `collect`, beside the model and the windows.

    Attributes
    ----------
    data_sha256
        Hash of the text the windows were cut from.
    num_samples, seq_len
        Number and length of the windows, held-out ones included.
    batch_size
        Windows per forward pass (the order of sums depends on it).
    reservoir_size
        Most tokens kept as samples.
    seed
        Of the sample and of the query positions that measure attention.
    held_out_share
        Share of the windows that no statistics come from; at least one window.
    queries_per_window
        Query positions per window that measure attention mass.
    fisher_draws
        Backward passes per batch that measure what errors of keys and values cost; 0 leaves them out.

    Raises
    ------
    UsageError
        If a number is out of range.
    """

    data_sha256: str
    num_samples: int
    seq_len: int
    batch_size: int = 1
    reservoir_size: int = 24576
    seed: int = 0
    held_out_share: float = 1 / 8
    queries_per_window: int = 32
    fisher_draws: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size", "reservoir_size", "queries_per_window"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.fisher_draws < 0:
            raise UsageError(f"fisher_draws is {self.fisher_draws}; expected at least 0")
        if not 0 <= self.held_out_share < 1:
            raise UsageError(f"held_out_share is {self.held_out_share}; expected at least 0 and below 1")
        if self.num_samples < 2:
            raise DataError(
                f"calibration has {self.num_samples} window; expected at least 2, since one is held out. Ask for more samples."
            )

    @property
    def num_held_out(self) -> int:
        """Windows at the end that are kept for choosing between candidates."""
        return max(1, int(self.num_samples * self.held_out_share))

    @property
    def num_windows(self) -> int:
        """Windows that statistics come from."""
        return self.num_samples - self.num_held_out

    @property
    def windows_per_part(self) -> int:
        """Windows between two commits to disk: whole batches, at least `PART_TOKENS` tokens."""
        return self.batch_size * max(1, PART_TOKENS // (self.batch_size * self.seq_len))


def kept_bytes(geometry: ModelGeometry, settings: CollectSettings) -> int:
    """Return what the samples of a calibration take on disk, moments and windows left out.

    Of every kept token keys and values in fp16 and the mass of attention in fp32; with Fisher draws their gradients in bf16,
    which become one weight each.
    """
    tokens = min(settings.reservoir_size, settings.num_windows * settings.seq_len)
    weights = 12 if settings.fisher_draws else 4
    return sum(
        tokens * layer.num_kv_heads * (4 * layer.head_dim + weights) for layer in geometry.layers if not layer.dense_reason
    )
