from pathlib import Path

import pytest

from pqkv_cli.errors import RecipeError, UsageError
from pqkv_cli.recipe import Recipe, recipe_hash
from pqkv_cli.recipe_files import dump_recipe, load_recipe, named_recipe, override, parse_recipe, recipe_names

GOOD = "name: mine\nmodel: org/name\n"


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name
    assert parse_recipe(dump_recipe(recipe), "dump") == recipe


def test_defaults() -> None:
    recipe = parse_recipe(GOOD, "test")
    assert (recipe.calibration.samples, recipe.calibration.seq_len, recipe.calibration.reservoir_size) == (32, 1024, 24576)
    assert (recipe.cache.num_sinks, recipe.cache.window_tokens, recipe.codebooks.bits) == (4, 64, 4)


@pytest.mark.parametrize(
    ("extra", "phrases"),
    [
        ("calibratoin: {}", ["calibratoin: unknown key (did you mean 'calibration'?)"]),
        (
            "calibration: {smaples: 3}",
            ["calibration.smaples: unknown key (did you mean 'samples'?)", "known are data"],
        ),
        ("codebooks: {bits: 6}", ["codebooks.bits: found 6; expected 0.5 to 5"]),
        (
            "codebooks: {allocation: uniform, bits: 2.2}",
            ["codebooks.bits: found 2.2; expected one of 5, 4.5, 4", "where the allocation is uniform"],
        ),
        ("codebooks: {bits: '4'}", ["codebooks.bits: found '4'"]),
        (
            "codebooks: {key_space: measured}",
            ["codebooks.key_space: found 'measured', which was removed", "every layer chose pre_rope; expected 'pre_rope'"],
        ),
        ("codebooks: {key_space: pre-rope}", ["key_space: found 'pre-rope' (did you mean 'pre_rope'?)", "or 'post_rope'"]),
        ("dtype: flaot16", ["dtype: found 'flaot16' (did you mean 'float16'?)"]),
        ("device: gpu", ["device: found 'gpu'"]),
        ("seed: -1", ["seed: found -1, expected at least 0"]),
        ("seed: 1.5", ["seed: found 1.5, expected a whole number"]),
        ("calibration: {samples: 1}", ["calibration.samples: found 1, expected at least 2"]),
        ("generation: {prompt: no}", ["generation.prompt: found False, expected text"]),
        ("evaluation: {tasks: [pass key]}", ["evaluation.tasks.0: found 'pass key', expected text that matches"]),
        ("evaluation: {tasks: []}", ["evaluation.tasks: found [], expected at least one entry"]),
        ("evaluation: perplexity", ["evaluation: found 'perplexity', expected a section with keys"]),
        ("seed: 1\nseed: 2", ["seed: found twice, on lines 3 and 4"]),
        ("cache: {num_sinks: 1, num_sinks: 2}", ["num_sinks: found twice"]),
        ("cache: [", ["not readable as YAML"]),
        ("cache: \0", ["not readable as YAML: unacceptable character"]),
        ("cache: 2001-99-99", ["not readable as YAML: month must be in 1..12"]),
        ("cache: " + "[" * 5000, ["not readable as YAML: maximum recursion depth"]),
        ("cache: !!python/object:os.system {}", ["not readable as YAML"]),
    ],
)
def test_faults_say_where_what_and_what_was_expected(extra: str, phrases: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD + extra, "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml is not a valid recipe")
    assert [phrase for phrase in phrases if phrase not in message] == []
    assert caught.value.exit_code == 2


def test_all_faults_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe("nme: x\nseed: -1\nseed: -2\ncache: {num_sinks: -1}\n", "mine.yaml")
    assert len(caught.value.faults) == 6  # two missing keys, one unknown, one twice, two out of range


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_text_without_keys_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected keys with values"):
        parse_recipe(text, "mine.yaml")


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        named_recipe("demo").seed = 3  # type: ignore[misc]


def test_override_changes_what_is_given_only() -> None:
    usual = named_recipe("demo").calibration.samples
    recipe = override(named_recipe("demo"), {"codebooks.bits": 2, "calibration.samples": None, "device": "cpu"})
    assert (recipe.codebooks.bits, recipe.calibration.samples, recipe.device) == (2, usual, "cpu")


def test_a_rate_is_the_same_however_it_is_written() -> None:
    recipe = named_recipe("demo")
    assert recipe_hash(override(recipe, {"codebooks.bits": 4.0})) == recipe_hash(recipe)
    assert "bits: 4\n" in dump_recipe(recipe) and "bits: 2.5\n" in dump_recipe(override(recipe, {"codebooks.bits": 2.5}))


@pytest.mark.parametrize("changes", [{"codebooks.bits": 7}, {"nothing.here": 1}, {"calibration.samplse": 3}])
def test_override_is_as_strict_as_a_file(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="this command line is not a valid recipe"):
        override(named_recipe("demo"), changes, "this command line")


def test_the_hash_is_of_what_decides_an_artifact() -> None:
    recipe = parse_recipe(GOOD, "test")
    same = {"model": "other/model", "name": "other", "device": "cuda:1", "calibration.data": "/a/b.txt", "evaluation.limit": 3}
    other = {"seed": 1, "codebooks.bits": 2, "calibration.samples": 3, "cache.window_tokens": 1, "dtype": "float32"}
    assert {recipe_hash(override(recipe, {key: value})) for key, value in same.items()} == {recipe_hash(recipe)}
    assert len({recipe_hash(override(recipe, {key: value})) for key, value in other.items()} | {recipe_hash(recipe)}) == 6


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"there is no recipe 'lama-3-8b' \(did you mean 'llama-3-8b'\?\)"):
        named_recipe("lama-3-8b")


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for name in ("latin.yaml", "absent.yaml"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_recipe(tmp_path / name)


def test_dump_states_every_setting() -> None:
    text = dump_recipe(Recipe(name="a", model="b"))
    assert [
        key for key in ("reservoir_size", "window_tokens", "iterations", "max_new_tokens", "modes") if key not in text
    ] == []


def test_recipes_and_evaluation_know_the_same_names() -> None:
    from typing import get_args

    from pqkv_cli.evaluation.settings import MODES
    from pqkv_cli.evaluation.tasks import TASKS
    from pqkv_cli.recipe import ModeName, TaskName

    assert set(get_args(TaskName)) == set(TASKS)
    assert set(get_args(ModeName)) == set(MODES)
