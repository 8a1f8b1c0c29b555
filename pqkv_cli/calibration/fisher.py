"""Gradients of the model's log-likelihood for every key and value of a batch. Knows attention steps and autograd; no files.

They say what an error costs: to second order an error `e` of one key or value causes a KL divergence of ``E[(g · e)^2] / 2``
nats, over random gradients `g` whose covariance is the Fisher information. The usual `g` is the gradient of the log-likelihood
of labels drawn from the model's own distribution `p`. The gradient along ``√p ∘ ε - p (√p · ε)`` with random signs `ε` has the
same covariance, ``diag(p) - p pᵀ`` in the logits, and does not vanish where the model is sure of one label: one backward pass
says more.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pqkv_cli.calibration.observer import given_angles
from pqkv_cli.errors import DataError, UnsupportedModelError
from pqkv_cli.hf.taps import AttentionStep
from pqkv_cli.quantizers.maps import metric_matrix
from pqkv_cli.specs import ModelGeometry
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.rotary import unit_angles, unrotate

# Tokens whose directions are made at once: they are as wide as the vocabulary.
_CHUNK_TOKENS = 256
# Powers of two that lift gradients of float16 models out of its subnormal numbers; the first at which none overflows counts.
_HALF_SCALES = (2.0**12, 2.0**6, 1.0)
# Share of the diagonal added to a moment of gradients before vectors are weighed in it.
_RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """One layer's gradients in a batch, n sampled tokens in window order.

    key_gradients, value_gradients [Hkv, n, draws, D] bf16 (its exponent is that of fp32, so scales of a model change no digit),
    for keys before rotary embedding; key_fisher, value_fisher [Hkv, D, D] fp64, the sum over all tokens and the mean over draws
    of ``g g^T``.
    """

    key_gradients: torch.Tensor
    value_gradients: torch.Tensor
    key_fisher: torch.Tensor
    value_fisher: torch.Tensor


class HeldSteps:
    """Holds what attention of some `layers` was given; a layer that reads another's keys and values has none of its own."""

    def __init__(self, layers: Iterable[int]) -> None:
        self._layers = frozenset(layers)
        self.steps: dict[int, AttentionStep] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        """Hold one layer's keys and values."""
        if layer_index in self._layers:
            self.steps[layer_index] = step


class GradientObserver(HeldSteps):
    """Holds what attention was given, and turns backward passes into gradients.

    Parameters
    ----------
    geometry
        Of the model; dense layers are not looked at.
    rows, positions
        [n] int64, the sampled tokens of this batch.
    """

    def __init__(self, geometry: ModelGeometry, rows: torch.Tensor, positions: torch.Tensor) -> None:
        coded = (i for i, layer in enumerate(geometry.layers) if geometry.kv_source(i) == i and not layer.dense_reason)
        super().__init__(coded)
        self._geometry = geometry
        self._rows, self._positions = rows, positions

    def finish(self, logits: torch.Tensor, directions: Iterable[torch.Tensor]) -> dict[int, LayerGradients]:
        """Return, per quantizable layer and on the CPU, the gradients of ``logits · direction`` [B, T, V] for each direction.

        Raises
        ------
        DataError
            If a gradient is not finite; names layer and head.
        UnsupportedModelError
            If the logits do not depend on a layer's keys or values as far as autograd can tell.
        """
        draws: dict[int, list[LayerGradients]] = {}
        for direction in directions:
            for index, (keys, values) in layer_gradients(self._geometry, self.steps, logits, direction):
                draws.setdefault(index, []).append(self._reduced(keys, values))
        return {index: _mean(index, found) for index, found in draws.items()}

    def _reduced(self, keys: torch.Tensor, values: torch.Tensor) -> LayerGradients:
        """Return what is kept of one layer's gradients [B, Hkv, T, D] in one backward pass."""
        rows, positions = self._rows.to(keys.device), self._positions.to(keys.device)
        kept = [g[rows, :, positions].transpose(0, 1)[:, :, None].to(torch.bfloat16) for g in (keys, values)]
        moments = [(g.mT @ g).double().sum(0) for g in (keys, values)]
        return LayerGradients(kept[0], kept[1], moments[0], moments[1])


def layer_gradients(
    geometry: ModelGeometry, steps: Mapping[int, AttentionStep], logits: torch.Tensor, direction: torch.Tensor
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield for every layer of `steps` the gradients of ``logits · direction`` [B, T, V], from one backward pass.

    Parameters
    ----------
    geometry
        Of the model.
    steps
        What attention was given, by layer, shown by a differentiable tap of the pass that made `logits`.
    logits, direction
        [B, T, V]; the graph is kept for further passes.

    Returns
    -------
    iterator of (int, tuple of torch.Tensor)
        Layers in order, each with the gradients of its keys before rotary embedding and of its values, [B, Hkv, T, D] fp32.

    Raises
    ------
    UnsupportedModelError
        If the logits do not depend on a layer's keys or values as far as autograd can tell.
    """
    layers = sorted(steps)
    found = _backward(logits, [tensor for i in layers for tensor in (steps[i].keys, steps[i].values)], direction)
    for index, keys, values in zip(layers, found[::2], found[1::2], strict=True):
        if keys is None or values is None:
            raise UnsupportedModelError(
                f"the logits have no gradient for the keys or values of layer {index}; expected one; calibrate this "
                "architecture without --fisher, and choose one rate for all with --bits"
            )
        yield index, (plain_keys(geometry, index, steps[index], keys), values)


def plain_keys(geometry: ModelGeometry, index: int, step: AttentionStep, keys: torch.Tensor) -> torch.Tensor:
    """Return `keys` [B, Hkv, T, D] of layer `index`, or their gradients, as they are before rotary embedding, if it has one."""
    rotary = geometry.layers[index].rotary
    if rotary is None:
        return keys
    cos, sin = unit_angles(*given_angles(step, index), rotary)
    return unrotate(keys, cos[:, None], sin[:, None], rotary)


def fisher_directions(logits: torch.Tensor, windows: Sequence[int], num_draws: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield `num_draws` random directions in the space of `logits` [B, T, V]; their covariance is the Fisher information.

    A direction depends on the seed, the number of its window and of its draw, and on no batch or device.
    """
    for draw in range(num_draws):
        rows = [_direction(row, _generator(window, draw, seed)) for row, window in zip(logits.detach(), windows, strict=True)]
        yield torch.stack(rows)


def fisher_weight(gradients: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return how much an error of each vector counts, [Hkv, N] fp32, about 1 in the mean.

    It is ``g^T F^-1 g / D``, mean over draws: the squared gradient in the space where gradients have no preferred direction.
    Scales and maps that leave the model as it is cancel.

    Parameters
    ----------
    gradients
        [Hkv, N, draws, D].
    moment
        `F`, the mean of ``g g^T`` over tokens, [Hkv, D, D] fp64.

    Raises
    ------
    DataError
        If the moment is not finite or no second moment.
    """
    upper = metric_matrix(moment, _RIDGE)
    flat = gradients.float().flatten(1, 2)
    relative = torch.linalg.solve_triangular(upper, flat, upper=True, left=False)
    weight: torch.Tensor = relative.square().mean(-1).view(gradients.shape[:3]).mean(-1)
    return weight


def pairs_only(moment: torch.Tensor, rotary: RotaryLayout) -> torch.Tensor:
    """Return `moment` [Hkv, D, D] with what lies between different rotary pairs, or beside them, set to zero."""
    first, second = torch.tensor(rotary.pairs()).unbind(1)
    kept = torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))
    for row, column in ((first, second), (second, first)):
        kept[:, row, column] = moment[:, row, column]
    return kept


def _direction(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one direction [T, V] for the logits of one window."""
    num_tokens, width = logits.shape
    # One row of signs, for each token shifted at random and with a sign of its own: white noise at the price of one row.
    signs = torch.randint(0, 2, (2 * width,), generator=generator).to(logits.device, torch.float32) * 2 - 1
    shifts = torch.randint(0, width, (num_tokens,), generator=generator).to(logits.device)
    own = (torch.randint(0, 2, (num_tokens, 1), generator=generator) * 2 - 1).to(logits.device)
    direction = torch.empty_like(logits)
    for start in range(0, num_tokens, _CHUNK_TOKENS):
        chunk = slice(start, start + _CHUNK_TOKENS)
        root = logits[chunk].float().softmax(-1).sqrt()
        noise = root * signs.unfold(0, width, 1)[shifts[chunk]] * own[chunk]
        direction[chunk] = noise - root.square() * noise.sum(-1, keepdim=True)
    return direction


def _generator(window: int, draw: int, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"fisher/{seed}/{window}/{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _backward(logits: torch.Tensor, held: Sequence[torch.Tensor], direction: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the gradients of ``logits · direction`` for `held`, fp32; None for what the logits do not depend on."""
    scales = _HALF_SCALES if any(tensor.dtype == torch.float16 for tensor in held) else (1.0,)
    found: Sequence[torch.Tensor | None] = ()
    for scale in scales:
        found = torch.autograd.grad(logits, held, direction * scale, retain_graph=True, allow_unused=True)
        if all(g is None or bool(torch.isfinite(g).all()) for g in found):
            break
    return [None if g is None else g.float() / scale for g in found]


def _mean(index: int, draws: Sequence[LayerGradients]) -> LayerGradients:
    """Return the draws of layer `index` as one, checked."""
    moments = {name: sum(getattr(draw, f"{name[:-1]}_fisher") for draw in draws) / len(draws) for name in ("keys", "values")}
    for name, moment in moments.items():
        bad = (~torch.isfinite(moment).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"the gradients of the {name} of layer {index}, key/value head {bad[0]} are not finite; expected finite ones. "
                "Load the model in another dtype (bfloat16 and float32 do not overflow where float16 does), or calibrate "
                "without --fisher."
            )
    kept = [torch.cat([getattr(draw, f"{side}_gradients") for draw in draws], dim=2).cpu() for side in ("key", "value")]
    return LayerGradients(kept[0], kept[1], moments["keys"].cpu(), moments["values"].cpu())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of `model` ask for a gradient while the context lasts, so that a graph holds activations alone."""
    was_training, asking = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        model.train(was_training)
        for parameter in asking:
            parameter.requires_grad_(True)
