"""The JSON text of a header, before its fields are read: canonical, of this format, of a known version."""

import json
from typing import Any

from pqkv_cli.artifact.schema import FORMAT, VERSION, canonical_json
from pqkv_cli.errors import ArtifactError

_SHOWN_FAULTS = 20


def parse_document(text: str) -> dict[str, Any]:
    """Return the JSON object of a header, checked to be canonical and of a known version, its fields unread.

    Raises
    ------
    ArtifactError
        If `text` is not JSON, not canonical, or of another format or version.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
        canonical = canonical_json(document)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise ArtifactError(f"the header is not valid JSON ({reason}); copy the file again or export it again") from error
    if not isinstance(document, dict):
        raise ArtifactError("the header is not a JSON object; copy the file again or export it again")
    found = document.get("format")
    if found != FORMAT:
        raise ArtifactError(f"the header's format is {_short(found)}; expected {FORMAT!r}; give a file that pqkv export wrote")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"the format version is {_short(version)}; this pqkv reads version {VERSION}; "
            "use the pqkv that wrote the artifact, or export it again"
        )
    if canonical != text:
        raise ArtifactError(
            "the header is not canonical JSON (sorted keys, each once, no spaces, ASCII); export the artifact again"
        )
    return document


def listed(what: str, faults: list[str]) -> str:
    """Return one message for all `faults`, with what to do next."""
    lines = [f"  - {fault}" for fault in faults[:_SHOWN_FAULTS]]
    if len(faults) > _SHOWN_FAULTS:
        lines.append(f"  - and {len(faults) - _SHOWN_FAULTS} more")
    return "\n".join([f"{what}:", *lines, "export the artifact again"])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _short(value: object) -> str:
    shown = ascii(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    shown = str(value) if type(value) is int and abs(value) < 10**20 else shown
    return shown if len(shown) <= 40 else shown[:40] + "..."
