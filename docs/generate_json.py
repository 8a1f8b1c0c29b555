"""The page of JSON output, made from the schemas beside this file. Knows JSON schemas and Markdown, no verb."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parent / "schemas"
MADE = "<!-- made by `make docs`; change the code instead -->\n"
_ABOUT = """\
`--json PATH` writes the result of a verb as JSON (`-`: one line on stdout and nothing else there). `schema` names the form and
its version; within a version keys may be added, never removed or given another meaning, so ignore keys you do not know. The
JSON schemas lie in [schemas/](schemas/); what every verb really writes is tested against them.
"""


def schemas() -> list[dict[str, Any]]:
    """Return the schemas of JSON output, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(SCHEMAS.glob("*.schema.json"))]


def json_page() -> str:
    """Return the page of JSON output: a table per schema."""
    lines = [
        MADE,
        "# JSON output\n",
        _ABOUT,
    ]
    for schema in schemas():
        verbs = ", ".join(f"`{verb}`" for verb in schema["x-verbs"])
        file = schema["$id"]
        lines += [f"## {schema['title']}\n", f"{schema['description']} Verbs: {verbs}. [Schema](schemas/{file})\n"]
        rows = [(f"`{path}`", kind, meaning) for path, kind, meaning in keys(schema, schema, "")]
        lines.append(table(("Key", "Type", "Meaning"), rows))
    return "\n".join(lines)


def keys(schema: Mapping[str, Any], root: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield path, type and meaning of every key below `schema`, depth first."""
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        optional = "" if name in required else ", optional"
        yield path, _kind(field) + optional, _meaning(field)
        yield from _below(field, root, path)


def _below(field: Mapping[str, Any], root: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    if "items" in field:
        yield from keys(field["items"], root, f"{path}[].")
    extra = field.get("additionalProperties")
    if isinstance(extra, Mapping):
        inner = next((root["$defs"][each["$ref"].split("/")[-1]] for each in extra.get("anyOf", ()) if "$ref" in each), extra)
        yield from keys(inner, root, f"{path}.*.")
    yield from keys(field, root, f"{path}.")


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    cells = [titles, tuple("---" for _ in titles), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def anchor(title: str) -> str:
    """Return the name by which a heading is linked to."""
    return "".join(letter for letter in title.lower() if letter.isalnum() or letter in "-_")


def _kind(field: Mapping[str, Any]) -> str:
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    kinds = field.get("type", "object" if "$ref" in field or "anyOf" in field else "any")
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def _meaning(field: Mapping[str, Any]) -> str:
    link = field.get("items", field).get("$ref", "")
    name = link.removesuffix(".schema.json").split("/")[-1]
    seen = (
        f" See [{name}](recipes.md)."
        if name == "recipe"
        else f" See `{name.rsplit('-', 1)[0]}/{name[-1]}`."
        if name.startswith("pqkv")
        else ""
    )
    return str(field.get("description", "")) + seen
