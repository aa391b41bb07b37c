"""From members' logits to member weights: uniform, greedy selection, and regularised non-negative stacking.

Weights are float64 arrays (n_members, n_labels); each label's column sums to 1. All are learned on out-of-fold logits,
in logits: the combined logit of a label is the weighted mean of its members' logits. Weights can also average the
members' probabilities; the combined logit is then that of their mean.
"""

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from emodistill.errors import InputError
from emodistill.metrics import LabelCounts, Metric, score_counts
from emodistill.thresholds import probabilities_to_logits, sigmoid

__all__ = [
    "SPACES",
    "average_logits",
    "greedy_weights",
    "selection_order",
    "stacked_weights",
    "uniform_weights",
]

SPACES = ("logits", "probabilities")
GREEDY_ROUNDS = 30
# Logits are binned to score every threshold at once; outside ±8 (probability 0.0003) no threshold is of use.
BIN_LIMIT, BINS_PER_LOGIT = 8.0, 20
N_BINS = int(2 * BIN_LIMIT * BINS_PER_LOGIT)

CONTESTED_PER_POSITIVE, CONTESTED_ROWS = 5, 500

SHARED_STRENGTH = 100.0
LABEL_STRENGTH = 100.0
MAX_ITERATIONS = 200

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def uniform_weights(n_members: int, n_labels: int) -> Float64Array:
    """Give every member the same weight.

    Parameters
    ----------
    n_members, n_labels : int
        At least 1.

    Returns
    -------
    float64 array of shape (n_members, n_labels)
    """
    return np.full((n_members, n_labels), 1.0 / n_members)


def average_logits(stack: Float32Array, weights: Float64Array, *, space: str = "logits") -> Float32Array:
    """Average members' logits, or their probabilities.

    Where members are missing, the weights of those present are scaled up to sum to 1.

    Parameters
    ----------
    stack : float32 array of shape (n_members, n_samples, n_labels)
        NaN rows where a member did not predict.
    weights : float64 array of shape (n_members, n_labels)
    space : {"logits", "probabilities"}
        What is averaged. A mean of logits lets a member that is sure outvote the others, a mean of probabilities does
        not.

    Returns
    -------
    float32 array of shape (n_samples, n_labels)
        Logits. NaN where no member predicted. Where all that did have weight 0, their plain mean.
    """
    if space == "probabilities":
        return probabilities_to_logits(_average(sigmoid(stack), weights))
    return _average(stack, weights)


def greedy_weights(
    stack: Float32Array, y_true: npt.NDArray[np.int8], metric: Metric, *, n_rounds: int = GREEDY_ROUNDS
) -> Float64Array:
    """Select members one by one, with replacement, each time the one that helps most; weights are the counts.

    A selection is scored at its best shared threshold (on a grid of 0.05 logits), and the best of the first `n_rounds`
    selections is kept.

    Parameters
    ----------
    stack : float32 array of shape (n_members, n_samples, n_labels)
        Out-of-fold logits without NaN.
    y_true : int8 array of shape (n_samples, n_labels), in {0, 1}
    metric : Metric
    n_rounds : int
        At least 1.

    Returns
    -------
    float64 array of shape (n_members, n_labels)
        The same for every label.

    References
    ----------
    Caruana, R., Niculescu-Mizil, A., Crew, G., Ksikes, A. (2004). Ensemble selection from libraries of models. ICML.
    """
    _check(stack, y_true)
    n_members, _, n_labels = stack.shape
    score = _GridScore(stack, y_true, metric)
    counts = np.zeros(n_members)
    total = np.zeros(score.n_cells, np.float32)
    best_score, best_counts = -1.0, counts
    for n_selected in range(1, n_rounds + 1):
        scores = [score((total + member) / np.float32(n_selected)) for member in score.members]
        chosen = int(np.argmax(scores))
        counts = counts + (np.arange(n_members) == chosen)
        total += score.members[chosen]
        if scores[chosen] > best_score:
            best_score, best_counts = scores[chosen], counts
    shares: Float64Array = np.repeat((best_counts / best_counts.sum())[:, None], n_labels, axis=1)
    return shares


def selection_order(stack: Float32Array, y_true: npt.NDArray[np.int8], metric: Metric) -> list[int]:
    """Order members so that each is the one that helps the plain average of those before it most.

    Parameters
    ----------
    stack : float32 array of shape (n_members, n_samples, n_labels)
        Out-of-fold logits without NaN.
    y_true : int8 array of shape (n_samples, n_labels), in {0, 1}
    metric : Metric

    Returns
    -------
    list of int
        Positions of all members, the best single one first.
    """
    _check(stack, y_true)
    score = _GridScore(stack, y_true, metric)
    order: list[int] = []
    total = np.zeros(score.n_cells, np.float32)
    while len(order) < len(stack):
        left = [i for i in range(len(stack)) if i not in order]
        scores = [score((total + score.members[i]) / np.float32(len(order) + 1)) for i in left]
        order.append(left[int(np.argmax(scores))])
        total += score.members[order[-1]]
    return order


def stacked_weights(
    stack: Float32Array,
    y_true: npt.NDArray[np.int8],
    *,
    per_label: bool = False,
    shared_strength: float = SHARED_STRENGTH,
    label_strength: float = LABEL_STRENGTH,
) -> Float64Array:
    """Fit non-negative weights by logistic regression on the members' logits, shrunk towards uniform.

    Minimizes the cross-entropy of sigmoid(sum_m v_m z_m + bias) plus strength / 2 * sum_m (v_m - mean(v))^2 over v >=
    0, with a free bias per label; the weights are v / sum(v). The penalty leaves the overall scale free, so that the
    shrinkage goes towards equal weights and not towards nothing. Per label, the penalty pulls towards the weights of
    all labels instead: a label with few positives keeps those.

    Parameters
    ----------
    stack : float32 array of shape (n_members, n_samples, n_labels)
        Out-of-fold logits without NaN.
    y_true : int8 array of shape (n_samples, n_labels), in {0, 1}
    per_label : bool
        Whether every label gets its own weights.
    shared_strength, label_strength : float
        At least 0, in rows' worth of curvature: the more, the closer to uniform, or to the shared weights.

    Returns
    -------
    float64 array of shape (n_members, n_labels)

    References
    ----------
    Breiman, L. (1996). Stacked regressions. Machine Learning 24.
    """
    _check(stack, y_true)
    n_members, _, n_labels = stack.shape
    shared = _fit_stack(stack, y_true, np.full(n_members, 1.0 / n_members), shared_strength)
    if not per_label:
        return np.repeat(shared[:, None], n_labels, axis=1)
    columns = [
        _fit_stack(stack[:, :, [i]], y_true[:, [i]], shared, label_strength) if y_true[:, i].any() else shared
        for i in range(n_labels)
    ]
    return np.stack(columns, axis=1)


def _average(stack: Float32Array, weights: Float64Array) -> Float32Array:
    present = ~np.isnan(stack)
    if present.all():
        average: Float32Array = np.einsum("mnl,ml->nl", stack, weights).astype(np.float32)
        return average
    shares = present * weights[:, None, :]
    total = shares.sum(axis=0)
    shares = np.where(total > 0, shares, present)
    total = np.where(total > 0, total, present.sum(axis=0))
    weighted = (np.where(present, stack, 0.0) * shares).sum(axis=0)
    partial = np.full(total.shape, np.nan)
    np.divide(weighted, total, out=partial, where=total > 0)
    return partial.astype(np.float32)


def _fit_stack(
    stack: Float32Array, y_true: npt.NDArray[np.int8], towards: Float64Array, strength: float
) -> Float64Array:
    """Fit weights that sum to 1, pulled towards the direction of `towards`."""
    n_members, n_rows, n_labels = stack.shape
    z = np.ascontiguousarray(stack.transpose(1, 2, 0).reshape(n_rows * n_labels, n_members), np.float64)
    y = y_true.reshape(-1).astype(np.float64)
    direction = towards / np.linalg.norm(towards)

    def objective(parameters: Float64Array) -> tuple[float, Float64Array]:
        v, bias = parameters[:n_members], parameters[n_members:]
        logits = (z @ v).reshape(n_rows, n_labels) + bias
        logits = logits.reshape(-1)
        small = np.exp(-np.abs(logits))
        cross_entropy = np.maximum(logits, 0) - logits * y + np.log1p(small)
        error = np.where(logits >= 0, 1.0, small) / (1.0 + small) - y
        off = v - (v @ direction) * direction
        value = cross_entropy.sum() + strength / 2 * (off @ off)
        gradient = np.concatenate([z.T @ error + strength * off, error.reshape(n_rows, n_labels).sum(axis=0)])
        return float(value), gradient

    start = np.concatenate([towards / towards.sum(), np.zeros(n_labels)])
    bounds = [(0.0, None)] * n_members + [(None, None)] * n_labels
    options = {"maxiter": MAX_ITERATIONS, "ftol": 1e-8}
    # A product of 141,000 x 13 numbers with a vector takes less than waking a second thread of BLAS, which then spins
    # against whatever else runs on its core: ten times the processor time.
    with threadpool_limits(limits=1, user_api="blas"):
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    v = np.asarray(found.x[:n_members], np.float64)
    weights: Float64Array = v / v.sum() if v.sum() > 1e-9 else towards / towards.sum()
    return weights


class _GridScore:
    """The best score that any shared threshold reaches, from histograms of the logits of positives and of all rows.

    Only contested cells are looked at: of each label the rows that some member scores highest, several times as many as
    have the label. A threshold so low that it reaches other rows decides more than that many positive and cannot be
    the best.
    """

    def __init__(self, stack: Float32Array, y_true: npt.NDArray[np.int8], metric: Metric) -> None:
        _, n_rows, n_labels = stack.shape
        self.metric, self.n_labels = metric, n_labels
        self.support = y_true.sum(axis=0, dtype=np.float64)
        highest = stack.max(axis=0)
        rows, labels = [], []
        for label in range(n_labels):
            n_kept = min(n_rows, CONTESTED_PER_POSITIVE * int(self.support[label]) + CONTESTED_ROWS)
            rows.append(np.argpartition(-highest[:, label], n_kept - 1)[:n_kept])
            labels.append(np.full(n_kept, label, np.int32))
        row, label_of = np.concatenate(rows), np.concatenate(labels)
        self.members = np.ascontiguousarray(stack[:, row, label_of])  # (n_members, n_cells)
        self.n_cells = len(row)
        self.offset = label_of * np.int32(N_BINS)
        self.positive = np.flatnonzero(y_true[row, label_of])

    def __call__(self, logits: Float32Array) -> float:
        bins = np.clip((logits + np.float32(BIN_LIMIT)) * np.float32(BINS_PER_LOGIT), 0, N_BINS - 1).astype(np.int32)
        cells = bins + self.offset
        size = self.n_labels * N_BINS
        # From the highest bin down: what is decided positive when the threshold is the bin's lower edge.
        predicted = np.bincount(cells, minlength=size).reshape(self.n_labels, N_BINS)[:, ::-1].cumsum(axis=1)
        hits = np.bincount(cells[self.positive], minlength=size).reshape(self.n_labels, N_BINS)[:, ::-1].cumsum(axis=1)
        counts = LabelCounts(hits.T.astype(np.float64), predicted.T.astype(np.float64), self.support)
        scores = score_counts(counts, self.metric)
        return float(np.nanmax(scores)) if not np.isnan(scores).all() else 0.0


def _check(stack: Float32Array, y_true: npt.NDArray[np.int8]) -> None:
    if stack.ndim != 3 or stack.shape[1:] != y_true.shape or np.isnan(stack).any():
        raise InputError(
            f"logits have shape {stack.shape} and truth {y_true.shape}: "
            "expected (n_members, n_samples, n_labels) without NaN, and (n_samples, n_labels)"
        )
