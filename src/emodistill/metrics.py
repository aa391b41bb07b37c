"""F1 of multi-label decisions, with row-bootstrap intervals: from two multi-hot arrays to numbers.

One rule for what is not defined, everywhere: a label with no true and no predicted positives has no F1. It is NaN in
arrays, None in reports (JSON null, "n/a" in tables), and is left out of the macro mean. A label with true positives of
which none was predicted has an F1 of 0, and counts.

The intervals resample rows (Efron 1979). Rows with the same truth and the same decisions are exchangeable, so they are
counted once and their multiplicities drawn from a multinomial: the same distribution, in milliseconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.errors import ConfigError, InputError

__all__ = [
    "LabelCounts",
    "Metric",
    "PairedDifference",
    "bootstrap_interval",
    "bootstrap_label_intervals",
    "count_decisions",
    "f1_report",
    "macro_f1",
    "micro_f1",
    "paired_bootstrap",
    "parse_metric",
    "score_counts",
]

INTERVAL_LEVEL = 0.95
CHUNK_CELLS = 8_000_000  # multinomial counts held at once: 64 MB


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a score is taken over: all decisions together, the mean over labels, or one label.

    Attributes
    ----------
    name : str
        As the user wrote it.
    kind : str
        "micro", "macro" or "label".
    beta : float
        Above 0; recall counts beta times as much as precision. 1 is F1.
    label : int or None
        Column of the label, for kind "label".
    """

    name: str
    kind: str
    beta: float = 1.0
    label: int | None = None


@dataclass(frozen=True)
class LabelCounts:
    """True positives, predicted positives and true positives to be found, float64 arrays of shape (..., n_labels)."""

    hits: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]
    support: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """Score of a minus score of b on the same rows, with the 95 % interval of the paired bootstrap."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of 0."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float]:
        """Return the three numbers as a dict."""
        return {"difference": self.difference, "low": self.low, "high": self.high}


def parse_metric(metric: str | Metric, label_names: Sequence[str] | None = None) -> Metric:
    """Read the name of a metric.

    Parameters
    ----------
    metric : str or Metric
        "micro_f1", "macro_f1", "label:NAME" (that label's F1) or "f_beta:B" (micro F-beta, B above 0).
    label_names : sequence of str, optional
        Names in column order; needed for "label:NAME".

    Returns
    -------
    Metric

    Raises
    ------
    ConfigError
        If the name is not one of these, B is not a positive number, or NAME is not a label.
    """
    if isinstance(metric, Metric):
        return metric
    head, _, argument = metric.partition(":")
    if metric in ("micro_f1", "macro_f1"):
        return Metric(name=metric, kind=metric.removesuffix("_f1"))
    if head == "label" and argument:
        if label_names is None or argument not in label_names:
            known = ", ".join(label_names or ())
            raise ConfigError(f"metric '{metric}' names no label: choose one of  {known or '(no label names given)'}")
        return Metric(name=metric, kind="label", label=list(label_names).index(argument))
    if head == "f_beta":
        try:
            beta = float(argument)
        except ValueError:
            beta = 0.0
        if 0 < beta < float("inf"):
            return Metric(name=metric, kind="micro", beta=beta)
    raise ConfigError(
        f"metric '{metric}' is unknown: choose micro_f1, macro_f1, label:NAME or f_beta:B (B above 0, as f_beta:0.5)"
    )


def count_decisions(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> LabelCounts:
    """Count hits, predicted and true positives per label.

    Parameters
    ----------
    y_true, y_pred : array-like of {0, 1}, shape (n_samples, n_labels)

    Returns
    -------
    LabelCounts
        Arrays of shape (n_labels,).
    """
    true, pred = _checked(y_true, y_pred)
    return LabelCounts(
        hits=(true & pred).sum(axis=0, dtype=np.float64),
        predicted=pred.sum(axis=0, dtype=np.float64),
        support=true.sum(axis=0, dtype=np.float64),
    )


def score_counts(counts: LabelCounts, metric: Metric) -> npt.NDArray[np.float64]:
    """Score counts.

    Parameters
    ----------
    counts : LabelCounts
        Arrays of shape (..., n_labels).
    metric : Metric

    Returns
    -------
    float64 array of shape (...), NaN where nothing is true and nothing predicted
    """
    if metric.kind == "micro":
        return _f_beta(counts.hits.sum(-1), counts.predicted.sum(-1), counts.support.sum(-1), metric.beta)
    per_label = _f_beta(counts.hits, counts.predicted, counts.support, metric.beta)
    if metric.label is not None:
        return np.asarray(per_label[..., metric.label])
    defined = ~np.isnan(per_label)
    total = np.where(defined, per_label, 0.0).sum(-1)
    return _divide(total, defined.sum(-1))


def micro_f1(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Return F1 over all decisions together; NaN when nothing is true and nothing predicted.

    Parameters
    ----------
    y_true, y_pred : array-like of {0, 1}, shape (n_samples, n_labels)

    Returns
    -------
    float

    Examples
    --------
    >>> micro_f1([[1, 0], [1, 0]], [[1, 0], [0, 0]])  # one hit, one predicted, two true: 2 * 1 / 3
    0.6666666666666666
    """
    return float(score_counts(count_decisions(y_true, y_pred), Metric(name="micro_f1", kind="micro")))


def macro_f1(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Return the mean F1 of the labels for which it is defined; NaN when it is for none.

    Parameters
    ----------
    y_true, y_pred : array-like of {0, 1}, shape (n_samples, n_labels)

    Returns
    -------
    float
    """
    return float(score_counts(count_decisions(y_true, y_pred), Metric(name="macro_f1", kind="macro")))


def f1_report(y_true: npt.ArrayLike, y_pred: npt.ArrayLike, label_names: Sequence[str]) -> dict[str, Any]:
    """Report micro, macro and per-label F1 as one JSON-ready dict.

    Parameters
    ----------
    y_true, y_pred : array-like of {0, 1}, shape (n_samples, n_labels)
    label_names : sequence of str
        In column order.

    Returns
    -------
    dict
        ``{"n_rows", "micro_f1", "macro_f1", "per_label": {name: {"support", "predicted", "precision", "recall",
        "f1"}}}``;
        None where a number is not defined (precision when nothing was predicted, recall when nothing is true).
    """
    counts = count_decisions(y_true, y_pred)
    if len(label_names) != counts.hits.shape[0]:
        raise InputError(
            f"{len(label_names)} label names for arrays with {counts.hits.shape[0]} columns: pass one name per column"
        )
    f1 = _f_beta(counts.hits, counts.predicted, counts.support, 1.0)
    precision = _divide(counts.hits, counts.predicted)
    recall = _divide(counts.hits, counts.support)
    per_label = {
        name: {
            "support": int(counts.support[i]),
            "predicted": int(counts.predicted[i]),
            "precision": _or_none(precision[i]),
            "recall": _or_none(recall[i]),
            "f1": _or_none(f1[i]),
        }
        for i, name in enumerate(label_names)
    }
    return {
        "n_rows": int(np.shape(y_true)[0]),
        "micro_f1": _or_none(score_counts(counts, Metric(name="micro_f1", kind="micro"))),
        "macro_f1": _or_none(score_counts(counts, Metric(name="macro_f1", kind="macro"))),
        "per_label": per_label,
    }


def bootstrap_interval(
    y_true: npt.ArrayLike,
    y_pred: npt.ArrayLike,
    *,
    metric: str | Metric = "micro_f1",
    label_names: Sequence[str] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a score under resampling of rows.

    Parameters
    ----------
    y_true, y_pred : array-like of {0, 1}, shape (n_samples, n_labels)
    metric : str or Metric
        See `parse_metric`.
    label_names : sequence of str, optional
        Needed for "label:NAME".
    n_resamples : int
        At least 1.
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    low, high : float
        NaN when the score is defined in no resample.

    References
    ----------
    Efron, B. (1979). Bootstrap methods: another look at the jackknife. Annals of Statistics 7(1).
    """
    parsed = parse_metric(metric, label_names)
    true, pred = _checked(y_true, y_pred)
    scores = [score_counts(counts[0], parsed) for counts in _resampled_counts(true, [pred], n_resamples, seed)]
    return _interval(np.concatenate(scores))


def bootstrap_label_intervals(
    y_true: npt.ArrayLike, y_pred: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Return the 95 % interval of every label's F1 from one set of resamples.

    Parameters
    ----------
    y_true, y_pred : array-like of {0, 1}, shape (n_samples, n_labels)
    n_resamples : int
        At least 1.
    seed : int

    Returns
    -------
    float64 array of shape (n_labels, 2)
        Low and high; NaN for a label that is defined in no resample.
    """
    true, pred = _checked(y_true, y_pred)
    drawn = [counts[0] for counts in _resampled_counts(true, [pred], n_resamples, seed)]
    f1 = np.concatenate([_f_beta(c.hits, c.predicted, c.support, 1.0) for c in drawn])
    return np.array([_interval(f1[:, i]) for i in range(true.shape[1])]).reshape(true.shape[1], 2)


def paired_bootstrap(
    y_true: npt.ArrayLike,
    pred_a: npt.ArrayLike,
    pred_b: npt.ArrayLike,
    *,
    metric: str | Metric = "micro_f1",
    label_names: Sequence[str] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two sets of decisions on the same rows: each resample scores both.

    Parameters
    ----------
    y_true, pred_a, pred_b : array-like of {0, 1}, shape (n_samples, n_labels)
    metric : str or Metric
        See `parse_metric`.
    label_names : sequence of str, optional
        Needed for "label:NAME".
    n_resamples : int
        At least 1.
    seed : int

    Returns
    -------
    PairedDifference
        Score of `pred_a` minus score of `pred_b`, and its 95 % percentile interval.
    """
    parsed = parse_metric(metric, label_names)
    true, a = _checked(y_true, pred_a)
    _, b = _checked(y_true, pred_b)
    drawn = [
        score_counts(counts[0], parsed) - score_counts(counts[1], parsed)
        for counts in _resampled_counts(true, [a, b], n_resamples, seed)
    ]
    point = score_counts(count_decisions(true, a), parsed) - score_counts(count_decisions(true, b), parsed)
    return PairedDifference(float(point), *_interval(np.concatenate(drawn)))


def _resampled_counts(
    true: npt.NDArray[np.bool_], predictions: list[npt.NDArray[np.bool_]], n_resamples: int, seed: int
) -> Iterator[list[LabelCounts]]:
    """Yield, chunk by chunk, the counts of every prediction in every resample: arrays (chunk, n_labels)."""
    n_rows, n_labels = true.shape
    if n_rows == 0:
        raise InputError("no rows to resample: an interval needs at least one scored row")
    pattern = np.packbits(np.concatenate([true, *predictions], axis=1), axis=1)
    _, first, multiplicity = np.unique(pattern, axis=0, return_index=True, return_counts=True)
    columns = [true[first]]
    for pred in predictions:
        columns += [true[first] & pred[first], pred[first]]
    table = np.concatenate(columns, axis=1).astype(np.float64)  # (n_patterns, (1 + 2 * n_predictions) * n_labels)
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_CELLS // len(first))
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        weights = generator.multinomial(n_rows, multiplicity / n_rows, size=size).astype(np.float64)
        sums = (weights @ table).reshape(size, -1, n_labels)
        yield [
            LabelCounts(hits=sums[:, 1 + 2 * i], predicted=sums[:, 2 + 2 * i], support=sums[:, 0])
            for i in range(len(predictions))
        ]


def _f_beta(
    hits: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64], support: npt.NDArray[np.float64], beta: float
) -> npt.NDArray[np.float64]:
    """(1 + b^2) hits / (b^2 support + predicted), NaN for 0/0."""
    return _divide((1 + beta**2) * hits, beta**2 * support + predicted)


def _divide(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Divide, with NaN (and no warning) where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    quotient = np.full(denominator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _interval(scores: npt.NDArray[np.float64]) -> tuple[float, float]:
    defined = scores[~np.isnan(scores)]
    if len(defined) == 0:
        return float("nan"), float("nan")
    tail = (1 - INTERVAL_LEVEL) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def _checked(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return both as bool arrays, or say what does not fit."""
    true, pred = np.asarray(y_true), np.asarray(y_pred)
    if true.ndim != 2 or true.shape != pred.shape:
        raise InputError(
            f"truth has shape {true.shape} and decisions {pred.shape}: "
            "both must be (n_samples, n_labels), in the same row order"
        )
    for name, array in (("truth", true), ("decisions", pred)):
        if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
            raise InputError(f"{name} holds values other than 0 and 1: apply thresholds before scoring")
    return true.astype(bool), pred.astype(bool)


def _or_none(value: npt.ArrayLike) -> float | None:
    number = float(np.asarray(value))
    return None if np.isnan(number) else number
