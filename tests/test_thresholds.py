"""Sigmoid, decisions and the choice of thresholds, against hand arithmetic and brute force."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from emodistill.errors import InputError
from emodistill.metrics import count_decisions, micro_f1, parse_metric, score_counts
from emodistill.thresholds import (
    cross_fit,
    decide,
    plug_in_thresholds,
    search_label_thresholds,
    search_shared_threshold,
    sigmoid,
)

CASES = Path(__file__).parent / "cases"


def small_case(seed: int, n_rows: int = 14, n_labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = (generator.random((n_rows, n_labels)) < [0.5, 0.3, 0.15]).astype(np.int8)
    scores = np.round(np.clip(0.35 * truth + generator.random((n_rows, n_labels)) * 0.65, 0, 1), 1)  # ties on purpose
    truth[0] = 1  # no label is absent
    return truth, scores.astype(np.float32)


def test_sigmoid_at_known_points_and_extremes() -> None:
    # 1 / (1 + e^4) = 0.0180; the same values that D10 asks of a loss wired with one sigmoid
    np.testing.assert_allclose(sigmoid([-4, 0, 4]), [0.0180, 0.5, 0.9820], atol=5e-5)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert sigmoid(np.array([-1e4, 1e4], np.float32)).tolist() == [0, 1]
    assert sigmoid([0.0]).dtype == np.float32
    assert np.isnan(sigmoid([np.nan])).all()


def test_equality_counts_as_positive() -> None:
    below = np.nextafter(np.float32(0.3), np.float32(0))
    decisions = decide(np.array([[0.3, below]], np.float32), [0.3, 0.3])  # the float64 0.3 is not the float32 0.3
    assert decisions.tolist() == [[1, 0]]
    assert decisions.dtype == np.int8


def test_d09_cross_fitted_is_not_tuned_on_the_same_rows() -> None:
    with open(CASES / "D09_oof_noise.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scores = np.array([[float(row["p_love"])] for row in rows], np.float32)
    truth = np.array([[int(row["y_love"])] for row in rows])
    folds = [int(row["fold"]) for row in rows]
    best = search_shared_threshold(truth, scores)
    assert best == pytest.approx(0.468)
    assert micro_f1(truth, decide(scores, best)) == pytest.approx(0.5185, abs=5e-5)  # 7 hits of 17: 14/27
    honest = cross_fit(folds, truth, scores, search_shared_threshold)
    assert micro_f1(truth, honest) == pytest.approx(0.2727, abs=5e-5)
    assert micro_f1(truth, np.ones_like(truth)) == pytest.approx(0.4)  # 2 * 10 / (10 + 40)


@pytest.mark.parametrize("metric", ["micro_f1", "f_beta:0.5", "f_beta:2"])
@pytest.mark.parametrize("seed", range(4))
def test_searched_thresholds_reach_the_brute_force_optimum(seed: int, metric: str) -> None:
    truth, scores = small_case(seed)
    parsed = parse_metric(metric)

    def score(thresholds: object) -> float:
        return float(score_counts(count_decisions(truth, decide(scores, np.array(thresholds))), parsed))

    candidates = np.unique(scores)
    best_shared = max(score(t) for t in candidates)
    assert score(search_shared_threshold(truth, scores, metric=metric)) == pytest.approx(best_shared)
    best_per_label = max(score(t) for t in itertools.product(candidates, repeat=3))
    own = search_label_thresholds(truth, scores, metric=metric, shrinkage_positives=0)
    assert score(own) == pytest.approx(best_per_label)


@pytest.mark.parametrize("metric", ["macro_f1", "label:b"])
@pytest.mark.parametrize("seed", range(4))
def test_macro_and_single_label_search_reach_each_labels_optimum(seed: int, metric: str) -> None:
    truth, scores = small_case(seed, n_rows=20)
    names = ["a", "b", "c"]
    parsed = parse_metric(metric, names)
    candidates = np.unique(scores)

    def score(thresholds: object) -> float:
        return float(score_counts(count_decisions(truth, decide(scores, np.array(thresholds))), parsed))

    shared = search_shared_threshold(truth, scores, metric=metric, label_names=names)
    assert score(shared) == pytest.approx(max(score(t) for t in candidates))
    own = search_label_thresholds(truth, scores, metric=metric, label_names=names, shrinkage_positives=0)
    best = max(score(t) for t in itertools.product(candidates, repeat=3))
    assert score(own) == pytest.approx(best)


def test_shrinkage_by_support() -> None:
    truth = np.array([[1, 0], [1, 0], [0, 0], [0, 0]])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.3], [0.1, 0.4]], np.float32)
    # first label: own threshold 0.8 with 2 positives, so 2 / (2 + 2) of it and the rest of 0.5; the second has no own
    chosen = search_label_thresholds(truth, scores, towards=0.5, shrinkage_positives=2)
    np.testing.assert_allclose(chosen, [0.65, 0.5])
    np.testing.assert_allclose(search_label_thresholds(truth, scores, towards=0.5, shrinkage_positives=0), [0.8, 0.5])
    np.testing.assert_allclose(
        search_label_thresholds(truth, scores, towards=0.5, shrinkage_positives=1e12), [0.5, 0.5]
    )


def test_plug_in_threshold_is_half_of_the_best_expected_f1() -> None:
    # take 1: 1.6/(1.3+1) = 0.6957; take 2: 2.4/(1.3+2) = 0.7273; take 3: 2.6/(1.3+3) = 0.6047; half of the best: 0.3636
    probabilities = np.array([[0.8], [0.4], [0.1]], np.float32)
    np.testing.assert_allclose(plug_in_thresholds(probabilities), [0.8 * 3 / 2 / 3.3], rtol=1e-6)
    per_label = plug_in_thresholds(np.concatenate([probabilities, probabilities / 2], axis=1), metric="macro_f1")
    # second label, sum 0.65: take 1: 0.8/1.65 = 0.4848; take 2: 1.2/2.65 = 0.4528; half of the best: 0.2424
    np.testing.assert_allclose(per_label, [0.36364, 0.24242], atol=1e-5)
    assert plug_in_thresholds(np.zeros((2, 1))).tolist() == [0.5]


@pytest.mark.parametrize("metric", ["micro_f1", "f_beta:0.5", "f_beta:2"])
def test_plug_in_threshold_meets_the_searched_one_on_calibrated_scores(metric: str) -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.beta(0.3, 1.5, (60_000, 2)).astype(np.float32)
    truth = generator.random((60_000, 2)) < probabilities  # calibrated by construction
    plug_in = plug_in_thresholds(probabilities, metric=metric)
    assert plug_in[0] == plug_in[1]
    assert plug_in[0] == pytest.approx(search_shared_threshold(truth, probabilities, metric=metric), abs=0.03)


def test_absent_label_gets_the_shared_threshold_under_every_metric() -> None:
    truth, scores = small_case(1)
    truth[:, 2] = 0
    for metric in ("micro_f1", "macro_f1"):
        own = search_label_thresholds(truth, scores, metric=metric, towards=0.37)
        assert own[2] == pytest.approx(0.37)
    assert search_shared_threshold(np.zeros_like(truth), scores) == 0.5


def test_unusable_probabilities_are_refused() -> None:
    with pytest.raises(InputError, match=r"sigmoid\(logits\)"):
        plug_in_thresholds([[np.nan]])
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        search_shared_threshold([[1]], [[3.0]])
    with pytest.raises(InputError, match="one fold"):
        cross_fit([0, 0], [[1], [0]], [[0.5], [0.1]], search_shared_threshold)
    with pytest.raises(InputError, match=r"\(1, 2\).*\(1, 1\)"):
        search_shared_threshold([[1, 0]], [[0.5]])
