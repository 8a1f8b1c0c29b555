"""What a shell may offer for a word that is half typed. Knows names; opens nothing, and never complains."""

from pathlib import Path

from pqkv_cli.errors import PqkvError


def targets(incomplete: str) -> list[str]:
    """Return the recipes and the runs under ``runs/`` that begin so; paths are the shell's own to offer."""
    from pqkv_cli.pipeline.rundir import runs_under
    from pqkv_cli.recipe_files import recipe_names

    try:
        names = [*recipe_names(), *map(str, runs_under(Path("runs")))]
    except (OSError, PqkvError):  # whoever completes a word cannot be told what is wrong
        return []
    return [name for name in names if name.startswith(incomplete)]
