"""From the rows of a file to texts, ids and label values, every fault reported, in one pass."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple

from emodistill.formats import MISSING, ProblemList, RowFile, cell_text

__all__ = ["ID_COLUMN", "TEXT_COLUMN", "LabelMode", "Layout", "ScannedRow", "find_layout", "parse_label", "scan_rows"]

TEXT_COLUMN: Final = "text"
ID_COLUMN: Final = "id"
LabelMode = Literal["required", "optional", "ignored"]

_LABEL_KIND: Final = "not a label value"
_NO_KEY_KIND: Final = "label that a record lacks"
_UNKNOWN_KEY_KIND: Final = "key that the first record lacks"
_MAX_PATTERNS: Final = 1 << 16
_LABEL_SPELLING: Final = re.compile(r"(?P<zero>[+-]?0(?:\.0*)?|false)|\+?1(?:\.0*)?|true", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where text, id and labels stand among the columns of a file.

    Attributes
    ----------
    text : int or None
        Position of the column of texts; None if it is missing, which is a reported fault.
    id : int or None
    labels : tuple of int
        Positions of the label columns, in the order of `label_names`; empty if the file has none.
    label_names : tuple of str
    is_closed : bool
        Whether each column beside text and id is a label, so that a further key in a later record is a fault.
    """

    text: int | None
    id: int | None
    labels: tuple[int, ...]
    label_names: tuple[str, ...]
    is_closed: bool = False


class ScannedRow(NamedTuple):
    """A row: None stands for a text or labels that are missing or faulty."""

    line: int
    text: str | None
    id: str | None
    labels: bytes | None
    values: Sequence[Any]
    extra: dict[str, Any] | None


def parse_label(value: object) -> int | None:
    """Return 0 or 1 for any harmless spelling of a label value, None for anything else.

    Examples
    --------
    >>> [parse_label(value) for value in (1, "1", "1.0", True, "false", 0.0, 2, "", "yes", None)]
    [1, 1, 1, 1, 0, 0, None, None, None, None]
    """
    if isinstance(value, str):
        match = _LABEL_SPELLING.fullmatch(value.strip())
        return None if match is None else int(match["zero"] is None)
    if isinstance(value, (bool, int, float, Decimal)) and value in (0, 1):
        return int(value)
    return None


def find_layout(rows: RowFile, problems: ProblemList, *, label_names: Sequence[str] | None, mode: LabelMode) -> Layout:
    """Find the columns of texts, ids and labels, and report those that are missing.

    Without `label_names`, every column but `text` and `id` is a label. In mode "optional" a file may have no label
    column at all, but not some of them.
    """
    columns = rows.columns
    listed = ", ".join(columns)
    if TEXT_COLUMN not in columns:
        problems.add("header", f"no column '{TEXT_COLUMN}' among {listed}: {_text_hint(columns)}", line=1)
    names: Sequence[str] = ()
    if mode != "ignored" and label_names is None:
        names = tuple(dict.fromkeys(name for name in columns if name not in (TEXT_COLUMN, ID_COLUMN)))
    elif mode != "ignored" and label_names is not None:
        names = label_names
    missing = [name for name in names if name not in columns]
    if mode == "optional" and len(missing) == len(names):
        names = missing = []
    for name in missing:
        message = f"no column for the label '{name}' among {listed}: add it with 0 or 1 in every row"
        problems.add("header", message, line=1, column=name)
    if mode == "required" and not names:
        problems.add("header", f"no label columns, only {listed}: add one column of 0 and 1 for each label", line=1)
    first = {name: position for position, name in reversed(list(enumerate(columns)))}
    found = tuple(name for name in names if name in first)
    return Layout(
        text=first.get(TEXT_COLUMN),
        id=first.get(ID_COLUMN),
        labels=tuple(first[name] for name in found),
        label_names=found,
        is_closed=label_names is None and bool(found) and rows.format == "JSONL",
    )


def _text_hint(columns: Sequence[str]) -> str:
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
        if len(columns) == 1 and separator in columns[0]:
            advice = " or name it .tsv" if separator == "\t" else ""
            return f"the columns seem to be separated by {name}: save the file with commas{advice}"
    return f"name the column that holds the texts '{TEXT_COLUMN}'"


def scan_rows(rows: RowFile, layout: Layout, problems: ProblemList, *, mode: LabelMode) -> Iterator[ScannedRow]:
    """Yield every row; report faulty texts, ids and label values.

    In mode "optional" a row whose label cells are all empty is a row without labels; such rows beside labelled ones
    are a fault.
    """
    labels = _LabelReader(layout, problems, optional=mode == "optional")
    first_has_id: bool | None = None
    n_rows = 0
    for line, values, extra in rows:
        n_rows += 1
        text = None if layout.text is None else values[layout.text]
        if layout.text is not None and not isinstance(text, str):
            found = "the record has no such key" if text is MISSING else f"{_shown(text)} is not a text"
            problems.add("not a text", f"{found}: give every row a text", line=line, column=TEXT_COLUMN)
            text = None
        if extra is not None and layout.is_closed:
            for key in (key for key in extra if key != ID_COLUMN):
                problems.add(_UNKNOWN_KEY_KIND, "the first record has no such key", line=line, column=key)
        row_id = _find_id(layout, values, extra)
        if first_has_id is None:
            first_has_id = row_id is not None
        elif first_has_id != (row_id is not None):
            found = "no id, and the first record has one" if first_has_id else "an id, and the first record has none"
            problems.add("id", f"{found}: give every record an id, or none", line=line, column=ID_COLUMN)
        yield ScannedRow(line, text, row_id, labels.read(line, values), values, extra)
    if not n_rows and not problems.total:
        problems.add("rows", "the file has a header and no rows: add rows")
    labels.finish(n_rows)


def _find_id(layout: Layout, values: Sequence[Any], extra: dict[str, Any] | None) -> str | None:
    value = MISSING if layout.id is None else values[layout.id]
    if value is MISSING and extra is not None:
        value = extra.get(ID_COLUMN, MISSING)
    return None if value is None or value is MISSING else cell_text(value)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    written = repr(value)
    return written if len(written) <= 40 else written[:37] + "..."


class _LabelReader:
    """Turn the label cells of each row into bytes of 0 and 1, remembering the few patterns that a file has."""

    def __init__(self, layout: Layout, problems: ProblemList, *, optional: bool) -> None:
        self._layout, self._problems, self._optional = layout, problems, optional
        self._patterns: dict[tuple[Any, ...], bytes] = {}
        self._first_labelled: int | None = None
        self._first_unlabelled: int | None = None

    def read(self, line: int, values: Sequence[Any]) -> bytes | None:
        """Return one byte per label; None if the row has no labels or faulty ones."""
        if not self._layout.labels:
            return None
        cells = tuple([values[position] for position in self._layout.labels])
        try:
            labels = self._patterns.get(cells)
        except TypeError:  # a list or an object, which a JSONL file can hold
            labels = None
        if labels is None:
            labels = self._parse(line, cells)
        if labels is None:
            return None
        if not labels:
            self._first_unlabelled = self._first_unlabelled or line
            return None
        self._first_labelled = self._first_labelled or line
        return labels

    def finish(self, n_rows: int) -> None:
        """Say once what is wrong with a whole column, or with the rows without labels."""
        problems = self._problems
        for name in self._layout.label_names:
            n_bad = problems.count(_LABEL_KIND, name)
            if n_bad > 2 and 2 * n_bad > n_rows:
                message = f"is not a column of labels, {n_bad:,} of its {n_rows:,} values are not 0 or 1"
                problems.collapse(_LABEL_KIND, name, f"{message}: name the label columns, or remove it")
            n_absent = problems.count(_NO_KEY_KIND, name)
            if n_absent > 1 and n_absent == n_rows:
                problems.collapse(_NO_KEY_KIND, name, "no record has this label: add it to every record")
        if self._first_labelled is not None and self._first_unlabelled is not None:
            message = f"the row has no labels, and {problems.noun} {self._first_labelled} has some"
            problems.add("labels", f"{message}: fill the labels of all rows, or of none", line=self._first_unlabelled)

    def _parse(self, line: int, cells: tuple[Any, ...]) -> bytes | None:
        if self._optional and all(_is_empty(cell) for cell in cells):
            labels: bytes | None = b""
        else:
            values = [parse_label(cell) for cell in cells]
            labels = None if None in values else bytes(value for value in values if value is not None)
        if labels is None:
            for name, cell in zip(self._layout.label_names, cells, strict=True):
                self._report(line, name, cell)
        elif len(self._patterns) < _MAX_PATTERNS:
            with contextlib.suppress(TypeError):
                self._patterns[cells] = labels
        return labels

    def _report(self, line: int, name: str, cell: object) -> None:
        if parse_label(cell) is not None:
            return
        if cell is MISSING:
            self._problems.add(
                _NO_KEY_KIND, "the record has no such key: write 0 or 1 for every label", line=line, column=name
            )
        elif _is_empty(cell):
            self._problems.add(_LABEL_KIND, "the label value is empty: write 0 or 1", line=line, column=name)
        else:
            message = f"{_shown(cell)} is not a label value: write 0 or 1"
            self._problems.add(_LABEL_KIND, message, line=line, column=name)


def _is_empty(cell: object) -> bool:
    return cell is MISSING or cell is None or (isinstance(cell, str) and not cell.strip())
