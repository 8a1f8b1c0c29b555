"""Is rotation the last thing that happens to a key? Only then does undoing it give what holds at every position.

The same tokens stand at two places. Attention depends on distances alone, so an un-rotated key is the same at both. It differs
where a norm or a factor follows the rotation, or where pairs lie elsewhere than expected: codes would then be right at the
positions of calibration, and wrong everywhere else without a word.
"""

from typing import Any

import torch

from pqkv_cli.calibration.observer import given_angles
from pqkv_cli.errors import UnsupportedModelError
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.structure import check_shapes
from pqkv_cli.specs import ModelGeometry
from pqkv_kernels.format.rotary import unit_angles, unrotate

_NUM_TOKENS = 32
_OFFSET = 1021  # far enough to turn all but the slowest pairs, and near enough for factors that grow with the position
# Relative to the keys. Families where something follows the rotation show 0.1 and more, half precision a few hundredths.
_MOST = {torch.float32: 0.02, torch.float64: 0.02}
_MOST_IN_HALF_PRECISION = 0.1


class _Unrotated:
    """Takes the un-rotated keys [B, Hkv, T, D] fp32 of every layer that will be coded so."""

    def __init__(self, shape: ModelGeometry) -> None:
        self._shape = shape
        self.keys: dict[int, torch.Tensor] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        layer = self._shape.layers[layer_index]
        if layer.rotary is None or layer.dense_reason:
            return
        check_shapes(layer_index, layer, step)
        cos, sin = unit_angles(*given_angles(step, layer_index), layer.rotary)
        self.keys[layer_index] = unrotate(step.keys.float(), cos[:, None], sin[:, None], layer.rotary)


@torch.no_grad()
def check_rotation(model: Any, shape: ModelGeometry, tokens: torch.Tensor) -> None:
    """Refuse a model whose un-rotated keys depend on the position of `tokens` [T] int64, some of a real text.

    Raises
    ------
    UnsupportedModelError
        If they do; the message names the layer and by how much.
    """
    if all(layer.rotary is None or layer.dense_reason for layer in shape.layers):
        return
    ids = tokens[:_NUM_TOKENS].to(model.device)[None]
    room = shape.max_positions - ids.shape[1] if shape.max_positions else _OFFSET
    offset = min(_OFFSET, room)
    if offset < 1:
        return
    here, there = (_keys_at(model, shape, ids, start) for start in (0, offset))
    at_most = _MOST.get(model.dtype, _MOST_IN_HALF_PRECISION)
    for index, keys in here.items():
        size = float(keys.norm())
        error = float((keys - there[index]).norm()) / size if size else 0.0
        if error > at_most:  # keys that are not finite are told from these by whoever takes samples
            raise UnsupportedModelError(
                f"layer {index} of this {shape.model_type} model does something to its keys after rotary embedding, or rotates "
                f"other pairs than expected: un-rotated keys differ by {error:.2g} of their size between positions {offset} "
                f"apart; expected at most {at_most}. Codes would be wrong away from the calibrated positions, so this model "
                "cannot be quantized"
            )


def _keys_at(model: Any, shape: ModelGeometry, ids: torch.Tensor, start: int) -> dict[int, torch.Tensor]:
    observer = _Unrotated(shape)
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    was_training = model.training
    model.eval()
    try:
        with tap(model, observer):
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        model.train(was_training)
    return observer.keys
