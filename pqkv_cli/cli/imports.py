"""Keeps what libraries write while they are imported off stdout and stderr, and says it where it is an error."""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pqkv_cli.cli.log_setup import current_voice

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_STREAMS: Final = (("stdout", 1), ("stderr", 2))


class Spool:
    """Takes what is written to stdout and stderr while it is open; where no file can be made, it lets everything pass."""

    def __init__(self) -> None:
        self._thread: int | None = None
        self._lock = threading.Lock()
        self._file: int | None = None

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def is_open(self) -> bool:
        """Whether somebody writes into it."""
        return self._lock.locked()

    def keep(self, text: str) -> bool:
        """Keep `text` if the calling thread is the one that writes here; return whether it was kept."""
        if self._file is None or self._thread != threading.get_ident():
            return False
        os.write(self._file, text.encode(errors="replace"))
        return True

    @contextmanager
    def open(self) -> Iterator[Callable[[], str]]:
        """Take everything inside the block; yields what gives the text, once the block has ended."""
        if not self._lock.acquire(blocking=False):  # what happens inside such a block belongs to it
            yield lambda: ""
            return
        texts: list[str] = []
        try:
            self._file = _new_file() if self._file is None else self._file
            if self._file is None:
                yield lambda: ""
                return
            with ExitStack() as stack:
                stack.callback(lambda file: texts.append(_taken(file)), self._file)
                stack.enter_context(self._diverted(self._file))
                self._thread = threading.get_ident()
                yield lambda: "".join(texts)
        finally:
            self._thread = None
            self._lock.release()

    @contextmanager
    def _diverted(self, file: int) -> Iterator[None]:
        _flush()
        streams = {name: getattr(sys, name) for name, _ in _STREAMS}
        # A stream with a descriptor of its own is left as it is: libraries remember it for what they log later.
        stand_ins = {
            name: _StandIn(stream, self.keep)
            for (name, number), stream in zip(_STREAMS, streams.values(), strict=True)
            if stream is not None and not _writes_to(stream, number)
        }
        saved = {number: copy for _, number in _STREAMS if (copy := _duplicate(number)) is not None}
        try:
            for number in saved:
                os.dup2(file, number)
            for name, stand_in in stand_ins.items():
                setattr(sys, name, stand_in)
            yield
        finally:
            _flush()
            for name, stand_in in stand_ins.items():
                if getattr(sys, name) is stand_in:
                    setattr(sys, name, streams[name])
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)


class _StandIn:
    """Stands for a stream while something is imported; whoever remembers it writes to the stream itself afterwards."""

    def __init__(self, stream: Any, keep: Callable[[str], bool]) -> None:
        self._stream, self._keep = stream, keep

    def write(self, text: str) -> int:
        """Keep `text`, or hand it on."""
        return len(text) if self._keep(text) else int(self._stream.write(text))

    def writelines(self, lines: Sequence[str]) -> None:
        """Write them one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _flush() -> None:
    for name, _ in _STREAMS:
        with suppress(AttributeError, OSError, ValueError):  # none, gone or closed
            getattr(sys, name).flush()


def _writes_to(stream: Any, number: int) -> bool:
    try:
        return bool(stream.fileno() == number)
    except (AttributeError, OSError, ValueError):
        return False


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:  # closed by whoever started us
        return None


def _new_file() -> int | None:
    # A file, no pipe: nobody reads while a library writes.
    try:
        if hasattr(os, "memfd_create"):
            return os.memfd_create("pqkv")
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    except OSError:
        return None


def _taken(file: int) -> str:
    size = os.lseek(file, 0, os.SEEK_END)
    os.lseek(file, 0, os.SEEK_SET)
    text = os.read(file, size).decode(errors="replace")
    os.lseek(file, 0, os.SEEK_SET)
    os.ftruncate(file, 0)
    return text


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
