import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.grouping import balanced_pairs, deal
from pqkv_cli.quantizers.maps import inverse_error, metric_matrix, metric_rotation, pair_metric, pair_scale, range_factor
from pqkv_kernels.format.layout import CodeGroup, CodeLayout, RotaryLayout

seeds = st.integers(0, 2**31)


def moment(seed: int, heads: int = 2, dim: int = 16, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, rank or 4 * dim, dim, generator=generator, dtype=torch.float64) * torch.rand(
        dim, generator=generator
    )
    return x.mT @ x


def powers(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.exp2(torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)).double())


def pair_powers(seed: int, rotary: RotaryLayout, heads: int, dim: int) -> torch.Tensor:
    factors = powers(seed, (heads, dim))
    for first, second in rotary.pairs():
        factors[:, second] = factors[:, first]
    return factors


def gauged(gram: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return factors[:, :, None] * gram * factors[:, None, :]


@given(seed=seeds, interleaved=st.booleans(), rotary_dim=st.sampled_from([8, 16]))
@settings(max_examples=30, deadline=None)
def test_pair_scale_is_equivariant_and_constant_within_pairs(seed: int, interleaved: bool, rotary_dim: int) -> None:
    rotary, gram = RotaryLayout(rotary_dim, interleaved), moment(seed)
    factors = pair_powers(seed, rotary, 2, 16)
    scale = pair_scale(gram, rotary)
    assert torch.equal(pair_scale(gauged(gram, factors), rotary), scale * factors.float())
    for first, second in rotary.pairs():
        assert torch.equal(scale[:, first], scale[:, second])
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    torch.testing.assert_close(scale[:, rotary_dim:], diagonal[:, rotary_dim:].sqrt().float())
    torch.testing.assert_close(scale.double().square().sum(1), diagonal.sum(1), rtol=1e-5, atol=0)


def test_pair_scale_of_dead_pairs_and_heads_is_positive() -> None:
    gram = moment(0)
    gram[0, 3], gram[0, :, 3], gram[0, 11], gram[0, :, 11] = 0, 0, 0, 0
    gram[1] = 0
    scale = pair_scale(gram, RotaryLayout(16))
    alive = scale[0, [i for i in range(16) if i not in (3, 11)]]
    torch.testing.assert_close(scale[0, 3], 0.01 * alive.mean())
    assert torch.equal(scale[1], torch.ones(16))


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_metric_matrix_measures_the_error_under_the_gram(seed: int) -> None:
    gram = moment(seed)
    matrix = metric_matrix(gram).double()
    x = torch.randn(2, 16, 5, dtype=torch.float64)
    expected = (x * (gram @ x)).sum(1)
    torch.testing.assert_close((matrix @ x).square().sum(1), expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(matrix.tril(-1), torch.zeros_like(matrix))


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_metric_maps_are_equivariant_to_the_bit(seed: int) -> None:
    gram, values, factors = moment(seed), moment(seed + 1), powers(seed, (2, 16))
    layout = CodeLayout.uniform(16, 4, 4)
    assert torch.equal(metric_matrix(gauged(gram, factors)), metric_matrix(gram) * factors.float()[:, None, :])
    turned = metric_rotation(gauged(gram, factors), gauged(values, 1 / factors), layout)
    assert torch.equal(turned, metric_rotation(gram, values, layout) * factors.float()[:, None, :])


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_metric_rotation_keeps_the_metric_and_balances_energy(seed: int) -> None:
    gram, values = moment(seed), moment(seed + 1)
    layout = CodeLayout.uniform(16, 4, 4)
    plain, turned = metric_matrix(gram).double(), metric_rotation(gram, values, layout).double()
    torch.testing.assert_close(turned.mT @ turned, plain.mT @ plain, rtol=1e-4, atol=1e-4)
    mapped = turned @ values @ turned.mT
    energy = torch.diagonal(mapped, dim1=1, dim2=2)
    off_diagonal = mapped - torch.diag_embed(energy)
    assert off_diagonal.abs().max() < 1e-4 * energy.max()
    loads = energy.log2().view(2, 4, 4).sum(2)
    spread = energy.log2().amax(1) - energy.log2().amin(1)
    assert (loads.amax(1) - loads.amin(1) <= spread).all()


@pytest.mark.parametrize("rank", [1, 3, 15])
def test_rank_deficient_grams_still_invert(rank: int) -> None:
    matrix = metric_rotation(moment(rank, rank=rank), moment(9), CodeLayout.uniform(16, 4, 4))
    assert inverse_error(matrix) <= 1e-4


def test_dead_channels_and_heads_still_invert() -> None:
    gram = moment(1)
    gram[0, 5], gram[0, :, 5] = 0, 0
    gram[1] = 0
    assert inverse_error(metric_rotation(gram)) <= 1e-4
    assert torch.equal(metric_matrix(gram)[1], torch.eye(16))


def test_bad_moments_are_refused_by_head() -> None:
    gram = moment(1)
    gram[1, 2, 3] = float("nan")
    with pytest.raises(DataError, match="head 1 is not finite"):
        metric_matrix(gram)
    with pytest.raises(DataError, match="query moment of key/value head 1"):
        pair_scale(gram, None)
    indefinite = torch.eye(4, dtype=torch.float64)[None] + 5 * (1 - torch.eye(4, dtype=torch.float64))
    with pytest.raises(DataError, match="not positive semi-definite"):
        metric_matrix(indefinite)


@given(seed=seeds, interleaved=st.booleans(), rotary_dim=st.sampled_from([4, 8, 16]), dsub=st.sampled_from([2, 4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_balanced_pairs_permutes_whole_pairs(seed: int, interleaved: bool, rotary_dim: int, dsub: int) -> None:
    rotary = RotaryLayout(rotary_dim, interleaved)
    energy = torch.rand(3, rotary.num_pairs, generator=torch.Generator().manual_seed(seed)) ** 4
    order = balanced_pairs(energy, rotary, CodeLayout.uniform(16, 16 // dsub, 4))
    assert order.dtype == torch.int16
    for row in order.long():
        assert sorted(row.tolist()) == list(range(16))
        place = {int(channel): i for i, channel in enumerate(row)}
        for first, second in rotary.pairs():
            assert place[second] == place[first] + 1
            assert place[first] // dsub == place[second] // dsub


def test_two_pairs_per_code_couple_the_strongest_with_the_weakest() -> None:
    order = balanced_pairs(torch.tensor([[8.0, 4.0, 2.0, 1.0]]), RotaryLayout(8), CodeLayout.uniform(8, 2, 8))
    assert order.tolist() == [[0, 4, 3, 7, 1, 5, 2, 6]]


def test_odd_subspaces_keep_the_order() -> None:
    order = balanced_pairs(torch.rand(2, 4), RotaryLayout(8), CodeLayout.uniform(8, 8, 4))
    assert order.tolist() == [list(range(8))] * 2


def test_unequal_groups_fill_up_and_more_bits_take_more_energy() -> None:
    layout = CodeLayout(((CodeGroup(1, 8, 4), CodeGroup(2, 4, 2)),))
    order = balanced_pairs(torch.tensor([[1.0, 2.0, 900.0, 800.0]]), RotaryLayout(8), layout)
    assert sorted(order[0].tolist()) == list(range(8))
    assert 2 in order[0, :4].tolist()


@given(seed=seeds, size=st.integers(1, 5), count=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_deal_respects_capacity(seed: int, size: int, count: int) -> None:
    energy = torch.rand(size * count, generator=torch.Generator().manual_seed(seed))
    buckets = deal(energy, [size] * count, [8.0] * count)
    assert [len(b) for b in buckets] == [size] * count
    assert sorted(i for b in buckets for i in b) == list(range(size * count))


def test_range_factor_is_a_power_of_two_into_one_to_two() -> None:
    mapped = torch.randn(3, 50, 4) * torch.tensor([1e-4, 1.0, 3e5]).view(3, 1, 1)
    factor = range_factor(mapped)
    assert torch.equal(torch.exp2(torch.log2(factor).round()), factor)
    rms = (mapped * factor.view(3, 1, 1)).square().mean((1, 2)).sqrt()
    assert ((rms >= 1) & (rms < 2)).all()
    assert torch.equal(range_factor(torch.zeros(1, 3, 2)), torch.ones(1))


@pytest.mark.parametrize("rotary_dim", [16, 12])
def test_pair_metric_measures_the_error_under_the_pair_moment(rotary_dim: int) -> None:
    rotary = RotaryLayout(rotary_dim)
    g = torch.Generator().manual_seed(5)
    met = torch.randn(2, rotary.num_pairs, 5, 2, generator=g).double()
    moments, channels = met.mT @ met, moment(3)
    maps = pair_metric(moments, channels, rotary, 16).double()
    assert maps.shape == (2, 8, 2, 2)
    x = torch.randn(2, rotary.num_pairs, 2, generator=g).double()
    expected = torch.einsum("hpi,hpij,hpj->hp", x, moments, x)
    found = torch.einsum("hpij,hpj->hpi", maps[:, : rotary.num_pairs], x).square().sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    left_over = maps[:, rotary.num_pairs :].diagonal(dim1=-2, dim2=-1).flatten(1)
    torch.testing.assert_close(left_over, channels.diagonal(dim1=1, dim2=2)[:, rotary_dim:].sqrt(), rtol=1e-4, atol=0)


def test_pair_metric_undoes_power_of_two_gauges_exactly_and_survives_degenerate_pairs() -> None:
    rotary = RotaryLayout(16)
    g = torch.Generator().manual_seed(6)
    met = torch.randn(2, 8, 5, 2, generator=g).double()
    moments = met.mT @ met
    factors = torch.exp2(torch.randint(-5, 6, (2, 8), generator=g).double())
    gauge = moments * factors[..., None, None].square()
    channels = moment(3)
    plain = pair_metric(moments, channels, rotary, 16)
    assert torch.equal(pair_metric(gauge, channels, rotary, 16), plain * factors[..., None, None].float())
    moments[0, 0], moments[0, 1] = 0.0, 1.0  # a dead pair; a pair that sees one direction only
    assert bool(torch.isfinite(torch.linalg.inv(pair_metric(moments, channels, rotary, 16))).all())
