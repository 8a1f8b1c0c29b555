"""How the command talks: JSON lines, quiet, no bars or colors where nobody watches, completion."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from pqkv_cli.cli import log_setup
from pqkv_cli.cli.log_setup import Heartbeat, Voice, speaking, wanted_voice
from pqkv_cli.cli.options import offered_targets
from pqkv_cli.cli.output import TerminalReporter

ESCAPE = "\x1b"


@pytest.mark.parametrize(
    ("words", "is_json", "is_quiet"),
    [
        (["run", "demo"], False, False),
        (["run", "demo", "--log-format", "json"], True, False),
        (["run", "--log-format=json", "--quiet", "demo"], True, True),
        (["run", "--log-format", "text", "--quiet"], False, True),
        (["generate", "run", "--", "--quiet --log-format=json"], False, False),
        (["generate", "run", "--", "--quiet"], False, False),
        (["run", "--log-format"], False, False),
    ],
)
def test_the_voice_is_that_of_the_words(words: list[str], is_json: bool, is_quiet: bool) -> None:
    found = wanted_voice(words)
    assert (found.is_json, found.is_quiet) == (is_json, is_quiet)


@pytest.mark.parametrize("is_json", [False, True])
def test_a_long_step_says_now_and_then_how_far_it_is(is_json: bool) -> None:
    stream, now = StringIO(), [0.0]
    beat = Heartbeat(Voice(is_json, stream=stream), "calibrate", lambda: now[0])
    for done in range(101):
        now[0] = done * 1.0
        beat(done, 1000)
    lines = stream.getvalue().splitlines()
    said = [(5, 995), (35, 965), (65, 935), (95, 905)]  # a first word soon, then every half minute
    if not is_json:
        assert lines == [f"calibrate: {done} of 1,000, some {round(left / 60)} min left" for done, left in said]
        return
    records = [json.loads(line) for line in lines]
    assert [(r["event"], r["done"], r["total"], r["seconds_left"]) for r in records] == [
        ("progress", done, 1000, left) for done, left in said
    ]


def test_what_an_earlier_command_did_says_nothing_of_how_fast_this_one_is() -> None:
    stream, now = StringIO(), [0.0]
    beat = Heartbeat(Voice(False, stream=stream), "fit-codebooks", lambda: now[0])
    beat(25, 30)  # layers that were found finished
    now[0] = 40.0
    beat(26, 30)
    assert stream.getvalue().splitlines() == ["fit-codebooks: 26 of 30, some 3 min left"]


def test_a_step_that_is_soon_over_says_nothing() -> None:
    stream, now = StringIO(), [0.0]
    beat = Heartbeat(Voice(False, stream=stream), "export", lambda: now[0])
    for done in range(20):
        now[0] = done * 1.0
        beat(done, 20)
    assert stream.getvalue() == ""


def test_what_libraries_write_becomes_lines() -> None:
    stream = StringIO()
    with speaking(Voice(True, stream=stream)):
        sys.stderr.write("half ")
        sys.stderr.write("a line\nanother\rthird\n\nno end")
        assert not sys.stderr.isatty()
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["message"] for record in records] == ["half a line", "another", "third", "no end"]
    assert {record["event"] for record in records} == {"library"}


def test_bars_of_libraries_are_off_while_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with speaking(Voice(stream=StringIO())):
        assert (os.environ["TQDM_DISABLE"], os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]) == ("1", "1")
    assert (os.environ["TQDM_DISABLE"], "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ) == ("0", False)


def test_quiet_keeps_warnings() -> None:
    stream = StringIO()
    with speaking(Voice(is_quiet=True, stream=stream)):
        reporter = TerminalReporter()
        reporter.note("all is well")
        reporter.note("warning: not all")
        with reporter.progress("fit"):
            pass
    assert stream.getvalue() == "warning: not all\n"


def test_a_bar_moves_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stderr(stream), speaking(Voice()):
        reporter = TerminalReporter()
        with reporter.progress("fit") as advance:
            advance(1, 2)
            reporter.note("half way")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "half way" in text and "1/2" in text
    assert re.search(r"\rfit: \d+\.\d s\n", text), text


def test_a_quiet_run_says_nothing(pqkv: Callable, exported: Path) -> None:
    assert "already done" in pqkv("export", exported).err
    answer = pqkv("export", exported, "--quiet")
    assert (answer.code, answer.err) == (0, "")
    failed = pqkv("export", exported, "--quiet", "--run", "other")
    assert (failed.code, failed.err.startswith("error: ")) == (2, True)


def test_warnings_are_lines_too(pqkv: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    monkeypatch.setattr("pqkv_cli.recipe_files.recipe_names", lambda: warnings.warn("look out", stacklevel=1) or ("demo",))
    record = json.loads(pqkv("recipes", "--log-format", "json").err)
    assert (record["level"], record["event"], record["message"]) == ("warning", "warning", "look out")
    assert pqkv("recipes", "--quiet").err == "warning: look out\n"


def test_an_unknown_format_is_misuse(pqkv: Callable) -> None:
    answer = pqkv("recipes", "--log-format", "jsn")
    assert (answer.code, "did you mean 'json'" in answer.err) == (2, True)


def command(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    line = [sys.executable, "-m", "pqkv_cli", *words]
    return subprocess.run(line, capture_output=True, text=True, env=variables, check=False)


def on_a_terminal(words: list[str], **variables: str) -> str:
    """Return what a terminal receives from ``pqkv WORDS``."""
    near, far = pty.openpty()
    line = [sys.executable, "-m", "pqkv_cli", *words]
    given = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", **variables}
    process = subprocess.Popen(line, stdout=far, stderr=far, stdin=subprocess.DEVNULL, env=given)
    os.close(far)
    received = b""
    with contextlib.suppress(OSError):  # Linux's way to say that nobody is at the other end
        while piece := os.read(near, 4096):
            received += piece
    os.close(near)
    assert process.wait() == 0, received.decode()
    return received.decode()


def test_no_color_off_a_terminal_nor_where_it_is_unwanted() -> None:
    plain = command(["recipes"])
    assert (plain.returncode, ESCAPE in plain.stdout + plain.stderr) == (0, False)
    colors = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-9]|4[0-9]|9[0-7]|10[0-7])m")
    assert colors.search(on_a_terminal(["recipes"], NO_COLOR="1")) is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = command(["--show-completion", shell], _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (script.returncode, "_PQKV_COMPLETE" in script.stdout) == (0, True), script.stderr
    words = {"COMP_WORDS": "pqkv cali", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "pqkv cali"}
    more = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell == "fish" else {}
    offered = command([], _PQKV_COMPLETE=f"complete_{shell}", **words, **more)
    assert "calibrate" in offered.stdout and "export" not in offered.stdout


def test_completion_loads_nothing_heavy() -> None:
    code = "import sys; from pqkv_cli.cli.main import main\ntry:\n main([])\nfinally:\n print(*sys.modules, file=sys.stderr)"
    words = {"COMP_WORDS": "pqkv run --se", "COMP_CWORD": "2", "_PQKV_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | words, check=False)
    assert "--seed" in done.stdout
    assert {"torch", "transformers", "yaml"} & set(done.stderr.splitlines()[-1].split()) == set()


def test_completion_offers_recipes_runs_and_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").write_text("name: mine\nmodel: demo\n")
    monkeypatch.chdir(tmp_path)
    assert offered_targets("qwen3") == ["qwen3-32b", "qwen3-8b"]
    assert offered_targets("run") == ["runs/mine"]
    for line, place, offered in (("pqkv run dem", 2, ["demo"]), ("pqkv eval --task ne", 3, ["needle"])):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(place), "_PQKV_COMPLETE": "complete_bash"}
        assert command([], **words).stdout.split() == offered


def test_the_seconds_are_documented() -> None:
    page = Path(__file__).parents[2] / "docs" / "ci.md"
    assert f"every {log_setup.HEARTBEAT_SECONDS:g} seconds" in page.read_text(encoding="utf-8")


def test_every_exit_code_is_listed() -> None:
    from pqkv_cli.cli.main import INTERRUPTED, TERMINATED
    from pqkv_cli.errors import GateError, PqkvError, UsageError

    known: set[Any] = {0, PqkvError.exit_code, UsageError.exit_code, GateError.exit_code, INTERRUPTED, TERMINATED}
    page = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == known
    listed = command(["--help"]).stdout.split("Exit codes:")[1]
    assert {int(code) for code in re.findall(r"\d+", listed)} == known
