"""Imports flow one way. The order is written once, here; a room may import any room of an earlier row and itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Rooms of one row are siblings and never import each other.
ROWS = (
    ("pqkv_kernels.errors",),
    ("pqkv_kernels.layout",),
    ("pqkv_cli", "errors"),
    ("specs", "rates", "recipe_faults", "recipe_sources", "strict_yaml", "files", "gates"),
    ("recipe", "pqkv_kernels"),
    ("hf",),
    ("quantizers", "models"),
    ("calibration", "artifact", "cache"),
    ("fitting", "runtime"),
    ("evaluation",),
    ("report",),
    ("pipeline",),
    ("cli",),
    ("demo", "__main__"),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}


def room_of(module: str) -> str:
    """Return the room that the module called `module` lies in."""
    parts = module.split(".")
    if parts[0] == "pqkv_kernels":
        precise = ".".join(parts[:2])
        return precise if precise in RANK else "pqkv_kernels"
    return parts[1] if len(parts) > 1 else "pqkv_cli"


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    for base, package in ((root, "pqkv_cli"), (root / "kernels", "pqkv_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            yield ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"), path


def imported(path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import of ours, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("pqkv_"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module and node.module.startswith("pqkv_"):
                # `from package import module` imports the module.
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield node.lineno, full if full in known else node.module


def edges(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield ``(where, importing room, imported room)`` for every import that crosses rooms."""
    all_modules = dict(modules(root))
    for module, path in all_modules.items():
        for line, target in imported(path, set(all_modules)):
            if room_of(module) != room_of(target):
                yield f"{path.relative_to(root)}:{line}", room_of(module), room_of(target)


def test_every_room_has_a_place(root: Path) -> None:
    rooms = {room_of(module) for module, _ in modules(root)}
    assert rooms - set(RANK) == set()


def test_imports_flow_one_way(root: Path) -> None:
    wrong = [f"{where}: {room} imports {target}" for where, room, target in edges(root) if RANK[target] >= RANK[room]]
    assert wrong == []


def test_nobody_imports_the_demo(root: Path) -> None:
    assert [
        where for where, room, target in edges(root) if target in ("demo", "cli") and room not in ("demo", "__main__")
    ] == []


def test_torch_free_rooms_import_no_torch(root: Path) -> None:
    free = {
        "pqkv_kernels.errors",
        "pqkv_kernels.layout",
        "pqkv_cli",
        "errors",
        "files",
        "specs",
        "rates",
        "recipe_faults",
        "recipe_sources",
        "strict_yaml",
        "gates",
        "recipe",
        "cli",
    }
    wrong = []
    for module, path in modules(root):
        if room_of(module) in free:
            names = _top_level_names(path)
            wrong += [f"{module} imports {name}" for name in names & {"torch", "transformers", "numpy", "safetensors"}]
    assert wrong == []


@pytest.mark.parametrize("foreign", ["typer", "rich", "pydantic", "yaml", "datasets"])
def test_the_small_runtime_needs_no_front_end(root: Path, foreign: str) -> None:
    front = {
        "cli",
        "pipeline",
        "recipe",
        "recipe_faults",
        "recipe_sources",
        "strict_yaml",
        "demo",
        "evaluation",
        "report",
        "__main__",
    }
    wrong = [m for m, path in modules(root) if room_of(m) not in front and foreign in _top_level_names(path)]
    assert wrong == []


def _top_level_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names
