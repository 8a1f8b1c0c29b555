import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.product import fit_product, reconstruct, relative_error
from pqkv_kernels.format.layout import CodeGroup, CodeLayout
from pqkv_kernels.reference.encode import dequantize


def points(seed: int, heads: int = 2, num: int = 600, dim: int = 8) -> torch.Tensor:
    return torch.randn(heads, num, dim, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 2**31), nbits=st.sampled_from([1, 3, 4, 6]), dsub=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_fitted_centroids_decode_to_themselves(seed: int, nbits: int, dsub: int) -> None:
    layout = CodeLayout.uniform(8, 8 // dsub, nbits)
    codebooks = fit_product(points(seed, num=200), layout, seed=seed, iterations=4)
    assert codebooks[0][0].dtype == torch.float16
    assert codebooks[0][0].shape == (2, 8 // dsub, 1 << nbits, dsub)
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(0, 1 << nbits, (1, 2, 8 // dsub, 50), generator=generator)]
    vectors = dequantize(codes, layout, codebooks)[0]
    assert torch.equal(reconstruct(vectors, layout, codebooks), vectors)
    assert torch.equal(relative_error(vectors, layout, codebooks), torch.zeros(2))


def test_more_bits_are_never_worse() -> None:
    x = points(1)
    layouts = [CodeLayout.uniform(8, 4, nbits) for nbits in (1, 2, 3, 4, 5, 6, 7, 8)]
    errors = torch.stack([relative_error(x, layout, fit_product(x, layout)) for layout in layouts])
    assert (errors[1:] <= errors[:-1]).all()


def test_a_second_stage_codes_what_the_first_left() -> None:
    x = points(2)
    group, other = CodeGroup(4, 4, 2), CodeGroup(2, 6, 4)
    one, two = CodeLayout(((group,),)), CodeLayout(((group,), (other,)))
    first, both = fit_product(x, one), fit_product(x, two)
    assert torch.equal(first[0][0], both[0][0])
    assert (relative_error(x, two, both) < 0.7 * relative_error(x, one, first)).all()


def test_stages_over_the_same_parts_are_fitted_together() -> None:
    x = points(7, num=2000)
    group, small = CodeGroup(4, 4, 2), CodeGroup(2, 2, 2)
    joint = CodeLayout(((group,), (small, CodeGroup(2, 3, 2))))
    books = fit_product(x, joint, iterations=12)
    assert [[tuple(t.shape) for t in stage] for stage in books] == [[(2, 4, 16, 2)], [(2, 2, 4, 2), (2, 2, 8, 2)]]
    first = fit_product(x, CodeLayout((joint.stages[0],)), iterations=12)
    rest = x - reconstruct(x, CodeLayout((joint.stages[0],)), first)
    second = fit_product(rest, CodeLayout((joint.stages[1],)), iterations=12)
    one_by_one = (rest - reconstruct(rest, CodeLayout((joint.stages[1],)), second)).square().sum((1, 2)) / x.square().sum(
        (1, 2)
    )
    assert (relative_error(x, joint, books) < 0.97 * one_by_one).all()


def test_groups_of_different_rates_each_get_their_codebook() -> None:
    layout = CodeLayout(((CodeGroup(1, 6, 4), CodeGroup(2, 3, 2)),))
    codebooks = fit_product(points(3), layout)
    assert [tuple(t.shape) for t in codebooks[0]] == [(2, 1, 64, 4), (2, 2, 8, 2)]


def test_weights_pull_the_error_down_where_they_are() -> None:
    x, layout = points(4), CodeLayout.uniform(8, 2, 4)
    weights = torch.ones(2, 600)
    weights[:, :100] = 100
    plain, weighted = fit_product(x, layout), fit_product(x, layout, weights=weights)
    assert (relative_error(x, layout, weighted, weights) < relative_error(x, layout, plain, weights)).all()


def test_same_seed_same_bits() -> None:
    layout = CodeLayout.uniform(8, 4, 4)
    assert torch.equal(fit_product(points(5), layout, seed=7)[0][0], fit_product(points(5), layout, seed=7)[0][0])


def test_zero_points_have_no_error() -> None:
    layout = CodeLayout.uniform(8, 4, 4)
    x = torch.zeros(1, 40, 8)
    assert float(relative_error(x, layout, fit_product(x, layout))) == 0


def test_centroids_outside_fp16_are_refused() -> None:
    with pytest.raises(DataError, match=r"a centroid reaches .*expected at most 65504"):
        fit_product(points(6) * 1e6, CodeLayout.uniform(8, 4, 4))
