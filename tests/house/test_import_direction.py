"""Imports flow one way. The order is written once, here; a room may import any room of an earlier row and itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.house import circles, import_graph, imported, modules, parsed

# Rooms of one row are siblings and never import each other.
ROWS = (
    ("pqkv_kernels", "pqkv_kernels.errors", "pqkv_recipes"),
    ("pqkv_kernels.format",),
    ("pqkv_cli", "errors", "pqkv_kernels.reference"),
    ("specs", "rates", "setting", "files", "gates", "reporter"),
    ("recipe", "pqkv_kernels.cpu", "pqkv_kernels.gpu"),
    ("recipe_files", "pqkv_kernels.dispatch"),
    ("pqkv_kernels.bench",),
    ("pqkv_kernels.tuning",),
    ("hf",),
    ("quantizers", "models"),
    ("artifact", "cache"),
    ("runtime",),
    ("calibration",),
    ("fitting",),
    ("evaluation",),
    ("report",),
    ("pipeline",),
    ("baselines",),
    ("benchmarks",),
    ("cli",),
    ("demo", "__main__"),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}


def room_of(module: str) -> str:
    """Return the room that the module called `module` lies in."""
    parts = module.split(".")
    if parts[0] == "pqkv_recipes":
        return "pqkv_recipes"
    if parts[0] == "pqkv_kernels":
        precise = ".".join(parts[:2])
        return precise if precise in RANK else "pqkv_kernels"
    return parts[1] if len(parts) > 1 else "pqkv_cli"


def edges(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield ``(where, importing room, imported room)`` for every import that crosses rooms."""
    known = modules(root)
    for module, path in known.items():
        for line, target in imported(path, known):
            if room_of(module) != room_of(target):
                yield f"{path.relative_to(root)}:{line}", room_of(module), room_of(target)


def test_every_room_has_a_place(root: Path) -> None:
    rooms = {room_of(module) for module in modules(root)}
    assert rooms - set(RANK) == set()


def test_imports_flow_one_way(root: Path) -> None:
    wrong = [f"{where}: {room} imports {target}" for where, room, target in edges(root) if RANK[target] >= RANK[room]]
    assert wrong == []


def test_no_circle_of_files(root: Path) -> None:
    """Imports for type checkers alone count too: a circle of ideas is one, whoever reads it."""
    assert circles(import_graph(root)) == []


def test_nobody_imports_the_demo(root: Path) -> None:
    assert [
        where for where, room, target in edges(root) if target in ("demo", "cli") and room not in ("demo", "__main__")
    ] == []


def test_torch_free_rooms_import_no_torch(root: Path) -> None:
    free = {
        "pqkv_kernels.errors",
        "pqkv_kernels.format.layout",
        "pqkv_cli",
        "errors",
        "files",
        "specs",
        "rates",
        "setting",
        "gates",
        "recipe",
        "recipe_files",
        "cli",
    }
    wrong = []
    for module, path in modules(root).items():
        if room_of(module) in free or module in free:
            names = _top_level_names(path)
            wrong += [f"{module} imports {name}" for name in names & {"torch", "transformers", "numpy", "safetensors"}]
    assert wrong == []


@pytest.mark.parametrize("foreign", ["typer", "rich", "yaml", "datasets"])
def test_the_small_runtime_needs_no_front_end(root: Path, foreign: str) -> None:
    front = {
        "cli",
        "pipeline",
        "recipe",
        "recipe_files",
        "demo",
        "evaluation",
        "baselines",
        "benchmarks",
        "report",
        "__main__",
    }
    wrong = [m for m, path in modules(root).items() if room_of(m) not in front and foreign in _top_level_names(path)]
    assert wrong == []


def _top_level_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names
