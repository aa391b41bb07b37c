"""From decisions to the competition's zip: `submission.csv` alone, in the input's columns and row order."""

import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from emodistill.errors import ConfigError
from emodistill.formats import PathLike
from emodistill.predictions import csv_line
from emodistill.replacement import replaced_file
from emodistill.scanning import ID_COLUMN, TEXT_COLUMN

if TYPE_CHECKING:
    from emodistill.data import Dataset

__all__ = ["SUBMISSION_NAME", "write_submission"]

SUBMISSION_NAME: Final = "submission.csv"
_FIXED_TIME: Final = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold: equal decisions give equal bytes


def write_submission(
    zip_path: PathLike,
    dataset: "Dataset",
    decisions: npt.NDArray[np.integer],
    *,
    label_names: Sequence[str] | None = None,
) -> None:
    """Write a submission; the same arguments give the same bytes, and an older file is replaced.

    Parameters
    ----------
    zip_path : path
        Its folder is made if it is missing.
    dataset : Dataset
        The test rows. The values of its label columns are placeholders and are replaced.
    decisions : int array of shape (n_rows, n_labels), in {0, 1}
    label_names : sequence of str, optional
        The labels of the columns of `decisions`, by default those of `dataset`. A label that is not among the
        dataset's columns becomes a further column at the end.

    Raises
    ------
    ConfigError
        If `decisions` has another shape or holds another value.
    InputError
        If the zip cannot be written.
    """
    names = tuple(dataset.label_names if label_names is None else label_names)
    decisions = np.asarray(decisions)
    if decisions.shape != (dataset.n_rows, len(names)):
        expected = (dataset.n_rows, len(names))
        raise ConfigError(
            f"decisions have the shape {decisions.shape}, expected {expected}: one row per row of the file"
        )
    if not np.isin(decisions, (0, 1)).all():
        raise ConfigError("decisions hold a value other than 0 and 1: apply thresholds to the probabilities first")
    content = _submission_csv(dataset, decisions.astype(np.int8), names).encode("utf-8")
    with replaced_file(zip_path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        entry = zipfile.ZipInfo(SUBMISSION_NAME, date_time=_FIXED_TIME)
        entry.compress_type = zipfile.ZIP_DEFLATED
        entry.create_system = 3  # Unix, wherever this runs
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, content)


def _submission_csv(dataset: "Dataset", decisions: npt.NDArray[np.int8], names: tuple[str, ...]) -> str:
    n_rows = dataset.n_rows
    values: dict[str, list[str]] = {name: [""] * n_rows for name in dataset.columns} | dataset.other_columns
    values[TEXT_COLUMN] = dataset.texts
    if dataset.ids is not None:
        values[ID_COLUMN] = dataset.ids
    if dataset.labels is not None:
        values |= {name: _digits(dataset.labels[:, i]) for i, name in enumerate(dataset.label_names)}
    values |= {name: _digits(decisions[:, i]) for i, name in enumerate(names)}
    columns = [*dataset.columns, *(name for name in names if name not in dataset.columns)]
    rows = zip(*(values[name] for name in columns), strict=True)
    return csv_line(columns) + "".join(map(csv_line, rows))


def _digits(column: npt.NDArray[np.int8]) -> list[str]:
    return ["1" if value else "0" for value in column.tolist()]
