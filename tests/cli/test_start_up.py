import os
import resource
import subprocess
import sys

import pytest

from pqkv_cli.cli.main import VERBS

HEAVY = ("torch", "transformers", "numpy", "yaml", "datasets", "safetensors")
CODE = "import sys; from pqkv_cli.cli.main import main; code = main({words!r}); print(code, *sys.modules, file=sys.stderr)"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["calibrate", "--help"], ["evl"]])
def test_help_and_misuse_load_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(words=words)], capture_output=True, text=True, check=True)
    modules = set(done.stderr.splitlines()[-1].split())
    assert modules & set(HEAVY) == set()


def test_recipes_load_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(words=["recipes"])], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"} & set(done.stderr.splitlines()[-1].split()) == set()


def test_help_is_quick() -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    # Whoever counts covered lines counts in this process only: that takes longer than the help.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    seconds = []
    for _ in range(3):
        before = spent()
        subprocess.run([sys.executable, "-m", "pqkv_cli", "--help"], capture_output=True, check=True, env=environment)
        seconds.append(spent() - before)
    assert min(seconds) <= 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_the_common_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pqkv_cli.cli.main import main

    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert [option for option in ("--run", "-r,", "--json", "--debug", "Example:") if option not in text] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from pqkv_cli import __version__
    from pqkv_cli.cli.main import main

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pqkv {__version__}\n"
