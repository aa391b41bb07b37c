"""`emodistill predict`: label texts from the command line, from standard input or from a file."""

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click
import numpy as np

from emodistill.errors import InputError
from emodistill.progress import Progress, format_duration

if TYPE_CHECKING:
    from emodistill.runtime import Classifier, Scores

__all__ = ["predict"]

MAX_TEXT_WIDTH = 60
STDIN = "-"

_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


@click.command()
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--model", type=click.Path(path_type=Path), help="Bundle folder. [default: the one in the package]")
@click.option("--input", "input_path", type=click.Path(path_type=Path), help="CSV, TSV, JSONL or Parquet file.")
@click.option(
    "--output", "output_path", type=click.Path(path_type=Path), help="File to write; its suffix is the format."
)
@click.option("--keep", "kept_columns", multiple=True, metavar="COLUMN", help="Copy this column too; may be repeated.")
@click.option("--graph", help="Which graph of the bundle, for example 'model'. [default: the bundle's choice]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: the cores this process may use]")
@click.option("--batch-size", type=click.IntRange(min=1), default=1024, show_default=True, help="Rows read at a time.")
@click.option(
    "--probabilities/--no-probabilities",
    default=None,
    help="All probabilities, or none. [default: all in files and JSON, those of the given labels in the table]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per text instead of a table.")
def predict(
    texts: tuple[str, ...],
    model: Path | None,
    input_path: Path | None,
    output_path: Path | None,
    kept_columns: tuple[str, ...],
    graph: str | None,
    threads: int | None,
    batch_size: int,
    probabilities: bool | None,
    as_json: bool,
) -> None:
    """Label texts: none, one or several labels each.

    \b
      emodistill predict "Thanks, I owe you one" "The shop opens at ten"
      grep thanks comments.txt | emodistill predict --json -
      emodistill predict --input comments.csv --output labelled.parquet

    TEXT "-" reads standard input, one text per line. A file needs a column 'text'; files of any size are worked through
    in their order with constant memory. The output has the columns id (if the input has it), text, a 0/1 column and a
    probability per label (JSONL: a list of labels); it appears when it is complete. The last line printed is JSON.
    """
    _check_usage(texts, input_path, output_path, kept_columns, as_json)
    from emodistill.runtime import Classifier

    classifier = Classifier.load(model, graph=graph, threads=threads)
    if input_path is not None and output_path is not None:
        summary = _predict_file(
            classifier, input_path, output_path, kept_columns, batch_size, with_probabilities=probabilities is not False
        )
        click.echo(json.dumps(summary))
        return
    given = _iter_lines(sys.stdin.buffer) if texts == (STDIN,) else iter(texts)
    printer = _JsonPrinter(probabilities is not False) if as_json else _TablePrinter(probabilities)
    counts = _Counts()
    while chunk := list(islice(given, batch_size)):
        scores = classifier.score(chunk)
        printer.print(chunk, scores)
        counts.add(scores)
    if counts.n_cut:
        click.echo(counts.cut_sentence(classifier), err=True)


def _check_usage(
    texts: tuple[str, ...],
    input_path: Path | None,
    output_path: Path | None,
    kept_columns: tuple[str, ...],
    as_json: bool,
) -> None:
    if texts and input_path is not None:
        raise click.UsageError("give texts or --input, not both")
    if not texts and input_path is None:
        raise click.UsageError("nothing to label: give texts, '-' for standard input, or --input FILE --output FILE")
    if STDIN in texts and len(texts) > 1:
        raise click.UsageError("'-' reads all texts from standard input: give no other text beside it")
    if (input_path is None) != (output_path is None):
        missing = "--output" if output_path is None else "--input"
        raise click.UsageError(f"a file needs both --input and --output: {missing} is missing")
    if input_path is None and kept_columns:
        raise click.UsageError("--keep copies columns of a file: it needs --input")
    if input_path is not None and as_json:
        raise click.UsageError("--json is for texts given directly: for a file give an --output ending in .jsonl")
    if input_path is not None and output_path is not None and input_path.resolve() == output_path.resolve():
        raise click.UsageError(f"--output is the input file itself, {input_path}: choose another name")


@dataclass
class _Counts:
    """What was seen so far."""

    n_rows: int = 0
    n_without_tokens: int = 0
    n_cut: int = 0
    n_positive: list[int] = field(default_factory=list)

    def add(self, scores: "Scores") -> None:
        self.n_rows += len(scores.decisions)
        self.n_without_tokens += int(scores.without_tokens.sum())
        self.n_cut += int(scores.cut.sum())
        here = scores.decisions.sum(axis=0, dtype=np.int64).tolist()
        self.n_positive = [a + b for a, b in zip(self.n_positive or [0] * len(here), here, strict=True)]

    def cut_sentence(self, classifier: "Classifier") -> str:
        subject = "1 text was" if self.n_cut == 1 else f"{self.n_cut:,} texts were"
        return f"{subject} cut at {classifier.max_length_tokens} tokens"


def _predict_file(
    classifier: "Classifier",
    input_path: Path,
    output_path: Path,
    kept_columns: Sequence[str],
    batch_size: int,
    *,
    with_probabilities: bool,
) -> dict[str, object]:
    """Label a file chunk by chunk; return the counts for programs."""
    from emodistill.data import iter_text_records
    from emodistill.predictions import open_predictions

    if input_path.exists() and not input_path.is_file():
        raise InputError(f"{input_path} is not a regular file: texts from a pipe are read with  emodistill predict -")
    counts = _Counts()
    # One pass before the work finds every fault of the file and the number of rows, which the time left needs.
    n_rows = sum(len(chunk) for chunk in iter_text_records(input_path, batch_size, check_first=False))
    start_s = time.monotonic()
    with (
        open_predictions(
            output_path, classifier.label_names, kept_columns=kept_columns, with_probabilities=with_probabilities
        ) as writer,
        Progress("predicting", n_rows, "rows") as progress,
    ):
        for records in iter_text_records(input_path, batch_size, check_first=False):
            scores = classifier.score([record.text for record in records])
            writer.write(records, scores.probabilities, scores.decisions)
            counts.add(scores)
            progress.advance(len(records))
        if counts.n_rows != n_rows:
            raise InputError(
                f"{input_path} changed while it was read ({n_rows:,} rows, then {counts.n_rows:,}): try again"
            )
    elapsed_s = time.monotonic() - start_s
    notes = [f"{counts.n_without_tokens:,} without tokens"] if counts.n_without_tokens else []
    notes += [counts.cut_sentence(classifier)] if counts.n_cut else []
    head = f"{counts.n_rows:,} rows labelled in {format_duration(elapsed_s)}, written to {output_path}"
    click.echo("; ".join([head, *notes]), err=True)
    return {
        "rows": counts.n_rows,
        "seconds": round(elapsed_s, 3),
        "rows_per_s": round(counts.n_rows / max(elapsed_s, 1e-9), 1),
        "without_tokens": counts.n_without_tokens,
        "cut": counts.n_cut,
        "positives": dict(zip(classifier.label_names, counts.n_positive, strict=True)),
        "graph": classifier.graph_name,
        "threads": classifier.threads,
        "output": str(output_path),
    }


def _iter_lines(stream: BinaryIO) -> Iterator[str]:
    """Yield the lines of standard input without their ends; a blank line is an empty text."""
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input, line {number}: not UTF-8 ({error.reason}): convert it first") from error


class _JsonPrinter:
    def __init__(self, with_probabilities: bool) -> None:
        self._with_probabilities = with_probabilities

    def print(self, texts: Sequence[str], scores: "Scores") -> None:
        for text, labels, row in zip(texts, scores.labels, scores.probabilities.tolist(), strict=True):
            out: dict[str, object] = {"text": text, "labels": labels}
            if self._with_probabilities:
                rounded = [round(probability, 6) for probability in row]
                out["probabilities"] = dict(zip(scores.label_names, rounded, strict=True))
            line = json.dumps(out, ensure_ascii=False)
            # Half a surrogate pair, from an argument that is not UTF-8, can only be written as an escape.
            click.echo(line if line.isascii() or not _HALF_SURROGATE.search(line) else json.dumps(out))


class _TablePrinter:
    """Print a row per text; the first chunk settles the width of the column of texts."""

    def __init__(self, probabilities: bool | None) -> None:
        self._probabilities = probabilities
        self._text_width: int | None = None

    def print(self, texts: Sequence[str], scores: "Scores") -> None:
        shown = [_one_line(text) for text in texts]
        if self._text_width is None:
            self._text_width = min(max(4, *map(len, shown)), MAX_TEXT_WIDTH)
            self._print_row("text", list(scores.label_names), "labels")
        for text, row, decisions in zip(shown, scores.probabilities.tolist(), scores.decisions.tolist(), strict=True):
            named = [
                name if self._probabilities is not None else f"{name} {probability:.2f}"
                for name, probability, decision in zip(scores.label_names, row, decisions, strict=True)
                if decision
            ]
            cells = [
                f"{probability:.3f}".rjust(len(name)) for name, probability in zip(scores.label_names, row, strict=True)
            ]
            self._print_row(text, cells, ", ".join(named) or "-")

    def _print_row(self, text: str, probabilities: list[str], labels: str) -> None:
        assert self._text_width is not None
        if len(text) > self._text_width:
            text = text[: self._text_width - 1] + "…"
        columns = [text.ljust(self._text_width), *(cell.rjust(5) for cell in probabilities if self._probabilities)]
        click.echo("  ".join([*columns, labels]))


def _one_line(text: str) -> str:
    """Replace line ends and other characters that would break a table."""
    return "".join(character if character.isprintable() else " " for character in text)
