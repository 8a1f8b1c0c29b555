import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.kmeans import KMeansResult, kmeans
from pqkv_kernels.errors import KernelError
from pqkv_kernels.reference.nearest import nearest_centroids


def fit(points: torch.Tensor, k: int, weights: torch.Tensor | None = None, seed: int = 0, iterations: int = 25) -> KMeansResult:
    return kmeans(points, k, weights=weights, iterations=iterations, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 2**31),
    subspaces=st.integers(1, 5),
    points=st.integers(1, 70),
    dim=st.sampled_from([1, 2, 4, 9]),
    centroids=st.integers(1, 300),
    block=st.sampled_from([None, 1, 64, 5000]),
)
@settings(max_examples=60, deadline=None)
def test_nearest_is_nearest(seed: int, subspaces: int, points: int, dim: int, centroids: int, block: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(subspaces, points, dim, generator=generator)
    c = torch.randn(subspaces, centroids, dim, generator=generator)
    distance = torch.cdist(x.double(), c.double()).square()
    found = distance.gather(2, nearest_centroids(x, c, block_scores=block)[..., None])[..., 0]
    torch.testing.assert_close(found, distance.amin(2), rtol=0, atol=1e-5)


def test_nearest_breaks_ties_to_the_smaller_index() -> None:
    centroids = torch.randn(3, 8, 2).repeat(1, 4, 1)
    codes = nearest_centroids(centroids, centroids)
    assert torch.equal(codes, torch.arange(8).repeat(4).expand(3, 32))


def test_nearest_refuses_other_shapes() -> None:
    with pytest.raises(KernelError, match=r"expected \[S, N, d\]"):
        nearest_centroids(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


def test_same_seed_same_bits_and_another_seed_other_bits() -> None:
    points = torch.randn(4, 900, 2, generator=torch.Generator().manual_seed(1))
    first, again, other = fit(points, 16, seed=5), fit(points, 16, seed=5), fit(points, 16, seed=6)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.distortion, again.distortion)
    assert not torch.equal(first.centroids, other.centroids)


def test_distortion_is_that_of_the_centroids() -> None:
    points, weights = torch.randn(3, 2000, 2), torch.rand(3, 2000)
    result = fit(points, 32, weights)
    nearest = torch.cdist(points, result.centroids).amin(2).square()
    expected = (nearest * weights).sum(1) / weights.sum(1)
    torch.testing.assert_close(result.distortion, expected, rtol=1e-4, atol=1e-7)


def test_separated_clusters_are_found() -> None:
    centers = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).reshape(1, 16, 2) * 10
    points = (centers.repeat(2, 200, 1)) + 0.01 * torch.randn(2, 3200, 2)
    assert (fit(points, 16).distortion < 1e-3).all()


@pytest.mark.parametrize("distinct", [1, 3, 16])
def test_fewer_distinct_points_than_centroids(distinct: int) -> None:
    points = torch.randn(2, distinct, 4).repeat(1, 2000 // distinct + 1, 1)
    result = fit(points, 64)
    assert torch.isfinite(result.centroids).all()
    assert (result.distortion < 1e-10).all()


def test_one_point_per_centroid_is_exact() -> None:
    points = torch.randn(3, 64, 2)
    assert (fit(points, 64).distortion < 1e-10).all()


def test_idle_centroids_move_to_the_points_with_the_largest_error() -> None:
    points = torch.cat((torch.zeros(1, 500, 1), 1000 + torch.arange(8.0).view(1, 8, 1)), dim=1)
    assert float(fit(points, 9).distortion) < 1e-9


def test_points_without_weight_do_not_count() -> None:
    points = torch.cat((torch.randn(2, 400, 2), 50 + torch.randn(2, 400, 2)), dim=1)
    weights = torch.cat((torch.ones(2, 400), torch.zeros(2, 400)), dim=1)
    assert float(fit(points, 8, weights).centroids.max()) < 10


def test_a_heavy_point_gets_a_centroid_though_only_a_sample_is_seeded() -> None:
    points, weights = torch.randn(2, 8000, 2), torch.ones(2, 8000)
    points[:, 17], weights[:, 17] = 30.0, 1e5
    nearest = (fit(points, 4, weights).centroids - 30).norm(dim=2).amin(1)
    assert (nearest < 0.1).all()


def test_weights_count_like_copies() -> None:
    points = torch.randn(1, 60, 2)
    copies = torch.randint(1, 4, (60,))
    weighted = [float(fit(points, 8, copies[None].float(), seed).distortion) for seed in range(8)]
    copied = [float(fit(points.repeat_interleave(copies, 1), 8, seed=seed).distortion) for seed in range(8)]
    assert min(weighted) == pytest.approx(min(copied), rel=0.1)


def test_not_worse_than_scipy() -> None:
    cluster = pytest.importorskip("scipy.cluster.vq")
    generator = torch.Generator().manual_seed(3)
    ours, theirs = [], []
    for dim, k in ((1, 16), (2, 16), (2, 64), (4, 32)):
        points = torch.randn(4, 3000, dim, generator=generator) ** 3
        ours.append(fit(points, k).distortion / points.square().mean((1, 2)))
        for subspace in points:
            centroids, codes = cluster.kmeans2(subspace.double().numpy(), k, iter=25, minit="++", seed=1)
            error = (subspace - torch.from_numpy(centroids[codes])).square().sum(1).mean()
            theirs.append(float(error / subspace.square().mean()))
    assert float(torch.cat(ours).mean()) <= 1.02 * sum(theirs) / len(theirs)


def test_more_iterations_are_never_worse() -> None:
    points = torch.randn(4, 600, 2)
    errors = [fit(points, 64, iterations=n).distortion for n in (0, 1, 3, 10)]
    for more, less in zip(errors[1:], errors[:-1], strict=True):
        assert (more <= less * (1 + 1e-5)).all()


def test_too_few_points_are_named() -> None:
    with pytest.raises(DataError, match=r"found 15 vectors for 16 centroids.*calibrate on more text"):
        fit(torch.randn(2, 15, 2), 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_points_that_are_not_finite_are_named(value: float) -> None:
    points = torch.randn(3, 50, 2)
    points[1, 7, 0] = value
    with pytest.raises(DataError, match="subspace 1 of 3"):
        fit(points, 4)
    with pytest.raises(DataError, match="subspace 0 of 3"):
        fit(torch.randn(3, 50, 2), 4, -torch.ones(3, 50))


@pytest.mark.parametrize("dim", [1, 2, 4, 8])
def test_no_worse_than_lloyd_from_random_points(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    points = torch.randn(8, 3000, dim, generator=generator) * torch.rand(8, 3000, 1, generator=generator)
    theirs = []
    for subspace in points.double().numpy():
        centroids, codes = kmeans2(subspace, 64, iter=25, minit="points", seed=0)
        theirs.append(((subspace - centroids[codes]) ** 2).sum(1).mean())
    assert fit(points, 64).distortion.mean() <= sum(theirs) / len(theirs)
