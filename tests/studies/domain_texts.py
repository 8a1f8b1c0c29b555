"""Texts of several domains to judge a run on. None is part of this project: they are found on disk, fetched, or made by a seed.

What cannot be had is named with the way to it, and left out of the table, never replaced by something else.
"""

import ast
import json
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pqkv_cli.calibration.text import load_text
from pqkv_cli.models.chat import talk_text

_MOST_CHARACTERS = 200_000
_EXCERPT = 1500
_NAMES = "Ana Bo Carla Deniz Emil Farah Goran Hana Ines Jonas Kira Liam Mona Nils Olga Priya".split()
_CITIES = "Bergen Bilbao Dakar Gdansk Hanoi Izmir Kassel Lima Osaka Porto Riga Turin Utrecht Zagreb".split()
_WORDS = "amount order hotel flight ticket invoice sensor report contact meeting parcel account stock route".split()
_MESSAGE = re.compile(r'^msgstr(?:\[\d\])?\s+((?:".*"\s*)+)', re.MULTILINE)


class Missing(Exception):
    """A text that is not here; the message says how to get it."""


def domain_texts(
    tokenizer: Any, data: Path, store: Path, own: Mapping[str, Path], seed: int = 0
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the texts by domain, and why the others are missing.

    Parameters
    ----------
    data
        Folder with ``wikitext2/wiki.test.raw`` and ``minilongbench/minilongbench.jsonl``.
    store
        Folder in which what is fetched is kept.
    own
        Files for domains by name; they go before what is found here.
    """
    makers: dict[str, Callable[[], str]] = {
        "web": lambda: _only_given("web", "documents of C4 or the like"),
        "wikitext": lambda: _read(data / "wikitext2" / "wiki.test.raw"),
        "code": lambda: _rows_text(data, ("lcc", "repobench-p")),
        "chat": lambda: _talks(tokenizer, data),
        "tools": lambda: tool_calls(random.Random(seed)),
        "german": lambda: _translated(store, "de"),
        "french": lambda: _translated(store, "fr"),
        "chinese": lambda: _rows_text(data, ("dureader", "vcsum", "multifieldqa_zh")),
    }
    makers |= {name: lambda path=path: load_text(str(path)) for name, path in own.items()}  # type: ignore[misc]
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()[:_MOST_CHARACTERS]
        except Missing as error:
            missing[name] = str(error)
    return found, missing


def tool_calls(rng: random.Random, count: int = 120) -> str:
    """Return `count` tools, each with its schema, a call and what came back: JSON with nested values."""
    return "\n".join(_tool(rng) for _ in range(count))


def _tool(rng: random.Random) -> str:
    noun, verb = rng.choice(_WORDS), rng.choice(("find", "create", "update", "list", "cancel"))
    name = f"{verb}_{noun}"
    fields = rng.sample(("city", "date", "limit", "email", "price", "active", "tags"), rng.randint(3, 5))
    schema = {"type": "object", "properties": {key: {"type": _type(key)} for key in fields}, "required": fields[:2]}
    about = {"type": "function", "function": {"name": name, "description": f"{verb.title()} {noun}s.", "parameters": schema}}
    call = {"name": name, "arguments": {key: _value(key, rng) for key in fields}}
    rows = [{"id": rng.randrange(10**6), **{key: _value(key, rng) for key in fields}} for _ in range(rng.randint(1, 4))]
    result = {"status": rng.choice(("ok", "ok", "error")), "took_ms": rng.randrange(900), noun + "s": rows}
    indent = rng.choice((None, 2))
    texts = [json.dumps(part, indent=indent) for part in (about, call, result)]
    return f"{texts[0]}\n<tool_call>\n{texts[1]}\n</tool_call>\n<tool_response>\n{texts[2]}\n</tool_response>"


def _type(key: str) -> str:
    return {"limit": "integer", "price": "number", "active": "boolean", "tags": "array"}.get(key, "string")


def _value(key: str, rng: random.Random) -> Any:
    person = rng.choice(_NAMES)
    values: dict[str, Any] = {
        "city": rng.choice(_CITIES),
        "date": f"20{rng.randint(19, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}T{rng.randint(0, 23):02}:15:00Z",
        "limit": rng.randrange(100),
        "email": f"{person.lower()}.{rng.choice(_WORDS)}@example.org",
        "price": {"amount": round(rng.uniform(1, 900), 2), "currency": rng.choice(("EUR", "USD", "JPY"))},
        "active": rng.random() < 0.5,
        "tags": rng.sample(_WORDS, rng.randint(0, 3)),
    }
    return values[key]


def _only_given(name: str, what: str) -> str:
    raise Missing(f"no {what} are here; name a file of text or rows with --text {name}=FILE")


def _read(path: Path) -> str:
    if not path.is_file():
        raise Missing(f"{path} is not there; name its folder with --data")
    return path.read_text(encoding="utf-8")


def _rows(data: Path, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    lines = _read(data / "minilongbench" / "minilongbench.jsonl").splitlines()
    return [row for row in map(json.loads, lines) if row["dataset"] in tasks]


def _rows_text(data: Path, tasks: tuple[str, ...]) -> str:
    # The beginning of a prompt is its task's instruction; a part of each row's middle is plain text.
    return "\n\n".join(row["prompt"][500 : 500 + 10 * _EXCERPT] for row in _rows(data, tasks))


def _talks(tokenizer: Any, data: Path) -> str:
    """Return talks in the tokenizer's template: texts that a user wants summarised, and the known summaries as answers."""
    rows = _rows(data, ("samsum", "multi_news", "qmsum", "gov_report"))
    asked = [f"Summarise this:\n\n{row['prompt'][500 : 500 + _EXCERPT]}" for row in rows]
    answers = [str(_first(row["answers"])) for row in rows]
    talks = []
    for i in range(0, len(rows) - 2, 3):
        talks.append(
            talk_text(tokenizer, "", [asked[i], answers[i], asked[i + 1], answers[i + 1], asked[i + 2]]) + answers[i + 2]
        )
    return "\n".join(talks)


def _first(answers: Any) -> Any:
    return answers[0] if isinstance(answers, list) and answers else answers


def _translated(store: Path, language: str) -> str:
    """Return the messages of the package Django in `language`, which its wheel holds beside the sources."""
    wheels = sorted(store.glob("[dD]jango-*.whl")) or _fetched(store)
    texts = []
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(f"locale/{language}/LC_MESSAGES/django.po"):
                messages = _MESSAGE.findall(wheel.read(name).decode("utf-8"))
                texts += [
                    "".join(ast.literal_eval(part) for part in message.split("\n") if part.strip()) for message in messages[1:]
                ]
    return "\n".join(text for text in texts if text.strip())


def _fetched(store: Path) -> list[Path]:
    store.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(store),
        "Django",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(store.glob("[dD]jango-*.whl"))
    if done.returncode or not wheels:
        raise Missing(f"the package Django cannot be fetched; put its wheel into {store}, or name a file with --text NAME=FILE")
    return wheels
