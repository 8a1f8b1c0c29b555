import ast
import re
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_KERNEL_LINES = 600
MAX_FUNCTION_LINES = 40


def sources(root: Path) -> list[Path]:
    return sorted([*(root / "pqkv_cli").rglob("*.py"), *(root / "kernels").rglob("*.py"), *(root / "recipes").rglob("*.py")])


def speaks(root: Path, path: Path) -> bool:
    """Return whether `path` may print, read the environment and exit."""
    relative = path.relative_to(root).as_posix()
    return relative.startswith("pqkv_cli/cli/") or relative in ("pqkv_cli/__main__.py", "pqkv_cli/demo/train.py")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code from ``def`` to the end; the docstring explains and does not count."""
    assert function.end_lineno is not None
    docstring = 0
    if ast.get_docstring(function) is not None:
        node = function.body[0]
        docstring = (node.end_lineno or 0) - node.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_files_are_short(root: Path) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    long = {
        str(path.relative_to(root)): n
        for path, n in lengths.items()
        if n > (MAX_KERNEL_LINES if path.name.endswith("_kernels.py") else MAX_FILE_LINES)
    }
    assert long == {}


def test_functions_are_short(root: Path) -> None:
    long = [
        f"{path.relative_to(root)}:{function.lineno} {function.name}: {length(function)}"
        for path in sources(root)
        for function in functions(ast.parse(path.read_text(encoding="utf-8")))
        if length(function) > MAX_FUNCTION_LINES and not is_kernel(function)
    ]
    assert long == []


def test_files_say_what_they_know(root: Path) -> None:
    empty = [
        path for path in sources(root) if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert [str(path.relative_to(root)) for path in empty] == []


def test_only_the_command_line_talks_to_the_world(root: Path) -> None:
    forbidden = re.compile(r"\bprint\(|\bos\.environ\b|\bos\.getenv\b|\bsys\.argv\b|\bsys\.exit\b|\bbreakpoint\(")
    assert _lines(root, forbidden, [path for path in sources(root) if not speaks(root, path)]) == []


def test_nothing_unpickles(root: Path) -> None:
    calls = r"\b(torch\.load|torch\.save|yaml\.load|yaml\.unsafe_load|marshal\.loads?)\("
    forbidden = re.compile(rf"{calls}|\b(import|from) pickle\b|trust_remote_code\s*=\s*True")
    assert _lines(root, forbidden, sources(root)) == []


def test_nothing_is_excused_wholesale(root: Path) -> None:
    forbidden = re.compile(r"# type: ignore(?!\[)|# noqa(?!:)|except:\s*$|\bTODO\b|\bFIXME\b|\bXXX\b")
    assert _lines(root, forbidden, sources(root)) == []


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
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in loaders:
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if given.get("trust_remote_code") not in ("False", "NO_CODE"):
                    wrong.append(f"{path.relative_to(root)}:{node.lineno}")
    assert wrong == [], "say trust_remote_code=NO_CODE, or transformers asks on a terminal whether to run the code"
