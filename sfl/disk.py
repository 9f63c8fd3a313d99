"""What must be on disk before anything rests on it, and what it means that something there cannot be read."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".tmp"  # ends the name of a file that is being written; one that is found was left by a process that died

_OF_THE_MOMENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.EBUSY}


def of_the_moment(error: OSError) -> bool:
    """Whether a file could not be read for want of something that there may be more of the next time, as of open files or memory.

    That says nothing of the file. Any other error does, as of a bad sector or of rights: it comes again however often the file is
    read, so whoever needs it goes on without it.
    """
    return error.errno in _OF_THE_MOMENT


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing, so that they outlive a power cut. Raises `OSError`."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files are in a folder. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, lasting: bool = True) -> Iterator[Path]:
    """The name of a file beside `path`, to be written inside the `with`, after which it takes the place of `path` in one move.

    If `lasting`, the disk has it then: after a power cut there is the earlier file or this one. When anything is raised inside,
    nothing is left of it. Raises `OSError`.
    """
    beside = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        yield beside
        if lasting:
            sync(beside)
        beside.replace(path)
        if lasting:
            sync(path.parent)
    except Exception:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, *content: bytes, mode: int = 0o666) -> None:
    """Have `path` hold this, whole or not at all, even if the power is lost. A new file gets the permissions `mode`, less what
    the process's umask takes away. Raises `OSError`."""
    with replacing(path) as beside:
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            for part in content:
                file.write(part)
