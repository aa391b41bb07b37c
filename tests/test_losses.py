"""Losses against numbers worked out by hand (D10, D17)."""

import json
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from emodistill.distill.losses import distillation_loss, soft_targets  # noqa: E402
from emodistill.losses import binary_cross_entropy  # noqa: E402
from emodistill.thresholds import probabilities_to_logits  # noqa: E402

D17 = json.loads((Path(__file__).parent / "cases" / "D17_numbers.json").read_text())


def test_soft_targets_are_sigmoids_of_softened_logits():
    found = soft_targets(np.array(D17["teacher_logits"], np.float32), D17["T"])
    np.testing.assert_allclose(found, D17["soft_targets"], atol=5e-5)


def test_temperature_one_changes_nothing():
    logits = np.array([-4.0, 0.0, 4.0], np.float32)
    np.testing.assert_allclose(soft_targets(logits, 1.0), [0.0180, 0.5, 0.9820], atol=5e-5)


def test_the_soft_loss_is_rescaled_by_the_squared_temperature():
    soft = tf.constant([D17["soft_targets"]])
    student = tf.constant([D17["student_logits"]])
    loss = distillation_loss(2.0, 0.0)(student, soft, tf.zeros((1, 3)), tf.ones(1))
    assert float(loss) == pytest.approx(D17["bce_mean_times_T2"], abs=2e-4)
    assert float(loss) / 4 == pytest.approx(D17["bce_mean_at_T"], abs=5e-5)


def test_saved_probabilities_are_softened_through_their_logits():
    logits = probabilities_to_logits(np.array([D17["teacher_prob_only"], 1.0, 0.0]))
    assert np.isfinite(logits).all()
    assert soft_targets(logits, 2.0)[0] == pytest.approx(D17["soft_target_from_prob_at_T2"], abs=5e-5)


def test_rows_without_labels_ignore_the_hard_part():
    logits = tf.constant([[1.0, -1.0], [1.0, -1.0]])
    soft = tf.constant([[0.5, 0.5], [0.5, 0.5]])
    loss = distillation_loss(1.0, 0.25)
    # BCE(1, target 1) = 0.3133, BCE(-1, target 0) = 0.3133; against 0.5 both are 0.8133.
    labelled = 0.25 * 0.3133 + 0.75 * 0.8133
    hard = tf.constant([[1.0, 0.0], [0.0, 0.0]])
    found = float(loss(logits, soft, hard, tf.constant([1.0, 0.0])))
    assert found == pytest.approx((labelled + 0.8133) / 2, abs=1e-4)


def test_both_labels_of_a_row_act():
    logits = tf.Variable([[0.0, 0.0, 0.0]])
    with tf.GradientTape() as tape:
        loss = binary_cross_entropy(logits, tf.constant([[1.0, 1.0, 0.0]]))
    # d/dlogit of the mean over 3 labels: (0.5 - target) / 3.
    np.testing.assert_allclose(tape.gradient(loss, logits)[0], [-1 / 6, -1 / 6, 1 / 6], atol=1e-6)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
