"""Distillation losses for independent labels: one sigmoid each, never a softmax over them.

Hinton, Vinyals and Dean (2015, arXiv:1503.02531) soften targets with a temperature; with sigmoids the temperature
divides each logit, and the gradient of the softened cross-entropy shrinks with its square, hence the factor T^2.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from emodistill.errors import ConfigError
from emodistill.losses import binary_cross_entropy
from emodistill.thresholds import sigmoid

__all__ = ["distillation_loss", "soft_targets"]


def soft_targets(teacher_logits: NDArray[np.float32], distillation_temperature: float) -> NDArray[np.float32]:
    """Return sigmoid(teacher_logits / T): float32 array of the logits' shape, in [0, 1].

    Examples
    --------
    >>> soft_targets(np.array([2.0, -1.0, 0.5], np.float32), 2.0).round(4).tolist()
    [0.7311000227928162, 0.3774999976158142, 0.5622000098228455]
    """
    if distillation_temperature <= 0:
        raise ConfigError(f"distillation_temperature = {distillation_temperature}: expected a number above 0")
    return sigmoid(np.asarray(teacher_logits, np.float32) / distillation_temperature)


def distillation_loss(
    distillation_temperature: float, hard_weight: float
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """Make the loss of a student: soft and hard cross-entropy, mixed.

    Parameters
    ----------
    distillation_temperature
        T; soft part = T^2 * BCE(student_logits / T, soft_targets).
    hard_weight
        Share of the hard part, in [0, 1], on rows that have labels.

    Returns
    -------
    callable
        `loss(logits, soft_targets, hard_targets, has_labels)`: float32 (batch, n_labels) three times, and
        float32 (batch,), 1 where a row has labels and 0 where it is transfer text; a scalar.
    """
    if not 0 <= hard_weight <= 1:
        raise ConfigError(f"hard_weight = {hard_weight}: expected a share between 0 and 1")

    def loss(logits: tf.Tensor, soft: tf.Tensor, hard: tf.Tensor, has_labels: tf.Tensor) -> tf.Tensor:
        t = distillation_temperature
        soft_rows = t * t * tf.nn.sigmoid_cross_entropy_with_logits(labels=soft, logits=logits / t)
        hard_rows = tf.nn.sigmoid_cross_entropy_with_logits(labels=hard, logits=logits)
        share = hard_weight * has_labels[:, None]
        return tf.reduce_mean(share * hard_rows + (1 - share) * soft_rows)

    return loss if hard_weight < 1 else lambda logits, _soft, hard, _has: binary_cross_entropy(logits, hard)
