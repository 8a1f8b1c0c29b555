"""The files of a small run, ways to change one, and how each is read. Draws with hypothesis."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutations import changed_document, spliced, truncated
from tiny_run import make_recipe

from pqkv_cli.calibration.store import CalibrationStore
from pqkv_cli.cli.main import main
from pqkv_cli.fitting.run import load_fitted
from pqkv_cli.pipeline.inspect import inspect_target
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.target import resolve_target

Read = Callable[[], Any]


class RunFiles:
    """A finished run under `directory`, made once."""

    def __init__(self, directory: Path) -> None:
        self.run = Run(directory / "run")
        recipe = make_recipe(directory)
        for words in (["calibrate", recipe, "-o", self.run.path], ["fit-codebooks", self.run.path], ["export", self.run.path]):
            if main([str(word) for word in words]):
                raise SystemExit(f"the run could not be made: {words}")
        self._reads: dict[str, Read] = {
            "stages.json": self._inspect,
            "recipe.yaml": self._inspect,
            "codebooks/fit.json": lambda: load_fitted(self.run.codebooks),
            "codebooks/layer_001.safetensors": lambda: load_fitted(self.run.codebooks),
            "calibration/manifest.json": self._calibration,
            "calibration/layer-001.safetensors": self._calibration,
            "calibration/windows.safetensors": self._calibration,
        }
        self._originals = {name: (self.run.path / name).read_bytes() for name in self._reads}

    def changes(self) -> st.SearchStrategy[tuple[str, bytes]]:
        """Draw a file's name and what to write into it."""
        return _changes(self._originals)

    @contextmanager
    def changed(self, name: str, data: bytes) -> Iterator[Read]:
        """Write `data` into the file `name`, give what reads it, and put it back."""
        (self.run.path / name).write_bytes(data)
        try:
            yield self._reads[name]
        finally:
            (self.run.path / name).write_bytes(self._originals[name])

    def _inspect(self) -> object:
        return inspect_target(resolve_target(str(self.run.path))).document()

    def _calibration(self) -> object:
        store = CalibrationStore(self.run.calibration)
        return [*map(store.layer, range(2)), store.held_out()]


@st.composite
def _changes(draw: st.DrawFn, originals: dict[str, bytes]) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(originals)))
    original = originals[name]
    if name.endswith(".json") and draw(st.booleans()):
        return name, json.dumps(draw(changed_document(json.loads(original)))[1]).encode()
    if name.endswith(".safetensors"):
        return name, draw(truncated(original) | spliced(original))
    return name, draw(spliced(original) | st.integers(0, len(original)).map(lambda end: original[:end]))
