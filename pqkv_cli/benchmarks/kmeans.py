"""Times k-means of faiss (Douze et al. 2024) beside ours. Needs faiss-cpu: ``pip install 'pqkv[faiss]'``."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.errors import UsageError
from pqkv_cli.evaluation.record import environment
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.quantizers.kmeans import kmeans
from pqkv_cli.reporter import Reporter
from pqkv_kernels.dispatch import nearest_centroids


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


NUM_CENTROIDS = 256
SUBSPACE_DIMS = (1, 2, 4, 8)
MOST_SUBSPACES = 16


@dataclass(frozen=True, slots=True)
class KMeansTimes:
    """One comparison: `num_subspaces` fits of 256 centroids to `num_points` points each.

    Attributes
    ----------
    points
        ``keys``, ``values`` (of the first coded layer, as the model has them) or ``normal``.
    seconds, faiss_seconds
        Of all fits together, seeding included.
    distortion_ratio
        Our mean squared distance over that of faiss, mean over subspaces; `worst_ratio` is that of the worst subspace.
    """

    points: str
    subspace_dim: int
    num_subspaces: int
    num_points: int
    seconds: float
    faiss_seconds: float
    distortion_ratio: float
    worst_ratio: float


def bench_kmeans(run: Run, iterations: int, seed: int, reporter: Reporter) -> dict[str, Any]:
    """Return the comparisons as JSON can hold them.

    Raises
    ------
    RunError
        If the run is not calibrated.
    UsageError
        If faiss is not installed.
    """
    version = faiss_library().__version__
    cases = list(_cases(CalibrationStore(run.calibration), seed))
    rows = []
    with reporter.progress("k-means") as advance:
        for index, (name, points) in enumerate(cases):
            rows.append(_compare(name, points, iterations, seed))
            advance(index + 1, len(cases))
    shared = {"iterations": iterations, "num_centroids": NUM_CENTROIDS, "faiss": version}
    return {
        "schema": "pqkv.kmeans/1",
        **shared,
        "rows": [asdict(row) for row in rows],
        "environment": environment(torch.device("cpu")),
    }


def _cases(store: CalibrationStore, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a name and points [S, N, d]."""
    samples = store.layer(next(i for i, reason in enumerate(store.manifest["layers"]) if not reason))
    for name, vectors in (("keys", samples.keys), ("values", samples.values)):
        for dim in SUBSPACE_DIMS:
            if vectors.shape[2] % dim == 0:
                split = vectors.float().unflatten(2, (-1, dim)).transpose(1, 2).flatten(0, 1)
                yield name, split[:MOST_SUBSPACES].contiguous()
    generator = torch.Generator().manual_seed(seed)
    for dim in SUBSPACE_DIMS:
        yield "normal", torch.randn(MOST_SUBSPACES, samples.keys.shape[1], dim, generator=generator)


def _compare(name: str, points: torch.Tensor, iterations: int, seed: int) -> KMeansTimes:
    def ours() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return kmeans(points, NUM_CENTROIDS, iterations=iterations, generator=generator).centroids

    found, seconds = _timed(ours)
    theirs, faiss_seconds = _timed(lambda: faiss_kmeans(points, NUM_CENTROIDS, iterations, seed))
    ratio = _distortion(points, found) / _distortion(points, theirs).clamp(min=torch.finfo(torch.float64).tiny)
    shape = (points.shape[2], points.shape[0], points.shape[1])
    return KMeansTimes(name, *shape, seconds, faiss_seconds, float(ratio.mean()), float(ratio.max()))


def _timed(fit: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    started = time.perf_counter()
    return fit(), time.perf_counter() - started


def _distortion(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance [S] fp64 of points to their nearest centroid, the same measure for both."""
    codes = nearest_centroids(points, centroids)
    nearest = centroids.gather(1, codes[..., None].expand(points.shape))
    return (points.double() - nearest.double()).square().sum(-1).mean(-1)
