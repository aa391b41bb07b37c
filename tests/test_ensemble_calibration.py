"""Calibration: known pairs are found again, rare labels keep to the shared pair, and scikit-learn agrees."""

import json

import numpy as np
import pytest

from emodistill.ensemble.calibration import Calibration, fit_calibration
from emodistill.errors import InputError
from emodistill.thresholds import sigmoid


def drawn(scales: list[float], biases: list[float], n_rows: int = 20_000, seed: int = 0) -> tuple:
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1, 2, (n_rows, len(scales)))
    truth = generator.random(logits.shape) < sigmoid(np.array(scales) * logits + np.array(biases))
    return logits.astype(np.float32), truth.astype(np.int8)


def test_the_pairs_that_generated_the_labels_are_found() -> None:
    logits, truth = drawn([0.5, 2.0], [0.3, -1.0])
    fitted = fit_calibration(logits, truth, prior_strength=0)
    np.testing.assert_allclose(fitted.scale, [0.5, 2.0], rtol=0.08)
    np.testing.assert_allclose(fitted.bias, [0.3, -1.0], atol=0.1)


def test_without_a_prior_it_is_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    logits, truth = drawn([0.7], [0.2], n_rows=500)
    model = linear_model.LogisticRegression(C=1e9, tol=1e-10).fit(logits, truth[:, 0])
    fitted = fit_calibration(logits, truth, prior_strength=0)
    np.testing.assert_allclose(fitted.scale[0], model.coef_[0, 0], rtol=1e-3)
    np.testing.assert_allclose(fitted.bias[0], model.intercept_[0], atol=1e-3)


def test_calibrated_probabilities_have_the_right_mean() -> None:
    logits, truth = drawn([0.5, 2.0, 1.0], [0.3, -1.0, 0.0])
    probabilities = sigmoid(fit_calibration(logits, truth).apply(logits))
    # at the likelihood's optimum of the bias the means are equal; the prior of 20 moves them by 20 * off / 20000 rows
    np.testing.assert_allclose(probabilities.mean(axis=0), truth.mean(axis=0), atol=2e-3)


def test_a_rare_label_keeps_to_the_shared_pair_and_an_absent_one_takes_it() -> None:
    logits, truth = drawn([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    truth[100:, 2] = 0  # a few dozen positives among 20,000 rows
    truth[:, 3] = 0
    weak, strong = (fit_calibration(logits, truth, prior_strength=s) for s in (0.1, 1e9))
    default = fit_calibration(logits, truth)
    shared = strong.bias[2]
    assert abs(default.bias[2] - shared) < abs(weak.bias[2] - shared)
    np.testing.assert_allclose(strong.bias, shared, atol=0.01)
    assert default.bias[3] == pytest.approx(shared, abs=1e-3)
    assert abs(default.bias[0]) < abs(shared)  # 10,000 positives: its own


def test_separable_labels_stay_finite_and_ordered() -> None:
    logits = np.array([[-3.0, 3.0], [-2.0, 2.0], [2.0, -2.0], [3.0, -3.0]], np.float32)
    truth = np.array([[0, 0], [0, 0], [1, 1], [1, 1]], np.int8)  # the second label is upside down
    fitted = fit_calibration(logits, truth, prior_strength=0)
    assert np.isfinite(fitted.scale).all()
    assert np.isfinite(fitted.bias).all()
    assert (fitted.scale > 0).all()


def test_json_gives_it_back() -> None:
    fitted = fit_calibration(*drawn([0.5, 2.0], [0.3, -1.0], n_rows=200))
    again = Calibration.from_json(json.loads(json.dumps(fitted.to_json())))
    np.testing.assert_array_equal(again.scale, fitted.scale)
    np.testing.assert_array_equal(again.bias, fitted.bias)


def test_nan_is_refused() -> None:
    with pytest.raises(InputError, match="finite"):
        fit_calibration([[np.nan]], [[1]])
