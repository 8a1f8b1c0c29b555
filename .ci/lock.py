"""Writes which versions `make demo` and `make test` install, for the Python that runs this: newest of all, nothing installed.

Only versions are written: no hashes and no hosts, so that every mirror and every build of a version serves.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "pqkv_cli" / "constraints"
EXTRAS = "test,dev"
# What lies on this machine (a torch for its processor alone, say) needs other packages than what others install.
PUBLISHED = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": "", "PIP_BUILD_CONSTRAINT": ""}


def resolved() -> dict[str, str]:
    """Return name and version of every package that an installation with the extras `EXTRAS` consists of."""
    with tempfile.TemporaryDirectory() as place:
        # Of a pip of its own: before 23.3 it fetches whole packages to read what they need.
        venv.create(place, with_pip=True)
        pip = [str(Path(place) / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", "--upgrade", "pip>=23.3"], check=True)
        report = Path(place) / "report.json"
        wanted = ["install", "--dry-run", "--ignore-installed", "--report", str(report), f"{ROOT}[{EXTRAS}]"]
        subprocess.run([*pip, *wanted], check=True, env=os.environ | PUBLISHED, stdout=subprocess.DEVNULL)
        packages = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    # Builds for one kind of device (2.13.0+cpu) are the same version.
    return {re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"].split("+")[0] for each in packages}


def main() -> None:
    """Write the file of this Python."""
    python = "{}.{}".format(*sys.version_info[:2])
    versions = {name: version for name, version in resolved().items() if name != "pqkv"}
    head = (
        f"# What `make demo` and `make test` install with Python {python}, and so what pqkv is tested with.\n"
        "# Made by `make lock`; change no line by hand.\n"
    )
    path = FOLDER / f"python{python}.txt"
    path.write_text(head + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)), encoding="utf-8")
    sys.stdout.write(f"{path.relative_to(ROOT)}: {len(versions)} packages\n")


if __name__ == "__main__":
    main()
