"""Samples of a layer to the codecs of its keys and values. Knows no files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.fitting.settings import FitSettings, Weighting
from pqkv_cli.fitting.side_by_side import stop_point
from pqkv_cli.quantizers.grouping import balanced_pairs
from pqkv_cli.quantizers.maps import MapStatistics, make_map, range_factor
from pqkv_cli.quantizers.prediction import fit_prediction
from pqkv_cli.quantizers.product import (
    Codebooks,
    Prototypes,
    fit_product,
    fit_prototypes,
    num_prototype_stages,
    reconstruct,
    relative_error,
    stored,
)
from pqkv_cli.specs import CODEC_MAPS, SIDES, CodecSpec, KeySpace, LayerGeometry, Side, fitting_maps
from pqkv_kernels.dispatch import to_code_space
from pqkv_kernels.format.layout import CodeLayout, RotaryLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.merged_stages import joint_layout
from pqkv_kernels.reference.prediction import predicted


def weighted_by_gradients(samples: LayerSamples, side: Side) -> LayerSamples:
    """Return `samples` with the cost of an error of `side`, as gradients measured it, in the place of the attention mass.

    Raises
    ------
    DataError
        If calibration measured no gradients.
    """
    weight = samples.key_weight if side == "keys" else samples.value_weight
    if weight is None:
        raise DataError("the calibration holds no gradients; expected them for the weighting 'fisher'; calibrate with --fisher")
    return replace(samples, attention_mass=weight)


# One window in so many judges, from so many vectors on: of fewer none can be spared.
JUDGED_EVERY = 16
LEAST_SPLIT = 4096


def split_samples(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the vectors to fit, and of those that errors are measured on; all twice, where there are few.

    Parameters
    ----------
    positions
        [N] integers, of the samples in their windows, window after window.
    """
    numbers = torch.arange(len(positions))
    window = torch.cat((positions.new_zeros(1, dtype=torch.int64), (positions[1:] <= positions[:-1]).cumsum(0)))
    num_windows = int(window[-1]) + 1
    if len(positions) < LEAST_SPLIT or num_windows < 2:
        return numbers, numbers
    judges = window % JUDGED_EVERY == min(JUDGED_EVERY, num_windows) - 1
    return numbers[~judges], numbers[judges]


def num_fitted(positions: torch.Tensor, most: int) -> int:
    """Return how many of the samples at `positions` [N] are fitted where one in so many is taken, to stay within `most`."""
    fitted = len(split_samples(positions)[0])
    return -(-fitted // stride_within(fitted, most))


def stride_within(count: int, most: int) -> int:
    """Return the least `n` such that one in `n` of `count` vectors are at most `most`."""
    return -(-count // most)


# What is left of predicted values is scaled up to unit size, but by no more than this beyond the values themselves.
MOST_LEFT_OUT = 256

# Codebooks of parts are fitted to at most so many vectors: at 4 bits per channel a quarter of them leaves a quarter more over.
PART_VECTORS = 65536


class SideFit:
    """Fits codecs of one side of a layer that share their map and key space: map and prototypes are fitted once.

    Parameters
    ----------
    samples, layer
        The layer's calibration samples and its attention.
    spec
        Map and key space; of its layout only the width counts.
    side, index
        Keys or values of which layer: for the seed.
    settings
        How to fit.
    keys
        The fitted codec of the layer's keys, where `spec` predicts values from them.
    """

    def __init__(
        self,
        samples: LayerSamples,
        layer: LayerGeometry,
        spec: CodecSpec,
        side: Side,
        index: int,
        settings: FitSettings,
        keys: CodecTables | None = None,
    ) -> None:
        if settings.weighting(side) == "fisher":
            samples = weighted_by_gradients(samples, side)
        self._spec, self._side, self._settings, self._seed = spec, side, settings, settings.derived_seed(index, side)
        everything = (samples.keys if side == "keys" else samples.values).float()
        fitted, judged = split_samples(samples.positions)
        self._vectors, self._judged = everything[:, fitted], everything[:, judged]
        mass = samples.attention_mass[:, fitted].float()
        self._weights = sample_weights(mass, settings.weighting(side), settings.damping)
        rotary = layer.rotary if spec.key_space == "pre_rope" else None
        num_heads = len(self._vectors)
        self._tables = CodecTables(spec.layout, _blank(spec.layout, num_heads), rotary=rotary)
        self._prediction: torch.Tensor | None = None  # of values in model space
        values = self._vectors
        if spec.predicted:
            decoded = _decoded(samples.keys, keys)
            self._judged_keys = decoded[:, judged]
            self._prediction = fit_prediction(decoded[:, fitted], values, self._weights)
            self._vectors = values - decoded[:, fitted] @ self._prediction.mT
        gram = samples.query_moment if side == "keys" else samples.output_gram
        self._statistics = MapStatistics(self._vectors, self._weights, gram, samples.pair_moment, rotary, self._seed)
        made, self._factor = make_map(spec.map, self._statistics), torch.ones(num_heads)
        if made is not None:
            mapped = replace(self._tables, map=made)
            # What is left of values may be next to nothing, and then what predicts them must stay inside fp16, too.
            most = range_factor(_coded(values, mapped)) * MOST_LEFT_OUT
            self._factor = torch.minimum(range_factor(_coded(self._vectors, mapped)), most)
            scaled = made * self._factor.view(-1, *[1] * (made.ndim - 1))
            self._tables = replace(self._tables, map=scaled, inverse=None)
        self._prototypes: dict[tuple[int, ...], tuple[Prototypes, torch.Tensor | None]] = {}

    def fit(self, layout: CodeLayout, iterations: int, part_vectors: int = PART_VECTORS) -> tuple[CodecTables, torch.Tensor]:
        """Return the tables of `layout`, its parts fitted to `part_vectors` vectors, and their relative error [Hkv] on others.

        In this order: codes of the whole vector (prototypes) where the layout has them, then what suits the parts of the vector
        to what those left over (an order of pairs, or a rotation), then the codes of the parts.

        Raises
        ------
        DataError
            If the samples are degenerate or fewer than centroids.
        """
        stop_point()
        (prototypes, spread), weights = self._fit_prototypes(layout), self._weights
        tables = replace(self._tables, layout=layout, codebooks=_blank(layout, len(self._vectors)))
        tables, given = self._arranged(tables, prototypes, spread)
        stop_point()
        stride = stride_within(self._vectors.shape[1], part_vectors)
        points, weights = _coded(self._vectors[:, ::stride], tables), None if weights is None else weights[:, ::stride]
        codebooks = fit_product(points, layout, given=given, weights=weights, iterations=iterations, seed=self._seed)
        tables = replace(tables, codebooks=codebooks, prediction=self._coded_prediction(tables))
        known = None if tables.prediction is None else predicted(self._judged_keys[None], tables)[0]
        return tables, relative_error(_coded(self._judged, tables), layout, codebooks, known=known)

    def _coded_prediction(self, tables: CodecTables) -> torch.Tensor | None:
        """Return `CodecTables.prediction` of values under the map of `tables`."""
        if self._prediction is None:
            return None
        return stored(_coded(self._prediction.mT, tables).mT)

    def _fit_prototypes(self, layout: CodeLayout) -> tuple[Prototypes, torch.Tensor | None]:
        # To all vectors, in a trial too: of few, a thousand prototypes would leave more over than they will in the end.
        sizes = tuple(stage[0].nbits for stage in layout.stages[: num_prototype_stages(layout)])
        if sizes not in self._prototypes:
            points = _coded(self._vectors, self._tables)
            iterations = self._settings.iterations
            prototypes = fit_prototypes(points, layout, weights=self._weights, iterations=iterations, seed=self._seed)
            self._prototypes[sizes] = prototypes, self._spread(prototypes.residual)
        return self._prototypes[sizes]

    def _spread(self, residual: torch.Tensor) -> torch.Tensor | None:
        """Return how far what prototypes leave over spreads, by which parts are arranged, None where they stay as they are.

        That is the energy of pairs [Hkv, P], or the second moment [Hkv, D, D] of channels in model space; fp64.
        """
        if self._tables.rotary is not None:
            return _pair_energy(residual, self._weights, self._tables.rotary)
        stays = self._side == "values" and not self._settings.rotate_values
        if self._tables.map is None or not CODEC_MAPS[self._spec.map].is_remade or stays:
            return None
        plain = residual.double() @ torch.linalg.inv(self._tables.map.double()).mT
        weighted = plain if self._weights is None else plain * self._weights[..., None].double()
        moment: torch.Tensor = weighted.mT @ plain / plain.shape[1]
        return moment

    def _arranged(
        self, tables: CodecTables, prototypes: Prototypes, spread: torch.Tensor | None
    ) -> tuple[CodecTables, Codebooks]:
        """Return `tables` with the pairs or directions of the residual dealt to the parts, and the prototypes in that space."""
        parts = joint_layout(CodeLayout(tables.layout.stages[len(prototypes.centroids) :])).layout
        if spread is None:
            return tables, tuple((c,) for c in prototypes.centroids)
        if tables.rotary is not None:
            order = balanced_pairs(spread, tables.rotary, parts)
            channels = order.long()[:, None, None]
            moved = tuple(c.gather(-1, channels.expand(c.shape)) for c in prototypes.centroids)
            return replace(tables, permutation=order), tuple((c,) for c in moved)
        made = make_map(self._spec.map, replace(self._statistics, residual_moment=spread, parts=parts))
        assert tables.map is not None and made is not None  # or there is no spread
        remade = made * self._factor.view(-1, 1, 1)
        # What was fitted under the first map goes back to model space, and under the other one.
        change = (remade.double() @ torch.linalg.inv(tables.map.double())).mT[:, None]
        return replace(tables, map=remade, inverse=None), tuple(((c.double() @ change).float(),) for c in prototypes.centroids)


def fit_side(
    samples: LayerSamples,
    layer: LayerGeometry,
    spec: CodecSpec,
    side: Side,
    index: int,
    settings: FitSettings,
    keys: CodecTables | None = None,
) -> tuple[CodecTables, torch.Tensor]:
    """Fit the codec of one side of layer `index`; return its tables and its relative error [Hkv] on vectors not fitted.

    Raises
    ------
    DataError
        If the samples are degenerate or fewer than centroids.
    """
    return SideFit(samples, layer, spec, side, index, settings, keys).fit(spec.layout, settings.iterations)


def sample_weights(mass: torch.Tensor, weighting: Weighting, damping: float) -> torch.Tensor | None:
    """Return the weight [Hkv, N] of each vector from its mass [Hkv, N] of attention or gradients, None where all are equal."""
    if weighting == "none":
        return None
    mean = mass.mean(dim=1, keepdim=True)
    relative = torch.where(mean > 0, mass / mean.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(mass))
    return (relative if weighting == "mass" else relative.sqrt()) + damping


def _coded(vectors: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    # Sampled keys are those before rotary embedding already.
    return to_code_space(vectors[None], tables, rotated=False)[0]


def _decoded(keys: torch.Tensor, tables: CodecTables | None) -> torch.Tensor:
    """Return sampled `keys` [Hkv, N, D] as they are decoded, in code space."""
    if tables is None:
        raise UsageError("values are predicted from keys that have no codec; expected the fitted tables of the layer's keys")
    return reconstruct(_coded(keys.float(), tables), tables.layout, tables.codebooks)


def _blank(layout: CodeLayout, num_heads: int) -> Codebooks:
    """Return codebooks of zeros that take no memory: maps are needed before codebooks exist."""
    zero = torch.zeros((), dtype=torch.float16)
    return tuple(
        tuple(zero.expand(num_heads, g.num_subspaces, g.num_centroids, g.subspace_dim) for g in stage)
        for stage in layout.stages
    )


def _pair_energy(mapped: torch.Tensor, weights: torch.Tensor | None, rotary: RotaryLayout) -> torch.Tensor:
    """Return the energy [Hkv, num_pairs] fp64 of each rotary pair of `mapped` [Hkv, N, D]: the root of its determinant.

    The distortion of a pair's codes goes with the area over which its vectors spread: a constant offset costs nothing, nor
    does the second axis of a pair that spreads along one.
    """
    x, y = (mapped[..., channels].double() for channels in torch.tensor(rotary.pairs()).unbind(1))  # [Hkv, N, P]
    weights = torch.ones(mapped.shape[:2]) if weights is None else weights
    shares = (weights.double() / weights.double().sum(dim=1, keepdim=True))[:, None]  # [Hkv, 1, N]
    x, y = x - shares @ x, y - shares @ y
    return ((shares @ (x * x)) * (shares @ (y * y)) - (shares @ (x * y)).square())[:, 0].clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """What fitting one layer gives; both mappings are empty for a layer that stays dense.

    Attributes
    ----------
    tables
        The codec of the layer's keys and of its values.
    relative_error
        Unweighted ``||x - x'||^2 / ||x||^2`` in code space, where it is the error of logits and outputs, per KV head; on
        vectors that nothing was fitted to, unless there are very few.
    """

    tables: Mapping[Side, CodecTables]
    relative_error: Mapping[Side, tuple[float, ...]]


def fit_layer(
    samples: LayerSamples,
    layer: LayerGeometry,
    specs: Mapping[Side, CodecSpec],
    *,
    index: int = 0,
    settings: FitSettings | None = None,
) -> FittedLayer:
    """Fit the codecs of one layer.

    Parameters
    ----------
    samples
        The layer's calibration samples.
    layer
        Its attention.
    specs
        The format of its keys and of its values.
    index
        Number of the layer: for the seed and for messages.
    settings
        How to fit.

    Raises
    ------
    DataError
        If samples are degenerate or fewer than centroids; the message names the layer.
    UsageError
        If a format does not fit the layer.
    """
    settings = FitSettings() if settings is None else settings
    tables: dict[Side, CodecTables] = {}
    errors: dict[Side, tuple[float, ...]] = {}
    for side in SIDES:
        _check_spec(specs[side], layer, samples.key_space, index, side)
        with checked_side(samples, index, side):
            tables[side], error = fit_side(samples, layer, specs[side], side, index, settings, tables.get("keys"))
        errors[side] = tuple(error.tolist())
    return FittedLayer(tables, errors)


@contextmanager
def checked_side(samples: LayerSamples, index: int, side: Side) -> Iterator[None]:
    """Refuse activations that are not finite, and name layer and side in every error of the samples.

    Raises
    ------
    DataError
        If the samples are at fault.
    """
    try:
        _check_finite(samples.keys if side == "keys" else samples.values)
        yield
    except DataError as cause:
        raise DataError(f"layer {index}, {side}: {cause}") from cause


def _check_finite(vectors: torch.Tensor) -> None:
    finite = torch.isfinite(vectors).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise DataError(
            f"key/value head {int(torch.nonzero(~finite)[0])} has NaN or infinite activations; expected finite ones; check the "
            "model in this dtype (bfloat16 and float32 do not overflow where float16 does) and calibrate again"
        )


def _check_spec(spec: CodecSpec, layer: LayerGeometry, sampled: KeySpace, index: int, side: Side) -> None:
    if spec.layout.head_dim != layer.head_dim:
        raise UsageError(
            f"layer {index}, {side}: the codec covers {spec.layout.head_dim} channels; expected head_dim {layer.head_dim}; "
            "plan a codec of its own for layers of this width"
        )
    if side == "keys" and spec.key_space == "pre_rope" and layer.rotary is None:
        raise UsageError(
            f"layer {index}, keys: found a layer without rotary embedding for codes before it; expected rotary keys; plan this "
            "layer with the key space 'post_rope'"
        )
    if side == "keys" and layer.rotary is not None and spec.key_space != sampled:
        raise UsageError(
            f"layer {index}, keys: found samples in the key space {sampled!r} for codes in {spec.key_space!r}; expected the "
            "same; take them from a RotatedStore where keys are coded after rotary embedding"
        )
    maps = fitting_maps(layer, spec.key_space)
    if spec.map not in maps:
        where = "codes before rotary embedding" if spec.key_space == "pre_rope" else side
        raise UsageError(
            f"layer {index}, {side}: found the map {spec.map!r} for {where}; expected one of {', '.join(maps)}; plan it with "
            "one of them, or keys in another key space"
        )
