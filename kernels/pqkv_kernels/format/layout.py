"""Where codes and rotary pairs lie: pure integers, no torch.

Codes live in pages of 64 tokens. Inside a page they are subspace-major and packed along tokens, so one subspace of one
page takes ``8 * nbits`` bytes whatever `nbits` is, every run starts on a word, and 64 lanes (one per token) read one table at
a time.

    page bytes:  | stage 0: group 0: subspace 0 | subspace 1 | ... | group 1: ... | stage 1: ... |
    one subspace: the parts of `nbits` (10 = 8 + 2, 7 = 4 + 2 + 1), widest first, which holds the lowest bits of the codes
    one part of w bits: 8 w bytes, a little-endian bit stream; token t holds its bits [w t, w (t + 1))

So no code crosses a byte within a part.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pqkv_kernels.errors import KernelError

PAGE_TOKENS = 64
SUPPORTED_NBITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
# What every encoder must do alike, or self-tests find other codes than stored: how many prototypes of a vector it tries, and up
# to how many bits of a part's codes it takes stages together (`pqkv_kernels.reference.merged_stages`).
TRIED_PROTOTYPES = 4
MOST_JOINT_NBITS = 10


def code_parts(nbits: int) -> tuple[tuple[int, int], ...]:
    """Return ``(width, lowest bit)`` of the parts in which codes of `nbits` bits are stored, in order."""
    parts, done = [], 0
    for width in (8, 4, 2, 1):
        if nbits - done >= width:
            parts.append((width, done))
            done += width
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class CodeGroup:
    """`num_subspaces` neighbouring subspaces of `subspace_dim` channels with codes of `nbits` bits.

    Raises
    ------
    KernelError
        If a number is out of range.
    """

    num_subspaces: int
    nbits: int
    subspace_dim: int

    def __post_init__(self) -> None:
        if self.nbits not in SUPPORTED_NBITS:
            raise KernelError(f"nbits is {self.nbits}; expected one of {', '.join(map(str, SUPPORTED_NBITS))}")
        if self.num_subspaces < 1 or self.subspace_dim < 1:
            raise KernelError(
                f"a group has {self.num_subspaces} subspaces of {self.subspace_dim} channels; expected at least one of each"
            )

    @property
    def num_centroids(self) -> int:
        """Entries of each codebook, ``2 ** nbits``."""
        return 1 << self.nbits

    @property
    def num_channels(self) -> int:
        """Channels covered by the group."""
        return self.num_subspaces * self.subspace_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of the group's codes for one page of one head."""
        return self.num_subspaces * PAGE_TOKENS * self.nbits // 8


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """The codes of one head vector: additive `stages`, each a row of groups that covers all channels in order.

    Raises
    ------
    KernelError
        If there is no stage or the stages cover different numbers of channels.
    """

    stages: tuple[tuple[CodeGroup, ...], ...]

    def __post_init__(self) -> None:
        if not self.stages or not all(self.stages):
            raise KernelError("a code layout needs at least one stage and one group in each")
        widths = {sum(group.num_channels for group in stage) for stage in self.stages}
        if len(widths) != 1:
            raise KernelError(f"the stages cover {sorted(widths)} channels; expected the same number in each")

    @classmethod
    def uniform(cls, head_dim: int, num_subspaces: int, nbits: int, num_stages: int = 1) -> "CodeLayout":
        """Return a layout of equal subspaces.

        Raises
        ------
        KernelError
            If `num_subspaces` does not divide `head_dim`.
        """
        if num_subspaces < 1 or head_dim % num_subspaces:
            raise KernelError(f"head_dim {head_dim} is not divisible into {num_subspaces} subspaces")
        return cls(((CodeGroup(num_subspaces, nbits, head_dim // num_subspaces),),) * num_stages)

    @property
    def head_dim(self) -> int:
        """Channels of the head vector."""
        return sum(group.num_channels for group in self.stages[0])

    @property
    def page_bytes(self) -> int:
        """Bytes of all codes of one page of one head."""
        return sum(group.page_bytes for stage in self.stages for group in stage)

    @property
    def table_numbers(self) -> int:
        """Numbers in the codebooks of one head."""
        return sum(group.num_centroids * group.num_channels for stage in self.stages for group in stage)

    @property
    def bits_per_channel(self) -> float:
        """Bits of code per cached channel (no exact tokens)."""
        return self.page_bytes * 8 / (PAGE_TOKENS * self.head_dim)

    @property
    def has_prototypes(self) -> bool:
        """Whether a code of the whole vector comes first and one stage after it: an encoder chooses both together."""
        return len(self.stages) == 2 and len(self.stages[0]) == 1 and self.stages[0][0].num_subspaces == 1

    def spans(self) -> Iterator[tuple[int, int, CodeGroup, int, int]]:
        """Yield ``(stage, index, group, byte_offset, channel_offset)`` of every group in storage order."""
        byte_offset = 0
        for i, stage in enumerate(self.stages):
            channel_offset = 0
            for j, group in enumerate(stage):
                yield i, j, group, byte_offset, channel_offset
                byte_offset += group.page_bytes
                channel_offset += group.num_channels


@dataclass(frozen=True, slots=True)
class RotaryLayout:
    """Which channels rotary embedding rotates together.

    The first `rotary_dim` channels of a head are rotated. Pair `p` is channels ``(p, p + rotary_dim / 2)`` or, where
    `interleaved`, ``(2p, 2p + 1)``.

    Raises
    ------
    KernelError
        If `rotary_dim` is not a positive even number.
    """

    rotary_dim: int
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise KernelError(f"rotary_dim is {self.rotary_dim}; expected a positive even number")

    @property
    def num_pairs(self) -> int:
        """Number of rotated pairs."""
        return self.rotary_dim // 2

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Return the two channels of every pair."""
        half = self.num_pairs
        if self.interleaved:
            return tuple((2 * p, 2 * p + 1) for p in range(half))
        return tuple((p, p + half) for p in range(half))

    def blocks(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        """Return all `head_dim` channels in twos: the rotary pairs, then the unrotated channels as they follow each other.

        Raises
        ------
        KernelError
            If an odd number of channels is left over.
        """
        if (head_dim - self.rotary_dim) % 2:
            raise KernelError(f"{head_dim - self.rotary_dim} unrotated channels do not form pairs; expected an even number")
        return self.pairs() + tuple((c, c + 1) for c in range(self.rotary_dim, head_dim, 2))
