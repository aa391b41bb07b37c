"""What a model must beat: no label at all, and TF-IDF of words with logistic regression.

The TF-IDF baseline is scikit-learn's plainest: words and pairs of words, one logistic regression per label, and one
threshold for all labels that is chosen on out-of-fold rows of train.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from emodistill.thresholds import search_shared_threshold

__all__ = ["TfidfBaseline", "all_negative"]

INVERSE_REGULARIZATION = 10.0
N_FOLDS = 5


def all_negative(n_rows: int, n_labels: int) -> npt.NDArray[np.int8]:
    """Give no text any label: int8 zeros of shape (n_rows, n_labels)."""
    return np.zeros((n_rows, n_labels), np.int8)


@dataclass(frozen=True)
class TfidfBaseline:
    """A fitted baseline; `TfidfBaseline.fit` makes one. It can be timed: see `emodistill.benchmarks.latency.TextModel`.

    Attributes
    ----------
    vectorizer : TfidfVectorizer
        Words and pairs of words, sublinear counts, lower case.
    coefficients : float64 array of shape (n_features, n_labels)
    intercepts : float64 array of shape (n_labels,)
    threshold : float
        Of all labels; a probability that equals it is positive.
    """

    vectorizer: Any
    coefficients: npt.NDArray[np.float64]
    intercepts: npt.NDArray[np.float64]
    threshold: float

    @classmethod
    def fit(
        cls, texts: Sequence[str], labels: npt.NDArray[np.int8], fold_ids: npt.NDArray[np.int8] | None = None
    ) -> Self:
        """Fit on all rows, and choose the threshold on rows that the fit of their fold did not see.

        Parameters
        ----------
        texts : sequence of str
            Of train.
        labels : int8 array of shape (n_texts, n_labels), in {0, 1}
        fold_ids : int8 array of shape (n_texts,), optional
            By default five folds, dealt out in turn.
        """
        folds = np.arange(len(texts)) % N_FOLDS if fold_ids is None else fold_ids
        held_out = np.empty(labels.shape)
        for fold in np.unique(folds):
            inside = folds == fold
            model = cls._fit_once([texts[row] for row in np.flatnonzero(~inside).tolist()], labels[~inside])
            held_out[inside] = model.predict_proba([texts[row] for row in np.flatnonzero(inside).tolist()])
        return cls._fit_once(texts, labels, search_shared_threshold(labels, held_out))

    @classmethod
    def _fit_once(cls, texts: Sequence[str], labels: npt.NDArray[np.int8], threshold: float = 0.5) -> Self:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        features = vectorizer.fit_transform(texts)
        coefficients = np.zeros((features.shape[1], labels.shape[1]))
        intercepts = np.empty(labels.shape[1])
        for column, target in enumerate(labels.T):
            if target.min() == target.max():  # nothing to learn from: a label that is always or never there
                intercepts[column] = 20.0 if target.max() else -20.0
                continue
            one = LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=1000).fit(features, target)
            coefficients[:, column], intercepts[column] = one.coef_[0], one.intercept_[0]
        return cls(vectorizer, coefficients, intercepts, threshold)

    @property
    def size_bytes(self) -> int:
        """What would have to be shipped: float32 weights and inverse frequencies, and the words themselves."""
        words = sum(len(word.encode()) + 1 for word in self.vectorizer.vocabulary_)
        return int(4 * (self.coefficients.size + self.intercepts.size + len(self.vectorizer.idf_)) + words)

    def encode(self, text: str) -> Any:
        """Return the sparse TF-IDF row of a text."""
        return self.vectorizer.transform([text])

    def run(self, encoded: Any) -> npt.NDArray[np.float64]:
        """Return the probabilities of encoded texts, float64 of shape (n_texts, n_labels)."""
        probabilities: npt.NDArray[np.float64] = 1 / (1 + np.exp(-(encoded @ self.coefficients + self.intercepts)))
        return probabilities

    def __call__(self, text: str) -> npt.NDArray[np.float64]:
        """Return the probabilities of one text, float64 of shape (1, n_labels)."""
        return self.run(self.encode(text))

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return the probabilities of texts, float64 of shape (n_texts, n_labels)."""
        return self.run(self.vectorizer.transform(texts))

    def decide(self, texts: Sequence[str]) -> npt.NDArray[np.int8]:
        """Return decisions, int8 of shape (n_texts, n_labels)."""
        return (self.predict_proba(texts) >= self.threshold).astype(np.int8)
