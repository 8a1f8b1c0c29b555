"""What every verb really writes as JSON, against the documented schema; every key that it writes is documented."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from pqkv_cli.cli.main import VERBS
from pqkv_cli.recipe_files import recipe_schema

DOCS = Path(__file__).parents[2] / "docs"
FILES = {file.name: file for file in sorted((DOCS / "schemas").glob("*.schema.json"))}


def closed(schema: Any) -> Any:
    """Return `schema` with every object that names its keys refusing others, unless it says that there may be more."""
    if isinstance(schema, dict):
        made = {key: closed(value) for key, value in schema.items()}
        if "properties" in made and isinstance(made["properties"], dict):
            made.setdefault("additionalProperties", False)
        return made
    return [closed(each) for each in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in FILES.values()}


@pytest.fixture(scope="module")
def check(schemas: dict[str, Any]) -> Callable[[Any], str]:
    """Return a function that holds a document against the schema it names, and returns the name."""
    recipe = recipe_schema()  # the file is tested elsewhere to be the same
    resources = [
        (f"schemas/{name}", Resource.from_contents(closed(schema) | {"$id": f"schemas/{name}"}))
        for name, schema in schemas.items()
    ]
    registry: Any = Registry().with_resources([*resources, ("recipe.schema.json", Resource.from_contents(recipe))])

    def hold(document: Any) -> str:
        name = document["schema"]
        root = {"$ref": f"schemas/{name.replace('/', '-')}.schema.json"}
        errors = list(Draft202012Validator(root, registry=registry).iter_errors(document))
        assert [f"{name} {error.json_path}: {error.message[:200]}" for error in errors] == []
        return str(name)

    return hold


@pytest.fixture(scope="module")
def places(
    exported: Path, tiny_model: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("json")
    recipe = root / "mine.yaml"
    recipe.write_text(
        f"name: mine\nmodel: {tiny_model}\ncalibration: {{data: {texts[0]}, samples: 20, seq_len: 64}}\n"
        "codebooks: {iterations: 2}\n"
        f"evaluation: {{tasks: [perplexity], data: {texts[1]}, limit: 2, gates: ['perplexity.kl_bits<=0']}}\n"
        "generation: {prompt: once upon, max_new_tokens: 4}\n"
    )
    run = Path(shutil.copytree(exported, root / "RUN"))
    return {"run": run, "recipe": recipe, "model": tiny_model, "text": texts[1], "other": root / "other"}


# A line per form of output: the words, the exit code, the schemas that the documents name.
LINES = [
    ("calibrate {recipe} -o {other}", 0, {"pqkv.stage/1"}),
    ("fit-codebooks {other} --bits 2", 0, {"pqkv.stage/1"}),
    ("export {other}", 0, {"pqkv.stage/1"}),
    ("run {recipe} -o {other}-run", 3, {"pqkv.run/1"}),
    ("eval {run} --task perplexity --data {text} --mode all --limit 2", 0, {"pqkv.result/1"}),
    ("eval {run} --task passkey --data {text} --context 128 --limit 1", 0, {"pqkv.result/1"}),
    ("eval {run} --task kld --generated --data {text} --context 32 --max-new-tokens 8 --limit 1", 0, {"pqkv.result/1"}),
    ("eval {run} --data {text} --context 64 --limit 2 --peers rtn:4", 0, {"pqkv.result/1"}),
    ("eval {run} --data {text} --context 64 --limit 2 --peers rtn:4 --inject-outliers 16", 0, {"pqkv.outliers/1"}),
    ("generate {run} once --max-new-tokens 2", 0, {"pqkv.generation/1"}),
    ("prefix save {run} --text {recipe} --store {other}-store", 0, {"pqkv.prefix/1"}),
    ("prefix list --store {other}-store", 0, {"pqkv.prefixes/1"}),
    ("prefix verify --store {other}-store", 0, {"pqkv.prefix-check/1"}),
    ("generate {run} once --max-new-tokens 2 --prefix-store {other}-store --save-prefix", 0, {"pqkv.generation/1"}),
    ("bench {run} --context 64 --repeats 1", 0, {"pqkv.bench/1"}),
    ("bench --shape small --context 64 --batch 1 --repeats 1 --memory 2MB --device cpu", 0, {"pqkv.bench-shapes/1"}),
    ("inspect {model} --gpu 1GB", 0, {"pqkv.inspect/1"}),
    ("inspect {run}", 0, {"pqkv.inspect/1"}),
    ("inspect {run}/artifact", 0, {"pqkv.inspect/1"}),
    ("verify {run}", 0, {"pqkv.verify/1"}),
    ("verify {run} --against demo", 1, {"pqkv.verify/1"}),
    ("diff {run} {run}/artifact", 0, {"pqkv.diff/1"}),
    ("doctor", None, {"pqkv.doctor/1"}),
    ("report {run}", 0, {"pqkv.report/1"}),
    ("recipes", 0, {"pqkv.recipes/1"}),
    ("recipes show demo", 0, {"pqkv.recipe/1"}),
    ("recipes new {model}", 0, {"pqkv.recipe/1"}),
]


@pytest.mark.parametrize(("line", "code", "names"), LINES, ids=[line for line, _, _ in LINES])
def test_json_is_what_the_schema_says(
    line: str, code: int | None, names: set[str], pqkv: Callable, places: dict[str, Path], check: Callable[[Any], str]
) -> None:
    answer = pqkv(*line.format_map(places).split(), "--json", "-", "--log-format", "json")
    assert code is None or answer.code == code, answer.err
    found = answer.json
    assert {check(document) for document in (found if isinstance(found, list) else [found])} == names
    assert {check(json.loads(each)) for each in answer.err.splitlines()} <= {"pqkv.log/1"}


def test_every_verb_has_a_line() -> None:
    assert {line.split()[0] for line, _, _ in LINES} == set(VERBS)


def test_every_schema_is_sound_and_tested(schemas: dict[str, Any]) -> None:
    for name, schema in schemas.items():
        Draft202012Validator.check_schema(schema)
        assert name == schema["$id"] == f"{schema['title'].replace('/', '-')}.schema.json"
    tested = {name for _, _, names in LINES for name in names} | {"pqkv.log/1", "pqkv.verdict/1"}
    assert {schema["title"] for schema in schemas.values()} == tested


def test_every_key_has_a_meaning(schemas: dict[str, Any]) -> None:
    def bare(schema: Any, where: str) -> Iterator[str]:
        if isinstance(schema, dict):
            for key, each in schema.get("properties", {}).items():
                if "description" not in each:
                    yield f"{where}.{key}"
            for key, each in schema.items():
                yield from bare(each, f"{where}/{key}")
        elif isinstance(schema, list):
            for each in schema:
                yield from bare(each, where)

    assert [where for name, schema in schemas.items() for where in bare(schema, name)] == []


def test_the_last_line_with_gates(pqkv: Callable, places: dict[str, Path], check: Callable[[Any], str]) -> None:
    words = "eval {run} --task perplexity --data {text} --mode all --limit 2 --max-kld 9".format_map(places).split()
    assert check(json.loads(pqkv(*words).out.splitlines()[-1])) == "pqkv.verdict/1"


def test_a_failure_is_one_object_on_stderr(pqkv: Callable, check: Callable[[Any], str]) -> None:
    for words, code, kind in (
        (["eval", "nowhere"], 2, "UsageError"),
        (["calibrate", "./nowhere"], 1, "ModelError"),
        (["export", "--num-sinks", "many"], 2, "UsageError"),
        (["evl"], 2, "UsageError"),
    ):
        answer = pqkv(*words, "--json", "-", "--log-format=json")
        assert (answer.code, answer.out) == (code, "")
        record = json.loads(answer.err)
        assert check(record) == "pqkv.log/1"
        assert (record["level"], record["event"], record["exit_code"], record["kind"]) == ("error", "error", code, kind)
        assert not record["message"].startswith("error")
    record = json.loads(pqkv("eval", "nowhere", "--debug", "--log-format", "json").err)
    assert record["traceback"].startswith("Traceback")
