"""The codec of one layer's keys or values from their samples. Knows maps, prototypes and codebooks; nothing of files."""

from dataclasses import replace

import torch

from pqkv_cli.calibration.store import LayerSamples
from pqkv_cli.fitting.sensitivity import as_gradients_see
from pqkv_cli.fitting.settings import FitSettings, Weighting
from pqkv_cli.fitting.side_by_side import stop_point
from pqkv_cli.fitting.split import split_samples, stride_within
from pqkv_cli.quantizers.grouping import balanced_pairs
from pqkv_cli.quantizers.maps import metric_rotation, pair_metric, pair_scale, range_factor
from pqkv_cli.quantizers.product import Codebooks, fit_product, relative_error
from pqkv_cli.quantizers.prototypes import Prototypes, fit_prototypes, num_prototype_stages
from pqkv_cli.specs import CodecSpec, LayerGeometry, Side
from pqkv_kernels.codec import to_code_space
from pqkv_kernels.joint import joint_layout
from pqkv_kernels.layout import CodeLayout, RotaryLayout
from pqkv_kernels.tables import CodecTables

# Codebooks of parts are fitted to at most so many vectors: at 4 bits per channel a quarter of them leaves a quarter more over.
PART_VECTORS = 65536


class SideFit:
    """Fits codecs of one side of a layer that share their map and key space: the metric, and prototypes, are found once.

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
    """

    def __init__(
        self, samples: LayerSamples, layer: LayerGeometry, spec: CodecSpec, side: Side, index: int, settings: FitSettings
    ) -> None:
        if settings.weighting(side) == "fisher":
            samples = as_gradients_see(samples, side)
        self._samples, self._spec, self._side, self._settings = samples, spec, side, settings
        everything = (samples.keys if side == "keys" else samples.values).float()
        fitted, judged = split_samples(samples.positions)
        self._vectors, self._judged = everything[:, fitted], everything[:, judged]
        mass = samples.attention_mass[:, fitted].float()
        self._weights = sample_weights(mass, settings.weighting(side), settings.damping)
        rotary = layer.rotary if spec.key_space == "pre_rope" else None
        num_heads = len(self._vectors)
        self._tables = CodecTables(spec.layout, _blank(spec.layout, num_heads), rotary=rotary)
        metric, self._factor = _metric(samples, spec, side, rotary, layer.head_dim), torch.ones(num_heads)
        if metric is not None:
            self._factor = range_factor(_coded(self._vectors, replace(self._tables, map=metric)))
            scaled = metric * self._factor.view(-1, *[1] * (metric.ndim - 1))
            self._tables = replace(self._tables, map=scaled, inverse=None)
        self._seed = settings.derived_seed(index, side)
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
        return replace(tables, codebooks=codebooks), relative_error(_coded(self._judged, tables), layout, codebooks)

    def _fit_prototypes(self, layout: CodeLayout) -> tuple[Prototypes, torch.Tensor | None]:
        # To all vectors, in a trial too: of few, a thousand prototypes would leave more over than they will in the end.
        sizes = tuple(stage[0].nbits for stage in layout.stages[: num_prototype_stages(layout)])
        if sizes not in self._prototypes:
            points = _coded(self._vectors, self._tables)
            found = fit_prototypes(points, layout, weights=self._weights, iterations=self._settings.iterations, seed=self._seed)
            self._prototypes[sizes] = found, self._spread(found.residual)
        return self._prototypes[sizes]

    def _spread(self, residual: torch.Tensor) -> torch.Tensor | None:
        """Return how far what prototypes leave over spreads, by which parts are arranged, None where they stay as they are.

        That is the energy of pairs [Hkv, P], or the second moment [Hkv, D, D] of channels in model space; fp64.
        """
        if self._tables.rotary is not None:
            return _pair_energy(residual, self._weights, self._tables.rotary)
        stays = self._side == "values" and not self._settings.rotate_values
        if self._spec.map != "matrix" or self._tables.map is None or stays:
            return None
        plain = residual.double() @ torch.linalg.inv(self._tables.map.double()).mT
        counted = plain if self._weights is None else plain * self._weights[..., None].double()
        moment: torch.Tensor = counted.mT @ plain / plain.shape[1]
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
            places = order.long()[:, None, None]
            moved = tuple(c.gather(-1, places.expand(c.shape)) for c in prototypes.centroids)
            return replace(tables, permutation=order), tuple((c,) for c in moved)
        assert tables.map is not None  # or there is no spread
        turned = metric_rotation(_gram(self._samples, self._side), spread, parts) * self._factor.view(-1, 1, 1)
        turn = (turned.double() @ torch.linalg.inv(tables.map.double())).mT[:, None]
        return replace(tables, map=turned, inverse=None), tuple(((c.double() @ turn).float(),) for c in prototypes.centroids)


def fit_side(
    samples: LayerSamples, layer: LayerGeometry, spec: CodecSpec, side: Side, index: int, settings: FitSettings
) -> tuple[CodecTables, torch.Tensor]:
    """Fit the codec of one side of layer `index`; return its tables and its relative error [Hkv] on vectors not fitted.

    Raises
    ------
    DataError
        If the samples are degenerate or fewer than centroids.
    """
    return SideFit(samples, layer, spec, side, index, settings).fit(spec.layout, settings.iterations)


def sample_weights(mass: torch.Tensor, weighting: Weighting, damping: float) -> torch.Tensor | None:
    """Return the weight [Hkv, N] of each vector from its mass [Hkv, N] of attention or gradients, None where all are equal."""
    if weighting == "none":
        return None
    mean = mass.mean(dim=1, keepdim=True)
    relative = torch.where(mean > 0, mass / mean.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(mass))
    return (relative if weighting == "mass" else relative.sqrt()) + damping


def _metric(
    samples: LayerSamples, spec: CodecSpec, side: Side, rotary: RotaryLayout | None, head_dim: int
) -> torch.Tensor | None:
    """Return the map in which plain L2 is the error that matters: from the query moment, or from the output projection."""
    gram = _gram(samples, side)
    if spec.map == "identity":
        return None
    if spec.map == "scale":
        return pair_scale(gram, rotary)
    if spec.map == "blocks" and rotary is not None:
        return pair_metric(samples.pair_moment, samples.query_moment, rotary, head_dim)
    return metric_rotation(gram)


def _gram(samples: LayerSamples, side: Side) -> torch.Tensor:
    """Return the second moment [Hkv, D, D] of what an error of this side is multiplied with."""
    return samples.query_moment if side == "keys" else samples.output_gram


def _coded(vectors: torch.Tensor, tables: CodecTables) -> torch.Tensor:
    # Sampled keys are those before rotary embedding already.
    return to_code_space(vectors[None], tables, rotated=False)[0]


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
    counted = torch.ones(mapped.shape[:2], dtype=torch.float64) if weights is None else weights.double()
    shares = (counted / counted.sum(dim=1, keepdim=True))[:, None]  # [Hkv, 1, N]
    x, y = x - shares @ x, y - shares @ y
    return ((shares @ (x * x)) * (shares @ (y * y)) - (shares @ (x * y)).square())[:, 0].clamp(min=0).sqrt()
