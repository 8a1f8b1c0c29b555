"""What a step of k-means needs of every point and its centroid, for many subspaces at once. Knows nothing of codecs."""

import torch

# From this many channels on, vectors are gathered whole.
WIDE_CHANNELS = 16


def centroid_sums(
    points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sum of each centroid's points, their mass behind it, and the weighted error of every point.

    Parameters
    ----------
    points
        [S, N, d] fp32.
    weights
        [S, N] fp32.
    centroids
        [S, K, d] fp32.
    codes
        [S, N] int64, the centroid of every point.

    Returns
    -------
    tuple of torch.Tensor
        Sums [S, K, d + 1] fp64, the last channel holding the mass, and weighted squared distances [S, N] fp32.
    """
    num_subspaces, num_centroids, num_channels = centroids.shape
    offset = torch.arange(num_subspaces, device=codes.device)[:, None] * num_centroids
    counted = torch.cat((points * weights[..., None], weights[..., None]), dim=-1).flatten(0, 1).double()
    sums = torch.zeros(num_subspaces * num_centroids, num_channels + 1, dtype=torch.float64, device=points.device)
    sums = sums.index_add_(0, (codes + offset).flatten(), counted).view(num_subspaces, num_centroids, -1)
    return sums, weights * _squared_distances(points, centroids, codes)


def _squared_distances(points: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    if points.shape[-1] >= WIDE_CHANNELS:
        return (points - centroids.gather(1, codes[..., None].expand(points.shape))).square().sum(dim=-1)
    total = torch.zeros_like(points[..., 0])
    for channel in range(points.shape[-1]):
        total += (points[..., channel] - centroids[..., channel].gather(1, codes)).square()
    return total
