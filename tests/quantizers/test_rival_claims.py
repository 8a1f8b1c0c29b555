"""What the papers claim of their methods holds for these implementations."""

import math

import pytest
import rival_support as support
import torch

from pqkv_cli.baselines.kvquant import KVQuant, channel_range
from pqkv_cli.baselines.levels import fitted_levels, nearest_level, sphere_levels
from pqkv_cli.baselines.million import Million
from pqkv_cli.baselines.protocol import RivalCodec, Samples
from pqkv_cli.baselines.rtn import Kivi
from pqkv_cli.baselines.transformers_cache import LibraryCache
from pqkv_cli.baselines.transforms import hadamard
from pqkv_cli.baselines.turboquant import random_rotation
from pqkv_cli.errors import PqkvError, UnsupportedModelError


def mean_error(codec: RivalCodec, x: torch.Tensor) -> float:
    return float(support.relative_error(codec, x).mean())


def test_kivi_keys_per_channel_beat_per_token_where_channels_stand_out() -> None:
    # KIVI, table 2: keys need per-channel ranges, values per-token ones.
    given = support.samples(outlier=30.0)
    per_channel, per_token = (support.codec_of("kivi", 2, given, side) for side in ("keys", "values"))
    quiet = [c for c in range(support.DIM) if c != 3]
    keys = [support.relative_error(codec, given.vectors)[:, quiet].mean() for codec in (per_channel, per_token)]
    assert 3 * keys[0] < keys[1]
    assert float(keys[1]) > 0.5  # per token the outlier channel drowns all others
    # Tokens that stand out are the opposite case.
    g = torch.Generator().manual_seed(5)
    loud = torch.randn(2, 512, 16, generator=g)
    loud[:, ::32] *= 30
    calm = torch.ones(512, dtype=torch.bool)
    calm[::32] = False
    errors = [(c.encode_decode(loud[None])[0] - loud).square()[:, calm].mean() for c in (per_channel, per_token)]
    assert 3 * errors[1] < errors[0]


@pytest.mark.parametrize("name", ["kivi", "kvquant"])
def test_ranges_per_channel_do_not_notice_scaled_channels(name: str) -> None:
    calm = support.samples()
    factor = torch.ones(support.DIM)
    factor[[3, 7]] = 16.0
    loud = Samples(calm.vectors * factor, calm.token_weight, calm.channel_weight / factor.square(), calm.rotary)
    x = support.samples(seed=1).vectors[None]
    first = support.codec_of(name, 3, calm).encode_decode(x)
    second = support.codec_of(name, 3, loud).encode_decode(x * factor)
    assert torch.equal(second, first * factor)
    values = [support.codec_of(name, 3, given, "values") for given in (calm, loud)]
    quiet = [c for c in range(support.DIM) if factor[c] == 1]
    errors = [support.relative_error(c, g.vectors)[:, quiet].mean() for c, g in zip(values, (calm, loud), strict=True)]
    assert errors[1] > 4 * errors[0]


def test_kivi_keeps_the_window_it_is_asked_for() -> None:
    codec = Kivi(2, window_tokens=128).fit("keys", [support.samples()], 0)[0]
    x = support.samples(seed=1).vectors[None].half().float()
    stored = codec.encode(x)
    assert stored.exact.shape[2] == 128
    assert torch.equal(codec.decode(stored)[:, :, -128:], x[:, :, -128:])


def test_kvquant_outliers_in_sparse_form_pay_for_their_bits() -> None:
    # KVQuant, table 4: one per cent of outliers at 3 bits gains more than their 0.3 bits would.
    g = torch.Generator().manual_seed(0)
    heavy = _heavy_tails(g)
    given = Samples(heavy, torch.ones(8, 1024), torch.ones(8, 32))
    for side in ("keys", "values"):
        sparse, dense = (KVQuant(3, share).fit(side, [given], 0)[0] for share in (0.01, 0.0))
        errors = [mean_error(codec, heavy) for codec in (sparse, dense)]
        gain = math.log2(errors[1] / errors[0]) / 2  # bits of a uniform quantizer
        assert gain > sparse.bits_per_channel - dense.bits_per_channel


def _heavy_tails(g: torch.Generator) -> torch.Tensor:
    normal = torch.randn(4, 8, 1024, 32, generator=g)
    return normal[0] / (normal[1:].square().mean(0)).sqrt()  # Student's t with three degrees of freedom


def test_kvquant_levels_beat_uniform_ones_and_follow_the_weights() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20000, generator=g).clamp(-4, 4)
    uniform = torch.linspace(-4, 4, 8)
    levels = fitted_levels(x, torch.ones_like(x), 8)
    errors = [(x - line[nearest_level(x, line).long()]).square().mean() for line in (levels, uniform)]
    assert 2 * errors[0] < errors[1]
    assert float(errors[0]) == pytest.approx(0.0345, abs=0.002)  # Max 1960: eight levels of a normal variable
    drawn = fitted_levels(x, torch.where(x > 1, 100.0, 1.0), 8)
    assert (drawn > 1).sum() > (levels > 1).sum()


def test_kvquant_keys_are_coded_before_rotation_and_values_as_they_are() -> None:
    given = support.samples()
    assert KVQuant(3).fit("keys", [given], 0)[0].rotary == given.rotary
    assert KVQuant(3).fit("values", [given], 0)[0].rotary is None
    low, high = channel_range(given.vectors, 0.02)
    outside = (given.vectors < low[:, None]) | (given.vectors > high[:, None])
    assert float(outside.float().mean()) == pytest.approx(0.02, abs=0.003)


@pytest.mark.parametrize(("num_levels", "distortion"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_turboquant_levels_are_those_of_the_sphere(num_levels: int, distortion: float) -> None:
    # TurboQuant, theorem 1: 0.36, 0.117, 0.03, 0.009 of the squared norm at 1 to 4 bits.
    levels = sphere_levels(128, num_levels)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-4)
    g = torch.Generator().manual_seed(2)
    x = torch.nn.functional.normalize(torch.randn(4000, 128, generator=g), dim=1)
    error = (x - levels[nearest_level(x, levels).long()]).square().sum(1).mean()
    assert float(error) == pytest.approx(distortion, rel=0.05)


@pytest.mark.parametrize("rate", [4, 3, 2, 1])
def test_turboquant_error_does_not_depend_on_the_data(rate: int) -> None:
    codec = support.codec_of("turboquant", rate, support.samples(dim=64))
    shares = []
    for x in (torch.eye(64)[None, None].repeat(1, 2, 1, 1), support.samples(dim=64, outlier=1000.0).vectors[None]):
        shares.append(float((codec.encode_decode(x) - x).square().sum() / x.square().sum()))
    assert shares[0] == pytest.approx(shares[1], rel=0.35)
    rotation = random_rotation(64, 0)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(64), atol=1e-5)


def test_rotatekv_rotation_spreads_outlier_channels() -> None:
    # RotateKV, table 3: rotation before rounding per token; one loud channel would ruin its group otherwise.
    given = support.samples(outlier=30.0, dim=64)
    rotated, plain = (support.codec_of(name, 4, given) for name in ("rotatekv", "rtn-g128"))
    total = [float((c.encode_decode(given.vectors[None])[0] - given.vectors).square().mean()) for c in (rotated, plain)]
    assert 2 * total[0] < total[1]
    matrix = hadamard(64)
    assert torch.allclose(matrix @ matrix, torch.eye(64), atol=1e-6)
    stored = rotated.encode(given.vectors[None])
    assert (rotated.exact.num_sinks, stored.start, stored.exact.shape[2]) == (4, 4, 4)


def test_million_has_one_codebook_for_all_layers_and_heads() -> None:
    layers = [support.samples(seed=i) for i in range(3)]
    codecs = Million(2).fit("keys", layers, 0)
    x = support.samples(seed=9).vectors[None]
    assert torch.equal(codecs[0].encode_decode(x), codecs[2].encode_decode(x))
    assert torch.equal(codecs[0].encode_decode(x.flip(1)), codecs[0].encode_decode(x).flip(1))
    assert [c.table_bytes for c in codecs] == [4 * 256 * 4 * 2, 0, 0]
    assert codecs[0].rotary is None and codecs[0].bits_per_channel == 2


def test_million_suffers_from_outliers_of_single_heads() -> None:
    # The weakness of one codebook for all: what one head needs, the others pay for.
    calm = [support.samples(seed=i) for i in range(3)]
    loud = [Samples(s.vectors * torch.tensor([[[1.0]], [[16.0]]]), s.token_weight, s.channel_weight) for s in calm]
    errors = []
    for layers in (calm, loud):
        codec = Million(2).fit("keys", layers, 0)[0]
        errors.append(float(support.relative_error(codec, layers[0].vectors)[0].mean()))
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_library_caches_work_or_say_what_to_install(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = LibraryCache(4, backend)  # type: ignore[arg-type]
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(PqkvError, match=rf"{backend}: found no package .* pip install 'pqkv\[quantized-cache\]'"):
        rival.fit("keys", [support.samples()], 0)


@pytest.mark.parametrize("rate", [4, 2])
def test_hqq_stores_what_it_counts(rate: int) -> None:
    pytest.importorskip("hqq")
    codec = LibraryCache(rate, "hqq").fit("keys", [support.samples()], 0)[0]
    x = support.samples(seed=1).vectors[None]
    stored = codec.encode(x)
    assert stored.bits.per_channel == pytest.approx(codec.bits_per_channel) == pytest.approx(rate + 0.5)
    assert float((codec.decode(stored) - x).square().mean() / x.var()) < 2.0 ** (3 - 2 * rate)
    with pytest.raises(
        UnsupportedModelError, match="hqq: found 32 entries at once; expected a multiple of 64; change --context"
    ):
        codec.encode(x[:, :, :1])
