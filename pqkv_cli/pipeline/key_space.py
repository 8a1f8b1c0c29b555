"""Where each layer's keys are coded, before rotary embedding or after it, and calibration samples to fit them from."""

from typing import Any

from pqkv_cli.calibration.rotated import RotatedStore
from pqkv_cli.fitting.plan import KeySpaces
from pqkv_cli.models.rotary import rotary_angles
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.specs import CompressionPlan, ModelGeometry


def rotary_layers(geometry: ModelGeometry) -> list[int]:
    """Return the layers whose keys can be coded in either space."""
    return [i for i, layer in enumerate(geometry.layers) if not layer.dense_reason and layer.rotary is not None]


def planned_spaces(geometry: ModelGeometry, plan: CompressionPlan) -> KeySpaces:
    """Return where `plan` codes the keys of rotary layers."""
    codecs = {index: plan.codec(index, "keys") for index in rotary_layers(geometry)}
    return {index: codec.key_space for index, codec in codecs.items() if codec is not None and codec.key_space is not None}


def sample_store(run: Run, geometry: ModelGeometry, spaces: KeySpaces, model: Any) -> RotatedStore:
    """Return the run's calibration with keys in `spaces`; the model is only asked for angles, and may be None without need."""
    turned = {}
    for index, space in spaces.items():
        rotary = geometry.layers[index].rotary
        if space == "post_rope" and rotary is not None:
            turned[index] = (rotary_angles(model, index), rotary)
    return RotatedStore(run.calibration, turned)
