"""Losses of several-hot targets on logits: one sigmoid per label, applied inside the loss and nowhere else."""

import tensorflow as tf

__all__ = ["binary_cross_entropy"]


def binary_cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Return the mean binary cross-entropy over rows and labels.

    Parameters
    ----------
    logits
        float32 (batch, n_labels), unbounded.
    targets
        float32 (batch, n_labels), in [0, 1]; several labels of a row may be 1.

    Returns
    -------
    Tensor
        float32 scalar.
    """
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits))
