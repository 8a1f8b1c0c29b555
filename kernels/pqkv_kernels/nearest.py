"""The nearest centroid of every point, for many subspaces at once. Knows nothing of codecs or layouts.

``argmin ||x - c||^2 = argmax (2 x . c - ||c||^2)``: one augmented matrix product per block, then an argmax over centroids; on a
CPU with a compiler, short points are searched in C++. Both give the same up to fp32 rounding of the scores.
"""

import torch
from torch.nn import functional

from pqkv_kernels.errors import KernelError
from pqkv_kernels.native_nearest import can_search, native_nearest

# Scores per block. On a CPU the block (1 MiB fp32) has to stay in the second-level cache; on a GPU it only bounds memory.
CPU_BLOCK_SCORES = 1 << 18
DEVICE_BLOCK_SCORES = 1 << 26
BLOCK_POINTS = 256


def nearest_centroids(points: torch.Tensor, centroids: torch.Tensor, *, block_scores: int | None = None) -> torch.Tensor:
    """Return the index of the nearest centroid under L2, ties to the smaller index.

    Exact up to fp32 rounding of the scores. Temporaries beside the result take ``4 * block_scores`` bytes, and a copy of the
    points of as many subspaces as one block spans.

    Parameters
    ----------
    points
        [S, N, d], any float dtype; computed in fp32.
    centroids
        [S, K, d], any float dtype.
    block_scores
        Scores held at a time by matrix products, which a number asks for; None chooses by device.

    Returns
    -------
    torch.Tensor
        [S, N] int64.

    Raises
    ------
    KernelError
        If the shapes do not fit each other.
    """
    if points.ndim != 3 or centroids.ndim != 3 or points.shape[::2] != centroids.shape[::2] or centroids.shape[1] < 1:
        found = f"points {list(points.shape)} and centroids {list(centroids.shape)}"
        raise KernelError(f"found {found}; expected [S, N, d] and [S, K, d] with equal S and d and at least one centroid")
    num_subspaces, num_points, _ = points.shape
    num_centroids = centroids.shape[1]
    if block_scores is None:
        if can_search(points):
            return native_nearest(points, centroids)
        block_scores = CPU_BLOCK_SCORES if points.device.type == "cpu" else DEVICE_BLOCK_SCORES
    rows = max(1, min(num_subspaces, block_scores // (num_centroids * BLOCK_POINTS)))
    columns = max(1, min(num_points, block_scores // (num_centroids * rows)))
    codes = torch.empty(num_subspaces, num_points, dtype=torch.int64, device=points.device)
    with torch.no_grad():
        scores = torch.empty(rows * num_centroids * columns, device=points.device)
        for first in range(0, num_subspaces, rows):
            block = slice(first, min(first + rows, num_subspaces))
            _nearest_rows(points[block].float(), centroids[block].float(), columns, scores, codes[block])
    return codes


def _nearest_rows(
    points: torch.Tensor, centroids: torch.Tensor, columns: int, scores: torch.Tensor, codes: torch.Tensor
) -> None:
    """Fill `codes` [R, N] of `points` [R, N, d], `columns` points at a time, with `scores` as scratch space."""
    rows, num_points, _ = points.shape
    num_centroids = centroids.shape[1]
    lines = torch.cat((2 * centroids, -centroids.square().sum(-1, keepdim=True)), dim=-1)
    augmented = torch.cat((points.transpose(1, 2), points.new_ones(rows, 1, num_points)), dim=1)
    for start in range(0, num_points, columns):
        stop = min(start + columns, num_points)
        block = scores[: rows * num_centroids * (stop - start)].view(rows, num_centroids, stop - start)
        torch.bmm(lines, augmented[:, :, start:stop], out=block)
        codes[:, start:stop] = _argmax(block)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the [R, n] index of the first largest of `scores` [R, K, n] along K."""
    if scores.device.type != "cpu":
        return scores.argmax(dim=1)
    # Channels-last max pooling is the one vectorized argmax PyTorch has on CPUs: 5 to 10 times faster than argmax, and it
    # keeps the first of equal values too.
    image = scores[:, :, None, :].permute(0, 3, 1, 2)
    _, index = functional.max_pool2d(image, (scores.shape[1], 1), return_indices=True)
    return index[:, :, 0, 0]
