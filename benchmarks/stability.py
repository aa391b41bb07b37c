"""Count decisions that change with a text's company: alone, in batches, in another order, from many threads.

python -m emodistill.benchmarks.stability --texts unlabeled.csv --out benchmarks/results/export/stability.json
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.artifacts import write_json
from emodistill.benchmarks.machine import describe_machine, machine_record
from emodistill.data import read_texts
from emodistill.progress import Progress
from emodistill.runtime import Classifier

__all__ = ["compare_companies"]

N_THREADS = 16
BATCH_SIZES = (7, 32, 1000)


def compare_companies(classifier: Classifier, texts: list[str], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Answer `texts` in several companies and compare with one text per call.

    Returns
    -------
    dict
        By company: `changed_decisions` and `max_probability_difference`.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    shuffled = [texts[i] for i in order]
    with Progress("answering texts one by one", len(texts), "texts") as progress:
        alone = np.concatenate([_advance(progress, classifier.predict_proba([text])) for text in texts])
    results = {}
    for size in BATCH_SIZES:
        together = np.concatenate(
            [classifier.predict_proba(shuffled[i : i + size]) for i in range(0, len(texts), size)]
        )
        results[f"shuffled, {size} per call"] = _compare(classifier, alone, together[np.argsort(order)])
    with ThreadPoolExecutor(N_THREADS) as pool:
        parallel = np.concatenate(list(pool.map(lambda text: classifier.predict_proba([text]), texts)))
    results[f"one per call from {N_THREADS} threads"] = _compare(classifier, alone, parallel)
    return results


def _advance(progress: Progress, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    progress.advance()
    return probabilities


def _compare(
    classifier: Classifier, expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]
) -> dict[str, Any]:
    thresholds = np.asarray(classifier.thresholds)
    return {
        "changed_decisions": int(((expected >= thresholds) != (found >= thresholds)).sum()),
        "max_probability_difference": float(np.abs(expected - found).max()),
    }


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="bundle folder; by default the one in the package")
    parser.add_argument("--texts", type=Path, required=True, help="file with a text column")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    classifier = Classifier.load(given.model)
    texts = read_texts(given.texts).texts[: given.rows]
    results = compare_companies(classifier, texts)
    record = machine_record(threads=classifier.threads)
    for company, result in results.items():
        print(f"{company:32} {result['changed_decisions']:>6} changed, {result['max_probability_difference']:.2e}")
    print(f"{len(texts):,} texts, {len(classifier.label_names)} labels; {describe_machine(record)}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, {"machine": record, "n_texts": len(texts), "companies": results})


if __name__ == "__main__":
    _main()
