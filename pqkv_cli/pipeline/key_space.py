"""Where each layer's keys are coded, before rotary embedding or after it: asked for, or measured on held-out text.

Codebooks learned after rotary embedding hold at the positions they were learned at. So what a choice costs is measured at both
ends of what the model reads, not only where calibration stood.
"""

import contextlib
import json
from dataclasses import asdict
from typing import Any, Final

import torch

from pqkv_cli.calibration.rotated import RotatedStore
from pqkv_cli.evaluation.held_out import held_out_losses, one_side_alone
from pqkv_cli.files import write_text
from pqkv_cli.fitting.fit import checked_side, fit_side
from pqkv_cli.fitting.layer_file import make_directory
from pqkv_cli.fitting.plan import KeySpaces, rated_specs
from pqkv_cli.fitting.run import layer_request
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.fitting.trial import shortened
from pqkv_cli.models.rotary import rotary_angles
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.rates import CodeStyle
from pqkv_cli.reporter import Reporter
from pqkv_cli.specs import CodecSpec, CompressionPlan, KeySpace, ModelGeometry
from pqkv_kernels.format.tables import CodecTables

SCHEMA = "pqkv.key-spaces/1"
KEY_SPACE_FILE = "key_spaces.json"
# The cheaper one to read comes first: it is taken where both cost the same.
SPACES: Final[tuple[KeySpace, KeySpace]] = ("post_rope", "pre_rope")


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


class KeySpaceChoice:
    """Measures which space costs less in each rotary layer, at the rate nearest to `bits`.

    Both candidates are fitted shortly; the KL divergence of the calibration's held-out windows with this layer's keys alone
    quantized is measured at position 0 and at the end of what the model reads, and the mean decides. Layers that were measured
    are not measured again.
    """

    def __init__(self, run: Run, geometry: ModelGeometry, bits: float, style: CodeStyle, settings: FitSettings) -> None:
        self._run, self._geometry, self._bits = run, geometry, bits
        self._style, self._settings = style, shortened(settings)
        self._path = run.codebooks / KEY_SPACE_FILE

    def spaces(self, model: Any, reporter: Reporter) -> KeySpaces:
        """Return the chosen spaces, and write down how they came about.

        Raises
        ------
        DataError
            If samples cannot be fitted.
        RunError
            If files cannot be written.
        """
        layers, chosen = rotary_layers(self._geometry), {}
        make_directory(self._run.codebooks)
        with reporter.progress("choose key spaces") as advance:
            advance(0, len(layers))
            for done, index in enumerate(layers, 1):
                losses = self._losses(model, index)
                chosen[index] = min(SPACES, key=lambda space: losses[space])
                advance(done, len(layers))
        return chosen

    def _losses(self, model: Any, index: int) -> dict[KeySpace, float]:
        """Return the mean KL divergence in bits that each space costs layer `index`; from the file where it stands there."""
        specs = {space: self._spec(index, space) for space in SPACES}
        store = sample_store(self._run, self._geometry, {}, model)
        asked, plain = {space: asdict(spec) for space, spec in specs.items()}, store.layer(index)
        request = layer_request(index, self._geometry.layers[index], asked, self._settings, plain)
        known = self._known()
        if index in known and known[index]["request_sha256"] == request:
            return {space: known[index][space] for space in SPACES}
        layer, tables = self._geometry.layers[index], {}
        turned = sample_store(self._run, self._geometry, {index: "post_rope"}, model).layer(index)
        for samples in (turned, plain):
            space = samples.key_space
            with checked_side(samples, index, "keys"):
                tables[space], _ = fit_side(samples, layer, specs[space], "keys", index, self._settings)
        losses = self._measured(model, store.held_out(), index, tables)
        known[index] = {"layer": index, "request_sha256": request, "bits": self._bits} | losses
        rows = [known[number] for number in sorted(known)]
        write_text(self._path, json.dumps({"schema": SCHEMA, "layers": rows}, indent=1) + "\n")
        return losses

    def _spec(self, index: int, space: KeySpace) -> CodecSpec:
        specs = rated_specs(self._geometry.layers[index], "keys", self._style, space)
        return specs[min(specs, key=lambda rate: (abs(rate - self._bits), rate))]

    def _measured(
        self, model: Any, windows: torch.Tensor, index: int, tables: dict[KeySpace, CodecTables]
    ) -> dict[KeySpace, float]:
        choices = [one_side_alone(len(self._geometry.layers), index, "keys", tables[space]) for space in SPACES]
        far = max(0, self._geometry.max_positions - windows.shape[1])
        found = [held_out_losses(model, windows, choices, position_offset=offset).mean(dim=0) for offset in (0, far)]
        return dict(zip(SPACES, torch.stack(found).mean(dim=0).tolist(), strict=True))

    def _known(self) -> dict[int, dict[str, Any]]:
        """Return the rows of the file by layer, none where it is missing or damaged: those layers are measured again."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads(self._path.read_text(encoding="utf-8"))
            rows = {int(row["layer"]): row for row in document["layers"] if all(float(row[space]) >= 0 for space in SPACES)}
            if document["schema"] == SCHEMA and all("request_sha256" in row for row in rows.values()):
                return rows
        return {}
