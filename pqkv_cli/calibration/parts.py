"""The half-finished calibration on disk. Knows which files make a finished part, and how to go on after any kill.

- ``parts/settings.json``: what is being computed; written first
- ``parts/samples-00007.safetensors``: the samples of part 7 (a run of batches); its presence means parts 0..7 are done
- ``parts/moments-00007.safetensors``: sums over parts 0..7; written before the samples, the former one removed after
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pqkv_cli.calibration.observer import LayerBatch
from pqkv_cli.calibration.ranks import Ranks
from pqkv_cli.calibration.store import read_json, write_json, write_tensors
from pqkv_cli.errors import RunError

# The last two of each are there only if gradients were asked for.
SAMPLE_FIELDS = ("keys", "values", "attention_mass", "key_gradients", "value_gradients")
MOMENT_FIELDS = ("query_moment", "pair_moment", "key_fisher", "value_fisher")
Moments = dict[str, torch.Tensor]
"""Sums by ``layer.field``."""


class Parts:
    """The part files under one calibration directory, of one process among `ranks`."""

    def __init__(self, directory: Path, ranks: Ranks | None = None) -> None:
        alone = ranks is None or ranks.size == 1
        self._directory = directory / ("parts" if alone or ranks is None else f"parts-{ranks.rank}-of-{ranks.size}")

    def open(self, identity: dict[str, Any]) -> int:
        """Start or resume; return the number of finished parts.

        Raises
        ------
        RunError
            If another calibration was begun here.
        """
        settings = self._directory / "settings.json"
        if settings.is_file():
            check_same(read_json(settings), identity, self._directory.parent)
        else:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_json(settings, identity)
        return self._num_done()

    def _num_done(self) -> int:
        return len(list(self._directory.glob("samples-*.safetensors")))

    def moments(self, num_done: int) -> Moments:
        """Return the sums over the first `num_done` parts, fp64."""
        return _loaded(self._moments(num_done - 1)) if num_done else {}

    def add(self, part: int, batches: Sequence[Mapping[int, LayerBatch]], moments: Moments) -> None:
        """Commit one part: the samples of its batches and the sums so far."""
        write_tensors(self._moments(part), moments)
        samples = {
            f"{i}.{field}": torch.cat([getattr(batch[i], field) for batch in batches], dim=1)
            for i in batches[0]
            for field in present(batches[0][i], SAMPLE_FIELDS)
        }
        write_tensors(self._samples(part), samples)
        if part:
            self._moments(part - 1).unlink(missing_ok=True)

    def samples(self, layer: int) -> dict[str, torch.Tensor]:
        """Return one layer's samples of all parts on disk, in window order.

        Raises
        ------
        RunError
            If a part is damaged.
        """
        pieces: dict[str, list[torch.Tensor]] = {}
        for index in range(self._num_done()):
            path = self._samples(index)
            try:
                with safe_open(path, framework="pt") as part:
                    names = set(part.keys())
                    for field in (field for field in SAMPLE_FIELDS if f"{layer}.{field}" in names):
                        pieces.setdefault(field, []).append(part.get_tensor(f"{layer}.{field}"))
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        return {field: torch.cat(found, dim=1) for field, found in pieces.items()}

    def remove(self) -> None:
        """Delete all parts; the finished store replaces them."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _samples(self, part: int) -> Path:
        return self._directory / f"samples-{part:05d}.safetensors"

    def _moments(self, part: int) -> Path:
        return self._directory / f"moments-{part:05d}.safetensors"


def present(batch: LayerBatch, names: Sequence[str]) -> list[str]:
    """Return those of the fields `names` that `batch` has."""
    return [name for name in names if getattr(batch, name) is not None]


def check_same(found: dict[str, Any], asked: dict[str, Any], directory: Path) -> None:
    """Refuse to continue one calibration as another.

    Raises
    ------
    RunError
        If they differ; lists every difference.
    """
    before, now = _flat(found), _flat(asked)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differing:
        listed = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
        raise RunError(
            f"{directory} holds a calibration with other settings: {listed}. Ask for the earlier settings again, "
            "choose another directory, or delete this one to start over."
        )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    directory = path.parent.parent
    return RunError(f"{path} is damaged ({error}); expected a whole part file. Delete {directory} and calibrate again.")
