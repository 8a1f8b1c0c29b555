"""What libraries say while they are imported is kept, whichever way they say it; what they say later is not, nor are errors."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pqkv_cli.cli.imports import ImportNote
from pqkv_cli.cli.main import describe

# How a module can make itself heard.
NOISES = {
    "stdout": "print('NOISE')",
    "stderr": "import sys; print('NOISE', file=sys.stderr)",
    "lines": "import sys; sys.stderr.writelines(['NOISE\\n'])",
    "unfinished": "import sys; sys.stdout.write('NOISE')",
    "descriptor 1": "import os; os.write(1, b'NOISE\\n')",
    "descriptor 2": "import os; os.write(2, b'NOISE\\n')",
    "C": "import ctypes; c = ctypes.CDLL(None); c.puts(b'NOISE'); c.fflush(None)",
    "child": "import os; os.system('echo NOISE; echo NOISE >&2')",
    "warning": "import warnings; warnings.warn('NOISE')",
    "future warning": "import warnings; warnings.warn('NOISE', FutureWarning)",
    "log without handlers": "import logging; logging.getLogger('noisy').warning('NOISE')",
    "log": "import logging; log = logging.getLogger('noisy'); log.addHandler(logging.StreamHandler()); log.warning('NOISE')",
    "not a word of any code": "import os; os.write(2, b'NOISE \\xff\\n')",
    "submodule": "import noisy.part",
    "by name": "import importlib; importlib.import_module('noisy.part')",
}
# A command of our own that imports the library `noisy`, then writes on both streams.
COMMAND = """
import logging, sys
from pqkv_cli.cli.main import VERBS, main
import pqkv_cli.recipe_files

def names():
    import noisy
    sys.stdout.write("result\\n")
    logging.getLogger("noisy").warning("LATER")
    return ("demo",)

pqkv_cli.recipe_files.recipe_names = names
code = main(sys.argv[1:])
sys.stdout.flush()
import louder
sys.exit(code)
"""


def library(place: Path, code: str) -> None:
    (place / "noisy").mkdir()
    (place / "noisy" / "__init__.py").write_text(code)
    (place / "noisy" / "part.py").write_text("print('NOISE')")
    (place / "louder.py").write_text("print('LOUD')")


def command(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", COMMAND, "recipes", *words]
    variables = {"PYTHONPATH": str(place), "PYTHONWARNINGS": "default"}
    return subprocess.run(line, capture_output=True, text=True, env=variables, cwd=place, check=False)


@pytest.mark.parametrize("noise", NOISES)
def test_nothing_of_it_is_seen(noise: str, tmp_path: Path) -> None:
    library(tmp_path, NOISES[noise])
    done = command(tmp_path)
    assert (done.returncode, "NOISE" in done.stdout + done.stderr) == (0, False), done.stdout + done.stderr
    assert done.stdout.startswith("result\n")
    assert "LATER" in done.stderr
    assert done.stdout.endswith("LOUD\n"), "the command has ended: this import is the caller's"


def test_debug_shows_all_of_it_on_stderr(tmp_path: Path) -> None:
    library(tmp_path, "\n".join(NOISES.values()))
    done = command(tmp_path, "--debug")
    assert "NOISE" not in done.stdout and done.stdout.startswith("result\n")
    heard = [line for line in done.stderr.splitlines() if "NOISE" in line]
    assert len(heard) >= len(NOISES) - 2  # two lines have no end
    assert {line.startswith("noisy, while it was imported: ") for line in heard} == {True}


def test_debug_shows_it_as_json_lines(tmp_path: Path) -> None:
    library(tmp_path, NOISES["warning"] + "\n" + NOISES["stderr"])
    done = command(tmp_path, "--debug", "--log-format", "json")
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(r["event"], r["message"]) for r in records[:2]] == [("library", "noisy, while it was imported: NOISE")] * 2


def test_the_prompt_is_not_an_option(tmp_path: Path) -> None:
    library(tmp_path, NOISES["stderr"])
    assert "NOISE" not in command(tmp_path, "--", "--debug").stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_trap(closed: str, tmp_path: Path) -> None:
    library(tmp_path, NOISES["C"])
    (tmp_path / "command.py").write_text(
        "import sys, os; import pqkv_cli.cli.imports as i\nwith i.quiet_imports(False): import noisy\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$0" command.py {closed}', sys.executable], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("raise ImportError('libsomething.so.3: cannot open')", "ImportError: libsomething.so.3: cannot open"),
        ("raise OSError('libcudart.so: no such file')", "OSError: libcudart.so: no such file"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        ("import noisy.no_such_part", "ModuleNotFoundError: No module named 'noisy.no_such_part'"),
        ("raise SystemExit('not here')", "SystemExit: not here"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_import_that_fails_says_why(failure: str, said: str, tmp_path: Path) -> None:
    library(tmp_path, f"print('')\nprint('built for another GLIBC')\n{failure}")
    done = command(tmp_path)
    wanted = f"error: noisy is installed but cannot be imported: {said}, after it had written: built for another GLIBC; install"
    assert (done.returncode, done.stderr.startswith(wanted)) == (1, True), done.stderr
    assert "run again with --debug" in done.stderr and done.stderr.count("\n") == 1
    shown = command(tmp_path, "--debug").stderr
    assert "noisy, while it was imported: built for another GLIBC" in shown
    assert "Traceback" in shown and "while noisy was imported" in shown and wanted in shown


def test_what_a_library_tries_and_does_not_need_is_no_failure(tmp_path: Path) -> None:
    library(tmp_path, "try:\n    import absent\nexcept ImportError:\n    print('NOISE')")
    done = command(tmp_path)
    assert (done.returncode, "NOISE" in done.stdout + done.stderr) == (0, False)


def test_a_cause_is_named_however_it_is_wrapped() -> None:
    inner = ImportError("no symbol")
    inner.add_note(ImportNote.of("torchao", ""))
    outer = RuntimeError("Failed to import a model")
    outer.__cause__ = inner
    message, code = describe(outer, ["calibrate"])
    assert code == 1
    assert message.startswith("error: torchao is installed but cannot be imported: ImportError: no symbol; install it again")


def test_streams_without_a_descriptor_are_kept_from_too(
    pqkv: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, NOISES["log"] + "\n" + NOISES["stdout"] + "\n" + NOISES["warning"])
    monkeypatch.syspath_prepend(tmp_path)
    before = sys.stdout, sys.stderr, list(sys.meta_path)

    def names() -> tuple[str, ...]:
        import noisy  # type: ignore[import-not-found]

        noisy.log.warning("LATER")
        assert not hasattr(noisy.__spec__.loader, "_finder"), "the module has its real loader"
        return ("demo",)

    monkeypatch.setattr("pqkv_cli.recipe_files.recipe_names", names)
    try:
        answer = pqkv("recipes")
    finally:
        for name in ("noisy", "noisy.part"):
            sys.modules.pop(name, None)
    assert (answer.code, "NOISE" in answer.out + answer.err, "LATER" in answer.err) == (0, False, True)
    assert (sys.stdout, sys.stderr, list(sys.meta_path)) == before
