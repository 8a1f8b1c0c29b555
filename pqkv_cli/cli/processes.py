"""Brings together the processes of a launcher (``accelerate launch``, ``torchrun``) for verbs that can share their work."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout

from pqkv_cli.cli.log_setup import Voice, speaking
from pqkv_cli.errors import UsageError

SHARED_VERBS = ("calibrate", "fit-codebooks")
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined_processes(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> Iterator[list[str]]:
    """Join the process group that a launcher has announced in `environment`, if any; yield the words to obey.

    All processes but the first keep silent on stdout and write no ``--json`` file.

    Raises
    ------
    UsageError
        If the verb works in one process only.
    """
    size = int(environment["WORLD_SIZE"]) if all(environment.get(name) for name in _LAUNCHED) else 1
    if size == 1:
        yield list(words)
        return
    verb = words[0] if words else "pqkv"
    if verb not in SHARED_VERBS:
        raise UsageError(
            f"{verb} was started in {size} processes; expected one: call it without a launcher ({' and '.join(SHARED_VERBS)} "
            "are what several processes can share)"
        )
    from pqkv_cli.calibration.ranks import process_group

    with process_group(int(environment.get("LOCAL_RANK", "0"))) as rank:
        if rank == 0:
            yield list(words)
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), speaking(Voice(is_quiet=True)):
            yield without_json(words)


def without_json(words: Sequence[str]) -> list[str]:
    """Return `words` without the option ``--json`` and its value."""
    kept: list[str] = []
    for i, word in enumerate(words):
        if word == "--json" or word.startswith("--json=") or (i and words[i - 1] == "--json"):
            continue
        kept.append(word)
    return kept
