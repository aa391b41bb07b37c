"""How fast `emodistill predict` works through a large file, and in how much memory.

Generates files of different lengths, runs the command on each in a process of its own, and checks that the rows come
back in their order. Memory is constant if the peak of the longest file is that of the shortest.

    python -m emodistill.benchmarks.predict_stream --model BUNDLE --rows 1000000 --result predict-stream.json
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from emodistill.artifacts import write_json
from emodistill.benchmarks.machine import describe_machine, machine_record
from emodistill.errors import VerificationError

__all__ = ["generate_rows", "main", "measure_stream"]

SHORT_FILE_ROWS = 5_000  # what the longest file's memory is compared with
WORDS = """
thank you so much for this great answer it really made my day and i love how simple was sorry to hear that happened hope
things get better soon haha best joke all week the game last night close but we lost again why would anyone think is a
good idea people never read article before they comment just saying what about other one proud of friends finally
finished glad over now can go home eat something warm sleep
"""
MEASURE = """
import json, sys
from emodistill.benchmarks.machine import peak_memory_bytes
from emodistill.cli import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps({"peak_memory_mib": peak_memory_bytes() / 2**20}))
"""


def generate_rows(n_rows: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (id, text): comments of 1 to 60 words, 13 on average, with commas, quotes and line ends."""
    rng = random.Random(seed)
    vocabulary = WORDS.split()
    for i in range(n_rows):
        n_words = min(max(1, round(rng.lognormvariate(2.3, 0.7))), 60)
        words = rng.choices(vocabulary, k=n_words)
        text = " ".join(words)
        if i % 7 == 0:
            text = text.replace(" ", ", ", 1) + "!"
        if i % 50 == 0:
            text = f'"{words[0]}"\n{text}'
        yield f"row{i}", text


def measure_stream(
    model: Path | None, n_rows: int, *, suffix: str, graph: str | None, threads: int | None, seed: int = 0
) -> dict[str, Any]:
    """Run `emodistill predict` on a generated CSV file in a process of its own.

    Parameters
    ----------
    model : path or None
        Bundle folder; None is the one in the package.
    n_rows : int
    suffix : str
        Format of the output: ".csv", ".tsv", ".jsonl" or ".parquet".
    graph : str or None
    threads : int or None
    seed : int

    Returns
    -------
    dict
        What the command counted (rows, seconds, rows_per_s, ...), peak_memory_mib, and the sizes of both files.

    Raises
    ------
    VerificationError
        If the command fails, or its output does not hold the rows of the input in their order.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "texts.csv", Path(folder) / f"predictions{suffix}"
        with given.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(("id", "text"))
            writer.writerows(generate_rows(n_rows, seed))
        command = [sys.executable, "-c", MEASURE, "predict", "--input", str(given), "--output", str(out)]
        for option, value in (("--model", model), ("--graph", graph), ("--threads", threads)):
            command += [] if value is None else [option, str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise VerificationError(f"emodistill predict ended with exit code {done.returncode}: see its message above")
        summary, memory = map(json.loads, done.stdout.splitlines()[-2:])
        _check_rows(out, n_rows, seed)
        del summary["output"]
        sizes = {"input_bytes": given.stat().st_size, "output_bytes": out.stat().st_size}
        return {**summary, **memory, **sizes, "output_format": suffix.removeprefix(".")}


def _check_rows(path: Path, n_rows: int, seed: int) -> None:
    """Compare ids and texts of a predictions file with those that were generated, one at a time."""
    for i, (found, expected) in enumerate(zip_longest(_read_rows(path), generate_rows(n_rows, seed))):
        if found != expected:
            raise VerificationError(f"row {i} of the predictions is {found!r}, expected {expected!r}")


def _read_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Read (id, text) without this package's own readers."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["id", "text"]):
            yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
        return
    with path.open(encoding="utf-8", newline="") as handle:
        if path.suffix == ".jsonl":
            records: Iterator[dict[str, Any]] = map(json.loads, handle)
        else:
            records = csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",")
        for record in records:
            yield record["id"], record["text"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a short and a long file, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="bundle folder; by default the one in the package")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the long file (default 1,000,000)")
    parser.add_argument("--suffix", choices=(".csv", ".tsv", ".jsonl", ".parquet"), default=".csv")
    parser.add_argument("--graph", help="which graph of the bundle")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--result", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    runs = []
    for n_rows in (min(SHORT_FILE_ROWS, options.rows), options.rows):
        run = measure_stream(options.model, n_rows, suffix=options.suffix, graph=options.graph, threads=options.threads)
        runs.append(run)
        print(
            f"{run['rows']:>9,} rows  {run['seconds']:>8.1f} s  {run['rows_per_s']:>7,.0f} rows/s  "
            f"peak {run['peak_memory_mib']:.0f} MiB  input {run['input_bytes'] / 2**20:.1f} MiB"
        )
    machine = machine_record(threads=runs[-1]["threads"])
    print(describe_machine(machine))
    result = {"machine": machine, "runs": runs}
    if options.result is not None:
        write_json(options.result, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
