"""Walsh-Hadamard transforms of channels, as several methods share them. Knows matrices only."""

import torch

from pqkv_cli.quantizers.rivals.protocol import unsupported


def hadamard(size: int) -> torch.Tensor:
    """Return the orthonormal Walsh-Hadamard matrix [size, size] fp32 of a power of two; symmetric, its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    scaled: torch.Tensor = matrix / size**0.5
    return scaled


def turn(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `rows` [..., C] with every block of channels multiplied by `matrix` [block, block]."""
    turned: torch.Tensor = rows.unflatten(-1, (-1, len(matrix))) @ matrix.to(rows.device)
    return turned.flatten(-2)


def check_power_of_two(name: str, dim: int) -> None:
    """Let heads of `dim` channels pass if a Walsh-Hadamard transform of them exists.

    Raises
    ------
    UnsupportedModelError
        If `dim` is no power of two.
    """
    if dim & (dim - 1):
        raise unsupported(name, f"head_dim {dim}", "a power of two, for which the Walsh-Hadamard transform exists")
