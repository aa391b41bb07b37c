"""From labelled or unlabelled files to texts, ids and multi-hot labels, and from predictions back to files.

One set of rules holds for every format: the column `text` holds the texts, `id` (optional) names the rows, and every
other column is a label with values 0 and 1, in the order of the header. No text is ever taken as missing or as a
number. `checking.check_file` reports the same faults without stopping at the first.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from emodistill.checking import CheckReport, check_file
from emodistill.errors import ConfigError, InputError
from emodistill.formats import MISSING, PathLike, ProblemList, cell_text, open_rows
from emodistill.predictions import write_predictions
from emodistill.scanning import ID_COLUMN, TEXT_COLUMN, LabelMode, find_layout, scan_rows
from emodistill.submission import write_submission

__all__ = [
    "CheckReport",
    "Dataset",
    "Record",
    "check_file",
    "file_fingerprint",
    "iter_text_records",
    "read_dataset",
    "read_texts",
    "row_fingerprints",
    "write_predictions",
    "write_submission",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """The rows of a file.

    Attributes
    ----------
    path : Path
    texts : list of str
    label_names : tuple of str
        In the order of the header, or the order that was asked for; empty if there are no labels.
    labels : int8 array of shape (n_rows, n_labels), in {0, 1}, or None
    ids : list of str or None
    columns : tuple of str
        All columns of the file, in its order.
    other_columns : dict of list of str
        The values of the columns that are neither text nor id nor labels, as text.
    """

    path: Path
    texts: list[str]
    label_names: tuple[str, ...]
    labels: npt.NDArray[np.int8] | None
    ids: list[str] | None
    columns: tuple[str, ...]
    other_columns: dict[str, list[str]] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.texts)


class Record(NamedTuple):
    """A row to predict: its id as text (None if the file has none), its text, and all its values by column."""

    id: str | None
    text: str
    row: dict[str, Any]


def read_dataset(path: PathLike, *, label_names: Sequence[str] | None = None, require_labels: bool = True) -> Dataset:
    """Read a whole file of texts and labels.

    Parameters
    ----------
    path : path
        A .csv, .tsv, .jsonl or .parquet file.
    label_names : sequence of str, optional
        The label columns, and their order; by default all columns but `text` and `id`, in the order of the file.
    require_labels : bool, default True
        If False, a file without any label column, or whose label cells are all empty, gives `labels=None`.

    Returns
    -------
    Dataset

    Raises
    ------
    InputError
        If anything in the file is wrong; the message names line, column and value of the first fault.
    ConfigError
        If `label_names` repeats a name or contains "text" or "id".

    Examples
    --------
    >>> dataset = read_dataset("train.csv")  # doctest: +SKIP
    >>> dataset.labels.shape  # doctest: +SKIP
    (25196, 7)
    """
    if label_names is not None:
        _check_label_names(label_names)
    return _read(path, label_names, "required" if require_labels else "optional")


def read_texts(path: PathLike) -> Dataset:
    """Read the texts and ids of a whole file, whatever its other columns hold.

    Parameters
    ----------
    path : path
        A .csv, .tsv, .jsonl or .parquet file with a column `text`.

    Returns
    -------
    Dataset
        With `labels=None` and no label names; all further columns are in `other_columns`.

    Raises
    ------
    InputError
        If the file cannot be read or has no column `text`.
    """
    return _read(path, None, "ignored")


def iter_text_records(path: PathLike, chunk_rows: int = 1024, *, check_first: bool = True) -> Iterator[list[Record]]:
    """Read the rows of a file in chunks, in its order and in constant memory.

    Parameters
    ----------
    path : path
        A .csv, .tsv, .jsonl or .parquet file with a column `text`.
    chunk_rows : int, default 1024
        Rows per chunk; the last one may have fewer.
    check_first : bool, default True
        Read the file once before the first chunk (about 3 s per million rows), so that a fault near its end is found
        before the work and not after it.

    Returns
    -------
    iterator of list of Record

    Raises
    ------
    InputError
        If anything in the file is wrong: at once with `check_first`, else when the faulty line is reached.
    """
    if chunk_rows < 1:
        raise ConfigError(f"chunk_rows is {chunk_rows}: give 1 or more")
    if check_first:
        _check_texts(path)
    return _in_chunks(_text_records(path), chunk_rows)


def row_fingerprints(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Return a stable 64-bit hash of each text.

    Parameters
    ----------
    texts : sequence of str

    Returns
    -------
    uint64 array of shape (n_texts,)
        BLAKE2b with 8 bytes of the UTF-8 text, read as a little-endian number.
    """
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def file_fingerprint(path: PathLike) -> str:
    """Return "sha256:" and the hash of a file's bytes.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}: check the path") from error


def _check_label_names(label_names: Sequence[str]) -> None:
    if isinstance(label_names, str):
        raise ConfigError(f"label_names is the string '{label_names}': give a list of names")
    for name in label_names:
        if name in (TEXT_COLUMN, ID_COLUMN):
            raise ConfigError(f"label_names contains '{name}', which is not a label: remove it")
    if len(set(label_names)) < len(label_names):
        repeated = next(name for name in label_names if list(label_names).count(name) > 1)
        raise ConfigError(f"label_names contains '{repeated}' twice: remove one")


def _read(path: PathLike, label_names: Sequence[str] | None, mode: LabelMode) -> Dataset:
    problems = ProblemList()
    texts: list[str] = []
    ids: list[str] = []
    label_rows: list[bytes] = []
    with open_rows(path, problems, expected=(TEXT_COLUMN, *(label_names or ()))) as rows:
        layout = find_layout(rows, problems, label_names=label_names, mode=mode)
        taken = {layout.text, layout.id, *layout.labels}
        others = [position for position in range(len(rows.header)) if position not in taken]
        other_values: list[list[str]] = [[] for _ in others]
        for row in scan_rows(rows, layout, problems, mode=mode):
            if row.text is not None:
                texts.append(row.text)
            if row.id is not None:
                ids.append(row.id)
            if row.labels is not None:
                label_rows.append(row.labels)
            for position, values in zip(others, other_values, strict=True):
                values.append(cell_text(row.values[position]))
        columns = rows.header
    problems.raise_if_any(path)
    labels = None
    if label_rows:
        labels = np.frombuffer(b"".join(label_rows), dtype=np.int8).reshape(len(texts), -1).copy()
    return Dataset(
        path=Path(path),
        texts=texts,
        label_names=layout.label_names if labels is not None else (),
        labels=labels,
        ids=ids or None,
        columns=columns,
        other_columns={columns[position]: values for position, values in zip(others, other_values, strict=True)},
    )


def _check_texts(path: PathLike) -> None:
    """Raise `InputError` if any row of a file cannot be predicted."""
    problems = ProblemList()
    with open_rows(path, problems, expected=(TEXT_COLUMN,)) as rows:
        layout = find_layout(rows, problems, label_names=None, mode="ignored")
        for _ in scan_rows(rows, layout, problems, mode="ignored"):
            pass
    problems.raise_if_any(path)


def _text_records(path: PathLike) -> Iterator[Record]:
    problems = ProblemList()
    with open_rows(path, problems, expected=(TEXT_COLUMN,)) as rows:
        layout = find_layout(rows, problems, label_names=None, mode="ignored")
        for row in scan_rows(rows, layout, problems, mode="ignored"):
            if problems.total or row.text is None:
                break
            values = {name: value for name, value in zip(rows.columns, row.values, strict=True) if value is not MISSING}
            yield Record(row.id, row.text, values | row.extra if row.extra else values)
    problems.raise_if_any(path)


def _in_chunks(records: Iterator[Record], chunk_rows: int) -> Iterator[list[Record]]:
    while chunk := list(islice(records, chunk_rows)):
        yield chunk
