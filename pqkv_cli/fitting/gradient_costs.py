"""What errors of every layer's keys and values cost, from gradients: no pass for each. Knows codecs, no artifacts or tasks.

To second order an error `e` of one key or value costs ``E[(g · e)^2] / 2`` nats of KL divergence over random gradients `g`
(`pqkv_cli.calibration.fisher`). Errors of different tokens and heads are taken to be independent, as they nearly are: the
costs of all sides of all layers come from one pass of a window and a few passes back.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pqkv_cli.calibration.fisher import HeldSteps, fisher_directions, frozen, layer_gradients, plain_keys
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.geometry import geometry
from pqkv_cli.quantizers.codec import ProductCodec, known_of_values
from pqkv_cli.specs import ModelGeometry, Side
from pqkv_kernels.format.tables import CodecTables

# Passes back per window. The sum over some thousand tokens is steady: a second draw moves a cost by few percent.
DRAWS = 2
# Tokens of a window that are looked at: a graph of all activations lies in memory.
MOST_TOKENS = 1024

# The keys or the values of a layer.
LayerSide = tuple[int, Side]


def gradient_costs(
    model: Any,
    windows: torch.Tensor,
    tables: Mapping[LayerSide, CodecTables],
    on_progress: Callable[[int, int], None],
    draws: int = DRAWS,
) -> dict[LayerSide, float]:
    """Return the KL divergence, in bits per token, that each codec of `tables` would cause alone, estimated from gradients.

    Parameters
    ----------
    model
        A transformers causal language model.
    windows
        [N, T] int64 token ids.
    tables
        The codec of one side of a layer; keys in either space. Where values are predicted, that of the layer's keys as well.
    on_progress
        Called with (windows done, N).
    draws
        Passes back per window.

    Raises
    ------
    UnsupportedModelError
        If the logits do not depend on keys or values as far as autograd can tell.
    """
    shape, windows = geometry(model.config), windows[:, :MOST_TOKENS]
    costs = dict.fromkeys(tables, 0.0)
    for number, window in enumerate(windows.to(model.device)):
        observer = HeldSteps(index for index, _ in tables)
        with frozen(model), torch.enable_grad(), tap(model, observer, differentiable=True):
            logits = model(input_ids=window[None], use_cache=False).logits
        errors = {each: _error(shape, observer.steps, each, tables) for each in tables}
        for direction in fisher_directions(logits, [number], draws, seed=0):
            for index, (keys, values) in layer_gradients(shape, observer.steps, logits, direction):
                for layer_side, gradient in (((index, "keys"), keys), ((index, "values"), values)):
                    if layer_side in errors:
                        costs[layer_side] += float((gradient * errors[layer_side]).sum(-1).double().square().sum())
        on_progress(number + 1, len(windows))
    scale = 2 * math.log(2) * draws * windows.numel()
    return {layer_side: cost / scale for layer_side, cost in costs.items()}


@torch.no_grad()
def _error(
    shape: ModelGeometry, steps: Mapping[int, AttentionStep], layer_side: LayerSide, tables: Mapping[LayerSide, CodecTables]
) -> torch.Tensor:
    """Return what the codec leaves over of what attention was given, [B, Hkv, T, D] fp32, keys before rotary embedding."""
    index, side = layer_side
    step, codec = steps[index], ProductCodec(tables[layer_side])
    if side == "values":
        values, known = step.values.detach().float(), None
        if codec.tables.prediction is not None:
            keys, decoded = _coded_keys(shape, index, step, tables[index, "keys"])
            known = known_of_values(decoded, tables[index, "keys"], codec.tables)
        return codec.encode_decode(values, known) - values
    keys, decoded = _coded_keys(shape, index, step, codec.tables)
    # Coded in the space of the cache, errors turn back like vectors.
    return decoded - keys if codec.rotary is not None else plain_keys(shape, index, step, decoded - keys)


def _coded_keys(
    shape: ModelGeometry, index: int, step: AttentionStep, tables: CodecTables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys in the space in which `tables` code them, and decoded, both [B, Hkv, T, D] fp32."""
    keys = step.keys.detach().float()
    if tables.rotary is not None:
        keys = plain_keys(shape, index, step, keys)
    return keys, ProductCodec(tables).encode_decode(keys)
