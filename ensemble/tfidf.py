"""A cheap member that errs elsewhere than encoders: TF-IDF of word and character n-grams, one regression per label.

Trains in about a minute on 20,000 short texts on one core. Everything, the vocabulary included, is fitted on the
training rows of its fold alone, so that its out-of-fold logits are honest like those of any other member.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from emodistill.errors import InputError

__all__ = ["constant_logit", "train_tfidf_member"]

WORD_NGRAMS = (1, 2)
WORD_PATTERN = r"(?u)\b\w+\b|[^\w\s]"  # a mark or emoji is a word of its own
CHARACTER_NGRAMS = (2, 5)  # within words, so that inflections and misspellings meet
MIN_TEXTS = 2  # an n-gram of fewer training texts is not a feature
INVERSE_REGULARIZATION = 4.0  # C of scikit-learn

Float32Array = npt.NDArray[np.float32]


def train_tfidf_member(
    texts: Sequence[str],
    labels: npt.NDArray[np.int8],
    fold_ids: npt.NDArray[np.int8],
    fold: int,
    evaluation_texts: Mapping[str, Sequence[str]],
    seed: int,
) -> tuple[npt.NDArray[np.int32], Float32Array, dict[str, Float32Array]]:
    """Train on the rows outside a fold; predict the fold and the evaluation texts.

    Parameters
    ----------
    texts : sequence of str
    labels : int8 array of shape (n_samples, n_labels), in {0, 1}
    fold_ids : int8 array of shape (n_samples,)
    fold : int
        The fold that is left out and predicted.
    evaluation_texts : mapping from str to sequence of str
        Sets of texts to predict, for example "dev" and "unlabeled".
    seed : int
        Of the solver, which shuffles coordinates.

    Returns
    -------
    valid_rows : int32 array of shape (n_valid,)
    valid_logits : float32 array of shape (n_valid, n_labels)
    evaluation_logits : dict from str to float32 array of shape (n_texts, n_labels)

    Raises
    ------
    InputError
        If no row lies inside the fold, or none outside.
    """
    inside = np.asarray(fold_ids) == fold
    if inside.all() or not inside.any():
        raise InputError(
            f"fold {fold} holds {int(inside.sum())} of {len(inside)} rows: choose one with rows in and outside"
        )
    training_rows, valid_rows = np.flatnonzero(~inside), np.flatnonzero(inside)
    training_texts = [texts[int(row)] for row in training_rows]
    vectorizers = [
        TfidfVectorizer(ngram_range=WORD_NGRAMS, min_df=MIN_TEXTS, sublinear_tf=True, token_pattern=WORD_PATTERN),
        TfidfVectorizer(ngram_range=CHARACTER_NGRAMS, min_df=MIN_TEXTS, sublinear_tf=True, analyzer="char_wb"),
    ]
    features = sparse.hstack([_fit(vectorizer, training_texts) for vectorizer in vectorizers], format="csr")
    models = [_fit_label(features, labels[training_rows, i], seed) for i in range(labels.shape[1])]

    def predict(some_texts: Sequence[str]) -> Float32Array:
        if not some_texts:
            return np.zeros((0, len(models)), np.float32)
        matrix = sparse.hstack([vectorizer.transform(some_texts) for vectorizer in vectorizers], format="csr")
        logits = np.empty((len(some_texts), len(models)), np.float32)
        for i, model in enumerate(models):
            logits[:, i] = model if isinstance(model, float) else model.decision_function(matrix)
        return logits

    valid_logits = predict([texts[int(row)] for row in valid_rows])
    return (
        valid_rows.astype(np.int32),
        valid_logits,
        {name: predict(some_texts) for name, some_texts in evaluation_texts.items()},
    )


def constant_logit(n_positive: int, n_rows: int) -> float:
    """Return the logit of a label's smoothed frequency, for a label that no model can be fitted to.

    Parameters
    ----------
    n_positive, n_rows : int

    Returns
    -------
    float
        Logit of (n_positive + 1/2) / (n_rows + 1).
    """
    return float(np.log((n_positive + 0.5) / (n_rows - n_positive + 0.5)))


def _fit(vectorizer: TfidfVectorizer, texts: list[str]) -> sparse.csr_matrix:
    try:
        return vectorizer.fit_transform(texts)
    except ValueError as error:  # scikit-learn's "empty vocabulary", "no terms remain"
        raise InputError(f"no word occurs in {MIN_TEXTS} of {len(texts)} training texts: give more texts") from error


def _fit_label(features: sparse.csr_matrix, truth: npt.NDArray[np.int8], seed: int) -> LogisticRegression | float:
    n_positive = int(truth.sum())
    if n_positive in (0, len(truth)):
        return constant_logit(n_positive, len(truth))
    model = LogisticRegression(C=INVERSE_REGULARIZATION, solver="liblinear", random_state=seed)
    return model.fit(features, truth)
