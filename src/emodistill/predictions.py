"""From probabilities and decisions to a predictions file in CSV, JSONL or Parquet, chunk by chunk, never half written.

A CSV or Parquet file has the columns `id` (if the input has ids), `text`, the columns that were asked to be kept, one
0/1 column per label, and one column `probability_LABEL` per label. A JSONL record has `id`, `text`, the kept keys,
`labels` (the names of the positive ones) and `probabilities`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from emodistill.errors import ConfigError, MissingExtraError
from emodistill.formats import MISSING, PathLike, cell_text, file_format
from emodistill.replacement import replaced_file
from emodistill.scanning import ID_COLUMN, TEXT_COLUMN

if TYPE_CHECKING:
    from emodistill.data import Record

__all__ = ["PredictionWriter", "csv_line", "open_predictions", "write_predictions"]

_NEEDS_QUOTES: Final = re.compile('[",\r\n]')
_N_DECIMALS: Final = 6
_JSON: Final = json.JSONEncoder(ensure_ascii=False, default=str)


class PredictionWriter(Protocol):
    """Takes the predictions of consecutive chunks of records."""

    def write(
        self, records: Sequence["Record"], probabilities: npt.NDArray[np.floating], decisions: npt.NDArray[np.integer]
    ) -> None:
        """Append one row per record: `probabilities` and `decisions` have the shape (n_records, n_labels)."""
        ...


def csv_line(cells: Iterable[str], delimiter: str = ",") -> str:
    """Return an RFC 4180 line with `\\n` at its end; empty cells are quoted, so that no line is blank.

    Examples
    --------
    >>> print(csv_line(["so, yes", "a 5\\" nail", "1"]), end="")
    "so, yes","a 5"" nail",1
    """
    quoted = [
        '"' + cell.replace('"', '""') + '"' if not cell or delimiter in cell or _NEEDS_QUOTES.search(cell) else cell
        for cell in cells
    ]
    return delimiter.join(quoted) + "\n"


@contextmanager
def open_predictions(
    path: PathLike,
    label_names: Sequence[str],
    *,
    kept_columns: Sequence[str] = (),
    with_text: bool = True,
    with_probabilities: bool = True,
) -> Iterator[PredictionWriter]:
    """Open a predictions file that appears at `path` when the `with` block ends without an error.

    Parameters
    ----------
    path : path
        A .csv, .tsv, .jsonl or .parquet file; its folder is made.
    label_names : sequence of str
    kept_columns : sequence of str, default ()
        Further columns of the input that are copied.
    with_text : bool, default True
    with_probabilities : bool, default True

    Yields
    ------
    PredictionWriter

    Raises
    ------
    InputError
        If the suffix is unknown or the folder cannot be written to.
    ConfigError
        If a kept column has the name of an output column.
    MissingExtraError
        If the file is Parquet and pyarrow is not installed.
    """
    kind = file_format(path)
    made = {*label_names, *(f"probability_{name}" for name in label_names)} if kind != "JSONL" else {"probabilities"}
    for name in kept_columns:
        if name in made or name in (TEXT_COLUMN, ID_COLUMN, "labels"):
            raise ConfigError(f"the column '{name}' cannot be kept: the predictions write a column of that name")
    columns = _Columns(tuple(label_names), tuple(kept_columns), with_text, with_probabilities)
    with replaced_file(path) as temporary:
        if kind == "Parquet":
            parquet = _ParquetWriter(temporary, columns)
            try:
                yield parquet
            finally:
                parquet.close()
        else:
            with open(temporary, "w", encoding="utf-8", newline="") as stream:
                if kind == "JSONL":
                    yield _JsonlWriter(stream, columns)
                else:
                    delimited = _DelimitedWriter(stream, columns, "," if kind == "CSV" else "\t")
                    yield delimited
                    delimited.close()


def write_predictions(
    path: PathLike,
    chunks: Iterable[tuple[Sequence["Record"], npt.NDArray[np.floating], npt.NDArray[np.integer]]],
    label_names: Sequence[str],
    *,
    kept_columns: Sequence[str] = (),
    with_text: bool = True,
    with_probabilities: bool = True,
) -> int:
    """Write (records, probabilities, decisions) of consecutive chunks to a file, as `open_predictions` does.

    Returns
    -------
    int
        Number of rows written.
    """
    n_rows = 0
    with open_predictions(
        path,
        label_names,
        kept_columns=kept_columns,
        with_text=with_text,
        with_probabilities=with_probabilities,
    ) as writer:
        for records, probabilities, decisions in chunks:
            writer.write(records, probabilities, decisions)
            n_rows += len(records)
    return n_rows


class _Columns:
    """Which columns an output file has; whether it has ids is known with its first record."""

    def __init__(
        self, label_names: tuple[str, ...], kept: tuple[str, ...], with_text: bool, with_probabilities: bool
    ) -> None:
        self.label_names, self.kept = label_names, kept
        self.with_text, self.with_probabilities = with_text, with_probabilities

    def check(self, records: Sequence["Record"], probabilities: npt.NDArray[Any], decisions: npt.NDArray[Any]) -> None:
        expected = (len(records), len(self.label_names))
        for name, array in (("probabilities", probabilities), ("decisions", decisions)):
            if array.shape != expected:
                raise ConfigError(f"{name} have the shape {array.shape}, expected {expected}: one row per record")

    def inputs(self, has_id: bool) -> list[str]:
        return [ID_COLUMN] * has_id + [TEXT_COLUMN] * self.with_text + list(self.kept)

    def outputs(self) -> list[str]:
        probabilities = [f"probability_{name}" for name in self.label_names] if self.with_probabilities else []
        return [*self.label_names, *probabilities]


class _DelimitedWriter:
    def __init__(self, stream: Any, columns: _Columns, delimiter: str) -> None:
        self._stream, self._columns, self._delimiter = stream, columns, delimiter
        self._inputs: list[str] | None = None

    def write(
        self, records: Sequence["Record"], probabilities: npt.NDArray[np.floating], decisions: npt.NDArray[np.integer]
    ) -> None:
        self._columns.check(records, probabilities, decisions)
        if self._inputs is None and records:
            self._start(has_id=records[0].id is not None)
        lines = []
        for record, row_probabilities, row_decisions in zip(
            records, probabilities.tolist(), decisions.tolist(), strict=True
        ):
            cells = [cell_text(record.row.get(name)) for name in self._inputs or ()]
            cells += [str(int(decision)) for decision in row_decisions]
            if self._columns.with_probabilities:
                cells += [f"{probability:.{_N_DECIMALS}f}" for probability in row_probabilities]
            lines.append(csv_line(cells, self._delimiter))
        self._stream.write("".join(lines))

    def close(self) -> None:
        if self._inputs is None:
            self._start(has_id=False)

    def _start(self, *, has_id: bool) -> None:
        self._inputs = self._columns.inputs(has_id)
        self._stream.write(csv_line([*self._inputs, *self._columns.outputs()], self._delimiter))


class _JsonlWriter:
    def __init__(self, stream: Any, columns: _Columns) -> None:
        self._stream, self._columns = stream, columns

    def write(
        self, records: Sequence["Record"], probabilities: npt.NDArray[np.floating], decisions: npt.NDArray[np.integer]
    ) -> None:
        columns, names = self._columns, self._columns.label_names
        columns.check(records, probabilities, decisions)
        lines = []
        for record, row_probabilities, row_decisions in zip(
            records, probabilities.tolist(), decisions.tolist(), strict=True
        ):
            inputs = columns.inputs(record.id is not None)
            out = {name: record.row[name] for name in inputs if record.row.get(name, MISSING) is not MISSING}
            out["labels"] = [name for name, decision in zip(names, row_decisions, strict=True) if decision]
            if columns.with_probabilities:
                rounded = [round(probability, _N_DECIMALS) for probability in row_probabilities]
                out["probabilities"] = dict(zip(names, rounded, strict=True))
            lines.append(_JSON.encode(out) + "\n")
        self._stream.write("".join(lines))


class _ParquetWriter:
    def __init__(self, path: Path, columns: _Columns) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise MissingExtraError.for_extra("pyarrow", "parquet") from error
        self._pyarrow, self._path, self._columns = pyarrow, path, columns
        self._writer: Any = None
        self._inputs: list[str] = []

    def write(
        self, records: Sequence["Record"], probabilities: npt.NDArray[np.floating], decisions: npt.NDArray[np.integer]
    ) -> None:
        self._columns.check(records, probabilities, decisions)
        if self._writer is None:
            self._start(has_id=bool(records) and records[0].id is not None)
        arrays: list[Any] = [[cell_text(record.row.get(name)) for record in records] for name in self._inputs]
        arrays += [decisions[:, i].astype(np.int8) for i in range(decisions.shape[1])]
        if self._columns.with_probabilities:
            arrays += [probabilities[:, i].astype(np.float32) for i in range(probabilities.shape[1])]
        columns = [
            self._pyarrow.array(values, type=field.type)
            for values, field in zip(arrays, self._writer.schema, strict=True)
        ]
        self._writer.write_table(self._pyarrow.Table.from_arrays(columns, schema=self._writer.schema))

    def close(self) -> None:
        if self._writer is None:
            self._start(has_id=False)
        self._writer.close()

    def _start(self, *, has_id: bool) -> None:
        pyarrow, n_labels = self._pyarrow, len(self._columns.label_names)
        self._inputs = self._columns.inputs(has_id)
        types = [pyarrow.string()] * len(self._inputs) + [pyarrow.int8()] * n_labels
        types += [pyarrow.float32()] * (n_labels if self._columns.with_probabilities else 0)
        schema = pyarrow.schema(list(zip([*self._inputs, *self._columns.outputs()], types, strict=True)))
        self._writer = pyarrow.parquet.ParquetWriter(self._path, schema)
