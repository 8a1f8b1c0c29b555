"""Streams that take less than the result: encodings without its characters, readers that have gone, halves of characters."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.cli.log_setup import Voice
from pqkv_cli.cli.streams import json_text, lasting_streams
from pqkv_cli.files import write_text

TEXT = "caf\u00e9 \u4e2d \U0001f600 \udce9"
MAIN = """
import sys
from pathlib import Path
from pqkv_cli.cli import recipes
from pqkv_cli.cli.main import main
from pqkv_cli.cli.output import Output
from pqkv_cli.cli.log_setup import current_voice
def show(output):
    current_voice().say("warning", "warning", {text!a})
    if {streams}:
        for _ in range(9):
            sys.stdout.write({text!a} * 9999 + chr(10))
            sys.stdout.flush()
    output.result({{"text": {text!a}}}, {text!a})
    Path("done").touch()
recipes._list = show
sys.exit(main({words!r}))
"""


def said(tmp_path: Path, words: list[str], streams: bool = False, text: str = TEXT, **options: Any) -> Any:
    variables = os.environ | options.pop("env", {}) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = MAIN.format(words=["recipes", *words], streams=streams, text=text)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, check=False, **options)


ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "strict ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "latin1": {"PYTHONIOENCODING": "latin1"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_encoding_loses_a_result(name: str, tmp_path: Path) -> None:
    environment = ENCODINGS[name]
    encoding = environment.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    expected = TEXT.encode(encoding, "backslashreplace").decode(encoding)
    plain = said(tmp_path, [], env=environment)
    assert (plain.returncode, plain.stdout.decode(encoding)) == (0, expected + "\n"), plain.stderr
    assert plain.stderr.decode(encoding) == f"warning: {expected}\n"
    as_json = said(tmp_path, ["--json", "-", "--log-format", "json"], env=environment)
    assert as_json.returncode == 0
    assert json.loads(as_json.stdout.decode(encoding)) == {"text": TEXT}
    assert json.loads(as_json.stderr.decode(encoding))["message"] == TEXT
    filed = said(tmp_path, ["--json", "out.json"], env=environment)
    assert filed.returncode == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"text": TEXT}


def closed_pipe() -> int:
    near, far = os.pipe()
    os.close(near)
    return far


@pytest.mark.parametrize("gone", [("stdout",), ("stderr",), ("stdout", "stderr")])
@pytest.mark.parametrize("streams", [False, True])
def test_a_reader_that_has_gone_is_no_failure_of_the_work(gone: tuple[str, ...], streams: bool, tmp_path: Path) -> None:
    done = said(tmp_path, ["--json", "out.json"], streams=streams, **{name: closed_pipe() for name in gone})
    assert done.returncode == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"text": TEXT}
    assert (tmp_path / "done").exists()
    if gone == ("stdout",):
        assert done.stderr.decode().count("\n") == 1, "the warning, and nothing of a pipe"


def test_json_that_nobody_reads_is_said(tmp_path: Path) -> None:
    done = said(tmp_path, ["--json", "-"], text="good", stdout=closed_pipe())
    *_, line = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert line == (
        "error: nobody reads stdout any more, so 16 characters of JSON were lost; the work is done and its files are "
        "written: read stdout to its end, or name a file with --json FILE"
    )


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--json", "-"], 1), (["--json", "out.json"], 0)])
def test_a_stdout_that_was_never_open(words: list[str], code: int, tmp_path: Path) -> None:
    line = MAIN.format(words=["recipes", *words], streams=False, text=TEXT)
    shell = f'exec "{sys.executable}" -c "$CODE" >&-'
    variables = os.environ | {"CODE": line, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("nobody reads stdout any more" in done.stderr) == (code == 1)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"], ["recipes", "schema"], ["evl"]])
def test_every_way_to_print_outlives_its_reader(words: list[str]) -> None:
    line = [sys.executable, "-m", "pqkv_cli", *words]
    done = subprocess.run(line, stdout=closed_pipe(), stderr=subprocess.PIPE, check=False)
    assert done.returncode == (2 if words == ["evl"] else 0)
    assert (b"no verb" in done.stderr) if words == ["evl"] else not done.stderr


def test_a_full_disk_is_still_said() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "wb") as full:
        line = [sys.executable, "-m", "pqkv_cli", "recipes"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "the disk is full" in done.stderr, done.stderr.count("\n")) == (1, True, 1)


def test_streams_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr, sys.stdout.errors
    with lasting_streams():
        sys.stdout.write("\udce9")
    assert (sys.stdout, sys.stderr, sys.stdout.errors) == before
    assert capsys.readouterr().out == "\\udce9"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin1", "utf-16"])
@pytest.mark.parametrize("text", ["plain", "caf\u00e9", "\u4e2d", "\ud83d", "\udce9 \U0001f600"])
def test_json_is_json_in_every_encoding(encoding: str, text: str) -> None:
    written = json_text({text: [text]}, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert json.loads(written.encode(encoding).decode(encoding)) == {text: [text]}
    assert json_text({"a": "\u00e9"}) == '{"a": "\u00e9"}', "a file is UTF-8 and needs no escapes"


def test_messages_of_a_voice_are_json_in_every_encoding() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Voice(is_json=True, stream=stream).say("info", "note", TEXT)
    assert json.loads(stream.buffer.getvalue())["message"] == TEXT  # type: ignore[attr-defined]


def test_files_hold_halves_of_characters_as_escapes(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", json.dumps({"path": TEXT}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": TEXT}


class Stdin:
    """What stands behind stdin: bytes in an encoding."""

    def __init__(self, data: bytes, encoding: str) -> None:
        self.buffer, self.encoding = io.BytesIO(data), encoding


@pytest.mark.parametrize(
    ("data", "encoding", "prompt"),
    [
        (b"once upon a", "utf-8", "once upon a"),
        (b"once upon a\n", "utf-8", "once upon a"),
        (b"once upon a\r\n", "utf-8", "once upon a"),
        (b"once upon a\n\n", "utf-8", "once upon a\n"),
        (b"once upon a\r\n\r\n", "utf-8", "once upon a\r\n"),
        (b"once upon a\r", "utf-8", "once upon a\r"),
        (b" once\r\nupon\n a \n", "utf-8", " once\r\nupon\n a "),
        (b"\nonce \t\n", "utf-8", "\nonce \t"),
        ("\ufeffonce\n".encode(), "utf-8", "once"),
        ("caf\u00e9\n".encode(), "ascii", "caf\u00e9"),
        ("caf\u00e9\n".encode(), "ANSI_X3.4-1968", "caf\u00e9"),
        ("caf\u00e9\n".encode("latin1"), "latin1", "caf\u00e9"),
    ],
)
def test_a_prompt_from_stdin_loses_the_end_of_its_last_line_and_nothing_else(
    data: bytes, encoding: str, prompt: str, pqkv: Callable, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(data, encoding))
    found = pqkv("generate", exported, "-", "--max-new-tokens", 4, "--json", "-").json
    given = pqkv("generate", exported, prompt, "--max-new-tokens", 4, "--json", "-").json
    assert found["prompt"] == prompt
    assert found == given


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n", b" \n \n"])
def test_nothing_on_stdin_is_no_prompt(data: bytes, pqkv: Callable, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(data, "utf-8"))
    answer = pqkv("generate", exported, "-")
    assert (answer.code, "stdin is empty" in answer.err) == (2, True)


def test_a_prompt_that_was_typed_in_an_ascii_locale(pqkv: Callable, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    typed = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    assert pqkv("generate", exported, typed, "--max-new-tokens", 4, "--json", "-").json["prompt"] == "caf\u00e9"


def test_a_prompt_that_is_no_text(pqkv: Callable, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = pqkv("generate", exported, "caf\udce9")
    assert answer.code == 2
    assert "no text in the encoding of this locale, the first behind 3 characters; expected text" in answer.err
    monkeypatch.setattr("sys.stdin", Stdin(b"caf\xe9", "utf-8"))
    answer = pqkv("generate", exported, "-")
    assert answer.code == 2
    assert "the prompt on stdin is not text in utf-8: byte 3 is 0xe9; expected utf-8: convert it" in answer.err
