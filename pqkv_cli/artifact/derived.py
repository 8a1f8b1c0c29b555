"""The files for people beside an artifact: its header as readable JSON and its model card. Readers never open them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pqkv_cli.artifact.card import model_card
from pqkv_cli.artifact.schema import Header, header_document
from pqkv_cli.errors import ArtifactError
from pqkv_cli.files import write_text

HEADER_FILE = "pqkv.json"
CARD_FILE = "README.md"


def write_derived(directory: Path | str, header: Header, rows: Sequence[Mapping[str, object]] = ()) -> tuple[Path, ...]:
    """Write ``pqkv.json`` and ``README.md`` for the artifact with this `header` (its hash filled in); return their paths.

    Raises
    ------
    ArtifactError
        If one cannot be written.
    """
    texts = {
        HEADER_FILE: header_text(header),
        CARD_FILE: model_card(header, rows),
    }
    paths = []
    for name, text in texts.items():
        paths.append(Path(directory) / name)
        write_text(paths[-1], text, ArtifactError)
    return tuple(paths)


def header_text(header: Header) -> str:
    """Return the text of ``pqkv.json``."""
    return json.dumps(header_document(header), indent=1, sort_keys=True) + "\n"
