"""F1, its rule for what is not defined, and the bootstrap, against hand arithmetic and scikit-learn."""

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest

from emodistill.errors import ConfigError, InputError
from emodistill.metrics import (
    bootstrap_interval,
    bootstrap_label_intervals,
    count_decisions,
    f1_report,
    macro_f1,
    micro_f1,
    paired_bootstrap,
    parse_metric,
    score_counts,
)

CASES = Path(__file__).parent / "cases"


def read_d07() -> tuple[list[str], np.ndarray, np.ndarray]:
    with open(CASES / "D07_scored.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [column.removeprefix("true_") for column in rows[0] if column.startswith("true_")]
    true = np.array([[int(row[f"true_{name}"]) for name in names] for row in rows])
    pred = np.array([[int(row[f"pred_{name}"]) for name in names] for row in rows])
    return names, true, pred


def random_case(seed: int, n_rows: int = 300, n_labels: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    true = (generator.random((n_rows, n_labels)) < 0.3).astype(np.int8)
    flip_a, flip_b = generator.random((2, n_rows, n_labels))
    return true, np.where(flip_a < 0.1, 1 - true, true), np.where(flip_b < 0.2, 1 - true, true)


def test_d07_absent_label_is_undefined_and_left_out_of_the_mean() -> None:
    names, true, pred = read_d07()
    report = f1_report(true, pred, names)
    per_label = {name: values["f1"] for name, values in report["per_label"].items()}
    # pride: one predicted, none true -> a real 0; relief: neither -> undefined; remorse: 1 hit of 2 -> 2*1/(2+1)
    assert per_label == pytest.approx(
        {"admiration": 1, "amusement": 0, "gratitude": 1, "love": 1, "pride": 0, "relief": None, "remorse": 2 / 3}
    )
    assert report["micro_f1"] == pytest.approx(0.7692, abs=5e-5)  # 5 hits, 6 predicted, 7 true: 10/13
    assert report["macro_f1"] == pytest.approx(0.6111, abs=5e-5)  # (1 + 0 + 1 + 1 + 0 + 2/3) / 6
    assert macro_f1(true, pred) == report["macro_f1"]
    relief = report["per_label"]["relief"]
    assert relief == {"support": 0, "predicted": 0, "precision": None, "recall": None, "f1": None}
    assert report["per_label"]["pride"]["recall"] is None
    assert report["per_label"]["pride"]["precision"] == 0
    assert "NaN" not in json.dumps(report)


def test_nothing_true_and_nothing_predicted_is_undefined() -> None:
    nothing = np.zeros((3, 2), np.int8)
    report = f1_report(nothing, nothing, ["a", "b"])
    assert report["micro_f1"] is None
    assert report["macro_f1"] is None
    assert np.isnan(micro_f1(nothing, nothing))
    assert np.isnan(bootstrap_interval(nothing, nothing)).all()


@pytest.mark.parametrize("seed", range(3))
def test_f1_equals_scikit_learn(seed: int) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    true, pred, _ = random_case(seed)
    report = f1_report(true, pred, list("abcde"))
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(true, pred)
    values = report["per_label"].values()
    np.testing.assert_allclose([v["f1"] for v in values], f1)
    np.testing.assert_allclose([v["precision"] for v in values], precision)
    np.testing.assert_allclose([v["recall"] for v in values], recall)
    assert [v["support"] for v in values] == support.tolist()
    assert micro_f1(true, pred) == pytest.approx(sklearn_metrics.f1_score(true, pred, average="micro"))
    assert macro_f1(true, pred) == pytest.approx(sklearn_metrics.f1_score(true, pred, average="macro"))
    half = score_counts(count_decisions(true, pred), parse_metric("f_beta:0.5"))
    assert half == pytest.approx(sklearn_metrics.fbeta_score(true, pred, beta=0.5, average="micro"))


def test_interval_equals_resampling_row_by_row() -> None:
    true, pred, _ = random_case(0)
    generator = np.random.default_rng(1)
    scores = []
    for _ in range(2000):
        rows = generator.integers(0, len(true), len(true))
        scores.append(micro_f1(true[rows], pred[rows]))
    expected = np.quantile(scores, [0.025, 0.975])
    # 2000 resamples place a 2.5 % quantile within about 0.0015 here (width 0.05): 0.004 is beyond chance
    np.testing.assert_allclose(bootstrap_interval(true, pred), expected, atol=0.004)


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1", "label:c", "f_beta:0.5", "f_beta:2"])
def test_interval_holds_the_score_and_repeats_with_its_seed(metric: str) -> None:
    true, pred, _ = random_case(2)
    names = list("abcde")
    low, high = bootstrap_interval(true, pred, metric=metric, label_names=names, seed=3)
    score = score_counts(count_decisions(true, pred), parse_metric(metric, names))
    assert low < score < high
    assert (low, high) == bootstrap_interval(true, pred, metric=metric, label_names=names, seed=3)
    assert (low, high) != bootstrap_interval(true, pred, metric=metric, label_names=names, seed=4)


def test_label_intervals_equal_the_interval_of_each_label() -> None:
    true, pred, _ = random_case(2)
    pred[:, 4] = true[:, 4] = 0
    intervals = bootstrap_label_intervals(true, pred, seed=5)
    assert intervals.shape == (5, 2)
    assert np.isnan(intervals[4]).all()
    one = bootstrap_interval(true, pred, metric="label:b", label_names=list("abcde"), seed=5)
    assert tuple(intervals[1]) == pytest.approx(one)


def test_paired_difference_is_antisymmetric_and_narrower_than_unpaired() -> None:
    true, better, worse = random_case(4)
    forward = paired_bootstrap(true, better, worse)
    backward = paired_bootstrap(true, worse, better)
    assert forward.difference == pytest.approx(micro_f1(true, better) - micro_f1(true, worse))
    assert forward.excludes_zero
    assert forward.low > 0
    assert backward.difference == -forward.difference
    assert backward.high < 0
    same = paired_bootstrap(true, better, better)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_large_data_takes_seconds_not_minutes() -> None:
    true, better, worse = random_case(5, n_rows=25_000, n_labels=7)
    start = time.process_time()
    paired_bootstrap(true, better, worse)
    assert time.process_time() - start < 6  # about 1 s with 5,000 patterns; resampled row by row it would be a minute


@pytest.mark.parametrize("metric", ["f1", "f_beta:", "f_beta:0", "f_beta:nan", "label:", "label:joy", "macro"])
def test_unknown_metric_is_refused(metric: str) -> None:
    with pytest.raises(ConfigError, match="metric"):
        parse_metric(metric, ["love", "pride"])


def test_shapes_and_values_are_checked() -> None:
    with pytest.raises(InputError, match=r"\(2, 1\).*\(1, 2\)"):
        micro_f1([[1], [0]], [[1, 0]])
    with pytest.raises(InputError, match="apply thresholds"):
        micro_f1([[1, 0]], [[0.7, 0.1]])
    with pytest.raises(InputError, match="one name per column"):
        f1_report([[1, 0]], [[1, 0]], ["love"])
    with pytest.raises(InputError, match="no rows"):
        bootstrap_interval(np.zeros((0, 2)), np.zeros((0, 2)))
