"""Score committed students on labelled rows, from their logits: against the ensemble that taught them, and without it.

    python -m emodistill.benchmarks.student_scores --students benchmarks/results/students \\
        --ensemble benchmarks/results/best --train train.csv --dev dev.csv \\
        --out benchmarks/results/students/scores.json

A student's folder holds `logits-fp32.npz`, `logits-int8.npz` and `verification.json`, whose thresholds and calibration
were set on the held-out tenth of train. A folder NAME-hard holds the logits of the same architecture on hard labels
alone; it has no thresholds, so both are compared at 0.5, on dev and on the tenth of train that no student saw. (Members
of the ensemble were trained on those rows, too, so this second comparison leans towards the students that it taught.)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.artifacts import read_json, write_json
from emodistill.benchmarks.machine import machine_record
from emodistill.data import read_dataset
from emodistill.errors import InputError
from emodistill.logits import read_model_logits
from emodistill.metrics import f1_report, paired_bootstrap
from emodistill.thresholds import decide, sigmoid

__all__ = ["score_students"]

GRAPHS = {"fp32": "onnx/model.onnx", "int8": "onnx/model_fast.onnx"}
ABLATION_SUFFIX = "-hard"

Decisions = npt.NDArray[np.int8]


def score_students(students: Path, ensemble: Path, train: Path, dev: Path) -> dict[str, Any]:
    """Return F1 and paired differences of micro-F1 by model.

    Parameters
    ----------
    students, ensemble : Path
        Results folders.
    train : Path
        Labelled file that the students learned from; its held-out tenth is scored.
    dev : Path
        Labelled file whose logits were saved under "dev".

    Raises
    ------
    InputError
        If a file has no labels.
    """
    saved = read_model_logits(ensemble / "logits" / "ensemble.npz")
    truth, train_truth = (_labels(path, saved.label_names) for path in (dev, train))
    thresholds = read_json(ensemble / "thresholds.json")["thresholds"]
    by_ensemble = decide(sigmoid(saved.averages["dev"]), [thresholds[name] for name in saved.label_names])

    def score(
        decisions: Decisions, minus: str = "", other: Decisions | None = None, truth: Decisions = truth
    ) -> dict[str, Any]:
        report = f1_report(truth, decisions, saved.label_names)
        scores = {metric: round(report[metric], 4) for metric in ("micro_f1", "macro_f1")}
        difference = {} if other is None else {f"minus_{minus}": paired_bootstrap(truth, decisions, other).to_json()}
        return {**scores, **difference}

    scores = {"ensemble": score(by_ensemble)}
    for folder in sorted(path for path in students.iterdir() if (path / "verification.json").is_file()):
        graphs = read_json(folder / "verification.json")["graphs"]
        for precision, graph in GRAPHS.items():
            logits = read_model_logits(folder / f"logits-{precision}.npz").averages["dev"]
            decisions = _decide_calibrated(logits, graphs[graph])
            scores[f"{folder.name}-{precision}"] = score(decisions, "ensemble", by_ensemble)
        ablation = students / f"{folder.name}{ABLATION_SUFFIX}" / "logits-fp32.npz"
        if ablation.is_file():
            student = read_model_logits(folder / "logits-fp32.npz")
            with np.load(ablation, allow_pickle=False) as arrays:
                rows, held_out, on_dev = (arrays[name] for name in ("held_out_rows", "held_out", "dev"))
            for where, taught, untaught, truth_there in (
                ("", student.averages["dev"], on_dev, truth),
                (", held-out tenth of train", student.oof[rows], held_out, train_truth[rows]),
            ):
                decisions, hard_decisions = (decide(sigmoid(logits), 0.5) for logits in (taught, untaught))
                scores[f"{folder.name}-fp32 at 0.5{where}"] = score(decisions, "hard", hard_decisions, truth_there)
                scores[f"{folder.name}{ABLATION_SUFFIX} at 0.5{where}"] = score(hard_decisions, truth=truth_there)
    return scores


def _labels(path: Path, label_names: Sequence[str]) -> Decisions:
    labels = read_dataset(path, label_names=label_names).labels
    if labels is None:
        raise InputError(f"{path} has no labels to score against")
    return labels


def _decide_calibrated(logits: npt.NDArray[np.float32], graph: dict[str, Any]) -> Decisions:
    if graph["calibration_scale"] is not None:
        logits = np.array(graph["calibration_scale"]) * logits + np.array(graph["calibration_bias"])
    return decide(sigmoid(logits), graph["thresholds"])


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=Path, required=True, help="folder with a folder per student")
    parser.add_argument("--ensemble", type=Path, required=True, help="results folder of the ensemble")
    parser.add_argument("--train", type=Path, required=True, help="labelled file that the students learned from")
    parser.add_argument("--dev", type=Path, required=True, help="labelled file")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    scores = score_students(given.students, given.ensemble, given.train, given.dev)
    for name, entry in scores.items():
        print(f"{name:44} micro-F1 {entry['micro_f1']:.4f}  macro-F1 {entry['macro_f1']:.4f}", end="")
        for key, gap in entry.items():
            if key.startswith("minus_"):
                print(
                    f"  {key.replace('_', ' ')} {gap['difference']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})",
                    end="",
                )
        print()
    if given.out:
        write_json(given.out, {"machine": machine_record(threads=1), "scores": scores})


if __name__ == "__main__":
    _main()
