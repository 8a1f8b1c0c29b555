"""The compressed side of an evaluation: gives fresh caches in the mode asked for. Knows no tasks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pqkv_cli.cache.cache import TimedCache
from pqkv_cli.evaluation.settings import Mode, Subject
from pqkv_cli.runtime.attach import attach, simulate_artifact

CacheFactory = Callable[[], TimedCache]


@contextmanager
def contender(subject: Subject, mode: Mode) -> Iterator[CacheFactory]:
    """Prepare the model for caches of `mode` and yield their factory; the model is restored on exit.

    Without one of these caches the model computes as it did before.
    """
    if mode == "cache":
        with attach(subject.model, subject.artifact, force=subject.force) as attached:
            yield attached.new_cache
    else:
        with simulate_artifact(subject.model, subject.artifact, force=subject.force) as simulation:
            yield simulation.new_cache
