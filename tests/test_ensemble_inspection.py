"""The inspection: planted errors are found, and every table's numbers are those of the metrics."""

import json
import sys

import numpy as np
import pytest

from emodistill.ensemble.combination import MemberLogits, combine
from emodistill.ensemble.inspection import (
    error_correlation,
    find_label_errors,
    inspect_ensemble,
    likely_label_errors,
    render_text,
)
from emodistill.ensemble.referee import Recipe, Referee
from emodistill.errors import InputError
from emodistill.metrics import micro_f1, parse_metric
from emodistill.thresholds import sigmoid

N_ROWS = 1500
NAMES = ("anger", "joy", "pride")


@pytest.fixture(scope="module")
def case() -> dict:
    generator = np.random.default_rng(0)
    truth = (generator.random((N_ROWS, 3)) < (0.3, 0.2, 0.1)).astype(np.int8)
    signal = np.where(truth, 3.0, -3.0) + generator.normal(0, 1.2, truth.shape)
    signal[4] = [9.0, -9.0, -9.0]
    truth[4] = [0, 0, 0]  # planted: surely anger, not labelled so
    signal[9] = [-9.0, -9.0, -9.0]
    truth[9] = [0, 1, 0]  # planted: surely not joy, labelled so
    noise = generator.normal(0, 1.5, (2, *truth.shape))
    noise[:, [4, 9]] = 0
    noise[1, :, 2] *= 4  # the second is bad at pride
    members = [MemberLogits(f"m{i}", (signal + noise[i]).astype(np.float32)) for i in range(2)]
    folds = (np.arange(N_ROWS) % 3).astype(np.int8)
    combination = combine(members, truth, folds, NAMES)
    texts = [f"text number {i}\nsecond line" for i in range(N_ROWS)]
    report = inspect_ensemble(members, truth, folds, combination, texts=texts)
    return {"members": members, "truth": truth, "folds": folds, "combination": combination, "report": report}


def test_scores_are_those_of_the_cross_fitted_decisions(case: dict) -> None:
    report, combination = case["report"], case["combination"]
    assert report["micro_f1"] == pytest.approx(micro_f1(case["truth"], combination.cross_fitted_decisions))
    low, high = report["micro_f1_interval"]
    assert low < report["micro_f1"] < high
    for label, name in zip(report["labels"], NAMES, strict=True):
        assert label["name"] == name
        assert label["support"] == case["truth"][:, NAMES.index(name)].sum()
        assert label["f1_interval"][0] < label["f1"] < label["f1_interval"][1]


def test_planted_errors_come_first(case: dict) -> None:
    for table in ("confident_errors", "label_errors"):
        found = {(row["row"], row["label"]) for row in case["report"][table][:2]}
        assert found == {(4, "anger"), (9, "joy")}
    first = {row["row"]: row for row in case["report"]["label_errors"]}
    assert first[4]["given"] == []
    assert first[4]["probability"] > 0.95
    assert first[9]["given"] == ["joy"]
    assert first[9]["text"] == "text number 9\nsecond line"
    assert len(case["report"]["label_errors"]) <= 20 < case["report"]["n_label_errors"] + 20


def test_members_gains_and_curve(case: dict) -> None:
    report = case["report"]
    first, second = report["members"]
    assert "pride" in first["best_at"]
    assert first["f1"]["pride"] > second["f1"]["pride"]
    assert first["micro_f1"] > second["micro_f1"]
    curve = report["curve"]
    assert [point["n_members"] for point in curve] == [1, 2]
    assert curve[0]["added"] == "m0"
    assert curve[0]["micro_f1"] == pytest.approx(first["micro_f1"])
    # leaving m1 out of two leaves m0: what m1 adds is the last point of the curve minus the first
    gain = next(g for g in report["leave_one_out"] if g["name"] == "m1")
    assert gain["difference"] == pytest.approx(curve[1]["micro_f1"] - curve[0]["micro_f1"])
    assert gain["low"] <= gain["difference"] <= gain["high"]
    assert curve[0]["gain"] is None
    assert curve[1]["gain"] == {key: gain[key] for key in ("difference", "low", "high")}


def test_gains_are_in_the_space_of_the_ensemble(case: dict) -> None:
    members, truth, folds = case["members"], case["truth"], case["folds"]
    forced = combine(members, truth, folds, NAMES, rule="uniform_probabilities")
    report = inspect_ensemble(members, truth, folds, forced)
    stack = np.stack([member.oof for member in members])
    decisions = Referee(stack, truth, folds, parse_metric("micro_f1"), 0).cross_fit(
        Recipe("uniform", "plug_in", "probabilities")
    )
    assert report["curve"][-1]["micro_f1"] == pytest.approx(micro_f1(truth, decisions))
    assert report["curve"][-1]["micro_f1"] != case["report"]["curve"][-1]["micro_f1"]


def test_co_occurrence_counts_rows_with_both(case: dict) -> None:
    co, truth = case["report"]["co_occurrence"], case["truth"]
    assert co["true"][0][1] == int((truth[:, 0] & truth[:, 1]).sum())
    assert co["true"][2][2] == int(truth[:, 2].sum())
    assert co["decided"][1][1] == case["report"]["labels"][1]["predicted"]


def test_report_is_json_and_text(case: dict) -> None:
    json.dumps(case["report"], allow_nan=False)
    text = render_text(case["report"])
    for part in (*NAMES, "m0", "m1", "shared_plug_in", "row 4: anger", "given no label", "Likely label errors"):
        assert part in text
    assert "text number 4 second line" in text  # one line per row


def test_confident_learning_by_hand() -> None:
    # with the label 0.9, 0.8, 0.1: usually 0.6; without it 0.1, 0.2, 0.95: its absence usually (0.9+0.8+0.05)/3 = 0.58
    truth = np.array([[1], [1], [1], [0], [0], [0]], np.int8)
    probabilities = np.array([[0.9], [0.8], [0.1], [0.1], [0.2], [0.95]], np.float32)
    # row 2: absence 0.9 reaches 0.58 and 0.1 does not reach 0.6. Row 5: 0.95 reaches 0.6. Given values: 0.05 and 0.1.
    assert likely_label_errors(truth, probabilities) == [(5, 0), (2, 0)]
    assert likely_label_errors(np.zeros((2, 1), np.int8), np.array([[0.9], [0.1]], np.float32)) == []


def test_a_rare_label_is_not_suspect_below_one_half() -> None:
    # With the label 0.3 and 0.1, usually 0.2; row 2 has 0.4 without it, twice what is usual, and is still unlikely.
    truth = np.array([[1], [1], [0], [0], [0]], np.int8)
    probabilities = np.array([[0.3], [0.1], [0.4], [0.0], [0.0]], np.float32)
    # Absence is usually (0.6 + 1 + 1) / 3 = 0.87: row 1 has 0.9, row 0 only 0.7.
    assert likely_label_errors(truth, probabilities) == [(1, 0)]


def test_our_rule_is_that_of_cleanlab(case: dict) -> None:
    filters = pytest.importorskip("cleanlab.multilabel_classification.filter")
    truth, probabilities = case["truth"], sigmoid(case["members"][1].oof)
    given = [np.flatnonzero(row).tolist() for row in truth]
    expected = filters.find_multilabel_issues_per_class(
        given, probabilities.astype(np.float64), filter_by="confident_learning", n_jobs=1
    )
    found = np.zeros(truth.shape, bool)
    for row, label in likely_label_errors(truth, probabilities):
        found[row, label] = True
    assert found.sum() > 20
    np.testing.assert_array_equal(found, expected)


def test_cleanlab_finds_the_planted_errors_and_lives_with_an_absent_label(case: dict) -> None:
    cleanlab = pytest.importorskip("cleanlab")
    truth, probabilities = case["truth"].copy(), sigmoid(np.mean([m.oof for m in case["members"]], axis=0))
    truth[:, 2] = 0
    errors, method = find_label_errors(truth, probabilities)
    assert set(errors[:2]) == {(4, 0), (9, 1)}
    assert all(label < 2 for _, label in errors)
    assert method == f"cleanlab {cleanlab.__version__}"


def test_without_cleanlab_the_report_says_what_found_them(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    probabilities = sigmoid(case["members"][0].oof)
    errors, method = find_label_errors(case["truth"], probabilities)
    assert errors == likely_label_errors(case["truth"], probabilities)
    assert "emodistill[inspect]" in method


def test_error_correlation_of_known_errors() -> None:
    truth = np.zeros((4, 1), np.int8)
    first = np.array([[-2.0], [-2.0], [2.0], [2.0]], np.float32)
    stack = np.stack([first, first, first[::-1], np.zeros_like(first)])
    expected = [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(error_correlation(stack, truth), expected, atol=1e-6)


def test_other_members_than_those_combined_are_refused(case: dict) -> None:
    with pytest.raises(InputError, match="not those combined"):
        inspect_ensemble(case["members"][:1], case["truth"], case["folds"], case["combination"])
