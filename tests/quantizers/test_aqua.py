"""AQUA-KV: layers are predicted from decoded ones, in order."""

import pytest
import rival_support as support
import torch

from pqkv_cli.baselines.aqua import AquaKV, ridge
from pqkv_cli.baselines.levels import token_rows
from pqkv_cli.baselines.protocol import RivalCodec, Samples
from pqkv_cli.baselines.registry import METHODS, is_at_rest
from pqkv_cli.errors import CacheError, DataError
from pqkv_cli.specs import SIDES, Side

LAYERS, HEADS, DIM, TOKENS = 3, 2, 16, 2048


def related(seed: int) -> dict[Side, list[Samples]]:
    """Samples of layers whose keys and values are linear in a common factor, but for a tenth of their size."""
    g, maps = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    common = torch.randn(TOKENS, HEADS * DIM, generator=g)
    made: dict[Side, list[Samples]] = {"keys": [], "values": []}
    for side in SIDES:
        for _ in range(LAYERS):
            rows = common @ torch.randn(HEADS * DIM, HEADS * DIM, generator=maps) / (HEADS * DIM) ** 0.5
            rows = rows + 0.1 * torch.randn(rows.shape, generator=g) + 1
            vectors = rows.unflatten(1, (HEADS, DIM)).transpose(0, 1)
            made[side].append(Samples(vectors, torch.ones(HEADS, TOKENS), torch.ones(HEADS, DIM)))
    return made


def fitted(rate: int) -> dict[Side, list[RivalCodec]]:
    rival, given = AquaKV(rate), related(0)
    return {side: rival.fit(side, given[side], 0) for side in SIDES}


def errors(codecs: dict[Side, list[RivalCodec]], seed: int = 1) -> dict[Side, list[float]]:
    """Share of the variance lost, layer after layer, in the order of a cache."""
    given = related(seed)
    lost: dict[Side, list[float]] = {"keys": [], "values": []}
    for layer in range(LAYERS):
        for side in SIDES:
            x = given[side][layer].vectors
            lost[side].append(float(support.relative_error(codecs[side][layer], x).mean()))
    return lost


def test_what_is_predicted_is_not_stored_again() -> None:
    codecs = fitted(2)
    lost = errors(codecs)
    plain = float(
        support.relative_error(
            METHODS["higgs"].make(2).fit("keys", related(0)["keys"][:1], 0)[0], related(1)["keys"][0].vectors
        ).mean()
    )
    for side in SIDES:
        assert lost[side][0] < 0.02  # four bits
        assert max(lost[side][1:]) < plain / 5
        assert codecs[side][0].bits_per_channel == 4 + 16 / 32
        assert codecs[side][1].bits_per_channel == 2 + 16 / 32
    width = HEADS * DIM
    assert [c.table_bytes for c in codecs["keys"]] == [0, *[2 * (width * width + width)] * 2]
    assert [c.table_bytes for c in codecs["values"]] == [0, *[2 * (2 * width * width + width)] * 2]
    assert is_at_rest("aqua-kv") and not is_at_rest("higgs") and not is_at_rest("pqkv")


def test_more_bits_lose_less() -> None:
    lost = [errors(fitted(rate))["values"][-1] for rate in (4, 3, 2)]
    assert 2 * lost[0] < lost[1] and 2 * lost[1] < lost[2]


def test_a_layer_is_its_prediction_from_decoded_layers_and_a_coded_residual() -> None:
    codecs, given = fitted(3), related(1)
    x = [given["keys"][layer].vectors[None] for layer in range(2)]
    before = codecs["keys"][0].encode_decode(x[0])
    # Whoever decodes alone has nothing but codes: the same numbers come out again.
    stored = codecs["keys"][1].encode(x[1])
    decoded = codecs["keys"][1].decode(stored)
    assert torch.equal(codecs["keys"][1].decode(stored), decoded)
    predictor = codecs["keys"][1]._predictor  # type: ignore[attr-defined]
    residual = codecs["keys"][1]._grid.decode(stored.payload)  # type: ignore[attr-defined]
    expected = predictor(token_rows(before)[:, 4:]) + residual
    assert torch.allclose(token_rows(decoded)[:, 4:], expected, atol=1e-5)
    assert torch.equal(decoded[:, :, :4], x[1][:, :, :4].half().float())


def test_layers_out_of_order_are_refused() -> None:
    codecs, given = fitted(2), related(1)
    match = (
        "aqua-kv: found no decoded tokens that the keys of coded layer 1 are predicted from; expected the layers of one cache"
    )
    with pytest.raises(CacheError, match=match):
        codecs["keys"][1].encode(given["keys"][1].vectors[None])
    codecs["keys"][0].encode_decode(given["keys"][0].vectors[None])
    with pytest.raises(CacheError, match=match):
        codecs["keys"][1].encode(given["keys"][1].vectors[None, :, :100])


def test_values_without_their_keys_are_refused() -> None:
    with pytest.raises(
        DataError, match="aqua-kv: found values of 3 layers and decoded keys of 0; expected the keys of the same"
    ):
        AquaKV(2).fit("values", related(0)["values"], 0)


def test_ridge_is_least_squares_where_there_is_plenty() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 6, generator=g)
    weight, offset = torch.randn(6, 3, generator=g), torch.randn(3, generator=g)
    y = x @ weight + offset + 0.01 * torch.randn(5000, 3, generator=g)
    predictor = ridge([("keys", 0)], x, y)
    exact = torch.linalg.lstsq(torch.cat((x, torch.ones(5000, 1)), 1), y).solution
    assert torch.allclose(predictor(torch.eye(6)) - predictor(torch.zeros(6)), exact[:6], atol=5e-3)
    assert torch.allclose(predictor(torch.zeros(6)), exact[6], atol=5e-3)
