"""What an artifact holds, and how well its calibration text quantized, in numbers. Pure arithmetic over its header."""

from dataclasses import dataclass
from statistics import fmean

from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.store import Artifact
from pqkv_cli.artifact.tensors import coded_sides, tensor_bytes
from pqkv_cli.specs import CacheSpec, Side
from pqkv_kernels.format.layout import PAGE_TOKENS

# With fewer samples per centroid, the error on the samples themselves is far below that on any other text.
MIN_SAMPLES_PER_CENTROID = 8


def calibration_errors(header: Header) -> list[dict[Side, float] | None] | None:
    """Return each layer's relative squared error at calibration, mean over heads, None for dense layers.

    None altogether where the calibration was too small to tell.
    """
    info = header.calibration
    num_samples = min(info.reservoir_size, (info.num_samples - info.num_held_out) * info.seq_len)
    groups = [group for codec in header.plan.codecs.values() for stage in codec.layout.stages for group in stage]
    if num_samples < MIN_SAMPLES_PER_CENTROID * max(group.num_centroids for group in groups):
        return None
    return [
        None if error is None else {"keys": fmean(error.keys), "values": fmean(error.values)} for error in header.relative_error
    ]


_BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class SideRow:
    """Keys or values of one layer: codec, bits of code per channel, relative squared error over its heads."""

    codec: str
    bits_per_channel: float
    mean_error: float
    worst_error: float


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer; without `keys` and `values` it stays dense, for `dense_reason`."""

    layer: int
    keys: SideRow | None
    values: SideRow | None
    bits_per_channel: float | None
    dense_reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """An artifact in numbers.

    Attributes
    ----------
    label, sha256, pqkv_version
        The model, the content hash and the writer.
    keys_bits, values_bits, total_bits
        Asymptotic bits of code per channel, over the coded layers.
    code_bytes_per_token
        Bytes of code per token of one sequence, all coded layers.
    dense_bytes_per_token
        bf16 bytes per token of layers that could be coded and stay dense.
    baseline_bytes_per_token
        bf16 bytes per token of the uncompressed cache of all layers that can be coded.
    table_bytes
        Bytes of codebooks and transforms.
    predicted_layers
        Layers whose values are predicted from their keys.
    cache
        What stays exact.
    layers
        One row per layer.
    """

    label: str
    sha256: str
    pqkv_version: str
    keys_bits: float
    values_bits: float
    total_bits: float
    code_bytes_per_token: float
    dense_bytes_per_token: int
    baseline_bytes_per_token: int
    table_bytes: int
    predicted_layers: int
    cache: CacheSpec
    layers: tuple[LayerRow, ...]

    @property
    def table_tokens(self) -> int:
        """Tokens whose codes take as much as the tables: in shorter caches these are the larger part."""
        return round(self.table_bytes / self.code_bytes_per_token)


def summarize(artifact: Artifact) -> Summary:
    """Return the numbers of an opened artifact."""
    return summarize_header(artifact.header)


def summarize_header(header: Header) -> Summary:
    """Return the numbers that `header` implies."""
    code_bytes: dict[Side, float] = {"keys": 0.0, "values": 0.0}
    channels: dict[Side, int] = {"keys": 0, "values": 0}
    for index, side, _, codec in coded_sides(header):
        geometry = header.geometry[index]
        code_bytes[side] += geometry.num_kv_heads * codec.layout.page_bytes / PAGE_TOKENS
        channels[side] += geometry.num_kv_heads * geometry.head_dim
    dense_bytes = [
        2 * geometry.num_kv_heads * geometry.head_dim * _BF16_BYTES
        for geometry, layer in zip(header.geometry, header.plan.layers, strict=True)
        if layer.dense_reason and not geometry.dense_reason
    ]
    total = sum(code_bytes.values())
    return Summary(
        label=header.model.label,
        sha256=header.sha256,
        pqkv_version=header.pqkv_version,
        keys_bits=code_bytes["keys"] * 8 / channels["keys"],
        values_bits=code_bytes["values"] * 8 / channels["values"],
        total_bits=total * 8 / sum(channels.values()),
        code_bytes_per_token=total,
        dense_bytes_per_token=sum(dense_bytes),
        baseline_bytes_per_token=sum(channels.values()) * _BF16_BYTES + sum(dense_bytes),
        table_bytes=tensor_bytes(header),
        predicted_layers=sum(codec.predicted for _, _, _, codec in coded_sides(header)),
        cache=header.plan.cache,
        layers=tuple(_layer_row(header, index) for index in range(len(header.geometry))),
    )


def _layer_row(header: Header, index: int) -> LayerRow:
    reason, error = header.plan.layers[index].dense_reason, header.relative_error[index]
    if reason or error is None:
        return LayerRow(index, None, None, None, reason)
    keys = _side_row(header, index, "keys", error.keys)
    values = _side_row(header, index, "values", error.values)
    return LayerRow(index, keys, values, (keys.bits_per_channel + values.bits_per_channel) / 2, "")


def _side_row(header: Header, index: int, side: Side, errors: tuple[float, ...]) -> SideRow:
    name = str(getattr(header.plan.layers[index], side))
    bits = header.plan.codecs[name].layout.bits_per_channel
    return SideRow(name, bits, sum(errors) / len(errors), max(errors))
