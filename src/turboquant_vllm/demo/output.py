"""Output of commands that work for minutes: whether a file can be written is asked first; a reader who left stops nothing."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["check_writable", "forget", "make_console", "one_line", "printing"]


def one_line(error: BaseException) -> str:
    """What went wrong, in a line; with its kind, where the words alone may not say it."""
    said = str(error).strip().splitlines()
    if isinstance(error, (ImportError, OSError, ValueError)) and said:
        return said[0]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def check_writable(path: Path) -> None:
    """Make the folders above ``path``; whether there is a file at ``path`` and what is in it stays as it was.

    Raises:
        OSError: no file can be written there.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_file():
        path.open("r+b").close()
    elif not path.exists():
        path.open("xb").close()
        path.unlink()
    elif not os.access(path, os.W_OK):  # a device or a pipe: to open it may wait for somebody
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def make_console(*, stderr: bool = False) -> Console:
    """Where text is printed as it is; rich's own would end the program where nobody reads any more."""
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            forget(self.file)

    return Patient(stderr=stderr, markup=False, highlight=False, emoji=False)


@contextmanager
def printing() -> Iterator[Console]:
    """A console on standard output; where nobody reads that any more, what is printed within the block is lost.

    Raises:
        OSError: standard output is a file that cannot be written.
    """
    try:
        yield make_console()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        forget(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def forget(stream: Any) -> None:
    """Let what ``stream`` still holds, and what else is written to it, go nowhere: Python would fail with it at its end."""
    with suppress(AttributeError, OSError, ValueError):  # no stream, or one without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
