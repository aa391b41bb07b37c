"""Which way of combining earns its place: from out-of-fold logits to a recipe, by second-level cross-fitting.

The outer splits are the member folds: weights, calibration and thresholds are fitted on all folds but one and decide
that one. (The members themselves are not refitted: the logits of the fitting folds come from members that saw the rows
of the fold that is decided. What is cross-fitted is everything that this module chooses.) Steps are tried in order of
simplicity, each on top of what was kept before it. A step is kept only if the paired row-bootstrap 95 % interval of its
gain lies above 0, the gain is at least `MIN_GAIN` and at least `MIN_CHANGED_ROWS` rows are decided otherwise: four rows
that all improve have an interval above 0 as well (one resample in e^4 = 55 contains none of them), and are chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.ensemble.calibration import Calibration, fit_calibration
from emodistill.ensemble.weights import average_logits, greedy_weights, stacked_weights, uniform_weights
from emodistill.errors import ConfigError
from emodistill.metrics import (
    Metric,
    PairedDifference,
    count_decisions,
    macro_f1,
    micro_f1,
    paired_bootstrap,
    score_counts,
)
from emodistill.thresholds import (
    DEFAULT_THRESHOLD,
    decide,
    plug_in_thresholds,
    search_label_thresholds,
    search_shared_threshold,
    sigmoid,
)

__all__ = ["RULES", "FittedRecipe", "Recipe", "Referee", "StepReport", "Verdict", "render_steps"]


MIN_GAIN = 0.0005  # of the target metric: half a unit of the third decimal
MIN_CHANGED_ROWS = 10


@dataclass(frozen=True)
class Recipe:
    """How members become decisions.

    Attributes
    ----------
    weights : str
        "uniform", "greedy", "shared" or "per_label" (the last two by stacking).
    thresholds : str
        "half" (0.5 on uncalibrated probabilities), "plug_in", "searched" (one for all labels) or "per_label"
        (searched); all but the first on calibrated probabilities.
    space : str
        "logits" or "probabilities": what the weights average. Learned weights are learned in logits.
    """

    weights: str
    thresholds: str
    space: str = "logits"


RULES: dict[str, Recipe] = {
    "uniform": Recipe("uniform", "half"),
    "uniform_probabilities": Recipe("uniform", "half", "probabilities"),
    "shared_plug_in": Recipe("uniform", "plug_in"),
    "shared_searched": Recipe("uniform", "searched"),
    "per_label_thresholds": Recipe("uniform", "per_label"),
    "greedy_weights": Recipe("greedy", "plug_in"),
    "shared_weights": Recipe("shared", "plug_in"),
    "per_label_weights": Recipe("per_label", "plug_in"),
}


@dataclass(frozen=True)
class FittedRecipe:
    """A recipe with its numbers.

    Attributes
    ----------
    weights : float64 array of shape (n_members, n_labels)
    calibration : Calibration or None
    thresholds : float32 array of shape (n_labels,)
    space : str
        As in `Recipe`.
    """

    weights: npt.NDArray[np.float64]
    calibration: Calibration | None
    thresholds: npt.NDArray[np.float32]
    space: str = "logits"

    def probabilities(self, stack: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return (calibrated) probabilities of members' logits (n_members, n_samples, n_labels)."""
        logits = average_logits(stack, self.weights, space=self.space)
        return sigmoid(logits if self.calibration is None else self.calibration.apply(logits))


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step gained, or why it was refused.

    Attributes
    ----------
    name : str
        A key of `RULES`.
    weights, thresholds, space : str
        The recipe that was tried: this step on top of what was kept before.
    score : float or None
        Of the target metric, on the pooled cross-fitted decisions.
    micro_f1, macro_f1 : float or None
        Of the same decisions.
    gain : PairedDifference or None
        Over the recipe kept before, in the target metric; None for the first step and for those not tried.
    kept : bool
    reason : str
        One sentence.
    """

    name: str
    weights: str
    thresholds: str
    score: float | None
    micro_f1: float | None
    macro_f1: float | None
    gain: PairedDifference | None
    kept: bool
    reason: str
    space: str = "logits"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {**self.__dict__, "gain": None if self.gain is None else self.gain.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "StepReport":
        """Read what `to_json` wrote."""
        gain = values["gain"]
        return cls(**{**values, "gain": None if gain is None else PairedDifference(**gain)})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The recipe that the referee chose, under the name of the last step that was kept, and how it got there."""

    name: str
    recipe: Recipe
    steps: tuple[StepReport, ...]


class Referee:
    """Fit recipes on rows, and judge them on rows that they were not fitted on.

    Parameters
    ----------
    stack : float32 array of shape (n_members, n_samples, n_labels)
        Out-of-fold logits of rows that every member predicted.
    y_true : int8 array of shape (n_samples, n_labels), in {0, 1}
    fold_ids : int array of shape (n_samples,)
    metric : Metric
        What is maximized.
    seed : int
        Of the bootstrap.
    """

    def __init__(
        self,
        stack: npt.NDArray[np.float32],
        y_true: npt.NDArray[np.int8],
        fold_ids: npt.NDArray[np.integer[Any]],
        metric: Metric,
        seed: int,
    ) -> None:
        self.stack, self.y_true, self.fold_ids = stack, y_true, fold_ids
        self.metric, self.seed = metric, seed
        self.folds = [int(fold) for fold in np.unique(fold_ids)]
        self._weights: dict[tuple[str, int | None], npt.NDArray[np.float64]] = {}
        self._calibrations: dict[tuple[str, str, int | None], tuple[Calibration, npt.NDArray[np.float32]]] = {}
        self._decisions: dict[Recipe, npt.NDArray[np.int8]] = {}

    @property
    def can_cross_fit(self) -> bool:
        """Whether the rows span the two folds that cross-fitting needs."""
        return len(self.folds) >= 2

    def fit(self, recipe: Recipe, without_fold: int | None = None) -> FittedRecipe:
        """Fit a recipe on all rows, or on those outside a fold.

        Parameters
        ----------
        recipe : Recipe
        without_fold : int, optional
            The fold whose rows stay unseen.

        Returns
        -------
        FittedRecipe
        """
        n_members, _, n_labels = self.stack.shape
        if recipe.weights == "uniform" and recipe.thresholds == "half":
            half = np.full(n_labels, DEFAULT_THRESHOLD, np.float32)
            return FittedRecipe(uniform_weights(n_members, n_labels), None, half, recipe.space)
        rows = self._rows(without_fold)
        weights = self._fit_weights(recipe.weights, without_fold)
        truth = self.y_true[rows]
        calibration, probabilities = self._calibrate(recipe.weights, recipe.space, without_fold)
        thresholds = plug_in_thresholds(probabilities, metric=self.metric)
        if recipe.thresholds == "searched":
            searched = search_shared_threshold(truth, probabilities, metric=self.metric)
            thresholds = np.full(n_labels, searched, np.float32)
        elif recipe.thresholds == "per_label":
            # Rare labels lean on the searched threshold of all labels, under macro-F1 on their own plug-in threshold.
            towards = None if self.metric.kind == "micro" else thresholds
            thresholds = search_label_thresholds(truth, probabilities, metric=self.metric, towards=towards)
        return FittedRecipe(weights, calibration, thresholds, recipe.space)

    def cross_fit(self, recipe: Recipe) -> npt.NDArray[np.int8]:
        """Decide every row with a recipe that was fitted on the other folds.

        Parameters
        ----------
        recipe : Recipe

        Returns
        -------
        int8 array of shape (n_samples, n_labels)
        """
        if recipe not in self._decisions:
            decisions = np.zeros(self.y_true.shape, np.int8)
            for fold in self.folds:
                inside = self.fold_ids == fold
                fitted = self.fit(recipe, without_fold=fold)
                decisions[inside] = decide(fitted.probabilities(self.stack[:, inside]), fitted.thresholds)
            self._decisions[recipe] = decisions
        return self._decisions[recipe]

    def compare(self, recipe: Recipe, baseline: Recipe) -> PairedDifference:
        """Return what a recipe gains over another on cross-fitted decisions, with its paired interval.

        Parameters
        ----------
        recipe, baseline : Recipe

        Returns
        -------
        PairedDifference
        """
        return paired_bootstrap(
            self.y_true, self.cross_fit(recipe), self.cross_fit(baseline), metric=self.metric, seed=self.seed
        )

    def judge(self) -> Verdict:
        """Try the steps in order and keep those that are sure to help.

        Returns
        -------
        Verdict
        """
        kept_name, kept = "uniform", RULES["uniform"]
        steps = [self._report("uniform", kept, None, True, "the simplest: nothing is fitted")]
        for name, rule in list(RULES.items())[1:]:
            recipe = _on_top(kept, rule)
            refusal = self._cannot_try(recipe)
            if refusal:
                steps.append(self._report(name, recipe, None, False, refusal))
                continue
            gain = self.compare(recipe, kept)
            n_changed = int((self.cross_fit(recipe) != self.cross_fit(kept)).any(axis=1).sum())
            is_kept, reason = _judge_gain(gain, n_changed)
            steps.append(self._report(name, recipe, gain, is_kept, reason))
            if is_kept:
                kept_name, kept = name, recipe
        return Verdict(name=kept_name, recipe=kept, steps=tuple(steps))

    def _cannot_try(self, recipe: Recipe) -> str:
        if not self.can_cross_fit:
            return "not tried: all rows that every member predicted lie in one fold, and cross-fitting needs two"
        if len(self.stack) == 1 and (recipe.weights, recipe.space) != ("uniform", "logits"):
            return "not tried: there is only one member to weigh"
        relevant = self.y_true if self.metric.label is None else self.y_true[:, self.metric.label]
        if not relevant.any():
            return f"not tried: no row is positive, so {self.metric.name} is not defined"
        return ""

    def _report(self, name: str, recipe: Recipe, gain: PairedDifference | None, kept: bool, reason: str) -> StepReport:
        tried = kept or gain is not None
        decisions = self.cross_fit(recipe) if tried else None
        scores: list[float | None] = [None, None, None]
        if decisions is not None:
            target = float(score_counts(count_decisions(self.y_true, decisions), self.metric))
            values = [target, micro_f1(self.y_true, decisions), macro_f1(self.y_true, decisions)]
            scores = [None if np.isnan(value) else value for value in values]
        return StepReport(
            name=name,
            weights=recipe.weights,
            thresholds=recipe.thresholds,
            score=scores[0],
            micro_f1=scores[1],
            macro_f1=scores[2],
            gain=gain,
            kept=kept,
            reason=reason,
            space=recipe.space,
        )

    def _rows(self, without_fold: int | None) -> npt.NDArray[np.bool_]:
        return np.ones(len(self.fold_ids), bool) if without_fold is None else self.fold_ids != without_fold

    def _calibrate(
        self, kind: str, space: str, without_fold: int | None
    ) -> tuple[Calibration, npt.NDArray[np.float32]]:
        """Calibrate the averages by one kind of weights; return also the probabilities of the rows it was fitted on."""
        if (kind, space, without_fold) not in self._calibrations:
            rows = self._rows(without_fold)
            logits = average_logits(self.stack[:, rows], self._fit_weights(kind, without_fold), space=space)
            calibration = fit_calibration(logits, self.y_true[rows])
            self._calibrations[kind, space, without_fold] = calibration, sigmoid(calibration.apply(logits))
        return self._calibrations[kind, space, without_fold]

    def _fit_weights(self, kind: str, without_fold: int | None) -> npt.NDArray[np.float64]:
        if (kind, without_fold) not in self._weights:
            rows = self._rows(without_fold)
            stack, truth = self.stack[:, rows], self.y_true[rows]
            if kind == "uniform" or len(stack) == 1:
                weights = uniform_weights(len(stack), truth.shape[1])
            elif kind == "greedy":
                weights = greedy_weights(stack, truth, self.metric)
            elif kind in ("shared", "per_label"):
                weights = stacked_weights(stack, truth, per_label=kind == "per_label")
            else:
                raise ConfigError(f"weights '{kind}' are unknown: choose uniform, greedy, shared or per_label")
            self._weights[kind, without_fold] = weights
        return self._weights[kind, without_fold]


def render_steps(steps: Sequence[StepReport], metric_name: str = "micro_f1") -> str:
    """Write the referee's steps as a table for people.

    Parameters
    ----------
    steps : sequence of StepReport
    metric_name : str
        Of the target metric, for the heading.

    Returns
    -------
    str
    """
    head = f"{'step':<22}{metric_name:>12}{'macro_f1':>10}  {'gain':>8}  {'95 % interval':<19} verdict"
    lines = [head, "-" * len(head)]
    for step in steps:
        gain, interval = "", ""
        if step.gain is not None:
            gain, interval = f"{step.gain.difference:+.4f}", f"{step.gain.low:+.4f} to {step.gain.high:+.4f}"
        score, macro = (f"{value:.4f}" if value is not None else "n/a" for value in (step.score, step.macro_f1))
        was_tried = step.kept or step.gain is not None
        verdict = f"{'kept' if step.kept else 'refused'}: {step.reason}" if was_tried else step.reason
        lines.append(f"{step.name:<22}{score:>12}{macro:>10}  {gain:>8}  {interval:<19} {verdict}")
    return "\n".join(lines)


def _on_top(kept: Recipe, rule: Recipe) -> Recipe:
    """Put one step on top of what was kept; learned weights, in logits, come with a fitted threshold at least."""
    if rule.space == "probabilities":
        return Recipe(kept.weights, kept.thresholds, rule.space)
    if rule.weights == "uniform":
        return Recipe(kept.weights, rule.thresholds, kept.space)
    return Recipe(rule.weights, "plug_in" if kept.thresholds == "half" else kept.thresholds)


def _judge_gain(gain: PairedDifference, n_changed_rows: int) -> tuple[bool, str]:
    """Whether a step is kept, and why."""
    if gain.high < 0:
        return False, "it makes decisions worse"
    if not gain.low > 0:  # NaN too
        return False, "the interval of its gain includes 0"
    if gain.difference < MIN_GAIN:
        return False, f"its gain is below {MIN_GAIN}"
    if n_changed_rows < MIN_CHANGED_ROWS:
        return False, f"it decides only {n_changed_rows} rows otherwise, fewer than {MIN_CHANGED_ROWS}"
    return True, "the interval of its gain lies above 0"
