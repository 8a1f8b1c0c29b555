"""k-means of faiss (Douze et al. 2024), to stand beside ours. Knows points; needs faiss-cpu: ``pip install 'pqkv[faiss]'``."""

from typing import Any

import torch

from pqkv_cli.errors import UsageError


def faiss_library() -> Any:
    """Return the faiss module.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UsageError(f"faiss cannot be imported ({error}); expected faiss-cpu: pip install 'pqkv[faiss]'") from error
    return faiss


def faiss_kmeans(points: torch.Tensor, num_centroids: int, iterations: int, seed: int) -> torch.Tensor:
    """Return the centroids [S, K, d] fp32 that faiss finds for the points [S, N, d] of each of `S` independent subspaces.

    Its own defaults (random points as seeds, one run) except that no points are left out: `iterations` Lloyd steps over all
    of them, with as many threads as torch has.

    Raises
    ------
    UsageError
        If faiss is not installed.
    """
    faiss = faiss_library()
    faiss.omp_set_num_threads(torch.get_num_threads())
    found = []
    for subspace in points.float().contiguous().numpy():
        trained = faiss.Kmeans(
            subspace.shape[1],
            num_centroids,
            niter=iterations,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(subspace),
        )
        trained.train(subspace)
        found.append(torch.from_numpy(trained.centroids.copy()))
    return torch.stack(found)
