"""What a model wrote is kept in its run: found again, gone on with, written anew for another model or seed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_chain import byte_tokenizer, tiny_llama

from pqkv_cli.calibration import writing
from pqkv_cli.calibration.writing import Written
from pqkv_cli.errors import DataError, RecipeError, RunError
from pqkv_cli.pipeline import calibration_text as subject
from pqkv_cli.pipeline.calibrate import calibrate
from pqkv_cli.pipeline.calibration_text import calibration_texts, own_text
from pqkv_cli.pipeline.fingerprints import texts_identity
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.start import text_references
from pqkv_cli.recipe import Recipe
from pqkv_cli.recipe_files import dump_recipe, override, parse_recipe
from pqkv_cli.reporter import Advance


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def progress(self, label: str) -> Iterator[Advance]:
        yield lambda done, total: None


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(writing, "ROWS", 8)
    monkeypatch.setattr(writing, "STEPS", 256)
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    found = Recipe(name="tiny", model=str(model), dtype="float32")
    return override(found, {"calibration.data": "self", "calibration.samples": 12, "calibration.seq_len": 64})


def test_a_run_keeps_what_its_model_wrote_and_calibrates_on_it(tmp_path: Path, recipe: Recipe) -> None:
    run, reporter = Run(tmp_path / "run"), Silent()
    with pytest.raises(DataError, match="0 of .* tokens that the model writes for its calibration"):
        calibration_texts(recipe, run)
    with pytest.raises(DataError, match="this artifact lies alone; name the run instead"):
        calibration_texts(recipe, None)
    calibrate(run, recipe, reporter)
    rows = [json.loads(line) for line in (run.texts / "self.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"talk", "prose", "code"} <= {row["kind"] for row in rows}
    assert calibration_texts(recipe, run)[0].startswith(rows[0]["text"])
    manifest = (run.calibration / "manifest.json").read_bytes()
    other = Run(tmp_path / "other")
    calibrate(other, recipe, reporter)
    assert (other.calibration / "manifest.json").read_bytes() == manifest
    assert calibrate(run, recipe, reporter).was_done
    assert not calibrate(run, override(recipe, {"seed": 1}), reporter).was_done


def test_a_mix_is_recorded_and_shares_the_windows(tmp_path: Path, recipe: Recipe) -> None:
    mixed = override(recipe, {"calibration.data": ["self", "stdlib:calibration"]})
    run = Run(tmp_path / "run")
    calibrate(run, mixed, Silent())
    assert run.recipe().calibration.data == ("self", "stdlib:calibration")
    identity = json.loads(run.stages_file.read_text())["calibrate"]["inputs"]["data"]
    assert identity.startswith("self of model ") and " with seed 0 and stdlib:calibration of Python" in identity
    assert [len(text) > 0 for text in calibration_texts(mixed, run)] == [True, True]


def test_writing_goes_on_behind_the_last_finished_batch(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    whole = own_text(tmp_path / "a", override(recipe, {"calibration.samples": 60}))
    whole.write(model, tokenizer, 0, Silent())
    lines = whole.file.read_text(encoding="utf-8").splitlines(keepends=True)
    first = [line for line in lines if json.loads(line)["batch"] == 0]
    assert len(first) < len(lines)
    half = own_text(tmp_path / "b", override(recipe, {"calibration.samples": 60}))
    half.file.parent.mkdir()
    half.file.write_text("".join(first), encoding="utf-8")
    half.write(model, tokenizer, 0, Silent())
    assert half.file.read_bytes() == whole.file.read_bytes()
    # Fewer windows read the beginning of the same text.
    assert whole.read().startswith(own_text(tmp_path / "a", recipe).read())
    asked = own_text(tmp_path / "a", override(recipe, {"seed": 5}))
    with pytest.raises(DataError, match="holds 0 of"):
        asked.read()


def test_a_damaged_file_and_a_model_that_repeats_itself_are_named(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = own_text(tmp_path, recipe)
    text.file.write_text("{half", encoding="utf-8")
    with pytest.raises(RunError, match=r"self.jsonl is damaged \(JSONDecodeError: .*\); delete it, then calibrate"):
        text.read()
    text.file.unlink()
    nothing: tuple[list[Written], int] = ([], 4)
    monkeypatch.setattr(subject, "write_batch", lambda *args: nothing)
    reporter = Silent()
    with pytest.raises(DataError, match="all texts of 2 batches that the model wrote repeat themselves; expected prose: give"):
        text.write(None, byte_tokenizer(), 0, reporter)
    assert reporter.notes[0] == "4 of 4 texts are left out, because they repeat themselves"


def test_recipes_hold_one_text_or_several(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = override(recipe, {"calibration.data": ("self", "stdlib:broad")})
    assert parse_recipe(dump_recipe(mixed), "x") == mixed
    assert "data: self\n" in dump_recipe(recipe)
    for wrong in (5, [], [""], ["self", 1]):
        with pytest.raises(RecipeError, match=r"calibration.data: found .*, expected text that is not empty, or a list"):
            override(recipe, {"calibration.data": wrong})
    with pytest.raises(RecipeError, match=r"expected every text once: each gets an equal share of the windows"):
        override(recipe, {"calibration.data": ["self", "self"]})
    assert texts_identity(("self",), "f" * 64, 3) == f"self of model {'f' * 64} with seed 3"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("a file", encoding="utf-8")
    assert text_references(["self", "./self"]) == ["self", str(tmp_path / "self")]
    assert text_references(None) is None
