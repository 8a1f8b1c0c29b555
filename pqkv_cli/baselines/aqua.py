"""AQUA-KV (Shutova et al., ICML 2025, arXiv 2501.19392): what the layer before predicts is not stored again.

With K~, V~ what decoding gives (keys before rotary embedding, all heads of a token side by side), layer after layer:

- keys: code ``K_l - P_l K~_{l-1}``
- values: code ``V_l - Q_l [K~_l ; V~_{l-1}]``
- P, Q: ridge regressions with an offset, trained one after another on decoded inputs
- residuals go through HIGGS; the first layer has no prediction and 4 bits; the first four tokens are exact
- its window of 128 recent tokens is left out

A layer can be read only after all layers before it have been rebuilt, so nothing can attend to the codes: a way to store a
cache, not to run on it. The codecs of one fit share what they have decoded, and have to be asked in the order of the model,
keys before values, as a cache does.

Ours: tokens of the calibration sample (16,384 at most) instead of 256 sequences of 8,192 tokens, predictors in half precision
(counted as `table_bytes`), and a ridge of a thousandth of the mean variance of an input, which the paper does not name.
"""

from collections.abc import Sequence

import torch

from pqkv_cli.baselines.higgs import SINKS, NormalGrid, grid_of
from pqkv_cli.baselines.levels import from_token_rows, token_rows
from pqkv_cli.baselines.protocol import Grouping, Payload, RivalCodec, Samples, Stored
from pqkv_cli.errors import CacheError, DataError
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.format.layout import RotaryLayout

FIRST_LAYER_BITS = 4
FIT_TOKENS = 1 << 14
RIDGE = 1e-3

Place = tuple[Side, int]
# What the codecs of one fit have decoded last, tokens as rows [B, T, Hkv * D] fp32.
Rebuilt = dict[Place, torch.Tensor]


class Predictor:
    """An affine map of rows: `weight` [Cin, Cout] and `offset` [Cout], both fp32 numbers of half precision."""

    def __init__(self, sources: Sequence[Place], weight: torch.Tensor, offset: torch.Tensor) -> None:
        self.sources, self._weight, self._offset = tuple(sources), weight.half().float(), offset.half().float()
        self.table_bytes = 2 * (weight.numel() + offset.numel())

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the prediction [..., Cout] from `inputs` [..., Cin]."""
        predicted: torch.Tensor = inputs @ self._weight.to(inputs.device) + self._offset.to(inputs.device)
        return predicted


class ResidualCodec(RivalCodec):
    """What a prediction from tokens decoded before leaves over, on a grid.

    Parameters
    ----------
    grid
        Codes rows of all heads.
    place
        Side and index of the layer among those that are coded.
    predictor
        None for the first layer.
    rebuilt
        Shared by the codecs of a fit.
    """

    def __init__(
        self, grid: NormalGrid, place: Place, predictor: Predictor | None, rebuilt: Rebuilt, rotary: RotaryLayout | None
    ) -> None:
        table_bytes = predictor.table_bytes if predictor else 0
        super().__init__(Grouping("token"), SINKS, rotary, grid.bits_per_channel, table_bytes)
        self._grid, self._place, self._predictor, self._rebuilt = grid, place, predictor, rebuilt

    def quantize(self, x: torch.Tensor) -> Payload:
        """Code the tokens of `x` [B, Hkv, T, D]."""
        rows = token_rows(x)
        return self._grid.encode(rows - self._prediction(rows.shape[0], rows.shape[1]))

    def dequantize(self, payload: Payload, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Return the vectors."""
        return from_token_rows(self._grid.decode(payload) + self._prediction(shape[0], shape[2]), shape)

    def decode(self, stored: Stored) -> torch.Tensor:
        """Return the vectors [B, Hkv, T, D] fp32 that `stored` stands for, and remember them for what comes after."""
        decoded = super().decode(stored)
        self._rebuilt[self._place] = token_rows(decoded)
        return decoded

    def _prediction(self, batch: int, tokens: int) -> torch.Tensor | float:
        """Return the prediction [B, T, C] of the tokens behind the sinks, 0 for the first layer."""
        if self._predictor is None:
            return 0.0
        found = [self._rebuilt.get(source) for source in self._predictor.sources]
        inputs = [rows[:, self.exact.num_sinks :] for rows in found if rows is not None]
        if len(inputs) < len(found) or any(rows.shape[:2] != (batch, tokens) for rows in inputs):
            side, index = self._place
            raise CacheError(
                f"aqua-kv: found no decoded tokens that the {side} of coded layer {index} are predicted from; expected the "
                "layers of one cache in order, keys before values; give every cache the codecs of a fit of its own"
            )
        return self._predictor(torch.cat(inputs, dim=-1))


class AquaKV:
    """AQUA-KV over HIGGS at an integer rate; keys are fitted before values."""

    name = "aqua-kv"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits
        self._rebuilt: Rebuilt = {}
        self._keys: list[torch.Tensor] = []  # decoded samples [n, C] of every layer, between both fits

    def space(self, side: Side) -> KeySpace:
        """Return that keys are coded before rotary embedding."""
        return "pre_rope"

    def fit(self, side: Side, layers: Sequence[Samples], seed: int) -> list[RivalCodec]:
        """Train the predictors of one side, layer after layer on decoded samples.

        Raises
        ------
        UnsupportedModelError
            If tokens do not divide into groups worth their scale.
        DataError
            If values come without the keys of their layers.
        """
        keys, self._keys = self._keys, []
        if side == "keys":
            self._rebuilt = {}
        elif len(layers) > 1 and len(keys) != len(layers):
            raise DataError(
                f"aqua-kv: found values of {len(layers)} layers and decoded keys of {len(keys)}; expected the keys of the same "
                "layers to be fitted first; fit keys, then values, with one object"
            )
        chosen = torch.randperm(layers[0].vectors.shape[1], generator=torch.Generator().manual_seed(seed))[:FIT_TOKENS]
        codecs: list[RivalCodec] = []
        decoded: list[torch.Tensor] = []
        for index, layer in enumerate(layers):
            rows = layer.vectors[:, chosen].transpose(0, 1).flatten(1)  # [n, Hkv * D]
            grid = grid_of(self.name, self.nbits if index else FIRST_LAYER_BITS, layer, seed)
            predictor, predicted = None, torch.zeros_like(rows)
            if index:
                inputs = decoded[-1] if side == "keys" else torch.cat((keys[index], decoded[-1]), dim=1)
                before: Place = (side, index - 1)
                predictor = ridge([before] if side == "keys" else [("keys", index), before], inputs, rows)
                predicted = predictor(inputs)
            decoded.append(predicted + grid.decode(grid.encode(rows - predicted)))
            rotary = layer.rotary if side == "keys" else None
            codecs.append(ResidualCodec(grid, (side, index), predictor, self._rebuilt, rotary))
        self._keys = decoded if side == "keys" else []
        return codecs


def ridge(sources: Sequence[Place], inputs: torch.Tensor, outputs: torch.Tensor) -> Predictor:
    """Return the ridge regression with an offset from `inputs` [n, Cin] to `outputs` [n, Cout]."""
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.mT @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    weight = torch.linalg.solve(gram, x.mT @ y)
    return Predictor(sources, weight.float(), (y_mean - x_mean @ weight).float())
