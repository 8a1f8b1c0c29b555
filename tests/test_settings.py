"""A setting is declared once: stages, schema, page, options and errors take what they need from its line."""

from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from pqkv_cli.cli.main import VERBS
from pqkv_cli.cli.option_set import Changes, recipe_options, with_recipe_options
from pqkv_cli.errors import RecipeError, RunError
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.pipeline.state import STAGES, begin, finish, require_done, stage_inputs, stage_settings
from pqkv_cli.recipe import CodebookRecipe, Recipe, recipe_hash, settings
from pqkv_cli.recipe_files import override, recipe_schema
from pqkv_cli.setting import Setting, Stage
from tools.generate_docs import recipe_page, setting_schemas


class Codebooks(CodebookRecipe):
    patience: Annotated[int, Field(ge=1), Setting("Rounds without progress.", "fit-codebooks", "--patience")] = 3


class LargerRecipe(Recipe):
    """The recipe with one line more."""

    codebooks: Codebooks = Codebooks()


def test_one_line_makes_a_setting() -> None:
    recipe = LargerRecipe(name="a", model="b")
    assert stage_settings(recipe, "fit-codebooks")["codebooks.patience"] == 3
    assert all("codebooks.patience" not in stage_settings(recipe, stage) for stage in STAGES if stage != "fit-codebooks")
    described = setting_schemas(recipe_schema(LargerRecipe))["codebooks.patience"]
    assert described == {"default": 3, "minimum": 1, "type": "integer", "description": "Rounds without progress."}
    assert (
        "| `codebooks.patience` | `3` | whole number, at least 1 | Rounds without progress. | fit-codebooks |"
        in recipe_page(LargerRecipe)
    )
    assert override(recipe, {"codebooks.patience": 4}).model_dump()["codebooks"]["patience"] == 4
    with pytest.raises(RecipeError, match=r"codebooks.patience: found 0, expected at least 1"):
        override(recipe, {"codebooks.patience": 0})


def test_one_line_makes_an_option() -> None:
    given: list[Changes] = []

    def fit(changes: Changes) -> None:
        """Fit."""
        given.append(changes)

    app = typer.Typer()
    app.command()(with_recipe_options("fit-codebooks", fit, LargerRecipe))
    assert CliRunner().invoke(app, ["--patience", "5"]).exit_code == 0
    assert {name for name, value in given[0].items() if value is not None} == {"codebooks.patience"}
    assert given[0]["codebooks.patience"] == 5
    assert "Rounds without progress." in CliRunner().invoke(app, ["--help"]).stdout
    assert "codebooks.patience" not in recipe_options("export", LargerRecipe)


class LaterCodebooks(CodebookRecipe):
    patience: Annotated[int, Field(ge=1), Setting("Rounds without progress.", "fit-codebooks", came_later=True)] = 3


class LaterRecipe(Recipe):
    """The recipe with one line more, of which runs and artifacts from before say nothing."""

    codebooks: LaterCodebooks = LaterCodebooks()


class Silent:
    def note(self, text: str) -> None:
        pass

    def progress(self, label: str) -> Any:
        raise AssertionError("nothing here takes long")


def test_what_was_made_before_a_setting_stays_current(tmp_path: Path) -> None:
    before, usual = Recipe(name="a", model="b"), LaterRecipe(name="a", model="b")
    other = override(usual, {"codebooks.patience": 4})
    assert recipe_hash(usual) == recipe_hash(before) != recipe_hash(other)
    assert stage_settings(usual, "fit-codebooks") == stage_settings(before, "fit-codebooks")
    assert stage_settings(other, "fit-codebooks")["codebooks.patience"] == 4
    run = Run(tmp_path)
    for recipe, another, words in ((before, other, "from None to 4"), (other, usual, "from 4 to None")):
        for stage in ("calibrate", "fit-codebooks"):
            begin(run, stage, stage_inputs(run, recipe, stage, {}), None, Silent())
            finish(run, stage, {})
        assert require_done(run, recipe, "fit-codebooks").done
        with pytest.raises(RunError, match=f"codebooks.patience changed {words}"):
            require_done(run, another, "fit-codebooks")


def test_a_field_without_a_setting_is_refused() -> None:
    class Forgetful(Recipe):
        patience: int = 3

    with pytest.raises(TypeError, match="patience has 0 of `Setting` beside its type; expected one"):
        settings(Forgetful)


def test_every_setting_says_what_it_means_and_names_what_there_is() -> None:
    for name, setting in settings().items():
        assert setting.help.endswith("."), name
        assert set(setting.stages) <= set(get_args(Stage)), name
        assert set(setting.verbs) <= set(VERBS), name
        assert len(set(setting.verbs)) == len(setting.verbs), name


def test_what_no_stage_depends_on_is_known() -> None:
    idle = {name for name, setting in settings().items() if not setting.stages}
    assert idle == {"name", "device", "evaluation.gates", "generation.prompt", "generation.max_new_tokens"}
    by_content = {name for name, setting in settings().items() if setting.by_content}
    assert by_content == {"model", "calibration.data", "evaluation.data"}


# What runs of earlier versions were recorded with: another list, and all their stages would be done again.
RECORDED: dict[Stage, str] = {
    "calibrate": """seed dtype calibration.samples calibration.seq_len calibration.batch_size calibration.reservoir_size
        calibration.recall_share calibration.fisher""",
    "fit-codebooks": """seed codebooks.allocation codebooks.bits codebooks.profile codebooks.prototype_bits
        codebooks.key_space codebooks.iterations codebooks.refine""",
    "export": "cache.num_sinks cache.window_tokens",
    "eval": """seed dtype evaluation.tasks evaluation.modes evaluation.context evaluation.limit evaluation.prompts
        evaluation.max_new_tokens evaluation.stride""",
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_depend_on_what_runs_were_recorded_with(stage: Stage) -> None:
    assert set(stage_settings(Recipe(name="a", model="b"), stage)) == set(RECORDED[stage].split())


def test_verbs_take_the_options_of_their_settings() -> None:
    def spelt(verb: str) -> list[str]:
        found: dict[str, Any] = {name: each.annotation.__metadata__[0] for name, each in recipe_options(verb).items()}
        return [info.default for info in found.values()]

    assert spelt("export") == ["--num-sinks", "--window-tokens"]
    assert spelt("run") == ["--seed", "--device", "--dtype", "--data"]
    assert spelt("generate") == ["--seed", "--device", "--dtype", "--max-new-tokens"]
    assert spelt("bench") == ["--device", "--dtype"]
    assert spelt("verify") == []


def test_no_verb_lists_an_option_of_a_setting() -> None:
    from pqkv_cli.cli import options

    declared = {setting.option for setting in settings().values() if setting.option}
    by_hand = {
        each.default
        for annotation in vars(options).values()
        for each in getattr(annotation, "__metadata__", ())
        if hasattr(each, "param_decls")
    }
    assert by_hand & declared == set() and {"--bits", "--budget", "--json"} <= by_hand
