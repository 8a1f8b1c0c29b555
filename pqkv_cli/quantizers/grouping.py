"""Which channels share a code: balancing energy over subspaces. Knows energies and layouts; nothing of data or models."""

from collections.abc import Sequence

import torch

from pqkv_kernels.format.layout import CodeLayout, RotaryLayout

# Energies below this share of a head's largest one count as this share: they cost nothing to code.
ENERGY_FLOOR = 1e-6


def subspace_dims(layout: CodeLayout) -> list[int]:
    """Return the channels of every subspace of the first stage, in storage order."""
    return [group.subspace_dim for group in layout.stages[0] for _ in range(group.num_subspaces)]


def subspace_bits(layout: CodeLayout) -> list[float]:
    """Return the code bits of every subspace of the first stage, in storage order."""
    return [float(group.nbits) for group in layout.stages[0] for _ in range(group.num_subspaces)]


def balanced_pairs(energy: torch.Tensor, rotary: RotaryLayout, layout: CodeLayout) -> torch.Tensor:
    """Return the channel order that puts whole rotary pairs into subspaces of equal energy.

    Pairs are dealt in order of falling energy, each to the subspace with room whose product of energies is smallest (the
    distortion of a subspace goes with that product, OPQ's argument). Inside a subspace the channels lie pair by pair, pairs
    by number. Unrotated channels fill the places left. Layouts with an odd subspace keep the order of the channels.

    Parameters
    ----------
    energy
        Mean square of the mapped keys of each pair, [Hkv, num_pairs].
    rotary
        Which channels form pairs.
    layout
        The codes; its first stage decides.

    Returns
    -------
    torch.Tensor
        [Hkv, D] int16: ``code_vector[c] = mapped[permutation[c]]``.
    """
    dims = subspace_dims(layout)
    if any(dim % 2 for dim in dims):
        return torch.arange(layout.head_dim, dtype=torch.int16).repeat(len(energy), 1)
    pairs = rotary.pairs()
    rows = []
    for head in energy.double().cpu():
        unrotated = iter(range(rotary.rotary_dim, layout.head_dim))
        row: list[int] = []
        for dim, dealt in zip(dims, deal(head, [d // 2 for d in dims], subspace_bits(layout)), strict=True):
            row += [channel for p in sorted(dealt) for channel in pairs[p]]
            row += [next(unrotated) for _ in range(dim - 2 * len(dealt))]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int16)


def deal(energy: torch.Tensor, capacity: Sequence[int], bits: Sequence[float]) -> list[list[int]]:
    """Deal items to buckets so that the products of their energies are as equal as the greedy rule makes them.

    Parameters
    ----------
    energy
        [n], not negative; n is at most the sum of `capacity`.
    capacity
        Items each bucket takes.
    bits
        Code bits of each bucket; a bit more takes a fourth of the energy away.

    Returns
    -------
    list of list of int
        The items of each bucket, highest energy first. Equal energies go in order of their number.
    """
    largest = float(energy.max()) if len(energy) else 0.0
    relative = energy.double() / largest if largest > 0 else torch.ones_like(energy, dtype=torch.float64)
    logs = relative.clamp(min=ENERGY_FLOOR).log2()
    logs = logs - logs.min()  # not negative, so that one more item never makes a bucket look emptier
    order = torch.argsort(logs, descending=True, stable=True).tolist()
    load = [-2.0 * (b - min(bits)) for b in bits]
    buckets: list[list[int]] = [[] for _ in capacity]
    for item in order:
        open_buckets = [i for i, bucket in enumerate(buckets) if len(bucket) < capacity[i]]
        target = min(open_buckets, key=lambda i: (load[i], len(buckets[i]), i))
        buckets[target].append(item)
        load[target] += float(logs[item])
    return buckets
