"""From a CSV, TSV, JSONL or Parquet file to rows with their line numbers, one at a time, in constant memory.

CSV is RFC 4180 in UTF-8: quoted fields may hold delimiters, doubled quotes and line ends; a BOM and CRLF are accepted;
no value is ever guessed to be missing or a number. TSV is the same with tabs. A JSONL file holds one object per line.
Faults of single lines are collected in a `ProblemList`, so that one pass can report all of them; a file that cannot
be read at all raises `InputError`.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

from emodistill.errors import InputError, MissingExtraError

__all__ = [
    "FORMATS",
    "MISSING",
    "PathLike",
    "Problem",
    "ProblemList",
    "Row",
    "RowFile",
    "cell_text",
    "file_format",
    "open_rows",
    "printable",
]

PathLike = str | os.PathLike[str]
FORMATS: Final = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSONL", ".ndjson": "JSONL", ".parquet": "Parquet"}
_MAX_FIELD_CHARACTERS: Final = 1 << 27  # an unclosed quote must not read a file larger than memory into one field
_SHOWN_PER_KIND: Final = 10
_NOT_UTF8: Final = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of an undecodable byte
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_PARQUET_ROWS: Final = 4096


class _Missing:
    """The value of a key that a JSONL record does not have."""

    def __repr__(self) -> str:
        return "nothing"


MISSING: Final = _Missing()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault of a file, with its place.

    Attributes
    ----------
    message : str
        What is wrong, and the next step.
    line : int or None
        Line of the file, the header being line 1 (Parquet: row, the first being 1); None for the whole file.
    column : str or None
    """

    message: str
    line: int | None = None
    column: str | None = None

    def sentence(self, noun: str = "line") -> str:
        """Put the place before the message, with `noun` as the word for a line."""
        place = [f"{noun} {self.line}"] if self.line is not None else []
        place += [f"column '{self.column}'"] if self.column is not None else []
        return f"{', '.join(place)}: {self.message}" if place else self.message


@dataclass
class ProblemList:
    """The faults found so far: all are counted, the first of each kind and column are kept."""

    noun: str = "line"
    total: int = 0
    _kept: list[tuple[str, Problem]] = field(default_factory=list)
    _counts: dict[tuple[str, str | None], int] = field(default_factory=dict)

    def add(self, kind: str, message: str, *, line: int | None = None, column: str | None = None) -> None:
        """Count a fault, and keep it if few of its kind and column came before."""
        self.total += 1
        count = self._counts.get((kind, column), 0) + 1
        self._counts[kind, column] = count
        if count <= _SHOWN_PER_KIND:
            self._kept.append((kind, Problem(message=message, line=line, column=column)))

    def count(self, kind: str, column: str | None = None) -> int:
        """Return how many faults of a kind a column has."""
        return self._counts.get((kind, column), 0)

    def collapse(self, kind: str, column: str, message: str) -> None:
        """Replace all faults of a kind in a column by one sentence about the column."""
        first = next(problem for kept_kind, problem in self._kept if (kept_kind, problem.column) == (kind, column))
        self.total -= self._counts.pop((kind, column)) - 1
        position = next(i for i, (_, problem) in enumerate(self._kept) if problem is first)
        kept = [(k, p) for k, p in self._kept if (k, p.column) != (kind, column)]
        message = f"{message} (first: {self.noun} {first.line}: {first.message})"
        kept.insert(position, ("column", Problem(message=message, column=column)))
        self._kept = kept

    def listed(self) -> list[Problem]:
        """Return the kept faults by line, then a line on how many more there are of each kind."""
        kept = sorted((problem for _, problem in self._kept), key=lambda problem: problem.line or 0)
        for (kind, column), count in self._counts.items():
            if count > _SHOWN_PER_KIND:
                kept.append(Problem(message=f"{count - _SHOWN_PER_KIND:,} more like this ({kind})", column=column))
        return kept

    def raise_if_any(self, path: PathLike) -> None:
        """Raise `InputError` with the first fault and the number of the others."""
        if not self.total:
            return
        place = self.listed()[0].sentence(self.noun)
        separator = ", " if place.startswith((self.noun, "column")) else ": "
        rest = self.total - 1
        more = f" ({rest:,} more problem{'s' if rest > 1 else ''}: run  emodistill check {path})" if rest else ""
        raise InputError(printable(f"{path}{separator}{place}{more}"))


class Row(NamedTuple):
    """A record: where it starts, its values in the order of the columns, and keys that the columns do not have."""

    line: int
    values: Sequence[Any]
    extra: dict[str, Any] | None = None


class RowFile(Protocol):
    """An open file of rows; iterate once, inside `with`."""

    @property
    def format(self) -> str: ...
    @property
    def header(self) -> tuple[str, ...]: ...  # the columns of the file
    @property
    def columns(self) -> tuple[str, ...]: ...  # the same, then expected keys that the first JSONL record lacks
    @property
    def encoding(self) -> str: ...
    @property
    def line_end(self) -> str: ...
    @property
    def n_blank_lines(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...


def file_format(path: PathLike) -> str:
    """Return "CSV", "TSV", "JSONL" or "Parquet" by the suffix of a path.

    Raises
    ------
    InputError
        If the suffix is none of `FORMATS`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"{path}: '{suffix}' is not a known format: use {', '.join(FORMATS)}")
    return FORMATS[suffix]


def cell_text(value: Any) -> str:
    """Return the text of a value for a CSV cell: strings as they are, anything else as JSON, nothing as ""."""
    if isinstance(value, str):
        return value
    if value is None or value is MISSING:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str)


def printable(text: str) -> str:
    """Return a text in which "?" stands for what UTF-8 cannot hold, such as the undecodable bytes of a faulty file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def open_rows(path: PathLike, problems: ProblemList, *, expected: Sequence[str] = ()) -> "_OpenFile":
    """Open a file of rows by its suffix.

    Parameters
    ----------
    path : path
    problems : ProblemList
        Collects faults of the header at once, and of each line while it is read.
    expected : sequence of str
        Keys that become columns of a JSONL file even if its first record lacks them.

    Returns
    -------
    context manager of RowFile

    Raises
    ------
    InputError
        If the file does not exist, is empty, is not UTF-8 text, or is damaged as a whole.
    MissingExtraError
        If a Parquet file is given and pyarrow is not installed.
    """
    kind = file_format(path)
    try:
        stream = open(path, "rb")  # noqa: SIM115 - _OpenFile closes it
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder: give a file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        return _OpenFile(stream, _row_file(kind, stream, path, problems, expected))
    except BaseException:
        stream.close()
        raise


class _OpenFile(AbstractContextManager["RowFile"]):
    """Close the stream below a RowFile at the end of `with`."""

    def __init__(self, stream: BinaryIO, rows: RowFile) -> None:
        self._stream, self._rows = stream, rows

    def __enter__(self) -> RowFile:
        return self._rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _row_file(kind: str, stream: BinaryIO, path: PathLike, problems: ProblemList, expected: Sequence[str]) -> RowFile:
    head = stream.read(4)
    stream.seek(0)
    if not head:
        raise InputError(f"{path}: the file is empty: it needs a column 'text' and rows")
    if kind == "Parquet":
        return _ParquetRows(stream, path, problems)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: line 1: the text is UTF-16, not UTF-8: save the file as UTF-8")
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"PAR1")):
        raise InputError(f"{path}: is not a text file (a zip, gzip, spreadsheet or Parquet file): save it as {kind}")
    if kind == "JSONL":
        return _JsonlRows(stream, path, problems, expected)
    return _DelimitedRows(stream, path, problems, kind)


def _undecodable(text: str) -> str:
    """Describe the first undecodable byte of a text that was read with errors="surrogateescape"."""
    match = _NOT_UTF8.search(text)
    assert match is not None
    byte = ord(match.group()) - 0xDC00
    return f"byte 0x{byte:02x} after {text[: match.start()][-20:]!r} is not UTF-8: save the file as UTF-8"


class _Lines:
    """Yield physical lines with their ends; count them, and note those that are not clean text."""

    def __init__(self, stream: BinaryIO) -> None:
        self.has_bom = stream.read(3) == b"\xef\xbb\xbf"
        stream.seek(0)
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.ends_only_with_cr = False
        self.line_end = "none"
        self.number = 0  # of the line that starts next, less one
        self.unclean: list[tuple[int, str]] = []  # lines with a NUL or an undecodable byte

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            if self.line_end == "none":
                self.line_end = "CRLF" if line.endswith("\r\n") else {"\n": "LF", "\r": "CR"}.get(line[-1], "none")
                self.ends_only_with_cr = self.line_end == "CR"
            if "\0" in line or (not line.isascii() and _NOT_UTF8.search(line)):
                self.unclean.append((self.number + 1, line))
            if line.endswith("\n") or self.ends_only_with_cr:  # a bare \r inside a field is no line of its own
                self.number += 1
            yield line
        self._text.detach()


class _DelimitedRows:
    """The rows of a CSV or TSV file."""

    def __init__(self, stream: BinaryIO, path: PathLike, problems: ProblemList, kind: str) -> None:
        csv.field_size_limit(_MAX_FIELD_CHARACTERS)
        self.format = kind
        self.n_blank_lines = 0
        self._problems = problems
        self._lines = _Lines(stream)
        self._delimiter = "," if kind == "CSV" else "\t"
        self._reader = csv.reader(self._lines, delimiter=self._delimiter, strict=True)
        self.columns: tuple[str, ...] = ()  # a fault of the header itself has no column to be reported under
        header = next((values for _, values in self._records()), None)
        if header is None:
            problems.raise_if_any(path)
            raise InputError(f"{path}: the file has no header line: it needs a column 'text' and rows")
        self.header = self.columns = tuple(header)
        self._check_header()

    @property
    def encoding(self) -> str:
        return "UTF-8 with BOM" if self._lines.has_bom else "UTF-8"

    @property
    def line_end(self) -> str:
        return self._lines.line_end

    def __iter__(self) -> Iterator[Row]:
        n_columns = len(self.columns)
        for line, values in self._records():
            if len(values) != n_columns:
                self._add_field_count(line, values)
                continue
            if self._lines.unclean:
                self._add_unclean(values)
            yield Row(line, values)

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        while True:
            line = self._lines.number + 1
            try:
                values = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._add_syntax(line, str(error))
                self._add_unclean(())
                continue
            if values:
                yield line, values
            else:
                self.n_blank_lines += 1

    def _check_header(self) -> None:
        problems, columns = self._problems, self.columns
        if self._lines.unclean:
            self._add_unclean(columns)
        for position, name in enumerate(columns, start=1):
            if not name.strip():
                problems.add("header", f"column {position} has no name: name it or remove it", line=1)
            elif name != name.strip():
                problems.add("header", f"the name {name!r} has spaces around it: remove them", line=1, column=name)
        _check_duplicates(columns, problems, line=1)

    def _add_field_count(self, line: int, values: list[str]) -> None:
        self._add_unclean(())
        name = "comma" if self._delimiter == "," else "tab"
        self._problems.add(
            "number of fields",
            f"{len(values)} field{'s' if len(values) > 1 else ''} where the header has {len(self.columns)}: "
            f"put a text that holds a {name} in double quotes",
            line=line,
        )

    def _add_syntax(self, line: int, error: str) -> None:
        last = max(self._lines.number, line)
        until = f" (up to line {last})" if last > line else ""
        if "end of data" in error:
            message = f"a double quote is opened and never closed{until}: close it, or double a quote that is text"
        elif "field limit" in error:
            message = (
                f"a field is longer than {_MAX_FIELD_CHARACTERS:,} characters{until}: is a double quote not closed?"
            )
        else:
            message = f"a quoted field goes on after its closing quote{until}: write a quote inside a text twice"
        self._problems.add("quotes", message, line=line)

    def _add_unclean(self, values: Sequence[str]) -> None:
        """Report the NULs and undecodable bytes of the lines that the last record was read from."""
        named = self.columns if len(self.columns) == len(values) else ()
        for line, text in self._lines.unclean:
            columns = [name for name, value in zip(named, values, strict=False) if "\0" in value]
            if "\0" in text:
                self._problems.add("NUL", _NUL_MESSAGE, line=line, column=columns[0] if columns else None)
            columns = [name for name, value in zip(named, values, strict=False) if _NOT_UTF8.search(value)]
            if _NOT_UTF8.search(text):
                column = columns[0] if columns else None
                self._problems.add("encoding", _undecodable(text), line=line, column=column)
        self._lines.unclean.clear()


_NUL_MESSAGE: Final = "a NUL character: remove it (is this a text file in UTF-8?)"


def _check_duplicates(columns: Sequence[str], problems: ProblemList, *, line: int | None) -> None:
    for name in dict.fromkeys(columns):
        positions = [str(i) for i, other in enumerate(columns, start=1) if other == name]
        if len(positions) > 1 and name.strip():
            where = f"columns {', '.join(positions)}"
            problems.add("header", f"'{name}' occurs twice ({where}): remove or rename one", line=line, column=name)


class _JsonlRows:
    """The rows of a JSONL file; its columns are the keys of the first record, then the expected ones."""

    format = "JSONL"

    def __init__(self, stream: BinaryIO, path: PathLike, problems: ProblemList, expected: Sequence[str]) -> None:
        self.has_bom = stream.read(3) == b"\xef\xbb\xbf"
        if not self.has_bom:
            stream.seek(0)
        self.line_end = "none"
        self.n_blank_lines = 0
        self._problems = problems
        self._records = self._read(stream)
        self._first = next(self._records, None)
        if self._first is None:
            problems.raise_if_any(path)
            raise InputError(f"{path}: the file has no records: each line needs an object with the key 'text'")
        self.header = tuple(self._first[1])
        self.columns = tuple(dict.fromkeys([*self.header, *expected]))

    @property
    def encoding(self) -> str:
        return "UTF-8 with BOM" if self.has_bom else "UTF-8"

    def __iter__(self) -> Iterator[Row]:
        columns = self.columns
        assert self._first is not None
        for line, record in _chain(self._first, self._records):
            values = [record.pop(name, MISSING) for name in columns]
            yield Row(line, values, record or None)

    def _read(self, stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, raw in enumerate(stream, start=1):
            if self.line_end == "none" and raw.endswith(b"\n"):
                self.line_end = "CRLF" if raw.endswith(b"\r\n") else "LF"
            raw = raw.strip(b" \t\r\n")
            if not raw:
                self.n_blank_lines += 1
                continue
            record = self._parse(line, raw)
            if record is not None:
                yield line, record

    def _parse(self, line: int, raw: bytes) -> dict[str, Any] | None:
        """Return the object of a line, or report why there is none."""
        add = self._problems.add
        text = raw.decode("utf-8", "surrogateescape")
        if not text.isascii() and _NOT_UTF8.search(text):
            add("encoding", _undecodable(text), line=line)
            return None
        if "\0" in text:
            add("NUL", _NUL_MESSAGE, line=line)
            return None
        try:
            value = json.loads(text, object_pairs_hook=_Pairs)
        except RecursionError:
            add("JSON", "the object is nested too deeply: flatten it", line=line)
            return None
        except ValueError as error:
            place = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            add("JSON", f"not valid JSON{place} ({reason}): write one object per line", line=line)
            return None
        if not isinstance(value, _Pairs):
            add("JSON", f"an object is expected, {_json_kind(value)} was found: write one object per line", line=line)
            return None
        _check_duplicates([key for key, _ in value.pairs], self._problems, line=line)
        record = {key: _plain(item) for key, item in value.pairs}
        if "\\u" in text:
            self._check_escapes(line, record)
        return record

    def _check_escapes(self, line: int, record: dict[str, Any]) -> None:
        """Report what escapes can write although no UTF-8 file holds it as text: a NUL, half a surrogate pair."""
        for key, value in record.items():
            written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if "\0" in written:
                self._problems.add("NUL", _NUL_MESSAGE, line=line, column=key)
            if half := _SURROGATE.search(key + written):
                message = f"\\u{ord(half.group()):04x} is half of a surrogate pair and no character: remove it"
                self._problems.add("encoding", message, line=line, column=_SURROGATE.sub("?", key))


class _Pairs:
    """A JSON object whose repeated keys are still there."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {key: _plain(item) for key, item in value.pairs}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _json_kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(type(value), "a number")


def _chain(first: tuple[int, dict[str, Any]], rest: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Any]:
    yield first
    yield from rest


class _ParquetRows:
    """The rows of a Parquet file, a few thousand at a time."""

    format = "Parquet"
    encoding = "UTF-8"
    line_end = "none"
    n_blank_lines = 0

    def __init__(self, stream: BinaryIO, path: PathLike, problems: ProblemList) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise MissingExtraError.for_extra("pyarrow", "parquet") from error
        problems.noun = "row"
        self._path = path
        self._damage = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
        try:
            self._file = pyarrow.parquet.ParquetFile(stream)
        except self._damage as error:
            raise InputError(
                f"{path}: is not a readable Parquet file ({_first_line(error)}): write it again"
            ) from error
        names = [name for name in self._file.schema_arrow.names if not name.startswith("__index_level_")]
        self._positions = [i for i, name in enumerate(self._file.schema_arrow.names) if name in set(names)]
        self.header = self.columns = tuple(names)
        _check_duplicates(self.columns, problems, line=None)

    def __iter__(self) -> Iterator[Row]:
        number = 0
        try:
            for batch in self._file.iter_batches(batch_size=_PARQUET_ROWS):
                columns = [batch.column(i).to_pylist() for i in self._positions]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield Row(number, values)
        except self._damage as error:
            message = f"the file is damaged after row {number:,} ({_first_line(error)}): write it again"
            raise InputError(f"{self._path}: {message}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
