"""A cheap member on a frozen encoder: one hidden layer from embeddings to logits, in a minute.

The encoder never saw a label, so its embeddings are the same for all folds; the layer is fitted on the training rows of
its fold alone.
"""

import math
import warnings
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from emodistill.ensemble.tfidf import constant_logit
from emodistill.errors import InputError

__all__ = ["train_head_member"]

HIDDEN_UNITS = 256
MIN_EPOCHS, MIN_STEPS = 10, 2000  # whichever takes longer
BATCH_SIZE = 64
WEIGHT_DECAY = 0.5  # alpha of scikit-learn; with this much the logits need no calibration
LEARNING_RATE = 3e-4
MIN_DEVIATION = 1e-6

Float32Array = npt.NDArray[np.float32]


def train_head_member(
    embeddings: Float32Array,
    labels: npt.NDArray[np.int8],
    fold_ids: npt.NDArray[np.int8],
    fold: int,
    evaluation_embeddings: Mapping[str, Float32Array],
    seed: int,
) -> tuple[npt.NDArray[np.int32], Float32Array, dict[str, Float32Array]]:
    """Train on the rows outside a fold; predict the fold and the evaluation texts.

    Parameters
    ----------
    embeddings : float32 array of shape (n_samples, n_features)
    labels : int8 array of shape (n_samples, n_labels), in {0, 1}
    fold_ids : int8 array of shape (n_samples,)
    fold : int
        The fold that is left out and predicted.
    evaluation_embeddings : mapping from str to float32 array of shape (n_texts, n_features)
        Sets of texts to predict, for example "dev" and "unlabeled".
    seed : int
        Of the starting weights and the order of rows.

    Returns
    -------
    valid_rows : int32 array of shape (n_valid,)
    valid_logits : float32 array of shape (n_valid, n_labels)
    evaluation_logits : dict from str to float32 array of shape (n_texts, n_labels)

    Raises
    ------
    InputError
        If no row lies outside the fold.
    """
    inside = np.asarray(fold_ids) == fold
    if inside.all():
        raise InputError(f"fold {fold} holds all {len(inside)} rows: choose one with rows outside")
    training, truth = embeddings[~inside], labels[~inside]
    centre = training.mean(axis=0)
    scale = 1 / np.maximum(training.std(axis=0), MIN_DEVIATION)
    n_positive = truth.sum(axis=0, dtype=np.int64)
    mixed = (n_positive > 0) & (n_positive < len(truth))
    constants = np.array([constant_logit(int(n), len(truth)) for n in n_positive], np.float32)
    # A batch is too small a product for a second thread of BLAS to be worth waking.
    with threadpool_limits(limits=1, user_api="blas"):
        model = _fit((training - centre) * scale, truth[:, mixed], seed) if mixed.any() else None

    def predict(some: Float32Array) -> Float32Array:
        logits = np.repeat(constants[None], len(some), axis=0)
        if model is not None:
            logits[:, mixed] = _logits(model, (some - centre) * scale)
        return logits

    valid_rows = np.flatnonzero(inside).astype(np.int32)
    return (
        valid_rows,
        predict(embeddings[valid_rows]),
        {name: predict(some) for name, some in evaluation_embeddings.items()},
    )


def _fit(features: Float32Array, truth: npt.NDArray[np.int8], seed: int) -> MLPClassifier:
    batch_size = min(BATCH_SIZE, len(features))
    n_epochs = max(MIN_EPOCHS, math.ceil(MIN_STEPS / math.ceil(len(features) / batch_size)))
    model = MLPClassifier(
        (HIDDEN_UNITS,),
        alpha=WEIGHT_DECAY,
        batch_size=batch_size,
        learning_rate_init=LEARNING_RATE,
        max_iter=n_epochs,
        n_iter_no_change=n_epochs,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are counted on purpose
        return model.fit(features, truth[:, 0] if truth.shape[1] == 1 else truth)


def _logits(model: MLPClassifier, features: Float32Array) -> Float32Array:
    """Return what goes into the sigmoid: scikit-learn gives probabilities only, in which sure logits are lost."""
    (to_hidden, to_logits), (hidden_bias, bias) = model.coefs_, model.intercepts_
    hidden = np.maximum(features @ to_hidden + hidden_bias, 0)
    logits: Float32Array = (hidden @ to_logits + bias).astype(np.float32)
    return logits
