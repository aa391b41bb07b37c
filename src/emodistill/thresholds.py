"""From logits to decisions: sigmoid, thresholds, and ways to choose them.

A decision is positive where the probability is greater than **or equal to** the threshold.

With calibrated probabilities the best threshold follows from the probabilities alone: half of the best F1 that they can
reach (Lipton, Elkan, Naryanaswamy 2014), one number for all labels under micro-F1, one per label under macro-F1. With
labels at hand thresholds can also be searched; on the rows they were searched on, the score is the best any threshold
could reach, and says nothing about new rows (`cross_fit` does).
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from emodistill.errors import InputError
from emodistill.metrics import LabelCounts, Metric, parse_metric, score_counts

__all__ = [
    "cross_fit",
    "decide",
    "plug_in_thresholds",
    "probabilities_to_logits",
    "search_label_thresholds",
    "search_shared_threshold",
    "sigmoid",
]

DEFAULT_THRESHOLD = 0.5
PROBABILITY_MARGIN = 1e-6
SHRINKAGE_POSITIVES = 200.0
MAX_ROUNDS = 50  # of the ratio iteration below, which converges superlinearly: 3 to 6 are usual

Float32Array = npt.NDArray[np.float32]


def sigmoid(logits: npt.ArrayLike) -> Float32Array:
    """Turn logits into probabilities without overflow.

    Parameters
    ----------
    logits : array-like of float, any shape

    Returns
    -------
    float32 array of the same shape, in [0, 1]; NaN stays NaN

    Examples
    --------
    >>> sigmoid([-1000.0, 0.0, 1000.0]).tolist()
    [0.0, 0.5, 1.0]
    """
    half = 0.5 * np.asarray(logits, dtype=np.float64)
    probabilities: Float32Array = (0.5 + 0.5 * np.tanh(half)).astype(np.float32)  # never overflows
    return probabilities


def probabilities_to_logits(probabilities: npt.ArrayLike) -> Float32Array:
    """Turn probabilities into logits, keeping them 1e-6 away from 0 and 1.

    Parameters
    ----------
    probabilities : array-like of float, any shape, in [0, 1]

    Returns
    -------
    float32 array of the same shape, within about ±13.8

    Examples
    --------
    >>> probabilities_to_logits([0.5, 1.0]).round(2).tolist()
    [0.0, 13.819999694824219]
    """
    clipped = np.clip(np.asarray(probabilities, np.float64), PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
    logits: Float32Array = (np.log(clipped) - np.log1p(-clipped)).astype(np.float32)
    return logits


def decide(probabilities: npt.ArrayLike, thresholds: npt.ArrayLike) -> npt.NDArray[np.int8]:
    """Decide 1 where the probability is at least the threshold; both are compared in float32.

    Parameters
    ----------
    probabilities : array-like of float, shape (n_samples, n_labels), in [0, 1]
    thresholds : array-like of float, shape (n_labels,) or ()

    Returns
    -------
    int8 array of shape (n_samples, n_labels)

    Examples
    --------
    >>> decide([[0.5, 0.4]], [0.5, 0.5]).tolist()
    [[1, 0]]
    """
    return (np.asarray(probabilities, np.float32) >= np.asarray(thresholds, np.float32)).astype(np.int8)


def plug_in_thresholds(
    probabilities: npt.ArrayLike, *, metric: str | Metric = "micro_f1", label_names: Sequence[str] | None = None
) -> Float32Array:
    """Choose thresholds from calibrated probabilities, without labels.

    The F-beta that is expected when the k highest probabilities are taken is (1 + b^2) S_k / (b^2 S_n + k), where S_k
    is their sum; at its optimum F* the threshold is F* / (1 + b^2), which is F*/2 for F1.

    Parameters
    ----------
    probabilities : array-like of float, shape (n_samples, n_labels), in [0, 1]
        Calibrated.
    metric : str or Metric
        For micro metrics one threshold for all labels; for "macro_f1" and "label:NAME" each label's own.
    label_names : sequence of str, optional
        Needed for "label:NAME".

    Returns
    -------
    float32 array of shape (n_labels,)

    References
    ----------
    Lipton, Z. C., Elkan, C., Naryanaswamy, B. (2014). Thresholding classifiers to maximize F1 score. arXiv:1402.1892.

    Examples
    --------
    >>> plug_in_thresholds([[1.0], [1.0], [0.0]]).tolist()  # F* = 2 * 2 / (2 + 2) = 1
    [0.5]
    """
    parsed = parse_metric(metric, label_names)
    scores = _as_scores(probabilities)
    if parsed.kind == "micro":
        return np.full(scores.shape[1], _plug_in(scores.ravel(), parsed.beta), np.float32)
    return np.array([_plug_in(column, parsed.beta) for column in scores.T], np.float32)


def search_shared_threshold(
    y_true: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    metric: str | Metric = "micro_f1",
    label_names: Sequence[str] | None = None,
) -> float:
    """Find the one threshold for all labels that scores best on these rows, among the probabilities that occur.

    Parameters
    ----------
    y_true : array-like of {0, 1}, shape (n_samples, n_labels)
    probabilities : array-like of float, shape (n_samples, n_labels), in [0, 1]
    metric : str or Metric
    label_names : sequence of str, optional
        Needed for "label:NAME".

    Returns
    -------
    float
        Of equally good thresholds the highest; 0.5 when nothing is true.
    """
    parsed = parse_metric(metric, label_names)
    truth, scores = _as_truth(y_true, probabilities)
    relevant = truth if parsed.label is None else truth[:, [parsed.label]]
    if not relevant.any():
        return DEFAULT_THRESHOLD
    candidates = np.unique(scores)
    hits, predicted = [], []
    for label in range(truth.shape[1]):
        order = np.sort(scores[:, label])
        positive = np.sort(scores[truth[:, label], label])
        predicted.append(len(order) - np.searchsorted(order, candidates, side="left"))
        hits.append(len(positive) - np.searchsorted(positive, candidates, side="left"))
    support = np.broadcast_to(truth.sum(axis=0, dtype=np.float64), (len(candidates), truth.shape[1]))
    counts = LabelCounts(np.array(hits, np.float64).T, np.array(predicted, np.float64).T, support)
    return float(candidates[_last_best(score_counts(counts, parsed))])


def search_label_thresholds(
    y_true: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    *,
    metric: str | Metric = "micro_f1",
    label_names: Sequence[str] | None = None,
    towards: npt.ArrayLike | None = None,
    shrinkage_positives: float = SHRINKAGE_POSITIVES,
) -> Float32Array:
    """Find the best threshold of each label on these rows, drawn towards the shared one where positives are few.

    Under a micro metric the labels meet only in the ratio of the pooled counts. For a given value F of that ratio each
    label alone maximizes (1 + b^2) hits - F predicted, and F is then taken anew until it stands still (Dinkelbach
    1967): the exact optimum. Under "macro_f1" and "label:NAME" every label maximizes its own score.

    Parameters
    ----------
    y_true : array-like of {0, 1}, shape (n_samples, n_labels)
    probabilities : array-like of float, shape (n_samples, n_labels), in [0, 1]
    metric : str or Metric
    label_names : sequence of str, optional
        Needed for "label:NAME".
    towards : array-like of float, shape (n_labels,) or (), optional
        What to shrink towards; by default `search_shared_threshold` of the same rows.
    shrinkage_positives : float
        At least 0. A label with this many positives gets the mean of its own and the shared threshold; 0 shrinks none.

    Returns
    -------
    float32 array of shape (n_labels,)
        That of `towards` for a label without positives.

    References
    ----------
    Dinkelbach, W. (1967). On nonlinear fractional programming. Management Science 13(7).
    """
    parsed = parse_metric(metric, label_names)
    truth, scores = _as_truth(y_true, probabilities)
    if towards is None:
        towards = search_shared_threshold(truth, scores, metric=parsed)
    goals = np.broadcast_to(np.asarray(towards, np.float64), (truth.shape[1],))
    curves = [_Curve(truth[:, i], scores[:, i]) for i in range(truth.shape[1])]
    own = _search_pooled(curves, parsed.beta) if parsed.kind == "micro" else [c.best_own(parsed.beta) for c in curves]
    chosen = []
    for curve, threshold, goal in zip(curves, own, goals, strict=True):
        trust = curve.support / (curve.support + shrinkage_positives) if curve.support else 0.0
        # A fully trusted threshold is taken as it is: rounding would part it from the probability that it equals.
        chosen.append(threshold if trust == 1.0 else trust * threshold + (1 - trust) * float(goal))
    return np.array(chosen, np.float32)


def cross_fit(
    fold_ids: npt.ArrayLike,
    y_true: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    choose: Callable[[npt.NDArray[np.int8], Float32Array], npt.ArrayLike],
) -> npt.NDArray[np.int8]:
    """Decide each fold's rows with thresholds chosen on the rows of the other folds.

    Parameters
    ----------
    fold_ids : array-like of int, shape (n_samples,)
        At least two different values.
    y_true : array-like of {0, 1}, shape (n_samples, n_labels)
    probabilities : array-like of float, shape (n_samples, n_labels), in [0, 1]
    choose : callable
        Takes (y_true, probabilities) of the other folds, returns thresholds of shape (n_labels,) or ().

    Returns
    -------
    int8 array of shape (n_samples, n_labels)
        Decisions whose score can be offered as expected quality.
    """
    truth, scores = _as_truth(y_true, probabilities)
    folds = np.asarray(fold_ids)
    if len(np.unique(folds)) < 2:
        raise InputError("all rows belong to one fold: cross-fitting needs at least two")
    decisions = np.zeros(scores.shape, np.int8)
    for fold in np.unique(folds):
        inside = folds == fold
        thresholds = choose(truth[~inside].astype(np.int8), scores[~inside])
        decisions[inside] = decide(scores[inside], thresholds)
    return decisions


class _Curve:
    """What one label's decisions count at every threshold that occurs, from the highest down."""

    def __init__(self, truth: npt.NDArray[np.bool_], scores: Float32Array) -> None:
        order = np.argsort(-scores, kind="stable")
        sorted_scores = scores[order]
        ends = np.flatnonzero(np.append(np.diff(sorted_scores) != 0, True))  # equal scores are decided together
        never = np.nextafter(sorted_scores[0], np.float32(2))  # just above all scores: the label is never given
        self.thresholds = np.append(never, sorted_scores[ends])
        self.hits = np.append(0.0, np.cumsum(truth[order], dtype=np.float64)[ends])
        self.predicted = np.append(0.0, ends + 1.0)
        self.support = float(truth.sum())

    def best_own(self, beta: float) -> float:
        """Return the threshold with this label's best F-beta."""
        if not self.support:
            return DEFAULT_THRESHOLD
        score = (1 + beta**2) * self.hits / (beta**2 * self.support + self.predicted)
        return float(self.thresholds[np.argmax(score)])

    def best_at_ratio(self, ratio: float, beta: float) -> int:
        """Return where this label's part of the pooled ratio is best."""
        return int(np.argmax((1 + beta**2) * self.hits - ratio * self.predicted))


def _search_pooled(curves: list[_Curve], beta: float) -> list[float]:
    """Maximize the F-beta of the pooled counts over one threshold per label."""
    fitted = [curve for curve in curves if curve.support]
    ratio = 0.0
    chosen = [0 for _ in fitted]
    for _ in range(MAX_ROUNDS):
        chosen = [curve.best_at_ratio(ratio, beta) for curve in fitted]
        hits = sum(curve.hits[at] for curve, at in zip(fitted, chosen, strict=True))
        predicted = sum(curve.predicted[at] for curve, at in zip(fitted, chosen, strict=True))
        new_ratio = (
            (1 + beta**2) * hits / (beta**2 * sum(curve.support for curve in fitted) + predicted) if fitted else 0.0
        )
        if new_ratio <= ratio:
            break
        ratio = new_ratio
    by_curve = dict(zip(map(id, fitted), chosen, strict=True))
    return [float(c.thresholds[by_curve[id(c)]]) if c.support else DEFAULT_THRESHOLD for c in curves]


def _plug_in(scores: npt.NDArray[np.float32], beta: float) -> float:
    descending = np.sort(scores.astype(np.float64))[::-1]
    expected_hits = np.cumsum(descending)
    if len(descending) == 0 or expected_hits[-1] == 0:
        return DEFAULT_THRESHOLD
    expected = (1 + beta**2) * expected_hits / (beta**2 * expected_hits[-1] + np.arange(1, len(descending) + 1))
    return float(expected.max() / (1 + beta**2))


def _last_best(scores: npt.NDArray[np.float64]) -> int:
    filled = np.where(np.isnan(scores), -1.0, scores)
    return len(filled) - 1 - int(np.argmax(filled[::-1]))


def _as_scores(probabilities: npt.ArrayLike) -> Float32Array:
    scores = np.asarray(probabilities, np.float32)
    if scores.ndim != 2 or scores.shape[0] == 0:
        raise InputError(
            f"probabilities have shape {scores.shape}: expected (n_samples, n_labels) with at least one row"
        )
    if not ((scores >= 0) & (scores <= 1)).all():  # NaN fails too
        raise InputError(
            "probabilities lie outside [0, 1] or are NaN: pass sigmoid(logits) of rows that were predicted"
        )
    return scores


def _as_truth(y_true: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], Float32Array]:
    scores = _as_scores(probabilities)
    truth = np.asarray(y_true).astype(bool)
    if truth.shape != scores.shape:
        raise InputError(
            f"truth has shape {truth.shape} and probabilities {scores.shape}: both must be (n_samples, n_labels)"
        )
    return truth, scores
