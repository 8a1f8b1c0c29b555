"""The nearest centroid of every point, for many subspaces at once. Knows nothing of codecs or layouts."""

from collections.abc import Callable

import torch
from torch.nn import functional

from pqkv_kernels.errors import KernelError


def augmented_centroids(centroids: torch.Tensor) -> torch.Tensor:
    """Return ``(2 c, -||c||^2)`` of `centroids` [..., K, d], [..., K, d + 1]: their products with ``(x, 1)`` are scores."""
    return torch.cat((2 * centroids, -centroids.square().sum(-1, keepdim=True)), dim=-1)


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
        Scores held at a time; None takes what suits the device.

    Returns
    -------
    torch.Tensor
        [S, N] int64.

    Raises
    ------
    KernelError
        If the shapes do not fit each other.
    """
    check_points(points, centroids)
    codes = torch.empty(*points.shape[:2], dtype=torch.int64, device=points.device)
    return _searched(points, centroids, codes, _argmax, block_scores)


def nearest_few(points: torch.Tensor, centroids: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` nearest centroids of every point, [S, count, N] int64, nearest first.

    Otherwise as `nearest_centroids`, but of equally near ones any comes first.
    """
    check_points(points, centroids, count)
    codes = torch.empty(len(points), count, points.shape[1], dtype=torch.int64, device=points.device)
    return _searched(points, centroids, codes, lambda scores: scores.topk(count, dim=1).indices)


def check_points(points: torch.Tensor, centroids: torch.Tensor, count: int = 1) -> None:
    """Check what a search for the `count` nearest is given.

    Raises
    ------
    KernelError
        If shapes do not fit each other, or there are not so many centroids.
    """
    if points.ndim != 3 or centroids.ndim != 3 or points.shape[::2] != centroids.shape[::2] or centroids.shape[1] < 1:
        found = f"points {list(points.shape)} and centroids {list(centroids.shape)}"
        raise KernelError(f"found {found}; expected [S, N, d] and [S, K, d] with equal S and d and at least one centroid")
    if not 1 <= count <= centroids.shape[1]:
        raise KernelError(f"{count} of {centroids.shape[1]} centroids were asked for; expected at least 1 and at most all")


def _searched(
    points: torch.Tensor,
    centroids: torch.Tensor,
    codes: torch.Tensor,
    choose: Callable[[torch.Tensor], torch.Tensor],
    block_scores: int | None = None,
) -> torch.Tensor:
    """Fill and return `codes` [S, ..., N] with what `choose` makes of scores [R, K, n], block by block."""
    num_subspaces, num_points, _ = points.shape
    num_centroids = centroids.shape[1]
    if block_scores is None:
        block_scores = CPU_BLOCK_SCORES if points.device.type == "cpu" else DEVICE_BLOCK_SCORES
    rows = max(1, min(num_subspaces, block_scores // (num_centroids * BLOCK_POINTS)))
    columns = max(1, min(num_points, block_scores // (num_centroids * rows)))
    with torch.no_grad():
        scores = torch.empty(rows * num_centroids * columns, device=points.device)
        for first in range(0, num_subspaces, rows):
            block = slice(first, min(first + rows, num_subspaces))
            _search_rows(points[block].float(), centroids[block].float(), columns, scores, codes[block], choose)
    return codes


def _search_rows(
    points: torch.Tensor,
    centroids: torch.Tensor,
    columns: int,
    scores: torch.Tensor,
    codes: torch.Tensor,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Fill `codes` [R, ..., N] of `points` [R, N, d], `columns` points at a time, with `scores` as scratch space."""
    rows, num_points, _ = points.shape
    num_centroids = centroids.shape[1]
    augmented = augmented_centroids(centroids)
    points_and_ones = torch.cat((points.transpose(1, 2), points.new_ones(rows, 1, num_points)), dim=1)
    for start in range(0, num_points, columns):
        stop = min(start + columns, num_points)
        block = scores[: rows * num_centroids * (stop - start)].view(rows, num_centroids, stop - start)
        torch.bmm(augmented, points_and_ones[:, :, start:stop], out=block)
        codes[..., start:stop] = choose(block)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the [R, n] index of the first largest of `scores` [R, K, n] along K."""
    if scores.device.type != "cpu":
        return scores.argmax(dim=1)
    # Channels-last max pooling is the one vectorized argmax PyTorch has on CPUs: 5 to 10 times faster than argmax, and it
    # keeps the first of equal values too.
    image = scores[:, :, None, :].permute(0, 3, 1, 2)
    _, index = functional.max_pool2d(image, (scores.shape[1], 1), return_indices=True)
    return index[:, :, 0, 0]
