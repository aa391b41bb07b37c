"""Anybody's logits as a teacher: a file of numbers per text, from any framework.

CSV, TSV, JSONL or Parquet with a column `id` or `text` and one column per label, or npz with arrays `logits`, `ids` or
`texts`, and `label_names` (without it, the columns are in the order of the run's labels).
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.errors import InputError
from emodistill.formats import MISSING, ProblemList, open_rows
from emodistill.thresholds import probabilities_to_logits

__all__ = ["TeacherLogits", "read_teacher_logits"]

KEY_COLUMNS = ("id", "text")

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """What a teacher says about texts.

    Attributes
    ----------
    path : Path
    key : str
        "id" or "text": what names a row.
    rows : dict of str to int
        Position of each name.
    logits : float32 array of shape (n_rows, n_labels)
        In the order of the labels that were asked for.
    """

    path: Path
    key: str
    rows: dict[str, int]
    logits: Float32Array

    def of(self, names: Sequence[str]) -> tuple[npt.NDArray[np.bool_], Float32Array]:
        """Return which of the rows are known, bool (n,), and the logits of these, float32 (n_known, n_labels)."""
        positions = np.array([self.rows.get(name, -1) for name in names], np.int64)
        known = positions >= 0
        return known, self.logits[positions[known]]


def read_teacher_logits(path: Path, label_names: Sequence[str], *, scale: str | None = None) -> TeacherLogits:
    """Read a teacher's file.

    Parameters
    ----------
    path : Path
        Its suffix names the format: .csv, .tsv, .jsonl, .parquet or .npz.
    label_names : sequence of str
        Labels that are wanted; further columns are ignored.
    scale : str, optional
        What the numbers are: "logits", or "probabilities" in [0, 1], which become logits. Left out, they are taken for
        logits unless all lie within 0 and 1: that is refused.

    Raises
    ------
    InputError
        If a label or the rows' names are missing, a number is none, a row is named twice with different numbers, or
        the numbers are not of that scale.
    """
    names, numbers, key = (_read_npz if path.suffix.lower() == ".npz" else _read_rows)(path, label_names)
    _check_scale(path, numbers, scale)
    rows: dict[str, int] = {}
    for position, name in enumerate(names):
        first = rows.setdefault(name, position)
        if first != position and not np.array_equal(numbers[first], numbers[position]):
            raise InputError(
                f"{path}: {key} '{name[:60]}' comes twice with different numbers (rows {first + 1} and "
                f"{position + 1}): keep one of them"
            )
    logits = probabilities_to_logits(numbers) if scale == "probabilities" else numbers.astype(np.float32)
    return TeacherLogits(path=path, key=key, rows=rows, logits=logits)


def _check_scale(path: Path, numbers: npt.NDArray[np.float64], scale: str | None) -> None:
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
    within = low >= 0 and high <= 1
    if scale == "probabilities" and not within:
        raise InputError(f"{path}: numbers from {low:g} to {high:g} are no probabilities: leave --teacher-scale out")
    if scale is None and within and numbers.size:
        raise InputError(
            f"{path}: all numbers lie between 0 and 1, which logits hardly do: say --teacher-scale probabilities, "
            "or logits if that is what they are"
        )


def _read_rows(path: Path, label_names: Sequence[str]) -> tuple[list[str], npt.NDArray[np.float64], str]:
    problems = ProblemList()
    names: list[str] = []
    numbers: list[list[float]] = []
    with open_rows(path, problems, expected=label_names) as rows:
        columns = list(rows.columns)
        key = next((column for column in KEY_COLUMNS if column in columns), None)
        if key is None:
            raise InputError(f"{path}: there is no column 'id' or 'text' to say which text a row is about: add one")
        missing = [name for name in label_names if name not in columns]
        if missing:
            raise InputError(
                f"{path}: there is no column '{missing[0]}': one per label of the run is needed "
                f"({', '.join(label_names)})"
            )
        places = [columns.index(name) for name in label_names]
        key_place = columns.index(key)
        for row in rows:
            name = row.values[key_place]
            if name is MISSING or name is None or (name == "" and key == "id"):
                problems.add("name", f"the {key} is missing: name the text that the row is about", line=row.line)
            names.append(str(name))
            numbers.append(
                [
                    _number(row.values[place], problems, row.line, label)
                    for place, label in zip(places, label_names, strict=True)
                ]
            )
    problems.raise_if_any(path)
    if not names:
        raise InputError(f"{path}: there are no rows: one per text is needed")
    return names, np.array(numbers, np.float64), key


def _number(value: Any, problems: ProblemList, line: int, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = "nothing" if value is MISSING or value is None or value == "" else repr(value)
        problems.add("number", f"{shown} is no finite number: give the teacher's number", line=line, column=column)
    return number


def _read_npz(path: Path, label_names: Sequence[str]) -> tuple[list[str], npt.NDArray[np.float64], str]:
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: check the path") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as npz without pickle ({error}): save plain arrays") from error
    key = next((column for column in KEY_COLUMNS if f"{column}s" in arrays), None)
    if "logits" not in arrays or key is None:
        raise InputError(
            f"{path}: holds {', '.join(arrays) or 'nothing'}; arrays 'logits' and 'ids' (or 'texts') are needed"
        )
    names = [str(name) for name in arrays[f"{key}s"].ravel()]
    numbers = arrays["logits"]
    own = [str(name) for name in arrays["label_names"]] if "label_names" in arrays else list(label_names)
    if numbers.shape != (len(names), len(own)) or numbers.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: 'logits' is {numbers.dtype} of shape {numbers.shape}, but {len(names)} {key}s and {len(own)} "
            f"labels need numbers of shape ({len(names)}, {len(own)})"
        )
    missing = [name for name in label_names if name not in own]
    if missing:
        raise InputError(f"{path}: 'label_names' lacks '{missing[0]}': all labels of the run are needed")
    if not names:
        raise InputError(f"{path}: there are no rows: one per text is needed")
    numbers = numbers[:, [own.index(name) for name in label_names]].astype(np.float64)
    if not np.isfinite(numbers).all():
        row, column = np.argwhere(~np.isfinite(numbers))[0].tolist()
        raise InputError(
            f"{path}: row {row + 1} ({key} '{names[row][:60]}'), label '{label_names[column]}': "
            f"{numbers[row, column]} is no finite number"
        )
    return names, numbers, key
