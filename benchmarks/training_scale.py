"""Time and memory of training against rows, text length and number of members, each point in a process of its own.

    python -m emodistill.benchmarks.training_scale --train train.csv \\
        --out benchmarks/results/training-scale/minilm-l6.json

Every point trains one epoch of MiniLM-L6 as members do (bfloat16, batches of 32, dropout) and predicts its held-out
fold. For the length axis, texts are strung together until each has the stated number of tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from emodistill.artifacts import write_json
from emodistill.benchmarks.machine import describe_machine, machine_record, peak_memory_bytes
from emodistill.data import read_dataset
from emodistill.encoders import resolve_encoder
from emodistill.ensemble.members import train_member
from emodistill.ensemble.variants import VariantConfig
from emodistill.runtime import usable_cores
from emodistill.training import use_cores

__all__ = ["measure_point"]

ROWS = (2_000, 8_000, 25_000)
LENGTHS = (16, 32, 64, 128)
LENGTH_ROWS = 1_000
MEMBERS = (1, 2, 3)
MEMBER_ROWS = 2_000
WORDS_PER_TOKEN = 0.8  # enough words that a text reaches its length; what is too long is cut


def measure_point(train: Path, n_rows: int, length_tokens: int | None, n_members: int) -> dict[str, Any]:
    """Train in this process and return what it took.

    Parameters
    ----------
    train
        Labelled file.
    n_rows
        Its first rows, four fifths of which are trained on.
    length_tokens
        Tokens of every text, or None for the texts as they are.
    n_members
        Trained one after the other.

    Returns
    -------
    dict
        Seconds of each member and the peak memory of the process in bytes.
    """
    use_cores(usable_cores())
    dataset = read_dataset(train)
    assert dataset.labels is not None
    texts = dataset.texts[:n_rows]
    if length_tokens is not None:
        words = " ".join(texts).split()
        per_text = max(1, round(length_tokens * WORDS_PER_TOKEN * 1.5))
        texts = [" ".join(np.roll(words, -i * per_text)[:per_text]) for i in range(n_rows)]
    fold_ids = (np.arange(n_rows) % 5).astype(np.int8)
    seconds = []
    for member in range(n_members):
        variant = VariantConfig(
            name="scale", epochs=1, seed=member, max_length_tokens=128 if length_tokens is None else length_tokens
        )
        with tempfile.TemporaryDirectory() as folder:
            started = perf_counter()
            train_member(
                variant,
                0,
                encoder_dir=resolve_encoder(variant.encoder),
                texts=texts,
                labels=dataset.labels[:n_rows],
                fold_ids=fold_ids,
                label_names=dataset.label_names,
                evaluation_texts={},
                work_dir=Path(folder),
            )
            seconds.append(round(perf_counter() - started, 1))
    return {
        "rows": n_rows,
        "length_tokens": length_tokens,
        "members": n_members,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _points() -> list[tuple[int, int | None, int]]:
    by_rows: list[tuple[int, int | None, int]] = [(rows, None, 1) for rows in ROWS]
    by_length: list[tuple[int, int | None, int]] = [(LENGTH_ROWS, length, 1) for length in LENGTHS]
    by_members: list[tuple[int, int | None, int]] = [(MEMBER_ROWS, None, n) for n in MEMBERS[1:]]
    return by_rows + by_length + by_members


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="labelled file")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        n_rows, length, n_members = json.loads(arguments.point)
        print(json.dumps(measure_point(arguments.train, n_rows, length, n_members)))
        return
    results = []
    print("   rows  tokens  members  seconds of each      peak memory")
    for point in _points():
        command = [sys.executable, "-m", "emodistill.benchmarks.training_scale", "--train", str(arguments.train)]
        done = subprocess.run([*command, "--point", json.dumps(point)], stdout=subprocess.PIPE, check=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        seconds = ", ".join(f"{value:.1f}" for value in result["seconds"])
        tokens = result["length_tokens"] or "as is"
        memory = result["peak_memory_bytes"] / 1e9
        print(f"{result['rows']:>7,}  {tokens:>6}  {result['members']:>7}  {seconds:<18}  {memory:.2f} GB", flush=True)
    if arguments.out:
        record = machine_record(threads=usable_cores())
        print(describe_machine(record))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, {"machine": record, "points": results})


if __name__ == "__main__":
    _main()
