"""From a file to everything that it holds and everything that is wrong with it, in one pass."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from emodistill.errors import EmodistillError
from emodistill.formats import PathLike, Problem, ProblemList, open_rows, printable
from emodistill.scanning import TEXT_COLUMN, LabelMode, Layout, ScannedRow, find_layout, scan_rows

__all__ = ["CheckReport", "check_file", "is_blank"]

_FEW_POSITIVES: Final = 5  # fewer than the usual folds: some would have none to validate on
_INVISIBLE: Final = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


@dataclass(frozen=True, kw_only=True)
class LongestText:
    """Where the longest text stands and how long it is."""

    line: int
    n_characters: int
    n_words: int


@dataclass(kw_only=True)
class CheckReport:
    """What a file holds and what is wrong with it.

    Attributes
    ----------
    path : str
    format, encoding, line_end : str or None
        None if the file could not be opened.
    n_rows : int
        Rows, faulty ones included, that have the right number of fields.
    positives : dict of int
        Rows with a 1, by label in the order of the header; empty if the file has no labels.
    n_without_label : int
        Rows whose labels are all 0.
    n_duplicate_texts : int
        Rows whose text, case-folded, stands in an earlier row.
    n_conflicting_duplicates : int
        Those whose labels differ from the earlier row's.
    n_blank_texts : int
        Texts without a visible character.
    problems : list of Problem
        By line; of many equal ones the first ten and a line on the rest. `n_problems` counts all.
    warnings : list of str
        What can be used and may not be meant.
    """

    path: str
    format: str | None = None
    size_bytes: int = 0
    encoding: str | None = None
    line_end: str | None = None
    columns: list[str] = field(default_factory=list)
    n_rows: int = 0
    has_ids: bool = False
    positives: dict[str, int] = field(default_factory=dict)
    n_without_label: int = 0
    n_duplicate_texts: int = 0
    n_conflicting_duplicates: int = 0
    n_blank_texts: int = 0
    longest_text: LongestText | None = None
    n_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.n_problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold, with `ok` beside them."""
        return {"ok": self.ok, **asdict(self)}

    def to_text(self) -> str:
        """Return the report as lines for people."""
        return printable("\n".join(_report_lines(self)))


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character, and so no token.

    Examples
    --------
    >>> [is_blank(text) for text in ("", " \\t", "\\u200b", ".")]
    [True, True, True, False]
    """
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def check_file(path: PathLike, *, label_names: Sequence[str] | None = None, texts_only: bool = False) -> CheckReport:
    """Report what a file holds and all that is wrong with it.

    Parameters
    ----------
    path : path
        A .csv, .tsv, .jsonl or .parquet file.
    label_names : sequence of str, optional
        The label columns; by default all columns but `text` and `id`. All of them or none may be absent or empty.
    texts_only : bool, default False
        Do not look at columns other than `text` and `id`.

    Returns
    -------
    CheckReport
        Also for a file that cannot be read at all, which is then its only problem.
    """
    report = CheckReport(path=str(path))
    problems = ProblemList()
    mode: LabelMode = "ignored" if texts_only else "optional"
    try:
        with open_rows(path, problems, expected=(TEXT_COLUMN, *(label_names or ()))) as rows:
            report.columns = list(rows.header)
            layout = find_layout(rows, problems, label_names=label_names, mode=mode)
            counts = _Counts(layout)
            for row in scan_rows(rows, layout, problems, mode=mode):
                counts.add(row)
            _fill(report, counts)
            report.format, report.encoding, report.line_end = rows.format, rows.encoding, rows.line_end
            report.warnings = list(_warnings(counts, layout, problems.noun, rows.n_blank_lines))
    except EmodistillError as error:
        problems.add("file", str(error).removeprefix(f"{path}: "))
    report.n_problems = problems.total
    report.problems = problems.listed()
    if Path(path).is_file():
        report.size_bytes = Path(path).stat().st_size
    return report


class _Counts:
    """Sums over the rows of a file; texts and ids are kept as hashes, because they would fill the memory."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.n_rows = self.n_duplicate_texts = self.n_conflicts = self.n_blank = self.n_replaced = 0
        self.n_duplicate_ids = 0
        self.first_duplicate_id: tuple[str, int] | None = None
        self.longest_text = ""
        self.longest_line = 0
        self.patterns: dict[bytes, int] = {}
        self._labels_by_text: dict[int, bytes | None] = {}
        self._ids: set[int] = set()

    @property
    def has_ids(self) -> bool:
        return bool(self._ids)

    def add(self, row: ScannedRow) -> None:
        self.n_rows += 1
        if row.labels is not None:
            self.patterns[row.labels] = self.patterns.get(row.labels, 0) + 1
        if row.text is not None:
            self._add_text(row.text, row)
        if row.id is not None:
            hashed = hash(row.id)
            if hashed in self._ids:
                self.n_duplicate_ids += 1
                self.first_duplicate_id = self.first_duplicate_id or (row.id, row.line)
            self._ids.add(hashed)

    def _add_text(self, text: str, row: ScannedRow) -> None:
        hashed = hash(text.casefold())
        if hashed in self._labels_by_text:
            self.n_duplicate_texts += 1
            self.n_conflicts += self._labels_by_text[hashed] != row.labels
        else:
            self._labels_by_text[hashed] = row.labels
        if len(text) > len(self.longest_text) or not self.longest_line:
            self.longest_text, self.longest_line = text, row.line
        self.n_blank += is_blank(text)
        self.n_replaced += "\ufffd" in text

    def positives(self) -> dict[str, int]:
        """Return the rows with a 1 by label; empty if no row has labels."""
        if not self.patterns:
            return {}
        columns = zip(*self.patterns, strict=True)  # a pattern is a byte of 0 or 1 per label
        totals = [sum(n for bit, n in zip(column, self.patterns.values(), strict=True) if bit) for column in columns]
        return dict(zip(self._layout.label_names, totals, strict=True))


def _fill(report: CheckReport, counts: _Counts) -> None:
    report.n_rows = counts.n_rows
    report.has_ids = counts.has_ids
    report.positives = counts.positives()
    report.n_without_label = sum(n for pattern, n in counts.patterns.items() if not any(pattern))
    report.n_duplicate_texts = counts.n_duplicate_texts
    report.n_conflicting_duplicates = counts.n_conflicts
    report.n_blank_texts = counts.n_blank
    if counts.longest_line:
        text = counts.longest_text
        report.longest_text = LongestText(line=counts.longest_line, n_characters=len(text), n_words=len(text.split()))


def _warnings(counts: _Counts, layout: Layout, noun: str, n_blank_lines: int) -> Iterator[str]:
    """Yield what can be used and may not be meant."""
    positives = counts.positives()
    n_labelled = sum(counts.patterns.values())
    if layout.label_names and not positives:
        yield "no row has labels: the file is read as texts without labels"
    elif positives and not any(positives.values()):
        yield "every label value is 0: the labels look like placeholders"
    else:
        for name, n_positives in positives.items():
            if n_positives == 0:
                yield f"the label '{name}' has no positives: it cannot be learned, and its F1 is undefined"
            elif n_positives == n_labelled:
                yield f"the label '{name}' is 1 in every row: it cannot be learned"
            elif n_positives < _FEW_POSITIVES:
                yield f"the label '{name}' has only {_count(n_positives, 'positive row')}"
    if counts.first_duplicate_id is not None:
        row_id, line = counts.first_duplicate_id
        yield f"{_count(counts.n_duplicate_ids, 'duplicate id')} (first: '{row_id}' at {noun} {line})"
    if counts.n_conflicts:
        yield f"{_count(counts.n_conflicts, 'duplicate text')} with other labels than the first of its kind"
    if counts.n_blank:
        yield f"{_count(counts.n_blank, 'text')} without a visible character"
    if counts.n_replaced:
        yield f"{_count(counts.n_replaced, 'text')} with U+FFFD, the mark of an earlier wrong decoding"
    if n_blank_lines:
        yield f"{_count(n_blank_lines, 'blank line')} skipped"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _report_lines(report: CheckReport) -> Iterator[str]:
    noun = "row" if report.format == "Parquet" else "line"
    facts = [report.format, report.encoding, report.line_end, f"{report.size_bytes:,} bytes"]
    yield f"{report.path}: {', '.join(fact for fact in facts if fact)}"
    if report.columns:
        yield f"  {_count(report.n_rows, 'row')}; columns: {', '.join(report.columns)}"
    if report.positives:
        width = max(len("label"), *map(len, report.positives))
        yield f"  {'label':<{width}}  positives   share"
        for name, n_positives in report.positives.items():
            yield f"  {name:<{width}}  {n_positives:>9,}  {n_positives / max(report.n_rows, 1):>6.2%}"
        yield f"  {_count(report.n_without_label, 'row')} without a positive label"
    if report.longest_text is not None:
        longest = report.longest_text
        duplicates, blanks = (
            _count(report.n_duplicate_texts, "duplicate text"),
            _count(report.n_blank_texts, "blank text"),
        )
        yield f"  {duplicates} (case-folded), {blanks}"
        yield f"  longest text: {longest.n_characters:,} characters, {longest.n_words:,} words ({noun} {longest.line})"
    for warning in report.warnings:
        yield f"  warning: {warning}"
    for problem in report.problems:
        yield f"  problem: {problem.sentence(noun)}"
    yield f"  {_count(report.n_problems, 'problem')}" if report.n_problems else "  no problems"
