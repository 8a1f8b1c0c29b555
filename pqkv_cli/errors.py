"""The errors users meet, each with its exit code. Knows no terminal, no torch.

A message says what was found, what was expected, and what to do next.
"""

import difflib
from collections.abc import Iterable


class PqkvError(Exception):
    """Base of all expected failures: the run failed or its result is incomplete."""

    exit_code = 1


class UsageError(PqkvError):
    """Misuse that shows before any model or data is opened: wrong words, options or recipe."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe is not valid; carries all faults of the file at once."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in faults)
        super().__init__(f"{source} is not a valid recipe:\n{lines}")


class ModelError(PqkvError):
    """A model is missing, unreadable, or not the one expected."""


class UnsupportedModelError(ModelError):
    """A model whose cache cannot be quantized, with the reason."""


class DataError(PqkvError):
    """Text or task data is missing, unreadable or too short."""


class RunError(PqkvError):
    """A run directory is missing a stage, is in use, or is damaged."""


class ArtifactError(PqkvError):
    """An artifact is corrupt, of an unknown version, or of another model."""


class CacheError(PqkvError):
    """A cache was used in a way that cannot give right answers."""


class GateError(PqkvError):
    """A quality gate was not met."""

    exit_code = 3


# Of the allocators of a CPU, a Mac and other devices.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory has run out, of this machine or of a device, in whatever way torch says it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says, or its kind where it says nothing: what libraries say may be pages long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the nearest of `known`, or an empty string."""
    nearest = difflib.get_close_matches(found, list(known), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
