"""Documentation that runs: its commands are understood, cheap ones are executed, its generated pages are current."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pqkv_cli import errors
from pqkv_cli.cli.main import VERBS, app
from pqkv_cli.errors import PqkvError
from pqkv_cli.gates import parse_gates
from pqkv_cli.recipe_files import parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Lab notes record the commands of their day, which need not be understood any more; their links must still lead somewhere.
NOTES = sorted((ROOT / "notes").glob("*.md"))
# What stands for something else in an example, or leaves something out.
ELISIONS = ("...", "[", "VERB", "…")


def code_lines(page: Path) -> Iterator[str]:
    """Yield the lines of code blocks, fenced or indented."""
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands(line: str) -> Iterator[list[str]]:
    """Yield the words after ``pqkv`` of every command on a line of a shell or of a workflow."""
    for part in re.split(r"&&|\|\|?|;", re.sub(r"\s#.*$", "", line)):
        found = re.match(r"\s*(?:- )?(?:run:\s*)?(?:\.venv/bin/)?pqkv (.+)", part)
        if found:
            yield shlex.split(found[1])


def blocks(page: Path) -> list[list[str]]:
    return [words for line in code_lines(page) for words in commands(line)]


def spans(page: Path) -> list[list[str]]:
    """Return the commands that stand in running text."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"`pqkv ([^`]+)`", text)
    return [shlex.split(each) for each in found if not any(mark in each for mark in ELISIONS)]


def understand(words: list[str]) -> None:
    """Read `words` as the command does, and do nothing."""
    group: Any = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert words[0] in {name for param in group.params for name in param.opts}, words
        return
    assert words[0] in VERBS, words
    words = [word for word in words if word != "--help"]
    if "..." not in words and not (
        len(words) > 1 and words[0] == "recipes" and words[1] not in ("list", "show", "new", "schema")
    ):
        group.get_command(None, words[0]).make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_command_is_understood(page: Path) -> None:
    for words in [*blocks(page), *spans(page)]:
        try:
            understand(words)
        except Exception as error:
            raise AssertionError(f"{page.name}: pqkv {' '.join(words)}: {error}") from error


def test_commands_are_found() -> None:
    assert len(blocks(ROOT / "README.md")) > 15
    assert ["verify", "runs/mine", "--against", "meta-llama/Llama-3.1-8B", "--json", "verify.json"] in blocks(
        ROOT / "docs" / "ci.md"
    )
    with pytest.raises(Exception, match="smaples"):
        understand(["calibrate", "org/model", "--smaples", "3"])


# Commands of the README that take minutes, or need data of others or a hub; they are understood all the same.
EXPENSIVE = ("longbench", "gsm8k", "demo", "runs/demo", "--refine", "--push-to-hub")
# What makes the others quick.
QUICK = {
    "calibrate": ["--samples", "20", "--seq-len", "64", "--batch-size", "4"],
    "fit-codebooks": ["--iterations", "2"],
    "eval": ["--limit", "2", "--context", "256"],  # long enough that tokens are read as codes
    "bench": ["--context", "64", "--repeats", "1"],
    "generate": ["--max-new-tokens", "4"],
}


def test_the_readme_is_executed(
    pqkv: Callable, exported: Path, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copy(texts[0], tmp_path / "text.txt")
    shutil.copy(texts[1], tmp_path / "other.txt")
    for name in ("old-run", "new-run"):
        shutil.copytree(exported, tmp_path / name)
    stands_for = {"meta-llama/Llama-3.1-8B": str(tiny_model), "org/model": str(tiny_model)}
    executed = set()
    for words in blocks(ROOT / "README.md"):
        if any(each in words for each in EXPENSIVE) or any(each.startswith("longbench") for each in words):
            continue
        line = [stands_for.get(word, word) for word in words]
        if "--peers" in line:
            line[line.index("--peers") + 1] = "rtn:4"
        if line[0] == "eval" and "--data" not in line:
            line += ["--data", "other.txt"]
        answer = pqkv(*line, *QUICK.get(line[0], []))
        fine = (0, 1) if line[0] == "doctor" else (0,)  # that is about this machine
        assert answer.code in fine, f"pqkv {' '.join(line)}: {answer.err}"
        executed.add(line[0])
    assert {
        "calibrate",
        "fit-codebooks",
        "export",
        "eval",
        "generate",
        "inspect",
        "verify",
        "diff",
        "report",
        "bench",
    } <= executed
    python = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert python is not None
    code = python[1].replace("path/to/model", str(tiny_model)).replace("max_new_tokens=40", "max_new_tokens=4")
    exec(compile(code, "README.md", "exec"), {})


def test_generated_pages_are_current() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from generate_docs import pages
    finally:
        sys.path.remove(str(ROOT / "tools"))
    made = pages()
    stale = [
        str(path.relative_to(ROOT))
        for path, text in made.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run: make docs"
    assert {path.stem for path in made if path.parent.name == "cli"} == {*VERBS, "README"}
    surplus = {path.name for path in (ROOT / "docs" / "cli").glob("*.md")} - {path.name for path in made}
    assert surplus == set()


def test_every_page_is_in_the_index_and_every_link_leads_somewhere() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set(), "add a row to docs/README.md"
    notes = (ROOT / "notes" / "README.md").read_text(encoding="utf-8")
    assert {note.name for note in NOTES if f"({note.name})" not in notes} == {"README.md"}, "add a row to notes/README.md"
    dead = []
    for page in [*PAGES, *NOTES]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://", "#")) and not (page.parent / link.split("#")[0]).exists():
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    assert dead == []


def test_the_pipeline_example_is_sound() -> None:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    recipe, workflow = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(parse_gates(parse_recipe(recipe, "docs/ci.md").evaluation.gates)) == 2
    steps = yaml.safe_load(workflow)["jobs"]["build"]["steps"]
    used = {words[0] for step in steps for words in commands(f"run: {step.get('run', '')}")}
    assert {"doctor", "run", "verify", "diff", "report"} <= used
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "docs/ci.md", "exec")


def test_every_error_is_in_the_troubleshooting() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d) \|", text, re.MULTILINE))
    known = {name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, PqkvError)}
    assert rows == {name: str(each.exit_code) for name, each in known.items()}
