"""What refining left on disk: `refinement.json` beside a fit, and where it paid, refined layers below it. Knows no model.

The fit itself is never touched: it stays as its own record says, and refining can begin again from it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.errors import RunError
from pqkv_cli.files import write_text
from pqkv_cli.fitting.fit import FittedLayer
from pqkv_cli.fitting.layer_file import layer_path, make_directory, save_layer, tensors_sha256
from pqkv_cli.fitting.record import RECORD_NAME, FitRecord, digest, read_document
from pqkv_cli.fitting.refine import Refinement
from pqkv_cli.fitting.refine_work import RefineSettings

SCHEMA = "pqkv.refinement/1"
OUTCOME_NAME = "refinement.json"
REFINED_NAME = "refined"
# Raised whenever the same request would give other bytes.
REFINE_VERSION = 1


def refine_request(record: FitRecord, windows: torch.Tensor, held_out: torch.Tensor, settings: RefineSettings) -> str:
    """Return the hash of everything that refining the fit of `record` depends on, beside the model that it was fitted for."""
    return digest(
        {
            "method": REFINE_VERSION,
            "torch": torch.__version__,
            "layers": list(record.layers_sha256),
            "settings": asdict(settings),
            "windows": tensors_sha256({"windows": windows, "held_out": held_out}),
        }
    )


def save_refinement(directory: Path, record: FitRecord, refinement: Refinement, request: str) -> dict[str, Any]:
    """Write what refining the fit in `directory` came to and return `refinement.json`, which comes last and commits it.

    Raises
    ------
    RunError
        If files cannot be written.
    """
    forget_refinement(directory)
    refined = directory / REFINED_NAME
    if refinement.is_better:
        make_directory(refined)
        _save_layers(refined, record, refinement.layers, request)
    outcome: dict[str, Any] = {
        "schema": SCHEMA,
        "request_sha256": request,
        "is_better": refinement.is_better,
        "held_out_kl_bits": {"before": list(refinement.before), "after": list(refinement.after)},
        "weighting": refinement.weighting,
        "selection_kl_bits": list(refinement.selection),
    }
    write_text(directory / OUTCOME_NAME, json.dumps(outcome, sort_keys=True, indent=1, allow_nan=False) + "\n", RunError)
    return outcome


def forget_refinement(directory: Path) -> None:
    """Remove what refining left in `directory`; the fit stays."""
    (directory / OUTCOME_NAME).unlink(missing_ok=True)
    if (directory / REFINED_NAME).is_dir():
        shutil.rmtree(directory / REFINED_NAME)


def load_outcome(directory: Path) -> dict[str, Any] | None:
    """Return `refinement.json`, None where the fit in `directory` was not refined to the end.

    Raises
    ------
    RunError
        If it is damaged.
    """
    path, advice = directory / OUTCOME_NAME, "delete it and run pqkv fit-codebooks --refine on this run"
    outcome = read_document(path, SCHEMA, advice)
    if outcome is not None and not isinstance(outcome.get("is_better"), bool):
        raise RunError(f"{path} says of is_better {outcome.get('is_better')!r}; expected true or false; {advice}")
    return outcome


def final_directory(directory: Path) -> Path:
    """Return where the codebooks to use lie: those of the fit in `directory`, or the refined ones below it.

    Raises
    ------
    RunError
        If `refinement.json` is damaged.
    """
    outcome = load_outcome(directory)
    return directory / REFINED_NAME if outcome is not None and outcome["is_better"] else directory


def _save_layers(refined: Path, record: FitRecord, layers: Sequence[FittedLayer], request: str) -> None:
    stamps = [save_layer(layer_path(refined, index), layer, request) for index, layer in enumerate(layers)]
    own = replace(
        record,
        request_sha256=request,
        relative_error=tuple(layer.relative_error for layer in layers),
        layers_sha256=tuple(stamp.tensors_sha256 for stamp in stamps),
    )
    write_text(refined / RECORD_NAME, own.text(), RunError)
