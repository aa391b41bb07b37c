"""A file that is written beside its place and renamed into it, so that nobody ever sees half of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emodistill.errors import InputError
from emodistill.formats import PathLike

__all__ = ["replaced_file"]


@contextmanager
def replaced_file(path: PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, remove it on any error.

    Raises
    ------
    InputError
        If the folder cannot be made or written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
