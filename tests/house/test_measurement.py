"""The script that measures a checkout: on a small tree whose numbers are known, and on this one."""

import ast
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools import house

CACHE = """\"\"\"Holds things.\"\"\"

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pqkv_cli.room import layer

LIMIT, _OWN = 1, 2


class Cache:
    def add(self, first, *rest, last=None, **others) -> None:
        \"\"\"Add.

        Twice.
        \"\"\"
        return None
"""
LAYER = """\"\"\"Uses them.\"\"\"

import os

import pqkv_kernels.format
from pqkv_cli.room.cache import LIMIT


@triton.jit
def kernel(a, b, c, d, e, f, g, h, i, j, k):
    def inner():
        pass
"""
SCHEMA = {"properties": {"name": {}, "codebooks": {"properties": {"bits": {}, "profile": {}}}}}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "pqkv_cli/__init__.py": "",
        "pqkv_cli/room/__init__.py": "",
        "pqkv_cli/room/cache.py": CACHE,
        "pqkv_cli/room/layer.py": LAYER,
        "kernels/pqkv_kernels/__init__.py": "",
        "kernels/pqkv_kernels/format.py": "FORMAT = 1\n",
        "kernels/pqkv_kernels/src/simd.h": "// one\n// two\n",
        "recipes/__init__.py": "",
        "docs/cli/run.md": "| Option | Default |\n| `-o, --out DIR` |  |\n| `--out-of DIR` |  |\n",
        "docs/cli/eval.md": "| `-o, --out DIR` |  |\n",
        "docs/recipe.schema.json": json.dumps(SCHEMA),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_numbers_of_a_small_tree(tree: Path) -> None:
    numbers = house.measure(tree)
    assert numbers["circles"] == [["pqkv_cli.room.cache", "pqkv_cli.room.layer"]]
    assert numbers["one_importer_in_own_room"] == {
        "pqkv_cli.room.cache": "pqkv_cli.room.layer",
        "pqkv_cli.room.layer": "pqkv_cli.room.cache",
    }
    assert numbers["one_importer"] == 3  # the format, too: from another room
    assert (numbers["python"]["files"], numbers["cpp"]) == (7, {"files": 1, "lines": 2, "median": 2, "p90": 2, "most": 2})
    assert numbers["rooms"]["pqkv_cli.room"]["files"] == 3 and numbers["rooms"]["pqkv_kernels"]["files"] == 2
    assert numbers["parameters"]["most"] == 4 and numbers["many_parameters"] == {}  # a kernel may have any number
    assert numbers["function_lines"]["most"] == 2
    assert (numbers["options"], numbers["settings"]) == (
        ["--out", "--out-of"],
        ["codebooks.bits", "codebooks.profile", "name"],
    )
    assert numbers["public_names"] == 4  # Cache, LIMIT, kernel, FORMAT
    assert "circles of files" in house.table({"before": numbers, "now": numbers})


def test_a_circle_of_three_and_a_module_that_only_leads_to_it() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert house.circles(graph) == [("a", "b", "c")]


def test_length_without_the_docstring() -> None:
    tree = ast.parse(CACHE)
    assert [house.length(function) for function in house.functions(tree)] == [2]


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("from . import other\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"module\.py:1: relative import; expected the full name"):
        list(house.imported(path, ()))


def test_a_tree_without_pages_is_an_error(tree: Path) -> None:
    (tree / "docs" / "recipe.schema.json").unlink()
    with pytest.raises(ValueError, match=r"0 files named recipe\.schema\.json .* expected one: run make docs"):
        house.measure(tree)


def test_before_and_now(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    who = ("-c", "user.name=any", "-c", "user.email=any@example.org", "-c", "commit.gpgsign=false")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tree, check=True, capture_output=True)
    (tree / "pqkv_cli" / "room" / "layer.py").unlink()
    assert house.main(["--root", str(tree), "--before", "HEAD", "--json"]) == 0
    columns = json.loads(capsys.readouterr().out)
    assert [(name, numbers["python"]["files"]) for name, numbers in columns.items()] == [("HEAD", 7), ("now", 6)]
    with pytest.raises(SystemExit) as stopped:
        house.main(["--root", str(tree), "--before", "nowhere"])
    assert stopped.value.code == 1 and "expected a commit, a branch or a tag" in capsys.readouterr().err


def test_every_option_of_this_tree_is_counted(root: Path) -> None:
    from typer.main import get_command

    from pqkv_cli.cli.main import app

    group: Any = get_command(app)
    commands = [group.get_command(None, verb) for verb in group.list_commands(None)]
    spelt = {
        next(word for word in option.opts if word.startswith("--"))
        for command in commands
        for option in command.params
        if any(word.startswith("--") for word in option.opts) and not option.hidden
    }
    assert set(house.option_names(root)) == spelt


def test_every_setting_of_this_tree_is_counted(root: Path) -> None:
    from pqkv_cli.recipe_files import recipe_schema
    from tools.generate_docs import setting_schemas

    assert set(house.setting_names(root)) == set(setting_schemas(recipe_schema()))
