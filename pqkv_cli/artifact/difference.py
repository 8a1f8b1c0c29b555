"""What differs between two artifacts: fields of the header, codecs, layers, numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.artifact.header import header_document, map_word
from pqkv_cli.artifact.store import Artifact, open_artifact
from pqkv_cli.artifact.summary import LayerRow, Summary, summarize
from pqkv_cli.artifact.tensors import flatten_tables
from pqkv_cli.specs import CodecSpec

# Compared on their own, in a form that says more than the raw fields do.
_OWN_PLACE = ("codecs", "relative_error", "sha256")


@dataclass(frozen=True, slots=True)
class FieldPair:
    """A field of the header that differs; None where one artifact does not have it."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class LayerPair:
    """One layer in both artifacts; bits and relative squared errors are None where it is dense or absent."""

    layer: int
    bits_a: float | None
    bits_b: float | None
    keys_error_a: float | None
    keys_error_b: float | None
    values_error_a: float | None
    values_error_b: float | None


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor that differs.

    Attributes
    ----------
    name
        Its name in the artifact.
    reason
        ``values``, ``shape``, ``only in a`` or ``only in b``.
    largest
        Largest absolute difference, where the shapes are equal.
    """

    name: str
    reason: str
    largest: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs; `num_equal_tensors` counts the tensors that are equal to the last bit, `layers` holds all layers."""

    same_content: bool
    fields: tuple[FieldPair, ...]
    layers: tuple[LayerPair, ...]
    tensors: tuple[TensorPair, ...]
    num_equal_tensors: int


def compare(a: Artifact, b: Artifact) -> Difference:
    """Return what differs between two opened artifacts, of one model or of two."""
    first, second = _named_tensors(a), _named_tensors(b)
    pairs = tuple(_tensor_pairs(first, second))
    return Difference(
        same_content=a.sha256 == b.sha256,
        fields=tuple(_field_pairs(_facts(a), _facts(b))),
        layers=_layer_pairs(a, b),
        tensors=pairs,
        num_equal_tensors=len(first.keys() | second.keys()) - len(pairs),
    )


def _named_tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    return flatten_tables(artifact.header, artifact.tables)


def _tensor_pairs(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> Iterator[TensorPair]:
    for name in sorted(a.keys() | b.keys()):
        if name not in b:
            yield TensorPair(name, "only in a")
        elif name not in a:
            yield TensorPair(name, "only in b")
        elif a[name].shape != b[name].shape:
            yield TensorPair(name, "shape")
        elif not torch.equal(a[name], b[name]):
            yield TensorPair(name, "values", float((a[name].double() - b[name].double()).abs().max()))


def _facts(artifact: Artifact) -> dict[str, Any]:
    document = header_document(artifact.header)
    facts = _flat("", {key: value for key, value in document.items() if key not in _OWN_PLACE})
    return facts | {f"codecs.{name}": _codec_words(codec) for name, codec in artifact.header.plan.codecs.items()}


def _flat(path: str, value: Any) -> dict[str, Any]:
    """Return the leaves of nested objects under dotted paths; a list counts its entries as members."""
    if isinstance(value, Mapping):
        members = [(f"{path}.{key}" if path else str(key), member) for key, member in value.items()]
    elif isinstance(value, list) and any(isinstance(member, Mapping) for member in value):
        members = [(f"{path}[{index}]", member) for index, member in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for member_path, member in members for name, leaf in _flat(member_path, member).items()}


def _codec_words(codec: CodecSpec) -> str:
    stages = " + ".join(
        ", ".join(f"{group.num_subspaces} x {group.nbits} bits of {group.subspace_dim} channels" for group in stage)
        for stage in codec.layout.stages
    )
    space = f"{codec.key_space} " if codec.key_space else ""
    return f"{space}{map_word(codec)}: {stages} ({codec.layout.bits_per_channel:g} bits per channel)"


def _field_pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[FieldPair]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield FieldPair(name, a.get(name), b.get(name))


def _layer_pairs(a: Artifact, b: Artifact) -> tuple[LayerPair, ...]:
    rows = [{row.layer: row for row in summarize(artifact).layers} for artifact in (a, b)]
    numbers = [{index: _layer_numbers(row) for index, row in each.items()} for each in rows]
    absent = (None, None, None)
    pairs = []
    for index in sorted(numbers[0].keys() | numbers[1].keys()):
        (bits_a, keys_a, values_a), (bits_b, keys_b, values_b) = (each.get(index, absent) for each in numbers)
        pairs.append(LayerPair(index, bits_a, bits_b, keys_a, keys_b, values_a, values_b))
    return tuple(pairs)


def _layer_numbers(row: LayerRow) -> tuple[float | None, float | None, float | None]:
    keys, values = (None if side is None else side.mean_error for side in (row.keys, row.values))
    return row.bits_per_channel, keys, values


SCHEMA = "pqkv.diff/1"


@dataclass(frozen=True, slots=True)
class OpenedArtifact:
    """One of the two: its file and its numbers."""

    path: Path
    file_bytes: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class ArtifactDiff:
    """Both artifacts and what differs between them."""

    a: OpenedArtifact
    b: OpenedArtifact
    difference: Difference

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON; its keys stay."""
        sides = {name: _side_document(side) for name, side in (("a", self.a), ("b", self.b))}
        return {"schema": SCHEMA, **sides, **asdict(self.difference)}


def diff(a: Path, b: Path) -> ArtifactDiff:
    """Compare the artifacts at `a` and `b`.

    Raises
    ------
    ArtifactError
        If one of them is missing or damaged.
    """
    first, second = open_artifact(a), open_artifact(b)
    return ArtifactDiff(_opened(first), _opened(second), compare(first, second))


def _opened(artifact: Artifact) -> OpenedArtifact:
    return OpenedArtifact(artifact.path, artifact.file_bytes, summarize(artifact))


def _side_document(side: OpenedArtifact) -> dict[str, Any]:
    return {
        "path": str(side.path),
        "sha256": side.summary.sha256,
        "model": side.summary.label,
        "bits_per_channel": side.summary.total_bits,
        "file_bytes": side.file_bytes,
    }
