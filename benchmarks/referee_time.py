"""Time the referee: every rule of combining, and the report of `inspect`, on made-up members of a given size.

    python -m emodistill.benchmarks.referee_time --members 13 --rows 25196 --out benchmarks/results/referee/time.json

Rows, rates and spread of the logits are like those of the competition's train file; members differ in noise and scale.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_info

from emodistill.artifacts import write_json
from emodistill.benchmarks.machine import describe_machine, machine_record
from emodistill.ensemble.combination import MemberLogits, combine_by_rules
from emodistill.ensemble.inspection import inspect_ensemble

__all__ = ["made_up_members", "time_referee"]

LABEL_RATES = (0.16, 0.10, 0.09, 0.08, 0.02, 0.006, 0.0045)  # share of rows with the label, from frequent to rare
N_FOLDS = 5

Result = TypeVar("Result")


def made_up_members(
    n_members: int, n_rows: int, seed: int = 0
) -> tuple[list[MemberLogits], npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Draw labels, folds, and logits of members that share most of their errors.

    Parameters
    ----------
    n_members, n_rows : int
        At least 1.
    seed : int

    Returns
    -------
    members : list of MemberLogits
    labels : int8 array of shape (n_rows, 7), in {0, 1}
    fold_ids : int8 array of shape (n_rows,)
    """
    generator = np.random.default_rng(seed)
    labels = (generator.random((n_rows, len(LABEL_RATES))) < LABEL_RATES).astype(np.int8)
    common = np.where(labels, 2.5, -4.0) + generator.normal(0, 1.5, labels.shape)
    members = [
        MemberLogits(
            f"member {i}",
            ((1 + 0.05 * i) * (common + generator.normal(0, 1 + 0.15 * i, labels.shape))).astype(np.float32),
        )
        for i in range(n_members)
    ]
    return members, labels, (np.arange(n_rows) % N_FOLDS).astype(np.int8)


def time_referee(n_members: int, n_rows: int) -> dict[str, dict[str, float]]:
    """Combine by all rules, then inspect.

    Parameters
    ----------
    n_members, n_rows : int

    Returns
    -------
    dict
        By stage, "combine" and "inspect": `wall_s` and `processor_s`, the latter of all threads together.
    """
    members, labels, fold_ids = made_up_members(n_members, n_rows)
    names = [f"label {i}" for i in range(labels.shape[1])]
    combinations, combine_s = _timed(lambda: combine_by_rules(members, labels, fold_ids, names))
    _, inspect_s = _timed(lambda: inspect_ensemble(members, labels, fold_ids, combinations["auto"]))
    return {"combine": combine_s, "inspect": inspect_s}


def _timed(work: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    seconds = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
    return result, {name: round(value, 2) for name, value in seconds.items()}


def _blas_threads() -> int:
    """Threads that BLAS would use by itself."""
    return max((int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=13)
    parser.add_argument("--rows", type=int, default=25_196)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    stages = time_referee(given.members, given.rows)
    record = machine_record(threads=_blas_threads())
    for stage, seconds in stages.items():
        print(f"{stage:10} {seconds['wall_s']:8.2f} s, {seconds['processor_s']:8.2f} s of processor time")
    print(f"{given.members} members, {given.rows:,} rows, {len(LABEL_RATES)} labels; {describe_machine(record)}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        shape: dict[str, Any] = {"members": given.members, "rows": given.rows, "labels": len(LABEL_RATES)}
        write_json(given.out, {"machine": record, **shape, "folds": N_FOLDS, "seconds": stages})


if __name__ == "__main__":
    _main()
