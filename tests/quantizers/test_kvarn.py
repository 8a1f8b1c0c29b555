"""KVarN: variances of tokens and channels are even before rounding, and that is what helps."""

import pytest
import rival_support as support
import torch

from pqkv_cli.baselines.kvarn import BalancedKeys, BalancedValues, KVarN, balance
from pqkv_cli.baselines.registry import METHODS
from pqkv_cli.baselines.transforms import hadamard, turn
from pqkv_cli.errors import UnsupportedModelError


def tiles(seed: int = 0) -> torch.Tensor:
    """Normal entries [1, 2, 256, 64] under scales per token and per channel, as a cache has them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 256, 64, generator=g)
    return x * 2 ** torch.randn(1, 2, 256, 1, generator=g) * 2 ** torch.randn(1, 2, 1, 64, generator=g)


def test_balanced_tiles_have_even_tokens_and_channels() -> None:
    x = tiles()[:, :, :128]
    per_token, per_channel = balance(x)
    even = x / per_token / per_channel
    spreads = torch.cat((even.std(-1), even.std(-2)), dim=-1)
    assert float(spreads.amax(-1).div(spreads.amin(-1)).max()) < 1.01
    plain = torch.cat((x.std(-1), x.std(-2)), dim=-1)
    assert float(plain.amax(-1).div(plain.amin(-1)).min()) > 10


def test_tiles_that_are_constant_or_even_stay_finite() -> None:
    for x in (torch.zeros(1, 1, 128, 16), torch.full((1, 1, 128, 16), 3.0), torch.eye(128, 16)[None, None]):
        assert all(bool((torch.isfinite(scale) & (scale > 0)).all()) for scale in balance(x))


def test_channels_that_hardly_vary_leave_all_numbers_finite() -> None:
    # Seen in a model: scales of tokens beyond half precision.
    g = torch.Generator().manual_seed(4)
    steady = torch.full((1, 1, 128, 64), 40.0)
    steady[..., 1:] = torch.randn(1, 1, 128, 63, generator=g)
    x = turn(steady + 1e-5 * torch.randn(1, 1, 128, 64, generator=g), hadamard(64))
    lost = [codec.encode_decode(x) - x for codec in (BalancedKeys(4, 64), BalancedValues(4, 64))]
    assert all(bool(torch.isfinite(each).all()) for each in lost)
    assert float(lost[0].square().sum() / x.square().sum()) < 0.01  # a range per channel takes the steady one up


@pytest.mark.parametrize("codec", [BalancedKeys(3, 64), BalancedValues(3, 64)])
def test_a_scale_of_a_token_is_taken_up(codec: BalancedKeys | BalancedValues) -> None:
    x = tiles(1)
    factors = torch.ones(256, 1)
    factors[::16] = 32.0
    lost = [(codec.encode_decode(y) - y).square().sum(-1) / y.square().sum(-1) for y in (x, x * factors)]
    assert float(lost[1].mean()) == pytest.approx(float(lost[0].mean()), rel=0.05)


@pytest.mark.parametrize("rate", [4, 3, 2])
def test_tokens_that_stand_out_hurt_less_than_in_kivi(rate: int) -> None:
    # The paper's point: errors that accumulate come from tokens of the wrong size.
    x = tiles(2)
    given = support.samples(dim=64)
    kivi, kvarn = (METHODS[name].make(rate).fit("keys", [given], 0)[0] for name in ("kivi-g128", "kvarn"))
    lost = [((c.encode_decode(x) - x).square().sum(-1) / x.square().sum(-1)).mean() for c in (kivi, kvarn)]
    assert 2 * lost[1] < lost[0]


def test_keys_have_ranges_per_channel_and_values_per_token() -> None:
    x = tiles(3)
    turned = turn(x, hadamard(64)).unflatten(2, (2, 128))
    keys, values = BalancedKeys(2, 64).encode(x).payload, BalancedValues(2, 64).encode(x).payload
    assert keys is not None and values is not None
    assert [tuple(s.shape) for s in keys.scales] == [(1, 2, 2, 64), (1, 2, 2, 64), (1, 2, 2, 128, 1)]
    assert [tuple(s.shape) for s in values.scales] == [(1, 2, 2, 128, 1), (1, 2, 2, 128, 1), (1, 2, 2, 1, 64)]
    # The dull way for one channel of one tile.
    scale, zero, per_token = (s.float() for s in keys.scales)
    column = turned[0, 1, 0, :, 5] / per_token[0, 1, 0, :, 0]
    codes = ((column - zero[0, 1, 0, 5]) / scale[0, 1, 0, 5]).round().clamp(0, 3)
    assert torch.equal(keys.codes[0, 1, 0, 5].float(), codes)
    assert float(column.amin()) == pytest.approx(float(zero[0, 1, 0, 5]), rel=1e-3)


def test_bits_of_keys_and_values_may_differ() -> None:
    given = support.samples(dim=128)
    mixed = METHODS["kvarn-k4v2"].make(3)
    keys, values = (mixed.fit(side, [given], 0)[0] for side in ("keys", "values"))
    assert (mixed.name, mixed.nbits) == ("kvarn-k4v2", 3)
    assert keys.bits_per_channel == 4 + 32 / 128 + 16 / 128
    assert values.bits_per_channel == 2 + 32 / 128 + 16 / 128
    with pytest.raises(UnsupportedModelError, match="kvarn: found head_dim 24; expected a power of two"):
        KVarN(2).fit("keys", [support.samples(dim=24)], 0)
