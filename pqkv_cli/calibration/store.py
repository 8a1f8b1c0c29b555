"""A finished calibration on disk: its tensors and its JSON, each whole or absent, its keys before rotary embedding or after."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from pqkv_cli.errors import RunError
from pqkv_cli.files import write_bytes, write_text
from pqkv_cli.models.rotary import AngleSource
from pqkv_cli.specs import KeySpace, Side
from pqkv_kernels.format.layout import RotaryLayout
from pqkv_kernels.format.rotary import rotate


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` to `path` as safetensors.

    Raises
    ------
    RunError
        If it cannot be written; the old file is untouched.
    """
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}), RunError)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON with sorted keys.

    Raises
    ------
    RunError
        If it cannot be written; the old file is untouched.
    """
    write_text(path, json.dumps(content, sort_keys=True, indent=1) + "\n", RunError)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises
    ------
    RunError
        If the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); expected JSON. Delete {path.parent} and calibrate again.") from error
    if not isinstance(content, dict):
        raise RunError(
            f"{path} holds a {type(content).__name__}; expected an object. Delete {path.parent} and calibrate again."
        )
    return content


SCHEMA = "pqkv.calibration/1"


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """What one layer's keys, values and queries look like.

    Attributes
    ----------
    keys
        [Hkv, N, D] fp16, before rotary embedding (as the cache sees them where the geometry has no rotary).
    values
        [Hkv, N, D] fp16.
    positions
        [N] int32, of the sampled tokens in their windows.
    attention_mass
        [Hkv, N] fp32, squared attention received, summed over sampled queries, mean over the group's heads.
    query_moment
        [Hkv, D, D] fp64, mean over tokens of the group's sum of ``q q^T`` after rotary embedding.
    pair_moment
        [Hkv, num_pairs, 2, 2] fp64, mean over sampled queries of the group's sum of ``r r^T``, with `r` the query as keys
        before rotary embedding meet it, averaged over keys by attention; no pairs where the geometry has no rotary.
    output_gram
        [Hkv, D, D] fp64, sum over the group's heads of ``W^T W`` with `W` [hidden, D] the head's output projection.
    key_fisher, value_fisher
        [Hkv, D, D] fp64, mean over tokens of ``g g^T`` with `g` the gradient of the log-likelihood of a window for the token's
        key before rotary embedding or its value; nats^2 per unit^2. None where calibration ran without ``--fisher``.
    key_weight, value_weight
        [Hkv, N] fp32, what an error of each sample costs beside the others of its head, about 1 in the mean
        (`pqkv_cli.calibration.fisher.fisher_weight`); None as well.
    key_space
        Where `keys` are: a calibration stores them before rotary embedding.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    attention_mass: torch.Tensor
    query_moment: torch.Tensor
    pair_moment: torch.Tensor
    output_gram: torch.Tensor
    key_fisher: torch.Tensor | None = None
    value_fisher: torch.Tensor | None = None
    key_weight: torch.Tensor | None = None
    value_weight: torch.Tensor | None = None
    key_space: KeySpace = "pre_rope"


class SampleStore(Protocol):
    """Whoever has the samples of every quantizable layer: a finished calibration, or something derived from one."""

    def layer(self, index: int) -> LayerSamples:
        """Return the samples of one layer."""
        ...


class CalibrationStore:
    """A finished calibration.

    Raises
    ------
    RunError
        If `directory` holds none, a half-finished one, or one of another version.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        if not path.is_file():
            state = "only a half-finished one" if any(self.directory.glob("parts*")) else "no such file"
            raise RunError(
                f"no finished calibration in {self.directory} (looked for manifest.json: {state}). Run pqkv calibrate."
            )
        self.manifest: dict[str, Any] = read_json(path)
        if self.manifest.get("schema") != SCHEMA:
            raise RunError(
                f"{path} has schema {self.manifest.get('schema')!r}; expected {SCHEMA!r}. "
                f"Delete {self.directory} and calibrate again."
            )
        reasons = self.manifest.get("layers")
        if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
            raise self._damaged("manifest.json", "its layers are not a list of reasons")

    def layer(self, index: int) -> LayerSamples:
        """Return the samples of one layer.

        Raises
        ------
        RunError
            If the layer stayed dense, is out of range, or its file is damaged.
        """
        reasons = self.manifest["layers"]
        if not 0 <= index < len(reasons):
            raise RunError(
                f"layer {index} was asked for; the calibration in {self.directory} has layers 0..{len(reasons) - 1}."
            )
        if reasons[index]:
            raise RunError(f"layer {index} has no samples: it stays dense ({reasons[index]}).")
        tensors: dict[str, Any] = {**self._load(layer_file(index))}
        tensors["positions"] = self._load(WINDOWS_FILE)["positions"]
        expected = {field.name for field in fields(LayerSamples)} - {"key_space"}
        if not _REQUIRED <= tensors.keys() <= expected:
            raise self._damaged(layer_file(index), f"holds {sorted(tensors)}")
        return LayerSamples(**tensors)

    def positions(self) -> torch.Tensor:
        """Return the positions [N] int32 of the sampled tokens in their windows, window after window."""
        return self._load(WINDOWS_FILE)["positions"]

    def first_vectors(self, index: int, side: Side, most: int) -> torch.Tensor:
        """Return the first sampled keys or values of a layer, at most `most`, [Hkv, n, D]; nothing else is read.

        Raises
        ------
        RunError
            If its file is damaged.
        """
        name = layer_file(index)
        try:
            with safe_open(self.directory / name, framework="pt") as file:
                vectors: torch.Tensor = file.get_slice(side)[:, :most]
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, str(error)) from error
        return vectors

    def held_out(self) -> torch.Tensor:
        """Return the held-out windows, [N, T] int64."""
        return self._load(WINDOWS_FILE)["held_out"]

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        try:
            return load_file(self.directory / name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, str(error)) from error

    def _damaged(self, name: str, found: str) -> RunError:
        return RunError(
            f"{self.directory / name} is damaged ({found}); expected a whole calibration file. "
            f"Delete {self.directory} and calibrate again."
        )


WINDOWS_FILE = "windows.safetensors"
_REQUIRED = {field.name for field in fields(LayerSamples) if field.default is MISSING}


def layer_file(index: int) -> str:
    """Return the file name of one layer."""
    return f"layer-{index:03d}.safetensors"


def rotated(keys: torch.Tensor, positions: torch.Tensor, angles: AngleSource, rotary: RotaryLayout) -> torch.Tensor:
    """Return `keys` [Hkv, N, D] as the cache sees them at `positions` [N]: after rotary embedding."""
    cos, sin = angles(positions.long()[None])
    return rotate(keys, cos, sin, rotary)


class RotatedStore(CalibrationStore):
    """A finished calibration whose keys of the layers in `turned` are given after rotary embedding, in fp32.

    Raises
    ------
    RunError
        As `CalibrationStore`.
    """

    def __init__(self, directory: Path | str, turned: Mapping[int, tuple[AngleSource, RotaryLayout]]) -> None:
        super().__init__(directory)
        self._turned = turned

    def layer(self, index: int) -> LayerSamples:
        """Return the samples of one layer; see `CalibrationStore.layer`."""
        samples = super().layer(index)
        if index not in self._turned:
            return samples
        keys = rotated(samples.keys.float(), samples.positions, *self._turned[index])
        return replace(samples, keys=keys, key_space="post_rope")
