"""Pieces of a run folder: written beside and renamed into place, ended by a mark, found again by fingerprint.

A *piece* is a folder (a member, the combined ensemble, a student, a bundle). It is built in a hidden folder next to its
place, `.NAME.part/`, which survives a kill so that the builder can go on in it. Publishing writes the end mark,
`complete.json` (the fingerprint of config and inputs, and size and sha256 of every file), and renames the folder into
place. A piece without its end mark, with another fingerprint, or with a file that is not the marked one does not exist.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np

from emodistill.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "END_MARK_NAME",
    "FolderLock",
    "Piece",
    "PieceState",
    "file_sha256",
    "fingerprint",
    "part_folder",
    "piece_state",
    "publish_piece",
    "read_json",
    "remove_piece",
    "start_piece",
    "write_bytes",
    "write_json",
    "writing_beside",
]

END_MARK_NAME = "complete.json"
START_MARK_NAME = "started.json"  # in a part folder: whose config and inputs the half-made files belong to
READ_SIZE = 1 << 20


# ---------------------------------------------------------------- files


@contextmanager
def writing_beside(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`; rename it into place when the block ends, remove it when the block fails.

    Readers see the old file or the whole new one, never a part of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with beside.open("rb") as handle:
            os.fsync(handle.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with writing_beside(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all.

    Dataclasses, NumPy scalars and arrays, paths and sets of settings are converted; NaN and infinities are refused,
    because JSON has no word for them.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    ArtifactError
        If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist: run the stage that writes it first") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}): delete it and run the stage again") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(READ_SIZE):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """Return a short stable name for a combination of settings and inputs.

    Equal values give equal names in every process and on every machine: keys are sorted, floats written exactly,
    arrays enter by dtype, shape and bytes.

    Examples
    --------
    >>> fingerprint({"epochs": 3, "seed": 1}) == fingerprint({"seed": 1, "epochs": 3})
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"array {part.dtype.str} {part.shape}\n".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            canonical = json.dumps(part, sort_keys=True, separators=(",", ":"), default=_plain)
            digest.update(f"value {canonical}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Convert what JSON does not know into what it does."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


# ---------------------------------------------------------------- pieces


PieceState = Literal["done", "missing", "stale", "damaged", "interrupted"]


@dataclass(frozen=True)
class Piece:
    """What was found where a piece should be.

    Attributes
    ----------
    folder : Path
        Place of the finished piece.
    state : {"done", "missing", "stale", "damaged", "interrupted"}
        "done": whole and made from these inputs; "stale": whole, made from others; "damaged": in place, but without an
        end mark or with a file that is not the marked one; "interrupted": not in place, half made from these inputs.
    reason : str
        One clause for people; empty when done.
    """

    folder: Path
    state: PieceState
    reason: str = ""

    @property
    def is_done(self) -> bool:
        """Whether nothing has to be made."""
        return self.state == "done"


def part_folder(folder: Path) -> Path:
    """Return where the piece of `folder` is built: ``.NAME.part`` beside it."""
    return folder.with_name(f".{folder.name}.part")


def piece_state(folder: Path, expected_fingerprint: str, *, verify: bool = True) -> Piece:
    """Say whether a piece exists, whole and made from the given config and inputs.

    Parameters
    ----------
    folder : Path
        Place of the finished piece.
    expected_fingerprint : str
        From `fingerprint`.
    verify : bool
        Compare the sha256 of every file too, not only its presence and size.

    Returns
    -------
    Piece
    """
    if not folder.is_dir():
        if _start_mark(part_folder(folder)) == expected_fingerprint:
            return Piece(folder, "interrupted", "begun and not ended")
        return Piece(folder, "missing", "not made yet")
    mark = _end_mark(folder)
    if mark is None:
        return Piece(folder, "damaged", f"no readable end mark {END_MARK_NAME}")
    if mark["fingerprint"] != expected_fingerprint:
        return Piece(folder, "stale", "made from other settings or inputs")
    for name, entry in mark["files"].items():
        fault = _file_fault(folder / name, entry, verify=verify)
        if fault:
            return Piece(folder, "damaged", f"{name} {fault}")
    return Piece(folder, "done")


def start_piece(folder: Path, expected_fingerprint: str) -> Path:
    """Return the part folder to build a piece in.

    What an interrupted build from the same config and inputs left there is kept, for the builder to go on from;
    what belongs to others is removed.
    """
    part = part_folder(folder)
    if part.exists() and _start_mark(part) != expected_fingerprint:
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    write_json(part / START_MARK_NAME, {"fingerprint": expected_fingerprint})
    return part


def publish_piece(folder: Path, expected_fingerprint: str, *, description: Any = None) -> None:
    """End mark the part folder and rename it into place, over whatever was there.

    Parameters
    ----------
    folder : Path
        Place of the finished piece; its part folder holds all files.
    expected_fingerprint : str
        From `fingerprint`; what a later `piece_state` is asked for.
    description : object, optional
        JSON value kept in the mark for people: the settings that the fingerprint stands for.
    """
    part = part_folder(folder)
    (part / START_MARK_NAME).unlink(missing_ok=True)
    files = {
        path.relative_to(part).as_posix(): {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(part.rglob("*"))
        if path.is_file() and path.name != END_MARK_NAME
    }
    if not files:
        raise ArtifactError(f"{part} holds no file: the stage that should have filled it left nothing")
    write_json(part / END_MARK_NAME, {"fingerprint": expected_fingerprint, "made_from": description, "files": files})
    remove_piece(folder)
    part.rename(folder)


def remove_piece(folder: Path) -> None:
    """Remove a piece; a kill meanwhile leaves it without its end mark, that is, not existing."""
    if folder.is_dir():
        (folder / END_MARK_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _end_mark(folder: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((folder / END_MARK_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(mark, dict) and isinstance(mark.get("files"), dict) and "fingerprint" in mark
    return mark if is_whole else None


def _start_mark(part: Path) -> str | None:
    try:
        return str(json.loads((part / START_MARK_NAME).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file_fault(path: Path, entry: Mapping[str, Any], *, verify: bool) -> str:
    if not path.is_file():
        return "is missing"
    size_bytes = path.stat().st_size
    if size_bytes != entry["size_bytes"]:
        return f"has {size_bytes:,} bytes instead of {entry['size_bytes']:,}"
    if verify and _known_sha256(path, size_bytes, path.stat().st_mtime_ns) != entry["sha256"]:
        return "is not the file that was written (its sha256 differs)"
    return ""


@lru_cache(maxsize=4096)
def _known_sha256(path: Path, size_bytes: int, changed_ns: int) -> str:
    """Hash a file once per process and state: stages ask for the same gigabytes of weights again and again."""
    return file_sha256(path)


# ---------------------------------------------------------------- one process per run folder


class FolderLock:
    """Let one process at a time work on a folder.

    The lock is the operating system's (`flock` on the file ``.lock``), so that it ends with its process: a killed run
    leaves nothing to clean up. Systems without `flock` go unlocked.

    Parameters
    ----------
    folder : Path
        Made when missing.

    Raises
    ------
    ArtifactError
        On entering, when a living process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: IO[str] | None = None

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = (self._folder / ".lock").open("a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.seek(0)
                owner = handle.read().strip() or "unknown"
                handle.close()
                raise ArtifactError(
                    f"{self._folder} is in use by another run (process {owner}): "
                    "wait for it to end, or choose another folder"
                ) from error
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.truncate(0)
            self._handle.close()
            self._handle = None
