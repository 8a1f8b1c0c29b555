"""What the score of a centroid is made of: ``argmin ||x - c||^2 = argmax (2 x . c - ||c||^2)``. Knows no search."""

import torch


def score_lines(centroids: torch.Tensor) -> torch.Tensor:
    """Return ``(2 c, -||c||^2)`` of `centroids` [..., K, d], [..., K, d + 1]: their products with ``(x, 1)`` are scores."""
    return torch.cat((2 * centroids, -centroids.square().sum(-1, keepdim=True)), dim=-1)
