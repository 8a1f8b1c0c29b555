import subprocess
import sys

# None in sys.modules is how Python marks a module as absent. The hub client that transformers imports needs yaml itself, so
# yaml is absent for our own modules only.
CODE = """
import builtins, sys

ABSENT = ("typer", "rich", "datasets")
sys.modules.update(dict.fromkeys(ABSENT))
real_import = builtins.__import__


def without_yaml(name, globals=None, *rest, **named):
    if name.partition(".")[0] == "yaml" and (globals or {}).get("__name__", "").startswith("pqkv"):
        raise ModuleNotFoundError("No module named 'yaml'", name=name)
    return real_import(name, globals, *rest, **named)


builtins.__import__ = without_yaml
import pqkv_cli.runtime
import pqkv_cli.runtime.generate

print(*(name for name in sys.modules if name.startswith("pqkv_cli.") and name.count(".") == 1))
"""


def test_the_runtime_imports_without_the_front_end() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rooms = {name.removeprefix("pqkv_cli.") for name in done.stdout.split()}
    assert "runtime" in rooms
    assert rooms & {"cli", "pipeline", "recipe", "evaluation", "fitting", "calibration", "demo"} == set()
