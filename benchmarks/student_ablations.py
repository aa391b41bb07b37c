"""What each choice in distillation is worth: students taught on half of train, compared on the other half.

    python -m emodistill.benchmarks.student_ablations --train train.csv --unlabeled unlabeled.csv \\
        --teacher runs/best/ensemble/oof.npz --work ablations \\
        --out benchmarks/results/students/ablations.json

Every treatment changes one thing of the baseline and gets the same number of updates, unless its name says otherwise.
Dev and test are not read. A finished treatment is kept in the work folder, so a second call goes on; several calls,
each with its own --only, may share the folder.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.artifacts import read_json, write_json
from emodistill.benchmarks.machine import machine_record
from emodistill.checkpoints import load_checkpoint
from emodistill.data import Dataset, read_dataset
from emodistill.distill.students import STUDENT_PRESETS, StudentConfig, draw_transfer_rows, train_student
from emodistill.encoders import resolve_encoder
from emodistill.errors import InputError
from emodistill.export.bundle import build_fast, fixed_ranges
from emodistill.export.verification import Session
from emodistill.folds import assign_folds
from emodistill.logits import ModelLogits, read_model_logits
from emodistill.metrics import f1_report, paired_bootstrap
from emodistill.runtime import usable_cores
from emodistill.thresholds import decide, search_shared_threshold, sigmoid
from emodistill.tokenization import encode, load_tokenizer
from emodistill.training import use_cores

__all__ = ["TREATMENTS", "Treatment", "choose_transfer", "decide_across", "measure_treatments"]

EPOCHS = 2  # of train and as many unlabeled texts; 4 of train alone are as many updates
_SECOND_TRAINING = ("compression", "sparsity", "n_clusters")
_RANGE_TEXTS = 500
_ALL = 10**9  # what is given to a student is chosen here
_SPLIT_SEED = 20_261_125
_RESAMPLING_SEED = 3

Float32Array = npt.NDArray[np.float32]
Decisions = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Treatment:
    """One change to the baseline.

    Parameters
    ----------
    changes : dict
        Settings of the student that differ.
    transfer : str
        Which unlabeled texts are added: "first", "positive" (drawn by how likely the teacher finds any label) or
        "none".
    teacher : int
        Which of the teachers: 0 is the baseline's.
    baseline : str
        Name of the treatment that it is compared with.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    transfer: str = "first"
    teacher: int = 0
    baseline: str = "baseline"


TREATMENTS = {
    "baseline": Treatment(),
    "hard labels alone": Treatment({"hard_weight": 1.0, "epochs": 2 * EPOCHS}, transfer="none"),
    "soft targets alone": Treatment({"hard_weight": 0.0}),
    "no transfer texts": Treatment({"epochs": 2 * EPOCHS}, transfer="none"),
    "transfer texts drawn towards positives": Treatment(transfer="positive"),
    "temperature 1": Treatment({"distillation_temperature": 1.0}),
    "temperature 4": Treatment({"distillation_temperature": 4.0}),
    "hidden states": Treatment({"hidden_weight": 0.1}),
    "attention relations": Treatment({"relation_weight": 0.1}),
    "layers 1, 3, 5": Treatment({"layers": (1, 3, 5)}),
    "paraphrase-MiniLM-L3": Treatment({"encoder": "paraphrase-minilm-l3"}),
    "whole vocabulary": Treatment({"vocabulary_size": None}),
    "factorized word table": Treatment({"vocabulary_size": None, "embedding_size": 128}),
    "cut and factorized word table": Treatment({"embedding_size": 128}),
    "2 layers": Treatment({"layers": (0, 1)}),
    "256 wide": Treatment({"hidden_size": 256}),
    "mean pooling": Treatment({"pooling": "mean"}),
    "twice the epochs": Treatment({"epochs": 2 * EPOCHS}),
    "int8-aware second training": Treatment({"compression": "quantization_aware"}),
    "half of the weights pruned": Treatment({"compression": "pruned"}),
    "weights in 32 clusters": Treatment({"compression": "clustered"}),
    "second teacher": Treatment(teacher=1),
    "third teacher": Treatment(teacher=2, baseline="second teacher"),
}


def choose_transfer(transfer: str, texts: Sequence[str], logits: Float32Array, n: int) -> npt.NDArray[np.int64]:
    """Return which `n` rows (or all there are) of the unlabeled texts are added, int64 (n,).

    Parameters
    ----------
    transfer : str
        See `Treatment`; "positive" draws by `distill.students.draw_transfer_rows`.
    texts : sequence of str
        Unlabeled.
    logits : float32 array of shape (len(texts), n_labels)
        The teacher's.
    n : int
        How many.
    """
    n = 0 if transfer == "none" else min(n, len(texts))
    return draw_transfer_rows(logits, n, seed=_RESAMPLING_SEED) if transfer == "positive" else np.arange(n)


def decide_across(truth: npt.NDArray[np.int8], logits: Float32Array) -> Decisions:
    """Decide each half of the rows at the shared threshold that is best on the other half.

    Parameters
    ----------
    truth, logits
        int8 and float32 arrays of shape (n, n_labels).
    """
    probabilities = sigmoid(logits)
    decisions = np.empty_like(truth)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        others = slice(1 - rows.start, None, 2)
        threshold = search_shared_threshold(truth[others], probabilities[others])
        decisions[rows] = decide(probabilities[rows], threshold)
    return decisions


def measure_treatments(
    names: Sequence[str], train: Dataset, unlabeled: Sequence[str], teachers: Sequence[ModelLogits], work: Path
) -> dict[str, Any]:
    """Train the students of `names` that the work folder lacks; score all that it holds.

    Parameters
    ----------
    names : sequence of str
        Of `TREATMENTS`; those that want a teacher that is not there are left out.
    train : Dataset
        Labelled.
    unlabeled : sequence of str
        Texts that the teachers saw under "unlabeled".
    teachers : sequence of ModelLogits
        With out-of-fold logits of every row of `train`.
    work : Path
        Gets a folder per treatment.

    Returns
    -------
    dict
        By treatment: F1 on the other half of the float32 weights and of the int8 graph, seconds, and the paired
        differences from its baseline where that is there.

    Raises
    ------
    InputError
        If `train` has no labels.
    """
    if train.labels is None:
        raise InputError("students cannot be compared on a file without labels")
    half = assign_folds(train.texts, train.labels, 2, _SPLIT_SEED)
    taught, scored = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
    truth = train.labels[scored]
    for name in names:
        treatment = TREATMENTS[name]
        folder = work / name.replace(",", "").replace(" ", "-")
        if treatment.teacher >= len(teachers) or (folder / "ablation.json").is_file():
            continue
        teacher = teachers[treatment.teacher]
        if "compression" in treatment.changes:
            _take_first_training(work / "baseline", folder)
        answers = teacher.averages.get("unlabeled", teacher.oof[:0])[: len(unlabeled)]
        chosen = choose_transfer(treatment.transfer, unlabeled[: len(answers)], answers, len(taught))
        student = _student(treatment)
        began = perf_counter()
        train_student(
            student,
            encoder_dir=resolve_encoder(student.encoder),
            texts=[train.texts[row] for row in taught],
            hard_targets=train.labels[taught],
            soft_logits=teacher.oof[taught],
            transfer_texts=[unlabeled[row] for row in chosen],
            transfer_logits=answers[chosen],
            label_names=train.label_names,
            evaluation_texts={"scored": [train.texts[row] for row in scored]},
            work_dir=folder,
            fingerprint=_first_training(treatment),
        )
        int8 = _int8_logits(folder, [train.texts[row] for row in taught], [train.texts[row] for row in scored])
        np.save(folder / "int8.npy", int8.astype(np.float16))
        write_json(folder / "ablation.json", {"treatment": name, "seconds": round(perf_counter() - began, 1)})
    decisions: dict[str, Decisions] = {}
    in_int8: dict[str, Decisions] = {}
    table: dict[str, Any] = {}
    for path in sorted(work.glob("*/ablation.json")):
        record = read_json(path)
        with np.load(path.parent / "logits.npz", allow_pickle=False) as saved:
            decisions[record["treatment"]] = decide_across(truth, saved["scored"].astype(np.float32))
        in_int8[record["treatment"]] = decide_across(truth, np.load(path.parent / "int8.npy").astype(np.float32))
        table[record["treatment"]] = record
    for name, entry in table.items():
        report = f1_report(truth, decisions[name], train.label_names)
        entry |= {"micro_f1": round(report["micro_f1"], 4), "macro_f1": round(report["macro_f1"], 4)}
        entry["int8_micro_f1"] = round(f1_report(truth, in_int8[name], train.label_names)["micro_f1"], 4)
        base = TREATMENTS[name].baseline
        if base != name and base in decisions:
            difference = paired_bootstrap(truth, decisions[name], decisions[base]).to_json()
            entry |= {"baseline": base, "micro_f1_minus_baseline": difference}
            macro = paired_bootstrap(truth, decisions[name], decisions[base], metric="macro_f1").to_json()
            entry["macro_f1_minus_baseline"] = macro
            rounded = paired_bootstrap(truth, in_int8[name], in_int8[base]).to_json()
            entry["int8_micro_f1_minus_baseline"] = rounded
    order = [name for name in TREATMENTS if name in table]
    return {"n_taught": len(taught), "n_scored": len(scored), "treatments": [table[name] for name in order]}


def _first_training(treatment: Treatment) -> str:
    """Name what decides on the weights before a second training."""
    changes = {setting: value for setting, value in treatment.changes.items() if setting not in _SECOND_TRAINING}
    return f"{changes} {treatment.transfer} {treatment.teacher}"


def _take_first_training(finished: Path, folder: Path) -> None:
    """Let a treatment that is a second training go on from the end of the baseline's first."""
    if (finished / "ablation.json").is_file() and not (folder / "checkpoint.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoint.safetensors", "metrics.jsonl"):
            shutil.copyfile(finished / name, folder / name)


def _int8_logits(folder: Path, seen: Sequence[str], texts: Sequence[str]) -> Float32Array:
    """Ask the fast int8 graph, with fixed ranges from training or from texts that were trained on."""
    checkpoint, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    length = checkpoint.max_length_tokens
    ranges = fixed_ranges(folder, checkpoint, encode(tokenizer, seen[:_RANGE_TEXTS], length))
    session = Session(build_fast(checkpoint, "int8-static", activation_ranges=ranges))
    return session.logits(encode(tokenizer, texts, length))


def _student(treatment: Treatment) -> StudentConfig:
    """Return the preset `tiny` on logits alone, with fewer epochs, and the treatment's changes."""
    plain = {"epochs": EPOCHS, "hidden_weight": 0.0, "relation_weight": 0.0, "transfer_texts": _ALL}
    return StudentConfig.from_mapping({**STUDENT_PRESETS["tiny"].fingerprint_parts(), **plain, **treatment.changes})


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="labelled file")
    parser.add_argument("--unlabeled", type=Path, required=True, help="texts that the teacher saw as unlabeled")
    parser.add_argument("--teacher", type=Path, action="append", required=True, help="logits file; once per teacher")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained students")
    parser.add_argument("--only", help="semicolon-separated names of treatments; by default all, empty for none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    use_cores(usable_cores())
    teachers = [read_model_logits(path) for path in given.teacher]
    train = read_dataset(given.train, label_names=teachers[0].label_names)
    unlabeled = read_dataset(given.unlabeled, require_labels=False).texts
    names = list(TREATMENTS) if given.only is None else [name for name in given.only.split(";") if name]
    found = measure_treatments(names, train, unlabeled, teachers, given.work)
    for entry in found["treatments"]:
        gap = entry.get("micro_f1_minus_baseline")
        shown = f"{gap['difference']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" if gap else ""
        print(f"{entry['treatment']:40} micro-F1 {entry['micro_f1']:.4f}  macro-F1 {entry['macro_f1']:.4f}  {shown}")
    if given.out:
        write_json(given.out, {"machine": machine_record(threads=usable_cores()), **found})


if __name__ == "__main__":
    _main()
