"""The directory of one run, and how directories are told apart by their files. Knows no stages and no models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pqkv_cli.artifact.schema import ARTIFACT_FILE
from pqkv_cli.errors import RunError
from pqkv_cli.files import write_text
from pqkv_cli.models.gguf import is_gguf
from pqkv_cli.recipe import Recipe
from pqkv_cli.recipe_files import dump_recipe, load_recipe

RECIPE_FILE = "recipe.yaml"
MODEL_FILE = "config.json"
# Where a comparison with rivals lies among the results, and its numbers.
PEERS_FOLDER = "peers"
PARETO_FILE = "pareto.json"
# What `pqkv bench` measured, among the results.
BENCH_FILE = "bench.json"

PathKind = Literal["model", "run", "artifact", "recipe"]


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory: the effective recipe and what each stage made of it."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The effective recipe."""
        return self.path / RECIPE_FILE

    @property
    def stages_file(self) -> Path:
        """Which stage was made of which inputs."""
        return self.path / "stages.json"

    @property
    def lock_file(self) -> Path:
        """Held by the process that works on the run."""
        return self.path / ".lock"

    @property
    def texts(self) -> Path:
        """Directory of what the model wrote for its calibration."""
        return self.path / "texts"

    @property
    def calibration(self) -> Path:
        """Directory of the calibration stage."""
        return self.path / "calibration"

    @property
    def trials(self) -> Path:
        """Directory of what short fits told about rates; kept when another budget makes the codebooks anew."""
        return self.path / "trials"

    @property
    def codebooks(self) -> Path:
        """Directory of the fitting stage."""
        return self.path / "codebooks"

    @property
    def artifact(self) -> Path:
        """Directory of the export stage."""
        return self.path / "artifact"

    @property
    def artifact_file(self) -> Path:
        """The one file a reader opens."""
        return self.artifact / ARTIFACT_FILE

    @property
    def results(self) -> Path:
        """Directory of result records."""
        return self.path / "results"

    def recipe(self) -> Recipe:
        """Return the effective recipe.

        Raises
        ------
        RunError
            If the directory is not a run.
        """
        if not self.recipe_file.is_file():
            raise RunError(
                f"{self.path} holds no run (no {RECIPE_FILE} in it); start one with: pqkv calibrate MODEL -o {self.path}"
            )
        return load_recipe(self.recipe_file)

    def save_recipe(self, recipe: Recipe) -> None:
        """Make `recipe` the effective one."""
        write_text(self.recipe_file, dump_recipe(recipe))


def kind_of(path: Path) -> PathKind | None:
    """Return what lies at `path`, or None where no file gives it away."""
    if path.is_file():
        if is_gguf(path):
            return "model"
        suffix = path.suffix.lower()
        return "artifact" if suffix == ".safetensors" else "recipe" if suffix in (".yaml", ".yml") else None
    if (path / ARTIFACT_FILE).is_file():
        return "artifact"
    if (path / MODEL_FILE).is_file():
        return "model"
    return "run" if (path / RECIPE_FILE).is_file() else None


def runs_under(root: Path) -> list[Path]:
    """Return the run directories directly under `root`, sorted."""
    return sorted(path for path in root.glob("*") if path.is_dir() and kind_of(path) == "run")
