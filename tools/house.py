"""Measures a checkout: files, lines, functions, imports and options. Reads sources only and needs nothing but Python.

    python tools/house.py                     this checkout
    python tools/house.py --before v0.1.0     the same beside a git revision
    python tools/house.py --json              one JSON object

Counted are the Python and C++ files that the wheel holds. ``tests/house`` judges the tree with the functions of this file, so
that what a test calls a circle, a long function or an import is what this prints.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Each package of the wheel, and the folder of the checkout that it is made from.
PACKAGES = {"pqkv_cli": "pqkv_cli", "pqkv_kernels": "kernels/pqkv_kernels", "pqkv_recipes": "recipes"}

# More than so many parameters, and a call can only be read beside its definition.
MANY_PARAMETERS = 10

Function = ast.FunctionDef | ast.AsyncFunctionDef
Graph = Mapping[str, set[str]]

_OPTION_ROW = re.compile(r"^\| `[^`]*?(--[a-z][a-z-]*)[^`]*` \|", re.MULTILINE)


def modules(root: Path) -> dict[str, Path]:
    """Return the file of every module of the wheel by the module's dotted name, for the checkout `root`."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = (package, *path.relative_to(root / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def sources(root: Path) -> list[Path]:
    """Return the Python files of the wheel."""
    return sorted(modules(root).values())


def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, known: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import of ours, wherever in the file it stands, those for type checkers included.

    Parameters
    ----------
    path
        The importing file.
    known
        The names of all modules: ``from package import name`` imports the module ``package.name`` where there is one.

    Raises
    ------
    ValueError
        If an import is relative: where it leads to cannot be read from its line.
    """
    names = set(known)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: relative import; expected the full name of the module")
            if node.module and node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield node.lineno, full if full in names else node.module


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return, for every module of the wheel, the modules that its file imports."""
    known = modules(root)
    return {name: {target for _, target in imported(path, known) if target in known} for name, path in known.items()}


def circles(graph: Graph) -> list[tuple[str, ...]]:
    """Return every largest set of modules that import each other in a circle, sorted; none is as it should be."""
    reach = {name: _reached(graph, name) for name in graph}
    found = {
        tuple(sorted({name} | {other for other in reach[name] if name in reach[other]}))
        for name in graph
        if name in reach[name]
    }
    return sorted(found)


def _reached(graph: Graph, start: str) -> set[str]:
    """Return what `start` imports, directly or through others."""
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left.extend(graph[name])
    return seen


def room_of(module: str) -> str:
    """Return the folder that `module` lies in, at most one below its package: ``pqkv_cli.cache``, ``pqkv_kernels``."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


def one_importer(graph: Graph) -> dict[str, str]:
    """Return the modules that exactly one other imports, with that one. The file of a package itself is no module here."""
    importers: dict[str, set[str]] = {name: set() for name in graph}
    for name, targets in graph.items():
        for target in targets - {name}:
            importers[target].add(name)
    packages = {name.rpartition(".")[0] for name in graph}
    return {name: min(own) for name, own in sorted(importers.items()) if len(own) == 1 and name not in packages}


def beside_importer(graph: Graph) -> dict[str, str]:
    """Return the modules whose only importer lies in their own room, with that importer."""
    return {name: by for name, by in one_importer(graph).items() if room_of(name) == room_of(by) != name}


def functions(tree: ast.AST) -> Iterator[Function]:
    """Yield every function and method of `tree`, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_kernel(function: Function) -> bool:
    """Return whether `function` is written in Triton's language."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def length(function: Function) -> int:
    """Return the lines of `function` from ``def`` to the end; the docstring explains and does not count."""
    assert function.end_lineno is not None
    docstring = 0
    if ast.get_docstring(function) is not None:
        node = function.body[0]
        docstring = (node.end_lineno or 0) - node.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def num_parameters(function: Function) -> int:
    """Return how many parameters callers see: all but ``self`` and ``cls``; ``*args`` and ``**kwargs`` are one each."""
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    others = (given.vararg is not None) + (given.kwarg is not None)
    return len([name for position, name in enumerate(named) if position or name not in ("self", "cls")]) + others


def many_parameters(root: Path) -> dict[str, int]:
    """Return the functions outside Triton's language with more than `MANY_PARAMETERS`, as ``module.name``, with how many."""
    found = {}
    for module, path in modules(root).items():
        for function in functions(parsed(path)):
            count = num_parameters(function)
            if count > MANY_PARAMETERS and not is_kernel(function):
                found[f"{module}.{function.name}"] = count
    return found


def public_names(tree: ast.Module) -> list[str]:
    """Return what a module defines at its top level without a leading underscore."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return sorted({name for name in found if not name.startswith("_")})


def option_names(root: Path) -> list[str]:
    """Return the long options of all verbs, each once, from the generated pages of the command line.

    Raises
    ------
    ValueError
        If there are no such pages.
    """
    pages = sorted([*(root / "docs" / "cli").glob("*.md"), *(root / "docs").glob("cli.md")])
    found = {name for page in pages for name in _OPTION_ROW.findall(page.read_text(encoding="utf-8"))}
    if not found:
        raise ValueError(f"no table of options in {root / 'docs'}; expected the pages of the command line: run make docs")
    return sorted(found)


def setting_names(root: Path) -> list[str]:
    """Return the dotted names of all settings of a recipe, from its generated schema.

    Raises
    ------
    ValueError
        If there is not exactly one schema.
    """
    files = sorted((root / "docs").rglob("recipe.schema.json"))
    if len(files) != 1:
        raise ValueError(f"{len(files)} files named recipe.schema.json in {root / 'docs'}; expected one: run make docs")
    schema = json.loads(files[0].read_text(encoding="utf-8"))
    names: list[str] = []
    for name, field in schema["properties"].items():
        names += [f"{name}.{inner}" for inner in field["properties"]] if "properties" in field else [name]
    return sorted(names)


def equal_names(root: Path) -> dict[str, int]:
    """Return file names that several rooms have, with how often; ``__init__.py`` and ``__main__.py`` must be."""
    counts = Counter(path.name for path in sources(root) if not path.name.startswith("__"))
    return {name: count for name, count in sorted(counts.items()) if count > 1}


def num_lines(path: Path) -> int:
    """Return how many lines a file has."""
    return len(path.read_text(encoding="utf-8").splitlines())


def measure(root: Path) -> dict[str, Any]:
    """Return all numbers about the checkout `root`, as JSON would hold them."""
    known, graph = modules(root), import_graph(root)
    trees = {path: parsed(path) for path in known.values()}
    all_functions = [function for tree in trees.values() for function in functions(tree)]
    own = [function for function in all_functions if not is_kernel(function)]
    cpp = sorted(path for ending in ("cpp", "h") for path in (root / "kernels").rglob(f"*.{ending}"))
    return {
        "python": _sizes(known.values()),
        "cpp": _sizes(cpp),
        "tests": _sizes((root / "tests").rglob("*.py")),
        "function_lines": _spread([length(function) for function in own]),
        "kernel_function_lines": _spread([length(function) for function in all_functions if is_kernel(function)]),
        "parameters": _spread([num_parameters(function) for function in own]),
        "many_parameters": many_parameters(root),
        "docstring_share": _share(ast.get_docstring(function) is not None for function in all_functions),
        "return_annotation_share": _share(function.returns is not None for function in own),
        "public_names": sum(len(public_names(tree)) for tree in trees.values()),
        "circles": [list(circle) for circle in circles(graph)],
        "one_importer": len(one_importer(graph)),
        "one_importer_in_own_room": beside_importer(graph),
        "options": option_names(root),
        "settings": setting_names(root),
        "equal_file_names": equal_names(root),
        "rooms": {room: _sizes(paths) for room, paths in _rooms(known).items()},
    }


def _rooms(known: Mapping[str, Path]) -> dict[str, list[Path]]:
    rooms: dict[str, list[Path]] = {}
    for name, path in known.items():
        rooms.setdefault(room_of(f"{name}.__init__" if path.stem == "__init__" else name), []).append(path)
    return dict(sorted(rooms.items()))


def _sizes(paths: Iterable[Path]) -> dict[str, float]:
    counts = [num_lines(path) for path in paths]
    return {"files": len(counts), "lines": sum(counts), **_spread([count for count in counts if count])}


def _spread(values: Sequence[int]) -> dict[str, float]:
    """Return the median, the smallest number that 90 % do not exceed, and the most; zeros of nothing."""
    ordered = sorted(values) or [0]
    return {"median": median(ordered), "p90": ordered[-(-9 * len(ordered) // 10) - 1], "most": ordered[-1]}


def _share(answers: Iterable[bool]) -> float:
    given = list(answers)
    return round(sum(given) / len(given), 3) if given else 0.0


def rows(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Return what the table says of a checkout: a title and a value per row."""
    made = {}
    for title, key in (("Python", "python"), ("C++", "cpp"), ("tests", "tests")):
        made[f"{title}: files"], made[f"{title}: lines"] = (f"{numbers[key][what]:,}" for what in ("files", "lines"))
    made["lines of a Python file: median, p90, most"] = _spread_words(numbers["python"])
    made["lines of a function: median, p90, most"] = _spread_words(numbers["function_lines"])
    made["lines of a Triton function: median, p90, most"] = _spread_words(numbers["kernel_function_lines"])
    made["parameters outside Triton: median, p90, most"] = _spread_words(numbers["parameters"])
    made[f"... functions with more than {MANY_PARAMETERS}"] = str(len(numbers["many_parameters"]))
    made["functions with a docstring"] = f"{numbers['docstring_share']:.0%}"
    made["functions with a return annotation"] = f"{numbers['return_annotation_share']:.0%}"
    made["public names"] = f"{numbers['public_names']:,}"
    made["circles of files"] = str(len(numbers["circles"]))
    made["files with one importer"] = str(numbers["one_importer"])
    made["... that lies in their own room"] = str(len(numbers["one_importer_in_own_room"]))
    made["options of the command line"] = str(len(numbers["options"]))
    made["settings of a recipe"] = str(len(numbers["settings"]))
    made["file names that several rooms have"] = str(len(numbers["equal_file_names"]))
    made |= {f"room {room}: files, lines": f"{size['files']}, {size['lines']:,}" for room, size in numbers["rooms"].items()}
    return made


def _spread_words(spread: Mapping[str, float]) -> str:
    return ", ".join(f"{spread[which]:g}" for which in ("median", "p90", "most"))


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a text table with a column per checkout, then the lists of the last one."""
    filled = {title: rows(numbers) for title, numbers in columns.items()}
    names = list(dict.fromkeys(name for column in filled.values() for name in column))
    width = max(map(len, names))
    widths = {title: max(len(title), *map(len, column.values())) for title, column in filled.items()}
    lines = [" " * width + "".join(f"  {title:>{widths[title]}}" for title in filled)]
    for name in names:
        lines.append(f"{name:<{width}}" + "".join(f"  {filled[title].get(name, '-'):>{widths[title]}}" for title in filled))
    last = list(columns.values())[-1]
    lists = {
        "circles": [" -> ".join(circle) for circle in last["circles"]],
        "one importer, in their own room": [f"{name} <- {by}" for name, by in last["one_importer_in_own_room"].items()],
        f"more than {MANY_PARAMETERS} parameters": [f"{name} ({count})" for name, count in last["many_parameters"].items()],
        "file names that several rooms have": [f"{name} x{count}" for name, count in last["equal_file_names"].items()],
    }
    for title, entries in lists.items():
        lines += ["", f"{title}:", *(f"  {entry}" for entry in entries or ["none"])]
    return "\n".join(lines)


def measure_revision(root: Path, revision: str) -> dict[str, Any]:
    """Return all numbers about a git revision of the repository `root`.

    Raises
    ------
    ValueError
        If git does not know it.
    """
    done = subprocess.run(["git", "archive", "--format=tar", revision], cwd=root, capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"git has no tree of {revision!r} ({reason}); expected a commit, a branch or a tag of this repository")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 brought it
        archive.extractall(folder, **safe)
        return measure(Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, print the numbers and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure a checkout: files, lines, functions, imports and options.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout; by default the one that holds this file")
    parser.add_argument("--before", metavar="REV", help="a git revision to put beside it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    columns = {}
    try:
        if options.before:
            columns[options.before] = measure_revision(options.root, options.before)
        columns["now"] = measure(options.root)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    sys.stdout.write((json.dumps(columns, indent=1) if options.json else table(columns)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
