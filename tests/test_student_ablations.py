"""Ablations of distillation: fair choices of text and threshold, and differences taken to the right treatment."""

from pathlib import Path

import numpy as np
import pytest
from models import write_encoder_folder

from emodistill.benchmarks import student_ablations
from emodistill.benchmarks.student_ablations import TREATMENTS, Treatment, choose_transfer, decide_across
from emodistill.data import read_dataset
from emodistill.distill.students import STUDENT_PRESETS
from emodistill.logits import ModelLogits


def test_every_treatment_is_a_student_that_can_be_made() -> None:
    for treatment in TREATMENTS.values():
        student = student_ablations._student(treatment)
        assert treatment.baseline in TREATMENTS
        for setting, value in treatment.changes.items():
            assert getattr(student, setting) == value
        if treatment.transfer == "none":
            assert student.epochs == 2 * student_ablations.EPOCHS  # as many updates as with as much transfer text


def test_transfer_texts_are_drawn_towards_positives() -> None:
    texts = [f"text {i}" for i in range(400)]
    logits = np.where(np.arange(400) % 4 == 0, 3.0, -5.0).astype(np.float32)[:, None]
    assert choose_transfer("none", texts, logits, 100).tolist() == []
    assert choose_transfer("first", texts, logits, 100).tolist() == list(range(100))
    chosen = choose_transfer("positive", texts, logits, 100)
    assert len(set(chosen.tolist())) == 100
    assert (logits[chosen, 0] > 0).mean() > 0.8
    assert len(choose_transfer("positive", texts, logits, 1000)) == 400


def test_a_half_is_decided_at_the_threshold_of_the_other() -> None:
    truth = np.array([[1], [1], [0], [0]] * 10, np.int8)
    logits = np.where(truth == 1, -1.0, -3.0).astype(np.float32)
    logits[1::2] += 4  # the halves are right at thresholds of their own, and wrong at each other's
    decisions = decide_across(truth, logits)
    assert decisions[0::2].max() == 0
    assert decisions[1::2].min() == 1


def test_differences_are_to_the_treatments_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorflow_model_optimization")
    pytest.importorskip("onnx")
    encoder = write_encoder_folder(tmp_path / "encoder")
    monkeypatch.setattr(student_ablations, "resolve_encoder", lambda name: encoder)
    monkeypatch.setattr(
        student_ablations,
        "TREATMENTS",
        {
            "baseline": Treatment(),
            "hard labels alone": Treatment({"hard_weight": 1.0}, transfer="none"),
            "clustered": Treatment({"compression": "clustered", "n_clusters": 4}),
            "second teacher": Treatment(teacher=1),
        },
    )
    toy = {"layers": (0,), "vocabulary_size": None, "learning_rate": 1e-2, "epochs": 6, "precision": "float32"}
    monkeypatch.setitem(STUDENT_PRESETS, "tiny", student_ablations.StudentConfig(name="tiny", **toy))
    monkeypatch.setattr(student_ablations, "EPOCHS", 6)
    generator = np.random.default_rng(0)
    words = generator.choice(["thank you", "sorry", "lol a", "love you"], 240)
    lines = [f"{word} {i},{int('thank' in word)},{int('sorry' in word)}" for i, word in enumerate(words)]
    (tmp_path / "train.csv").write_text("\n".join(["text,gratitude,remorse", *lines]) + "\n")
    train = read_dataset(tmp_path / "train.csv")
    assert train.labels is not None
    teacher = ModelLogits(
        oof=np.where(train.labels, 4.0, -4.0).astype(np.float32),
        fold_ids=np.zeros(240, np.int8),
        folds=np.zeros(1, np.int8),
        train_rows=np.arange(240, dtype=np.uint64),
        rows={"unlabeled": np.arange(2, dtype=np.uint64)},
        averages={"unlabeled": np.array([[4, -4], [-4, 4]], np.float32)},
        label_names=train.label_names,
    )
    work = tmp_path / "work"
    student_ablations.measure_treatments(["baseline"], train, ["thank you", "sorry"], [teacher], work)
    metrics = work / "baseline" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('{"step": 0,', '{"marked": 1, "step": 0,'))
    found = student_ablations.measure_treatments(
        list(student_ablations.TREATMENTS), train, ["thank you", "sorry"], [teacher], work
    )
    by_name = {entry["treatment"]: entry for entry in found["treatments"]}
    assert list(by_name) == ["baseline", "hard labels alone", "clustered"]  # there is no second teacher
    assert by_name["baseline"]["micro_f1"] > 0.9
    assert "micro_f1_minus_baseline" not in by_name["baseline"]
    assert by_name["baseline"]["int8_micro_f1"] > 0.9
    assert "marked" in (work / "clustered" / "metrics.jsonl").read_text()  # went on from the baseline's end
    assert not np.array_equal(np.load(work / "baseline" / "int8.npy"), np.load(work / "clustered" / "int8.npy"))
    gap = by_name["hard labels alone"]
    expected = gap["micro_f1"] - by_name["baseline"]["micro_f1"]
    assert gap["micro_f1_minus_baseline"]["difference"] == pytest.approx(expected, abs=2e-4)
    trained = (work / "baseline" / "logits.npz").stat().st_mtime_ns
    student_ablations.measure_treatments(["baseline"], train, [], [teacher], work)
    assert (work / "baseline" / "logits.npz").stat().st_mtime_ns == trained
