"""The stage that writes the artifact and the files for people beside it."""

from collections.abc import Callable
from dataclasses import replace

from pqkv_cli import __version__
from pqkv_cli.artifact.card import write_derived
from pqkv_cli.artifact.schema import CalibrationInfo, Header, LayerError, ModelInfo
from pqkv_cli.artifact.store import open_artifact, save_artifact
from pqkv_cli.artifact.summary import summarize_header
from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.files import write_text
from pqkv_cli.fitting.record import FitRecord, load_record
from pqkv_cli.fitting.refine_files import final_directory
from pqkv_cli.fitting.run import load_fitted
from pqkv_cli.models.footprint import weights
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.load import load_config
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.pipeline.rundir import RECIPE_FILE, Run
from pqkv_cli.pipeline.state import Facts, StageOutcome, StageWork, do_stage, stage_inputs
from pqkv_cli.recipe import Recipe, recipe_hash
from pqkv_cli.recipe_files import dump_recipe
from pqkv_cli.reporter import Reporter
from pqkv_cli.specs import ModelGeometry


def export(run: Run, recipe: Recipe, reporter: Reporter) -> StageOutcome:
    """Write the artifact of `run`; an older one stays until the new one is complete.

    Raises
    ------
    RunError
        If the codebooks are missing or older than the calibration.
    ArtifactError
        If the artifact cannot be written.
    """
    inputs = stage_inputs(run, recipe, "export", {})

    def prepare() -> Callable[[], Facts]:
        codebooks = final_directory(run.codebooks)
        resolved = resolve_model(recipe.model)
        config = load_config(resolved)
        header = _header(run, recipe, load_record(codebooks), resolved.label, geometry(config))
        tables = [layer.tables or None for layer in load_fitted(codebooks)]
        # Of two bytes, whatever a checkpoint keeps them in: what a GPU holds beside the tables.
        weight_bytes = 2 * weights(config).num_parameters

        def act() -> Facts:
            with reporter.progress("export"):
                sha256 = save_artifact(run.artifact_file, header, tables)
                saved = replace(header, sha256=sha256)
                write_derived(run.artifact, saved)
                write_text(run.artifact / RECIPE_FILE, dump_recipe(recipe))
            summary = summarize_header(saved)
            return {
                "sha256": sha256,
                "file_bytes": run.artifact_file.stat().st_size,
                "bits_per_channel": summary.total_bits,
                "bytes_per_token": summary.code_bytes_per_token + summary.dense_bytes_per_token,
                "bytes_per_token_uncompressed": summary.baseline_bytes_per_token,
                "table_bytes": summary.table_bytes,
                "table_share_of_weights": round(summary.table_bytes / weight_bytes, 4),
                "table_tokens": summary.table_tokens,
            }

        return act

    def read() -> object:
        return open_artifact(run.artifact_file)

    work = StageWork("export", inputs, run.artifact, prepare, keeps_old_files=True, read=read)
    return do_stage(run, recipe, work, reporter)


def _header(run: Run, recipe: Recipe, record: FitRecord, label: str, shape: ModelGeometry) -> Header:
    manifest = CalibrationStore(run.calibration).manifest
    identity, settings = manifest["model"], manifest["settings"]
    return Header(
        model=ModelInfo(label, shape.model_type, identity["config_sha256"], identity["weights_sha256"]),
        geometry=shape.layers,
        # The fit does not depend on what the cache keeps exact, so only the export decides it.
        plan=replace(record.plan.as_stored(), cache=recipe.cache.spec),
        relative_error=tuple(LayerError(e["keys"], e["values"]) if e else None for e in record.relative_error),
        calibration=CalibrationInfo(
            data_sha256=settings["data_sha256"],
            num_samples=settings["num_samples"],
            num_held_out=manifest["num_held_out"],
            seq_len=settings["seq_len"],
            reservoir_size=settings["reservoir_size"],
            seed=settings["seed"],
        ),
        recipe_sha256=recipe_hash(recipe),
        pqkv_version=__version__,
    )
