"""HIGGS, NSNQuant and VecInfer: what their papers claim, and a dull reference beside each."""

import math

import pytest
import rival_support as support
import torch

from pqkv_cli.baselines.higgs import GROUP_SIZE, Higgs, NormalGrid
from pqkv_cli.baselines.nsnquant import NSNQuant
from pqkv_cli.baselines.protocol import RivalCodec, Samples
from pqkv_cli.baselines.transforms import hadamard, magnitude_codebook, normal_codebook
from pqkv_cli.baselines.vecinfer import CODES, VecInfer, smooth_and_turn
from pqkv_cli.errors import UnsupportedModelError
from pqkv_kernels.reference.nearest import nearest_centroids

# Mean squared error per channel of Lloyd-Max levels for a normal variable (Max 1960), at 1 to 4 bits.
SCALAR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def normal(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def share_lost(codec: RivalCodec, x: torch.Tensor) -> float:
    """Squared error over squared size of tokens [1, Hkv, T, D], without those that stay exact."""
    lost = (codec.encode_decode(x) - x)[:, :, codec.exact.num_sinks :]
    return float(lost.square().sum() / x[:, :, codec.exact.num_sinks :].square().sum())


@pytest.mark.parametrize(("num_points", "nbits"), [(16, 2), (64, 3), (256, 4)])
def test_pairs_of_normal_variables_are_coded_better_than_one_by_one(num_points: int, nbits: int) -> None:
    points = normal_codebook(2, num_points)
    x = normal(1, 50000, 2)
    error = float((x - points[nearest_centroids(x, points[None])[0]]).square().mean())
    # Between the best for very many points (Zador 1982: 5 / (18 sqrt 3) * 8 pi / n in two channels) and the scalar one.
    assert error < SCALAR[nbits]
    assert error > 0.85 * 5 / (36 * math.sqrt(3)) * 8 * math.pi / num_points
    assert normal_codebook(2, num_points) is points  # found once in a process


@pytest.mark.parametrize("rate", [4, 3, 2])
def test_higgs_error_is_that_of_a_normal_variable_whatever_the_data(rate: int) -> None:
    shares = []
    for given in (support.samples(dim=64), support.samples(dim=64, outlier=100.0)):
        codec = support.codec_of("higgs", rate, given)
        shares.append(share_lost(codec, given.vectors[None]))
    # One channel of 64 that drowns all others is two-valued once turned: worse, but not by much.
    assert shares[0] < SCALAR[rate]
    assert shares[1] < 2 * SCALAR[rate]


def test_higgs_is_linear_in_scale() -> None:
    codec = support.codec_of("higgs", 2)
    x = support.samples(seed=1).vectors[None]
    assert torch.equal(codec.encode_decode(8 * x)[:, :, 4:], 8 * codec.encode_decode(x)[:, :, 4:])


def test_higgs_group_is_as_large_as_a_token_allows() -> None:
    bits = {(8, 128): 1024, (3, 64): 64, (2, 16): 32, (16, 128): 1024}
    for (heads, dim), group in bits.items():
        codec = Higgs(2).fit("keys", [support.samples(heads=heads, dim=dim, tokens=8)], 0)[0]
        assert codec.bits_per_channel == 2 + 16 / group
        assert group <= GROUP_SIZE
    with pytest.raises(UnsupportedModelError, match="higgs: found 1 heads of 12 channels, which leave groups of 4"):
        Higgs(2).fit("keys", [support.samples(heads=1, dim=12, tokens=8)], 0)


def test_higgs_codes_are_those_of_a_loop() -> None:
    grid = NormalGrid(2, 16, 8, seed=5)
    rows = normal(6, 16)
    payload = grid.encode(rows)
    signs = torch.randint(2, (16,), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    matrix, points = hadamard(8), normal_codebook(2, 16)
    decoded = grid.decode(payload)
    for token in range(6):
        for group in range(2):
            channels = slice(8 * group, 8 * group + 8)
            turned = matrix @ (rows[token, channels] * signs[channels])
            scale = (turned.norm() / math.sqrt(8)).half().float()
            best = [int((turned[i : i + 2] / scale - points).norm(dim=1).argmin()) for i in range(0, 8, 2)]
            assert payload.codes[token, group].tolist() == best
            assert float(payload.scales[0][token, group]) == pytest.approx(float(scale), rel=1e-3)
            back = matrix @ (points[best].flatten() * scale) * signs[channels]
            assert torch.allclose(decoded[token, channels], back, atol=1e-5)


@pytest.mark.parametrize("rate", [2, 1])
def test_nsnquant_takes_shifts_and_sizes_out(rate: int) -> None:
    codec = support.codec_of("nsnquant", rate, support.samples(dim=64))
    x = normal(1, 2, 256, 64)
    points = (magnitude_codebook if rate == 2 else normal_codebook)(8, 256)
    flat = x.reshape(1, -1, 8)
    flat = flat.abs() if rate == 2 else flat
    alone = float((flat - points[nearest_centroids(flat, points[None])[0]]).square().mean())
    assert alone < SCALAR[rate]
    assert share_lost(codec, x) < 1.1 * alone
    # A size of its own for every token, and a mean for every channel, change little.
    sizes = 2 ** normal(1, 2, 256, 1, seed=8)
    lost = (codec.encode_decode(x * sizes) - x * sizes) / sizes
    assert float(lost.square().mean()) < 1.2 * alone
    shifted = x + 5 * normal(1, 2, 1, 64, seed=9)
    lost = codec.encode_decode(shifted) - shifted
    assert float(lost.square().mean()) < 1.2 * alone
    turbo = support.codec_of("turboquant", rate, support.samples(dim=64))
    assert 4 * float(lost.square().mean()) < float((turbo.encode_decode(shifted) - shifted).square().mean())


def test_nsnquant_needs_no_calibration_and_counts_its_side_information() -> None:
    first, second = (support.codec_of("nsnquant", 2, support.samples(seed=seed, dim=128)) for seed in (0, 1))
    x = support.samples(seed=2, dim=128).vectors[None]
    assert torch.equal(first.encode_decode(x), second.encode_decode(x))
    assert first.bits_per_channel == pytest.approx(2 + 16 / 128 + 8 / 64 + 96 / (64 * 128))
    assert first.bits_per_channel == pytest.approx(2.23, abs=0.04)  # the paper's
    assert first.table_bytes == 0
    with pytest.raises(UnsupportedModelError, match="nsnquant: found head_dim 4; expected at least 8 channels"):
        NSNQuant(2).fit("keys", [support.samples(dim=4, tokens=64)], 0)


def test_nsnquant_is_what_its_equations_say() -> None:
    codec = support.codec_of("nsnquant", 2, support.samples(dim=16))
    x = normal(1, 1, 64, 16) + 1
    stored = codec.encode(x)
    assert stored.payload is not None
    s1, s1_scale, s1_zero, o, o_scale, o_zero, s2, s2_scale, s2_zero = (part.float() for part in stored.payload.scales)
    outer, inner = s1[0, 0, 0] * s1_scale[0, 0, 0] + s1_zero[0, 0, 0], s2[0, 0, 0] * s2_scale[0, 0, 0] + s2_zero[0, 0, 0]
    shift = o[0, 0, 0] * o_scale[0, 0, 0] + o_zero[0, 0, 0]
    # s1 and o within half a step of 8 bits.
    rms = x[0, 0].square().mean(1).sqrt()
    assert float((outer - rms).abs().max()) <= 0.51 * float(s1_scale[0, 0, 0]) + 1e-3
    mean = (x[0, 0] / outer[:, None]).mean(0)
    assert float((shift - mean).abs().max()) <= 0.51 * float(o_scale[0, 0, 0]) + 1e-3
    decoded = codec.decode(stored)
    for token in (0, 63):
        point = torch.cat([magnitude_codebook(8, 256)[int(c[0])] for c in stored.payload.codes[0, 0, 0, token]])
        negative = [int(c[1]) >> place & 1 for c in stored.payload.codes[0, 0, 0, token] for place in range(8)]
        z = torch.where(torch.tensor(negative) == 1, -point, point)
        expected = outer[token] * (inner[token] * (hadamard(16) @ z) + shift)
        assert torch.allclose(decoded[0, 0, token], expected, atol=1e-5)


def test_vecinfer_leaves_scores_what_they_were_before_coding() -> None:
    keys, queries = support.samples(outlier=16.0).vectors, normal(2, 5, 16)
    forward, inverse = smooth_and_turn(keys)
    assert torch.allclose(forward @ inverse, torch.eye(16).expand(2, 16, 16), atol=1e-5)
    # Queries take the inverse, transposed: (q Lambda H) (H Lambda^-1 k) = q k.
    scores = (queries @ inverse.mT) @ (keys @ forward).mT
    assert torch.allclose(scores, queries @ keys.mT, rtol=1e-3, atol=1e-3)


def test_vecinfer_survives_outlier_channels_that_ruin_plain_product_quantization() -> None:
    given = [support.samples(seed=i, outlier=16.0) for i in range(2)]
    # The channels that share a code with the loud one.
    million, smooth = (
        float(support.relative_error(support.codec_of(name, 2, given[0]), given[1].vectors)[:, :3].mean())
        for name in ("million", "vecinfer")
    )
    assert 1.5 * smooth < million


@pytest.mark.parametrize("rate", [4, 2, 1])
def test_vecinfer_has_a_codebook_per_head_for_all_sub_vectors(rate: int) -> None:
    subspace_dim, nbits = CODES[rate]
    given = support.samples()
    keys, values = (VecInfer(rate).fit(side, [given], 0)[0] for side in ("keys", "values"))
    assert values.table_bytes == 2 * support.HEADS * subspace_dim << nbits
    assert keys.table_bytes == values.table_bytes + 2 * support.HEADS * support.DIM  # and lambda
    assert keys.bits_per_channel == values.bits_per_channel == rate
    # Values: sub-vectors may change places.
    x = support.samples(seed=4).vectors[None]
    swapped = x.unflatten(-1, (-1, subspace_dim)).flip(3).flatten(3)
    expected = values.encode_decode(x).unflatten(-1, (-1, subspace_dim)).flip(3).flatten(3)
    assert torch.equal(values.encode_decode(swapped), expected)


def test_vecinfer_refuses_heads_it_cannot_turn() -> None:
    with pytest.raises(UnsupportedModelError, match="vecinfer: found head_dim 24; expected a power of two"):
        support.codec_of("vecinfer", 2, support.samples(dim=24))
    narrow = support.samples(dim=4)
    with pytest.raises(UnsupportedModelError, match="vecinfer: found head_dim 4; expected a multiple of 8 at 1 bits"):
        VecInfer(1).fit("values", [Samples(narrow.vectors, narrow.token_weight, narrow.channel_weight)], 0)
