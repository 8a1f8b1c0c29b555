"""Linear maps into the space where plain L2 is the error that matters. Knows vectors and second moments; nothing of codes.

`specs.CODEC_MAPS` lists the maps that there are, and `make_map` makes one of them.

Every map of this file undoes a gauge freedom of attention: rescaling a channel (a rotary pair) by a power of two, and what it
is multiplied with by the inverse, leaves the mapped vectors bit for bit as they were. That is why ridges are relative to each
diagonal entry, and why no floor depends on other channels unless a moment is exactly zero.
"""

from dataclasses import dataclass
from importlib import import_module

import torch

from pqkv_cli.errors import DataError
from pqkv_cli.quantizers.grouping import deal, subspace_bits, subspace_dims
from pqkv_cli.specs import CODEC_MAPS
from pqkv_kernels.format.layout import CodeLayout, RotaryLayout

# A channel without any second moment gets this share of its head's mean root mean square, so that the map stays invertible.
DEAD_SHARE = 1e-2
# Share of the diagonal added to a pair's moment: the condition of its map stays below about 200.
PAIR_RIDGE = 1e-4
# Shares of the diagonal added to a Gram matrix: the first whose map inverts to within INVERSE_TOLERANCE in fp32 is taken.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
INVERSE_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class MapStatistics:
    """What a map is made from: one side of one layer.

    Attributes
    ----------
    vectors
        Keys, before rotary embedding if `rotary` is set, or values: those that codebooks are fitted to, [Hkv, N, D] fp32.
    weights
        What each vector counts for, [Hkv, N] fp32; None where all count the same.
    error_gram
        The second moment of what an error of the side is multiplied with, queries or columns of the output projection:
        [Hkv, D, D] fp64. An error `e` costs ``e^T error_gram e``.
    pair_moment
        For keys before rotary embedding the same per rotary pair, as they meet the queries: [Hkv, num_pairs, 2, 2] fp64.
    rotary
        The rotary pairs of keys before rotary embedding, else None.
    seed
        For what is drawn at random; another one for each layer and side.
    residual_moment, parts
        Set where a map is remade: the second moment of what prototypes leave over of the vectors, [Hkv, D, D] fp64, and the
        codes of the rest.
    """

    vectors: torch.Tensor
    weights: torch.Tensor | None
    error_gram: torch.Tensor
    pair_moment: torch.Tensor
    rotary: RotaryLayout | None
    seed: int
    residual_moment: torch.Tensor | None = None
    parts: CodeLayout | None = None


def make_map(name: str, statistics: MapStatistics) -> torch.Tensor | None:
    """Return the map called `name`: None, a scale [Hkv, D], blocks [Hkv, D / 2, 2, 2] or matrices [Hkv, D, D], fp32.

    Raises
    ------
    DataError
        If it cannot be made from these statistics.
    TypeError
        If the function that makes it returns another kind of map than its row in `CODEC_MAPS` says.
    """
    row = CODEC_MAPS[name]
    module, _, function = row.maker.partition(":")
    made: torch.Tensor | None = getattr(import_module(module), function)(statistics)
    heads, _, dim = statistics.vectors.shape
    shapes = {"identity": None, "scale": (heads, dim), "blocks": (heads, dim // 2, 2, 2), "matrix": (heads, dim, dim)}
    shape = None if made is None else tuple(made.shape)
    if shape != shapes[row.kind]:
        raise TypeError(
            f"{row.maker} made a map of shape {shape}; expected {shapes[row.kind]}, of the kind {row.kind!r} that the map "
            f"{name!r} has; correct the function, or the kind in its row of CODEC_MAPS"
        )
    return None if made is None else made.float()


def identity(statistics: MapStatistics) -> None:
    """Return no map."""


def scale(statistics: MapStatistics) -> torch.Tensor:
    """Return `pair_scale`, within which plain L2 is the error as far as channels do not depend on each other."""
    return pair_scale(statistics.error_gram, statistics.rotary)


def blocks(statistics: MapStatistics) -> torch.Tensor:
    """Return `pair_metric`, in which plain L2 is the error as far as rotary pairs do not depend on each other."""
    assert statistics.rotary is not None  # or the kind of the map would not fit the side
    dim = statistics.vectors.shape[-1]
    return pair_metric(statistics.pair_moment, statistics.error_gram, statistics.rotary, dim)


def matrix(statistics: MapStatistics) -> torch.Tensor:
    """Return `metric_rotation`, in which plain L2 is the error, turned to suit the parts once they are known."""
    return metric_rotation(statistics.error_gram, statistics.residual_moment, statistics.parts)


def pair_scale(query_moment: torch.Tensor, rotary: RotaryLayout | None) -> torch.Tensor:
    """Return the root mean square of the queries of each rotary pair, for both of its channels.

    Parameters
    ----------
    query_moment
        ``E[q q^T]``, [Hkv, D, D] fp64.
    rotary
        The pairs; channels outside them (all of them when None) get their own root mean square. A pair or channel whose
        moment is exactly zero gets `DEAD_SHARE` of the mean over the head's others, or 1 where there are none.

    Returns
    -------
    torch.Tensor
        [Hkv, D] fp32, positive.

    Raises
    ------
    DataError
        If a moment is not finite or negative on the diagonal.
    """
    mean_square = _diagonal(query_moment, "query moment").clone()
    if rotary is not None:
        first, second = torch.tensor(rotary.pairs()).unbind(1)
        both = (mean_square[:, first] + mean_square[:, second]) / 2
        mean_square[:, first] = mean_square[:, second] = both
    return _alive(mean_square.sqrt()).float()


def pair_metric(pair_moment: torch.Tensor, query_moment: torch.Tensor, rotary: RotaryLayout, head_dim: int) -> torch.Tensor:
    """Return the 2 x 2 maps in which plain L2 is the error of logits, for keys before rotary embedding.

    Each is the upper triangular `A` with ``A^T A`` the pair's moment and a ridge of `PAIR_RIDGE` of its diagonal.

    Parameters
    ----------
    pair_moment
        ``E[r r^T]`` of the queries as keys before rotary embedding meet them, [Hkv, num_pairs, 2, 2] fp64.
    query_moment
        ``E[q q^T]``, [Hkv, D, D] fp64: unrotated channels get their root mean square, without correlation.
    rotary
        The pairs.
    head_dim
        `D`.

    Returns
    -------
    torch.Tensor
        [Hkv, D / 2, 2, 2] fp32, for ``rotary.blocks(D)``.

    Raises
    ------
    DataError
        If a moment is not finite or negative on the diagonal.
    """
    channels = pair_scale(query_moment, None).double()
    first, second = torch.tensor(rotary.blocks(head_dim)).unbind(1)
    blocks = torch.diag_embed(torch.stack((channels[:, first], channels[:, second]), dim=-1).square())
    _diagonal(pair_moment.flatten(0, 1), "pair moment")
    alive = pair_moment.diagonal(dim1=-2, dim2=-1).amin(-1) > 0
    blocks[:, : rotary.num_pairs] = torch.where(alive[..., None, None], pair_moment.double(), blocks[:, : rotary.num_pairs])
    a, b, c = blocks[..., 0, 0] * (1 + PAIR_RIDGE), blocks[..., 0, 1], blocks[..., 1, 1] * (1 + PAIR_RIDGE)
    # By hand: square roots and quotients scale exactly under powers of two, so the map undoes such a gauge bit for bit.
    top = a.sqrt()
    side = b / top
    bottom = (c - side * side).clamp(min=PAIR_RIDGE * c).sqrt()
    maps: torch.Tensor = torch.stack((top, side, torch.zeros_like(top), bottom), dim=-1).unflatten(-1, (2, 2)).float()
    return maps


def metric_matrix(gram: torch.Tensor, ridge: float = RIDGES[0]) -> torch.Tensor:
    """Return the upper triangular `A` with ``A^T A = gram + ridge * diag(gram)``.

    Parameters
    ----------
    gram
        [Hkv, D, D] fp64, symmetric and positive semi-definite.
    ridge
        Share of each diagonal entry that is added to it; raised through `RIDGES` while the factorization fails.

    Returns
    -------
    torch.Tensor
        [Hkv, D, D] fp32.

    Raises
    ------
    DataError
        If the matrix is not finite or far from positive semi-definite.
    """
    return _factor(gram, ridge).float()


def metric_rotation(
    gram: torch.Tensor, second_moment: torch.Tensor | None = None, layout: CodeLayout | None = None
) -> torch.Tensor:
    """Return an invertible map whose L2 error is the error under `gram`, turned to suit the product structure of `layout`.

    With ``A`` from `metric_matrix`, the eigenvectors of the second moment of the mapped vectors are dealt to the subspaces
    so that the products of their eigenvalues are balanced (Ge et al. 2013, OPQ-P). The ridge is the smallest of `RIDGES`
    at which map and inverse, both rounded to fp32, multiply to the identity within `INVERSE_TOLERANCE`.

    Parameters
    ----------
    gram
        [Hkv, D, D] fp64.
    second_moment
        ``E[v v^T]`` of the vectors to map, [Hkv, D, D] fp64; None leaves the rotation out.
    layout
        The codes; its first stage decides. None leaves the rotation out.

    Returns
    -------
    torch.Tensor
        [Hkv, D, D] fp32.

    Raises
    ------
    DataError
        If a matrix is not finite, or no ridge makes the map invertible.
    """
    for ridge in RIDGES:
        matrix = _factor(gram, ridge)
        if second_moment is not None and layout is not None:
            matrix = _balanced_rotation(matrix @ second_moment.double() @ matrix.mT, layout) @ matrix
        matrix = matrix.float()
        if inverse_error(matrix) <= INVERSE_TOLERANCE:
            return matrix
    raise DataError(
        f"the metric of errors cannot be inverted: error {inverse_error(matrix):.2g} at ridge {RIDGES[-1]}, expected at most "
        f"{INVERSE_TOLERANCE}; choose another map, such as scale for codebooks.key_map or value_map"
    )


def inverse_error(matrix: torch.Tensor) -> float:
    """Return the largest entry of ``|A B - 1|`` for `matrix` [Hkv, D, D] and its inverse `B` rounded to fp32."""
    wide = matrix.double()
    inverse = torch.linalg.inv(wide).float().double()
    return float((wide @ inverse - torch.eye(wide.shape[-1], dtype=torch.float64, device=wide.device)).abs().max())


def range_factor(mapped: torch.Tensor) -> torch.Tensor:
    """Return the power of two [Hkv] that brings the root mean square of `mapped` [Hkv, N, D] into [1, 2); 1 for zeros.

    A power of two changes no code, and keeps codebooks inside fp16 whatever the units of a model.
    """
    rms = mapped.double().square().mean(dim=(1, 2)).sqrt()
    exponent = torch.where(rms > 0, -torch.floor(torch.log2(rms.clamp(min=torch.finfo(torch.float64).tiny))), 0.0)
    return torch.exp2(exponent).float()


def _diagonal(moment: torch.Tensor, what: str) -> torch.Tensor:
    diagonal = torch.diagonal(moment.double(), dim1=-2, dim2=-1)
    valid = torch.isfinite(moment).flatten(1).all(dim=1) & (diagonal >= 0).all(dim=1)
    if not bool(valid.all()):
        head = int(torch.nonzero(~valid)[0])
        raise DataError(
            f"the {what} of key/value head {head} is not finite or negative on its diagonal; expected a second moment; check "
            "the model's activations in this dtype and calibrate again"
        )
    return diagonal


def _alive(rms: torch.Tensor) -> torch.Tensor:
    """Replace exact zeros of `rms` [Hkv, D] by a share of the mean of the head's others."""
    alive = rms > 0
    mean = rms.sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(alive, rms, torch.where(mean > 0, DEAD_SHARE * mean, torch.ones_like(mean)))


def _factor(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the fp64 upper factor of `gram` plus the first of `ridge` and the larger `RIDGES` that lets it factor."""
    diagonal = _diagonal(gram, "output projection's Gram matrix")
    gram = (gram.double() + gram.double().mT) / 2
    # Dead channels get an entry of their own: their row and column are zero, so a ridge relative to them would be too.
    dead = torch.where(diagonal > 0, 0.0, _alive(diagonal.sqrt()).square())
    for share in (ridge, *(r for r in RIDGES if r > ridge)):
        lower, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(share * diagonal + dead))
        if not bool(info.any()):
            upper: torch.Tensor = lower.mT.contiguous()
            return upper
    raise DataError(
        f"the Gram matrix of key/value head {int(torch.nonzero(info)[0])} is not positive semi-definite even with a ridge of "
        f"{RIDGES[-1]}; expected a second moment; calibrate again"
    )


def _balanced_rotation(moment: torch.Tensor, layout: CodeLayout) -> torch.Tensor:
    """Return the rotations [Hkv, D, D] whose rows are eigenvectors of `moment`, dealt to the subspaces of `layout`."""
    dims, bits = subspace_dims(layout), subspace_bits(layout)
    energies, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    # Eigenvectors have no sign of their own; the largest entry is made positive so that every run gets the same.
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    rotations = []
    for energy, columns in zip(energies.clamp(min=0), vectors, strict=True):
        order = [i for bucket in deal(energy, dims, bits) for i in bucket]
        rotations.append(columns[:, order].mT)
    return torch.stack(rotations)
