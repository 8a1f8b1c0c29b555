"""What an artifact says about how well its calibration text quantized, where that says something. Pure arithmetic."""

from statistics import fmean

from pqkv_cli.artifact.schema import Header
from pqkv_cli.specs import Side

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
