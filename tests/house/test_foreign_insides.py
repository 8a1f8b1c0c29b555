"""What is inside transformers is known in one room, where every fact of it has a test (``tests/hf/test_contracts.py``)."""

import ast
import re
from pathlib import Path

from tools.house import parsed, sources

# Names that its documentation does not promise, and the two names of the cache, of which one is always wrong.
INSIDES = re.compile(
    r"(?<!set)_attn_implementation|ALL_ATTENTION_FUNCTIONS|_global_mapping|_MAPPING_NAMES|eager_attention_forward|past_key_values"
)


def other_rooms(root: Path) -> list[Path]:
    room = root / "pqkv_cli" / "hf"
    return [path for path in sources(root) if room not in path.parents]


def test_other_rooms_take_from_transformers_what_it_exports(root: Path) -> None:
    wrong = []
    for path in other_rooms(root):
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            wrong += [f"{path.relative_to(root)}:{node.lineno}: {name}" for name in names if name.startswith("transformers.")]
    assert wrong == []


def test_other_rooms_name_nothing_of_its_insides(root: Path) -> None:
    wrong = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in other_rooms(root)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        # A sentence may tell users that both names of the cache are understood.
        if INSIDES.search(re.sub(r"``past_key_values``", "", line))
    ]
    assert wrong == []
