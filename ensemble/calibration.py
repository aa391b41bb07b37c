"""From logits to calibrated probabilities: a scale and a bias per label, drawn towards shared ones for rare labels.

Platt scaling fits probability = sigmoid(scale * logit + bias) by maximum likelihood. Here one pair is fitted for all
labels first; each label's own pair then has a Gaussian prior around the shared pair, so that a label with a hundred
positives keeps close to what thousands have shown, and a label without positives takes the shared pair.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.errors import InputError

__all__ = ["Calibration", "fit_calibration"]

PRIOR_STRENGTH = 20.0  # precision of the prior: as much as 20 rows at probability 1/2 tell about the bias, times 4
MIN_SCALE = 0.05  # a higher logit never means a lower probability
MAX_ROUNDS = 50
TOLERANCE = 1e-7

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """probability = sigmoid(scale * logit + bias).

    Attributes
    ----------
    scale, bias : float32 array of shape (n_labels,)
        Scale is above 0. It is the inverse of the calibration temperature.
    """

    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def apply(self, logits: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return calibrated logits.

        Parameters
        ----------
        logits : array-like of float, shape (n_samples, n_labels)

        Returns
        -------
        float32 array of the same shape
        """
        calibrated: npt.NDArray[np.float32] = self.scale * np.asarray(logits, np.float32) + self.bias
        return calibrated

    def to_json(self) -> dict[str, list[float]]:
        """Return lists, one number per label."""
        return {"scale": self.scale.tolist(), "bias": self.bias.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Calibration":
        """Read what `to_json` wrote."""
        return cls(np.array(values["scale"], np.float32), np.array(values["bias"], np.float32))


def fit_calibration(
    logits: npt.ArrayLike, y_true: npt.ArrayLike, *, prior_strength: float = PRIOR_STRENGTH
) -> Calibration:
    """Fit a scale and a bias per label.

    Parameters
    ----------
    logits : array-like of float, shape (n_samples, n_labels)
        Finite, and of rows that the model was not trained on.
    y_true : array-like of {0, 1}, shape (n_samples, n_labels)
    prior_strength : float
        At least 0; 0 fits every label alone, a large number gives all labels the same pair.

    Returns
    -------
    Calibration

    References
    ----------
    Platt, J. (1999). Probabilistic outputs for support vector machines. Advances in Large Margin Classifiers.
    """
    x = np.asarray(logits, np.float64)
    y = np.asarray(y_true, np.float64)
    if x.ndim != 2 or x.shape != y.shape or not np.isfinite(x).all():
        raise InputError(
            f"logits {x.shape} and truth {y.shape} must have the same shape (n_samples, n_labels), and logits be finite"
        )
    identity = np.array([[1.0, 0.0]])
    # The weak prior keeps the shared pair finite when the logits separate the labels perfectly.
    shared = _newton(x.reshape(1, -1), y.reshape(1, -1), centre=identity, strength=1.0)
    own = _newton(x.T, y.T, centre=np.repeat(shared, x.shape[1], axis=0), strength=max(prior_strength, 1e-6))
    absent = y.sum(axis=0) == 0
    own[absent] = shared
    return Calibration(own[:, 0].astype(np.float32), own[:, 1].astype(np.float32))


def _newton(x: Float64Array, y: Float64Array, *, centre: Float64Array, strength: float) -> Float64Array:
    """Maximize the penalized likelihood of (scale, bias) for each row of x; returns (n_rows, 2)."""
    pairs = centre.copy()
    loss = _loss(x, y, pairs, centre, strength)
    for _ in range(MAX_ROUNDS):
        p = _stable_sigmoid(pairs[:, :1] * x + pairs[:, 1:])
        curvature = p * (1 - p)
        off = pairs - centre
        gradient = np.stack([((p - y) * x).sum(1), (p - y).sum(1)], axis=1) + strength * off
        aa = (curvature * x * x).sum(1) + strength
        ab = (curvature * x).sum(1)
        bb = curvature.sum(1) + strength
        determinant = aa * bb - ab * ab
        step = np.stack([bb * gradient[:, 0] - ab * gradient[:, 1], aa * gradient[:, 1] - ab * gradient[:, 0]], axis=1)
        step /= determinant[:, None]
        shrink = np.ones(len(pairs))
        for _ in range(30):  # halve the step of a row until its loss does not grow
            trial = pairs - shrink[:, None] * step
            trial[:, 0] = np.maximum(trial[:, 0], MIN_SCALE)
            trial_loss = _loss(x, y, trial, centre, strength)
            grew = trial_loss > loss + 1e-12 * np.abs(loss)
            if not grew.any():
                break
            shrink[grew] /= 2
        trial[grew], trial_loss[grew] = pairs[grew], loss[grew]
        moved = np.abs(trial - pairs).max()
        pairs, loss = trial, trial_loss
        if moved < TOLERANCE:
            break
    return pairs


def _loss(x: Float64Array, y: Float64Array, pairs: Float64Array, centre: Float64Array, strength: float) -> Float64Array:
    z = pairs[:, :1] * x + pairs[:, 1:]
    cross_entropy = np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))
    penalty: Float64Array = cross_entropy.sum(1) + strength / 2 * ((pairs - centre) ** 2).sum(1)
    return penalty


def _stable_sigmoid(z: Float64Array) -> Float64Array:
    small = np.exp(-np.abs(z))
    p: Float64Array = np.where(z >= 0, 1.0, small) / (1.0 + small)
    return p
