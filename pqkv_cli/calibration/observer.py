"""What one batch says about keys, values and queries, and which tokens are kept: drawn up front, from seeds alone."""

from dataclasses import dataclass

import torch

from pqkv_cli.errors import DataError, UnsupportedModelError
from pqkv_cli.hf.taps import AttentionStep
from pqkv_cli.models.structure import check_shapes
from pqkv_cli.specs import LayerGeometry, ModelGeometry
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.rotary import unit_angles, unrotate


def draw_sample(num_windows: int, window_tokens: int, size: int, seed: int) -> torch.Tensor:
    """Return sorted indices ``window * window_tokens + position`` of a uniform sample without replacement.

    Every token has a random priority and the `size` smallest are kept, all tokens if there are fewer. The sample is known
    before the first forward pass, so what is not kept is never copied.
    """
    priorities = token_priorities(num_windows, window_tokens, seed)
    kept = torch.topk(priorities, min(size, len(priorities)), largest=False, sorted=False).indices
    return kept.sort().values


def token_priorities(num_windows: int, window_tokens: int, seed: int) -> torch.Tensor:
    """Return the random priority of every token, [num_windows * window_tokens] fp64 in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_windows * window_tokens, generator=generator, dtype=torch.float64)


def draw_queries(window: int, window_tokens: int, count: int, seed: int) -> torch.Tensor:
    """Return `count` (or all) sorted query positions of one window: a random one from each of `count` equal stretches.

    They depend on the window's number and not on its batch.
    """
    count = min(count, window_tokens)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + window + 1)
    bounds = torch.arange(count + 1) * window_tokens // count
    lengths = bounds[1:] - bounds[:-1]
    return bounds[:-1] + (torch.rand(count, generator=generator, dtype=torch.float64) * lengths).long()


_FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class LayerBatch:
    """One layer's share of a batch, n sampled tokens in window order.

    keys, values [Hkv, n, D] fp16 (keys before rotary embedding); attention_mass [Hkv, n] fp32; query_moment [Hkv, D, D] fp64,
    the sum over tokens and the group's heads of ``q q^T``; pair_moment [Hkv, P, 2, 2] fp64, the sum over sampled queries and
    the group's heads of what `pair_moment` returns. The others are those of `LayerGradients`, None where none were asked for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    attention_mass: torch.Tensor
    query_moment: torch.Tensor
    pair_moment: torch.Tensor
    key_gradients: torch.Tensor | None = None
    value_gradients: torch.Tensor | None = None
    key_fisher: torch.Tensor | None = None
    value_fisher: torch.Tensor | None = None


@dataclass(slots=True)
class _Seen:
    keys: torch.Tensor  # fp32, on the model's device until the batch ends, so that the device is waited for once
    values: torch.Tensor
    mass: torch.Tensor
    query_moment: torch.Tensor
    pair_moment: torch.Tensor
    maxima: dict[str, torch.Tensor]  # largest magnitude per kv head over ALL tokens; NaN and infinity survive a maximum

    def add(self, mass: torch.Tensor, query_moment: torch.Tensor, pair_moment: torch.Tensor) -> None:
        """Count the queries of another layer that reads the same keys and values; it may lie on another device."""
        self.mass = self.mass + mass.to(self.mass.device)
        self.query_moment = self.query_moment + query_moment.to(self.query_moment.device)
        self.pair_moment = self.pair_moment + pair_moment.to(self.pair_moment.device)


class BatchObserver:
    """Gathers the statistics of one forward pass.

    Parameters
    ----------
    geometry
        Of the model; dense layers are not looked at.
    rows, positions
        [n] int64, the sampled tokens of this batch.
    queries
        [B, Q] int64, the query positions that measure attention.
    """

    def __init__(self, geometry: ModelGeometry, rows: torch.Tensor, positions: torch.Tensor, queries: torch.Tensor) -> None:
        self._geometry = geometry
        self._rows, self._positions, self._queries = rows, positions, queries
        self._layers: dict[int, _Seen] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        """Take what is needed from one layer's attention call."""
        source = self._geometry.kv_source(layer_index)
        layer = self._geometry.layers[source]
        if layer.dense_reason:
            return
        check_shapes(layer_index, layer, step)
        device = step.keys.device
        rows, positions = self._rows.to(device), self._positions.to(device)
        grouped = step.queries.float().reshape(step.queries.shape[0], layer.num_kv_heads, -1, layer.head_dim)
        chosen, weights = attention_weights(step, self._queries.to(device), layer.group_size)
        mass = attention_mass(weights)[rows, :, positions].transpose(0, 1)
        query_moment = (grouped.transpose(-1, -2) @ grouped).double().sum(0)
        pair_moment = _pair_moment(chosen, weights, step, layer, layer_index)
        if source != layer_index:
            # It reads keys and values seen already: only its queries are new.
            self._layers[source].add(mass, query_moment, pair_moment)
            return
        keys = step.keys[rows, :, positions].float()  # [n, Hkv, D]
        if layer.rotary is not None:
            keys = _unrotated(keys, step, rows, positions, layer.rotary, layer_index)
        values = step.values[rows, :, positions].float()
        maxima = {"keys": step.keys.abs().amax((0, 2, 3)), "values": step.values.abs().amax((0, 2, 3))}
        self._layers[source] = _Seen(keys.transpose(0, 1), values.transpose(0, 1), mass, query_moment, pair_moment, maxima)

    def finish(self) -> dict[int, LayerBatch]:
        """Return the statistics per quantizable layer, on the CPU.

        Raises
        ------
        DataError
            If activations are not finite, or a sample does not fit fp16; names layer and head.
        UnsupportedModelError
            If a layer was never seen.
        """
        expected = [i for i, layer in enumerate(self._geometry.layers) if not layer.dense_reason]
        missing = [i for i in expected if i not in self._layers]
        if missing:
            raise UnsupportedModelError(
                f"layers {missing} made no attention call that could be observed; expected one per forward pass. "
                "This architecture is not handled yet."
            )
        return {i: _finished(i, self._layers[i]) for i in expected}


def attention_weights(step: AttentionStep, queries: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the queries at `queries` [B, Q], [B, Hkv, G, Q, D], and their attention [B, Hkv, G, Q, T], both fp32."""
    num_batch, num_heads, num_tokens, head_dim = step.queries.shape
    num_kv_heads, num_queries = num_heads // group_size, queries.shape[1]
    index = queries[:, None, :, None].expand(-1, num_heads, -1, head_dim)
    chosen = step.queries.gather(2, index).reshape(num_batch, num_kv_heads, -1, head_dim)
    scores = (
        ((chosen * step.arguments.scaling) @ step.keys.mT)
        .float()
        .view(num_batch, num_kv_heads, group_size, num_queries, num_tokens)
    )
    if step.arguments.softcap is not None:
        scores = step.arguments.softcap * torch.tanh(scores / step.arguments.softcap)
    later = torch.arange(num_tokens, device=queries.device) > queries[:, :, None]  # [B, Q, T]
    # Adding a float mask is several times faster than filling by a boolean one.
    scores += torch.zeros(later.shape, device=queries.device).masked_fill_(later, -torch.inf)[:, None, None]
    sink_logits = step.arguments.sink_logits
    if sink_logits is not None:
        extra = sink_logits.float().view(1, num_kv_heads, group_size, 1, 1).expand(num_batch, -1, -1, num_queries, 1)
        scores = torch.cat((scores, extra), dim=-1)
    grouped = chosen.float().view(num_batch, num_kv_heads, group_size, num_queries, head_dim)
    return grouped, scores.softmax(-1)[..., :num_tokens]


def attention_mass(weights: torch.Tensor) -> torch.Tensor:
    """Return [B, Hkv, T]: squared `weights` [B, Hkv, G, Q, T] each token receives, summed over queries, mean over the group."""
    return weights.square().sum((2, 3)) / weights.shape[2]


def pair_moment(
    queries: torch.Tensor, weights: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: RotaryLayout
) -> torch.Tensor:
    """Return the second moments of queries as keys before rotary embedding meet them, pair by pair.

    A key at position j scores a query with ``r = R(-j) q``, so an error of the key weighs ``E[r r^T]``. High-frequency pairs
    turn it into a circle; slow pairs keep a direction, and only errors along it cost anything.

    Parameters
    ----------
    queries
        After rotary embedding, [B, Hkv, G, Q, D].
    weights
        How much each key counts for each query, [B, Hkv, G, Q, T].
    cos, sin
        Angles of the keys' positions, [B or 1, T, num_pairs], unit modulus.

    Returns
    -------
    torch.Tensor
        [Hkv, num_pairs, 2, 2] fp64, summed over B, G and Q, averaged over keys by `weights`.
    """
    first, second = torch.tensor(rotary.pairs(), device=queries.device).unbind(1)
    a, b = queries[..., first], queries[..., second]
    # As complex numbers r = exp(-i phi) q, and sum w r^2 = q^2 sum w exp(-2 i phi): one product with the doubled angles.
    doubled = torch.cat((cos.square() - sin.square(), 2 * sin * cos), dim=-1)[:, None, None]
    even, odd = (weights @ doubled).chunk(2, dim=-1)
    real = (a * a - b * b) * even + 2 * a * b * odd
    imaginary = 2 * a * b * even - (a * a - b * b) * odd
    total = (a * a + b * b) * weights.sum(-1, keepdim=True)
    sums = [x.double().sum((0, 2, 3)) for x in (total + real, imaginary, total - real)]
    moment: torch.Tensor = torch.stack((sums[0], sums[1], sums[1], sums[2]), dim=-1).unflatten(-1, (2, 2)) / 2
    return moment


def _pair_moment(
    queries: torch.Tensor, weights: torch.Tensor, step: AttentionStep, layer: LayerGeometry, index: int
) -> torch.Tensor:
    if layer.rotary is None:
        return torch.zeros(layer.num_kv_heads, 0, 2, 2, dtype=torch.float64)
    cos, sin = unit_angles(*given_angles(step, index), layer.rotary)
    return pair_moment(queries, weights, cos, sin, layer.rotary)


def _unrotated(
    keys: torch.Tensor, step: AttentionStep, rows: torch.Tensor, positions: torch.Tensor, rotary: RotaryLayout, index: int
) -> torch.Tensor:
    all_cos, all_sin = given_angles(step, index)
    rows = rows if all_cos.shape[0] > 1 else torch.zeros_like(rows)
    cos, sin = unit_angles(all_cos[rows, positions], all_sin[rows, positions], rotary)
    return unrotate(keys, cos[:, None], sin[:, None], rotary)


def given_angles(step: AttentionStep, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the angles that layer `index` was given.

    Raises
    ------
    UnsupportedModelError
        If it was given none.
    """
    if step.cos is None or step.sin is None or step.cos.ndim != 3 or step.sin.ndim != 3:
        raise UnsupportedModelError(
            f"layer {index} is not given rotary angles as (cos, sin) [B, T, rotary_dim], so its keys cannot be un-rotated. "
            "This architecture is not handled yet."
        )
    return step.cos, step.sin


def _finished(index: int, seen: _Seen) -> LayerBatch:
    diagonal = seen.query_moment.diagonal(dim1=-2, dim2=-1).amax(-1)
    for name, maxima in {**seen.maxima, "queries": diagonal}.items():
        bad = (~torch.isfinite(maxima)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"the {name} of layer {index}, key/value head {bad[0]} are not finite "
                f"({float(maxima[bad[0]])}); expected finite activations. Load the model in another dtype "
                "(bfloat16 or float32) and check its weights."
            )
    return LayerBatch(
        _half(seen.keys, "keys", index),
        _half(seen.values, "values", index),
        seen.mass.float().cpu().contiguous(),
        seen.query_moment.cpu(),
        seen.pair_moment.cpu(),
    )


def _half(samples: torch.Tensor, name: str, index: int) -> torch.Tensor:
    samples = samples.cpu()
    half = samples.to(torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        head = int((~torch.isfinite(half)).flatten(1).any(1).nonzero()[0])
        raise DataError(
            f"the {name} of layer {index}, key/value head {head} reach {float(samples[head].abs().max()):.6g}, "
            f"and fp16 storage overflowed; expected at most {_FP16_MAX:.0f}. Rescale that head's weights, or use another model."
        )
    return half
