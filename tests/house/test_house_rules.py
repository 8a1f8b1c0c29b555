import ast
import re
from pathlib import Path

from tools.house import functions, is_kernel, length, many_parameters, num_lines, parsed, sources

MAX_FILE_LINES = 400
MAX_KERNEL_LINES = 600
MAX_FUNCTION_LINES = 40


def with_tools(root: Path) -> list[Path]:
    return [*sources(root), *sorted((root / "tools").rglob("*.py"))]


def speaks(root: Path, path: Path) -> bool:
    """Return whether `path` may print, read the environment and exit."""
    relative = path.relative_to(root).as_posix()
    return relative.startswith("pqkv_cli/cli/") or relative == "pqkv_cli/__main__.py"


def test_files_are_short(root: Path) -> None:
    lengths = {path: num_lines(path) for path in with_tools(root)}
    long = {
        str(path.relative_to(root)): n
        for path, n in lengths.items()
        if n > (MAX_KERNEL_LINES if path.name.endswith("_kernels.py") else MAX_FILE_LINES)
    }
    assert long == {}


def test_functions_are_short(root: Path) -> None:
    long = [
        f"{path.relative_to(root)}:{function.lineno} {function.name}: {length(function)}"
        for path in with_tools(root)
        for function in functions(parsed(path))
        if length(function) > MAX_FUNCTION_LINES and not is_kernel(function)
    ]
    assert long == []


def test_functions_take_few_parameters(root: Path) -> None:
    assert many_parameters(root) == {}


def test_files_say_what_they_know(root: Path) -> None:
    empty = [path for path in with_tools(root) if path.stat().st_size and not ast.get_docstring(parsed(path))]
    assert [str(path.relative_to(root)) for path in empty] == []


def test_only_the_command_line_talks_to_the_world(root: Path) -> None:
    forbidden = re.compile(r"\bprint\(|\bos\.environ\b|\bos\.getenv\b|\bsys\.argv\b|\bsys\.exit\b|\bbreakpoint\(")
    assert _lines(root, forbidden, [path for path in sources(root) if not speaks(root, path)]) == []


def test_nothing_unpickles(root: Path) -> None:
    calls = r"\b(torch\.load|torch\.save|yaml\.load|yaml\.unsafe_load|marshal\.loads?)\("
    forbidden = re.compile(rf"{calls}|\b(import|from) pickle\b|trust_remote_code\s*=\s*True")
    assert _lines(root, forbidden, with_tools(root)) == []


def test_nothing_is_excused_wholesale(root: Path) -> None:
    forbidden = re.compile(r"# type: ignore(?!\[)|# noqa(?!:)|except:\s*$|\bTODO\b|\bFIXME\b|\bXXX\b")
    assert _lines(root, forbidden, with_tools(root)) == []


def _lines(root: Path, pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_loader_may_run_code_of_a_repository(root: Path) -> None:
    loaders = {"from_pretrained", "load_dataset", "HFLM"}
    wrong = []
    for path in with_tools(root):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in loaders:
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if given.get("trust_remote_code") not in ("False", "NO_CODE"):
                    wrong.append(f"{path.relative_to(root)}:{node.lineno}")
    assert wrong == [], "say trust_remote_code=NO_CODE, or transformers asks on a terminal whether to run the code"
