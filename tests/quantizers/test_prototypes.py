"""Codes of whole vectors: found where vectors gather, nothing where the format has none, untouched by rotations."""

import pytest
import torch

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.product import fit_product, fit_prototypes, num_prototype_stages, relative_error
from pqkv_kernels.format.layout import CodeGroup, CodeLayout

DIM = 16
PARTS = (CodeGroup(8, 4, 2),)
LAYOUT = CodeLayout(((CodeGroup(1, 4, DIM),), PARTS))


def gathered(noise: float, seed: int = 0) -> torch.Tensor:
    """Return [2, 1024, 16] points around 16 centers each."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(2, 16, DIM, generator=generator)
    chosen = torch.randint(0, 16, (2, 1024), generator=generator)
    points = centers.gather(1, chosen[..., None].expand(-1, -1, DIM))
    return points + noise * torch.randn(points.shape, generator=generator)


def test_stages_that_code_the_whole_vector_are_counted() -> None:
    whole, more = (CodeGroup(1, 4, DIM),), (CodeGroup(1, 8, DIM),)
    cases = [((PARTS,), 0), ((whole,), 0), ((whole, PARTS), 1), ((whole, more, PARTS), 2), ((PARTS, whole), 0)]
    cases.append(((whole, whole, PARTS), 0))  # few enough bits for an encoder to take both together
    for stages, expected in cases:
        assert num_prototype_stages(CodeLayout(stages)) == expected


def test_prototypes_leave_only_the_noise() -> None:
    points = gathered(0.05)
    residual = fit_prototypes(points, LAYOUT).residual
    assert residual.square().mean() < 1.1 * 0.05**2


def test_a_format_without_them_leaves_points_as_they_are() -> None:
    points = gathered(0.5)
    found = fit_prototypes(points, CodeLayout((PARTS,)))
    assert found.centroids == () and torch.equal(found.residual, points)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_at_equal_rate_they_win_where_vectors_gather(noise: float) -> None:
    points, parts_alone = gathered(noise), CodeLayout(((CodeGroup(4, 5, 2), CodeGroup(4, 4, 2)),))
    assert parts_alone.bits_per_channel == LAYOUT.bits_per_channel
    given = tuple((c,) for c in fit_prototypes(points, LAYOUT).centroids)
    with_them = relative_error(points, LAYOUT, fit_product(points, LAYOUT, given=given))
    without = relative_error(points, parts_alone, fit_product(points, parts_alone))
    assert bool((with_them < without).all())


def test_given_codebooks_are_kept() -> None:
    points = gathered(0.2)
    given = tuple((c,) for c in fit_prototypes(points, LAYOUT).centroids)
    assert torch.equal(fit_product(points, LAYOUT, given=given)[0][0], given[0][0].half())


def test_rotations_change_no_prototype() -> None:
    points = gathered(0.02)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)))[0]
    plain, turned = fit_prototypes(points, LAYOUT), fit_prototypes(points @ turn, LAYOUT)
    torch.testing.assert_close(plain.centroids[0] @ turn, turned.centroids[0], atol=1e-3, rtol=0)


def test_too_few_vectors_and_overflow_are_errors() -> None:
    with pytest.raises(DataError, match="found 9 vectors for 16 centroids"):
        fit_prototypes(torch.randn(2, 9, DIM), LAYOUT)
    with pytest.raises(DataError, match="the range of fp16"):
        fit_prototypes(gathered(0.1) * 1e6, LAYOUT)
