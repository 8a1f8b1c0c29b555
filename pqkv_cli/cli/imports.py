"""Keeps what third parties say while they are imported, and shows it with ``--debug`` only. Knows no verb and no library.

Everything counts: prints, warnings, log records and what compiled code writes to the descriptors themselves. Only the command
line listens; who imports pqkv sees what they always see.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pqkv_cli.cli.spool import Spool
from pqkv_cli.cli.voice import current_voice

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_OURS: Final = frozenset({"pqkv_cli", "pqkv_kernels", "pqkv_recipes", "__main__", "__mp_main__"})


class ImportNote(str):
    """A note on an error: which `package` was being imported, and what it had `written` by then."""

    package: str
    written: str

    @classmethod
    def of(cls, package: str, written: str) -> "ImportNote":
        """Return the note; its text is what a traceback shows."""
        note = cls(f"while {package} was imported")
        note.package, note.written = package, written
        return note


def failed_import(error: BaseException) -> tuple[BaseException, ImportNote] | None:
    """Return the error that ended an import, `error` or what caused it, and its note; None where no import failed."""
    cause: BaseException | None = error
    while cause is not None:
        for note in getattr(cause, "__notes__", ()):
            if isinstance(note, ImportNote):
                return cause, note
        cause = cause.__cause__
    return None


@contextmanager
def quiet_imports(is_shown: bool) -> Iterator[Callable[[str], bool]]:
    """Keep what third parties say while they are imported inside the block; show it afterwards if `is_shown`.

    Yields what keeps a text of theirs that comes another way, a warning, and returns False where it is nothing of the kind.
    """
    with Spool() as spool:
        finder = _Finder(spool, is_shown)
        sys.meta_path.insert(0, finder)
        try:
            yield spool.keep
        finally:
            sys.meta_path.remove(finder)


class _Finder:
    """Stands before all other finders, and listens while a module of somebody else is executed."""

    def __init__(self, spool: Spool, is_shown: bool) -> None:
        self._spool, self._is_shown = spool, is_shown

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> "ModuleSpec | None":
        """Return what the next finder finds, with a loader that is listened to; None for what needs no listening."""
        top = name.partition(".")[0]
        if self._spool.is_open or top in _OURS or top in sys.stdlib_module_names:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    @contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """Keep what is said inside the block, which imports the module `name`, and put a note on what ends it."""
        try:
            with self._spool.open() as written:
                yield
        except BaseException as error:
            if failed_import(error) is None:
                error.add_note(ImportNote.of(name.partition(".")[0], written()))
            raise
        finally:
            if self._is_shown:
                for line in filter(str.strip, written().splitlines()):
                    current_voice().say("info", "library", f"{name}, while it was imported: {line}")


class _Loader:
    """Stands for the loader of one module until that is executed, and is like it in everything else."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """Make the module; compiled ones are loaded by this, and may write already."""
        with self._finder.listening(spec.name):
            made: ModuleType | None = self._loader.create_module(spec) if hasattr(self._loader, "create_module") else None
            return made

    def exec_module(self, module: "ModuleType") -> None:
        """Execute the module, which from then on has its real loader."""
        with suppress(AttributeError):
            module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with self._finder.listening(module.__name__):
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
