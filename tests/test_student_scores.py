"""Scores of committed students: calibrated thresholds are used, and differences are taken to the right model."""

import json
from pathlib import Path

import numpy as np
import pytest

from emodistill.benchmarks.student_scores import score_students
from emodistill.errors import InputError
from emodistill.logits import ModelLogits, write_model_logits

LABELS = ("joy", "anger")
TRUTH = np.array([[1, 0], [0, 1], [1, 1], [0, 0]] * 25, np.int8)
RIGHT = np.where(TRUTH == 1, 2.0, -2.0).astype(np.float32)


def write_logits(path: Path, dev: np.ndarray) -> None:
    """Save logits whose held-out rows of train are the last two: the right ones, whatever dev gets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    oof = np.full((4, 2), np.nan, np.float32)
    oof[2:] = RIGHT[2:4]
    write_model_logits(
        path,
        ModelLogits(
            oof=oof,
            fold_ids=np.zeros(4, np.int8),
            folds=np.zeros(1, np.int8),
            train_rows=np.arange(4, dtype=np.uint64),
            rows={"dev": np.arange(len(dev), dtype=np.uint64)},
            averages={"dev": dev},
            label_names=LABELS,
        ),
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An ensemble that is right, a student that is right once calibrated, and its ablation that never says joy."""
    lines = ["text,joy,anger", *(f"text {i},{a},{b}" for i, (a, b) in enumerate(TRUTH))]
    (tmp_path / "dev.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "train.csv").write_text("\n".join(lines[:5]) + "\n")
    write_logits(tmp_path / "best/logits/ensemble.npz", RIGHT)
    (tmp_path / "best/thresholds.json").write_text(json.dumps({"thresholds": {"joy": 0.5, "anger": 0.5}}))
    graph = {"thresholds": [0.4, 0.4], "calibration_scale": [2.0, 2.0], "calibration_bias": [6.0, 6.0]}
    plain = {"thresholds": [0.5, 0.5], "calibration_scale": None, "calibration_bias": None}
    graphs = {"onnx/model.onnx": graph, "onnx/model_fast.onnx": plain}
    write_logits(tmp_path / "students/tiny/logits-fp32.npz", RIGHT - 3)  # all below 0: right after the calibration
    write_logits(tmp_path / "students/tiny/logits-int8.npz", RIGHT - 3)
    (tmp_path / "students/tiny/verification.json").write_text(json.dumps({"graphs": graphs}))
    (tmp_path / "students/tiny-hard").mkdir()
    without_joy = RIGHT * [-0.0, 1.0] - [1.0, 0.0]
    np.savez(
        tmp_path / "students/tiny-hard/logits-fp32.npz",
        dev=without_joy,
        held_out_rows=np.array([2, 3]),
        held_out=without_joy[2:4],
    )
    return tmp_path


def test_students_are_scored_with_their_own_thresholds(results: Path) -> None:
    scores = score_students(results / "students", results / "best", results / "train.csv", results / "dev.csv")
    at_half = ["tiny-fp32 at 0.5", "tiny-hard at 0.5"]
    held_out = [f"{name}, held-out tenth of train" for name in at_half]
    assert list(scores) == ["ensemble", "tiny-fp32", "tiny-int8", *at_half, *held_out]
    assert scores["ensemble"] == {"micro_f1": 1.0, "macro_f1": 1.0}
    assert scores["tiny-fp32"]["micro_f1"] == 1.0
    assert scores["tiny-fp32"]["minus_ensemble"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert scores["tiny-int8"]["micro_f1"] == 0.0  # no calibration there: nothing reaches 0.5
    assert scores["tiny-int8"]["minus_ensemble"]["difference"] == -1.0


def test_the_ablation_is_compared_at_one_half(results: Path) -> None:
    scores = score_students(results / "students", results / "best", results / "train.csv", results / "dev.csv")
    assert scores["tiny-hard at 0.5"]["micro_f1"] == pytest.approx(2 / 3, abs=1e-4)  # all of anger and none of joy
    assert scores["tiny-fp32 at 0.5"]["minus_hard"]["difference"] == pytest.approx(-2 / 3)
    # rows 2 and 3 of train: joy and anger, of which the ablation finds anger (2 * 1 / (1 + 2)), and nothing
    held_out = scores["tiny-fp32 at 0.5, held-out tenth of train"]
    assert held_out["micro_f1"] == 1.0
    assert held_out["minus_hard"]["difference"] == pytest.approx(1 / 3)
    assert scores["tiny-hard at 0.5, held-out tenth of train"]["micro_f1"] == pytest.approx(2 / 3, abs=1e-4)


def test_unlabelled_rows_are_refused(results: Path) -> None:
    (results / "dev.csv").write_text("text\nhello\n")
    with pytest.raises(InputError):
        score_students(results / "students", results / "best", results / "train.csv", results / "dev.csv")
