"""From members' logits to one ensemble: weights, calibration and thresholds, all chosen on out-of-fold rows.

Weights and thresholds are learned on logits of single folds; what is deployed averages the models of all folds, and
averages are less extreme. `fold_average_shift` measures, without labels, how that moves the rate of positive
decisions, and gives the bias that moves it back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.ensemble.calibration import Calibration
from emodistill.ensemble.referee import RULES, FittedRecipe, Recipe, Referee, StepReport, Verdict
from emodistill.ensemble.weights import average_logits
from emodistill.errors import ConfigError, InputError
from emodistill.metrics import PairedDifference, parse_metric
from emodistill.thresholds import decide, sigmoid

__all__ = ["Combination", "FoldAverageShift", "MemberLogits", "combine", "combine_by_rules", "fold_average_shift"]

SHIFT_SHRINKAGE_POSITIVES = 200.0
NOISE_DEVIATIONS = 1.96  # a difference in positives within this many standard errors is no shift
MIN_PROBABILITY = 1e-6
TEST_SET = "test"  # its texts are never used to choose anything

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MemberLogits:
    """What one member (a variant over its folds) said about all rows.

    Attributes
    ----------
    name : str
    oof : float32 array of shape (n_samples, n_labels)
        Out-of-fold logits of the train rows; NaN in rows whose fold was not trained.
    evaluation : dict from str to float32 array of shape (n_texts, n_labels)
        Logits of other texts ("dev", "test", "unlabeled"), averaged over the folds.
    evaluation_by_fold : dict from str to float32 array of shape (n_folds, n_texts, n_labels), optional
        The same of each fold alone.
    folds : sequence of int, optional
        Which folds these are, in order; 0, 1, 2 ... when not given.
    """

    name: str
    oof: Float32Array
    evaluation: dict[str, Float32Array] = field(default_factory=dict)
    evaluation_by_fold: dict[str, Float32Array] | None = None
    folds: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class FoldAverageShift:
    """How averaging folds moves the rate of positive decisions, and what moves it back.

    Attributes
    ----------
    bias : float32 array of shape (n_labels,)
        To add to the calibrated logits of fold averages; zeros when the shift is within noise.
    single_fold_rate, fold_average_rate, corrected_rate : float64 array of shape (n_labels,)
        Share of texts decided positive: by one fold's models (mean over folds), by the average, and by the average
        with `bias`.
    n_texts, n_folds : int
        What it was measured on.
    is_corrected : bool
    note : str
        One sentence.
    """

    bias: Float32Array
    single_fold_rate: npt.NDArray[np.float64]
    fold_average_rate: npt.NDArray[np.float64]
    corrected_rate: npt.NDArray[np.float64]
    n_texts: int
    n_folds: int
    is_corrected: bool
    note: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        arrays = ("bias", "single_fold_rate", "fold_average_rate", "corrected_rate")
        return {**self.__dict__, **{name: getattr(self, name).tolist() for name in arrays}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "FoldAverageShift":
        """Read what `to_json` wrote."""
        rates = ("single_fold_rate", "fold_average_rate", "corrected_rate")
        arrays = {name: np.array(values[name], np.float64) for name in rates}
        return cls(**{**values, **arrays, "bias": np.array(values["bias"], np.float32)})


@dataclass(frozen=True, kw_only=True)
class Combination:
    """An ensemble: how members' logits become logits, probabilities and decisions.

    Attributes
    ----------
    member_names, label_names : tuple of str
    metric : str
        What was maximized.
    rule : str
        The name of the rule in use: a key of `RULES`. Under "auto" it is the last step that the referee kept.
    requested_rule : str
        What was asked for.
    recipe : Recipe
        The weights and thresholds of the rule.
    member_weights : float64 array of shape (n_members, n_labels)
        Each label's column sums to 1.
    space : str
        "logits" or "probabilities": what the weights average.
    calibration : Calibration or None
        None: probabilities are the sigmoid of the combined logits.
    thresholds : float32 array of shape (n_labels,)
        Positive where the probability is at least the threshold.
    shift : FoldAverageShift or None
        None when it could not be measured or there is none to measure.
    steps : tuple of StepReport
        What the referee tried.
    price : PairedDifference or None
        For a forced rule: its score minus that of the referee's choice.
    notes : tuple of str
        Sentences for the report.
    n_fitted_rows : int
        Rows that every member predicted, on which everything was fitted.
    oof_logits : float32 array of shape (n_samples, n_labels)
        Combined out-of-fold logits; NaN where no member predicted. Empty when read from JSON.
    cross_fitted_rows : int32 array of shape (n_rows,)
        Train rows that every member predicted. Empty when read from JSON.
    cross_fitted_decisions : int8 array of shape (n_rows, n_labels)
        Their decisions by the rule as fitted on the other folds. Empty when it could not be, or when read from JSON.
    """

    member_names: tuple[str, ...]
    label_names: tuple[str, ...]
    metric: str
    rule: str
    requested_rule: str
    recipe: Recipe
    member_weights: npt.NDArray[np.float64]
    space: str
    calibration: Calibration | None
    thresholds: Float32Array
    shift: FoldAverageShift | None
    steps: tuple[StepReport, ...]
    price: PairedDifference | None
    notes: tuple[str, ...]
    n_fitted_rows: int
    oof_logits: Float32Array
    cross_fitted_rows: npt.NDArray[np.int32]
    cross_fitted_decisions: npt.NDArray[np.int8]

    def apply(self, member_logits: Mapping[str, npt.ArrayLike], *, fold_average: bool = True) -> Float32Array:
        """Combine members' logits of other texts.

        Parameters
        ----------
        member_logits : mapping from member name to array-like of float, shape (n_texts, n_labels)
        fold_average : bool
            Whether these are averages over folds, which get the bias of `shift`; False for logits of a single fold.

        Returns
        -------
        float32 array of shape (n_texts, n_labels)

        Raises
        ------
        InputError
            If a member is missing, or the shapes differ.
        """
        missing = [name for name in self.member_names if name not in member_logits]
        if missing:
            raise InputError(
                f"no logits of member {', '.join(missing)}: give those of all {len(self.member_names)} members"
            )
        stack = _stack([np.asarray(member_logits[name], np.float32) for name in self.member_names], self.member_names)
        logits = average_logits(stack, self.member_weights, space=self.space)
        if fold_average and self.shift is not None:
            scale = 1.0 if self.calibration is None else self.calibration.scale
            logits = (logits + self.shift.bias / scale).astype(np.float32)
        return logits

    def calibrated_logits(self, logits: npt.ArrayLike) -> Float32Array:
        """Return calibrated logits of combined logits (n_texts, n_labels): their sigmoid is `probabilities`."""
        values = np.asarray(logits, np.float32)
        return values if self.calibration is None else self.calibration.apply(values)

    def probabilities(self, logits: npt.ArrayLike) -> Float32Array:
        """Return probabilities of combined logits.

        Parameters
        ----------
        logits : array-like of float, shape (n_texts, n_labels)
            From `apply`, or `oof_logits`.

        Returns
        -------
        float32 array of the same shape, in [0, 1]
        """
        return sigmoid(self.calibrated_logits(logits))

    def decide(self, logits: npt.ArrayLike) -> npt.NDArray[np.int8]:
        """Return decisions from combined logits.

        Parameters
        ----------
        logits : array-like of float, shape (n_texts, n_labels)
            From `apply`, or `oof_logits`.

        Returns
        -------
        int8 array of the same shape
        """
        return decide(self.probabilities(logits), self.thresholds)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the rows as a JSON-ready dict."""
        return {
            "member_names": list(self.member_names),
            "label_names": list(self.label_names),
            "metric": self.metric,
            "rule": self.rule,
            "requested_rule": self.requested_rule,
            "recipe": asdict(self.recipe),
            "member_weights": self.member_weights.tolist(),
            "space": self.space,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "thresholds": self.thresholds.tolist(),
            "shift": None if self.shift is None else self.shift.to_json(),
            "steps": [step.to_json() for step in self.steps],
            "price": None if self.price is None else self.price.to_json(),
            "notes": list(self.notes),
            "n_fitted_rows": self.n_fitted_rows,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Combination":
        """Read what `to_json` wrote.

        Parameters
        ----------
        values : dict

        Returns
        -------
        Combination
            With empty `oof_logits`, `cross_fitted_rows` and `cross_fitted_decisions`.
        """
        calibration, shift, price = values["calibration"], values["shift"], values["price"]
        n_labels = len(values["label_names"])
        return cls(
            member_names=tuple(values["member_names"]),
            label_names=tuple(values["label_names"]),
            metric=values["metric"],
            rule=values["rule"],
            requested_rule=values["requested_rule"],
            recipe=Recipe(**values["recipe"]),
            member_weights=np.array(values["member_weights"], np.float64),
            space=values["space"],
            calibration=None if calibration is None else Calibration.from_json(calibration),
            thresholds=np.array(values["thresholds"], np.float32),
            shift=None if shift is None else FoldAverageShift.from_json(shift),
            steps=tuple(StepReport.from_json(step) for step in values["steps"]),
            price=None if price is None else PairedDifference(**price),
            notes=tuple(values["notes"]),
            n_fitted_rows=values["n_fitted_rows"],
            oof_logits=np.zeros((0, n_labels), np.float32),
            cross_fitted_rows=np.zeros(0, np.int32),
            cross_fitted_decisions=np.zeros((0, n_labels), np.int8),
        )


def combine(
    members: Sequence[MemberLogits],
    labels: npt.NDArray[np.int8],
    fold_ids: npt.NDArray[np.int8],
    label_names: Sequence[str],
    *,
    rule: str = "auto",
    metric: str = "micro_f1",
    seed: int = 0,
) -> Combination:
    """Choose weights, calibration and thresholds on the out-of-fold rows.

    Everything is fitted on the rows that all members predicted: a member may cover some folds only.

    Parameters
    ----------
    members : sequence of MemberLogits
        At least one, with different names.
    labels : int8 array of shape (n_samples, n_labels), in {0, 1}
    fold_ids : int8 array of shape (n_samples,)
    label_names : sequence of str
        In column order.
    rule : str
        "auto" leaves the choice to the referee; a key of `RULES` forces that rule, and its price is reported.
    metric : str
        What is maximized: "micro_f1", "macro_f1", "label:NAME" or "f_beta:B".
    seed : int
        Of the bootstrap.

    Returns
    -------
    Combination

    Raises
    ------
    ConfigError
        If the rule or the metric is unknown.
    InputError
        If shapes or names do not fit, or no row was predicted by every member.
    """
    return combine_by_rules(members, labels, fold_ids, label_names, rules=[rule], metric=metric, seed=seed)[rule]


def combine_by_rules(
    members: Sequence[MemberLogits],
    labels: npt.NDArray[np.int8],
    fold_ids: npt.NDArray[np.int8],
    label_names: Sequence[str],
    *,
    rules: Sequence[str] = ("auto", *RULES),
    metric: str = "micro_f1",
    seed: int = 0,
) -> dict[str, Combination]:
    """Combine by several rules at the price of one: the referee's fits are shared.

    Parameters
    ----------
    members, labels, fold_ids, label_names, metric, seed
        As for `combine`.
    rules : sequence of str
        Each "auto" or a key of `RULES`; by default all.

    Returns
    -------
    dict from rule to Combination
        What `combine` returns for each rule.
    """
    target = parse_metric(metric, label_names)
    for rule in rules:
        if rule != "auto" and rule not in RULES:
            raise ConfigError(f"rule '{rule}' is unknown: choose auto, {', '.join(RULES)}")
    names = tuple(member.name for member in members)
    stack = _checked_stack(members, names, labels, fold_ids, label_names)
    common = np.asarray(~np.isnan(stack).any(axis=(0, 2)))
    if not common.any():
        raise InputError(
            f"no row was predicted by all of {', '.join(names)}: train them on a common fold, or leave one of them out"
        )
    referee = Referee(stack[:, common], labels[common], fold_ids[common], target, seed)
    verdict = referee.judge()
    coverage = _coverage_notes(names, stack, fold_ids, common)
    averages_folds = _n_folds(stack, fold_ids) > 1
    combinations = {}
    for rule in rules:
        choice = _choose(rule, referee, verdict, members, averages_folds)
        combinations[rule] = Combination(
            member_names=names,
            label_names=tuple(label_names),
            metric=metric,
            rule=choice.name,
            requested_rule=rule,
            recipe=choice.recipe,
            member_weights=choice.fitted.weights,
            space=choice.recipe.space,
            calibration=choice.fitted.calibration,
            thresholds=choice.fitted.thresholds,
            shift=choice.shift,
            steps=verdict.steps,
            price=choice.price,
            notes=(*coverage, *choice.notes),
            n_fitted_rows=int(common.sum()),
            oof_logits=average_logits(stack, choice.fitted.weights, space=choice.recipe.space),
            cross_fitted_rows=np.flatnonzero(common).astype(np.int32),
            cross_fitted_decisions=_cross_fitted(referee, choice.recipe),
        )
    return combinations


def fold_average_shift(
    single_fold_margins: npt.NDArray[np.floating[Any]],
    fold_average_margins: npt.NDArray[np.floating[Any]],
    *,
    is_learned: bool = True,
) -> FoldAverageShift:
    """Measure, without labels, what averaging folds does to positive decisions, and find the bias that undoes it.

    A margin is a calibrated logit minus the logit of its threshold: positive decisions are those at 0 or above. The
    bias of a label makes the average decide as many texts positive as a single fold does; it is drawn towards the bias
    that does so for all labels together, by n / (n + 200) for n positives.

    Parameters
    ----------
    single_fold_margins : float array of shape (n_folds, n_texts, n_labels)
    fold_average_margins : float array of shape (n_texts, n_labels)
        Of the same texts.

    is_learned : bool
        Whether the thresholds were learned on single folds. If not, matching the rate of single folds would only hand
        their errors on to the average, and nothing is corrected.

    Returns
    -------
    FoldAverageShift
        With a bias of 0 when the difference in positives is within its own noise over the texts.
    """
    n_folds, n_texts, n_labels = single_fold_margins.shape
    single = (single_fold_margins >= 0).mean(axis=0)  # (n_texts, n_labels), in [0, 1]
    average = (fold_average_margins >= 0).astype(np.float64)
    difference = (average - single).sum(axis=1)
    noise = NOISE_DEVIATIONS * float(np.std(difference)) * np.sqrt(n_texts)
    is_shifted = bool(abs(difference.sum()) > noise)
    is_corrected = is_shifted and is_learned
    bias = np.zeros(n_labels, np.float32)
    if is_corrected:
        positives = single.sum(axis=0)
        shared = _matching_bias(fold_average_margins.ravel(), float(positives.sum()))
        own = np.array([_matching_bias(fold_average_margins[:, i], positives[i]) for i in range(n_labels)])
        trust = positives / (positives + SHIFT_SHRINKAGE_POSITIVES)
        bias = (trust * own + (1 - trust) * shared).astype(np.float32)
    corrected = (fold_average_margins + bias >= 0).mean(axis=0)
    share = f"{average.sum():.0f} positive decisions against {single.sum():.1f} of a single fold on {n_texts} texts"
    verdict = "corrected by a bias per label" if is_corrected else "within noise, not corrected"
    if is_shifted and not is_learned:
        verdict = "not corrected, as 0.5 was not learned on single folds"
    return FoldAverageShift(
        bias=bias,
        single_fold_rate=single.mean(axis=0),
        fold_average_rate=average.mean(axis=0),
        corrected_rate=corrected,
        n_texts=n_texts,
        n_folds=n_folds,
        is_corrected=is_corrected,
        note=f"the average of {n_folds} folds gives {share}: {verdict}",
    )


@dataclass(frozen=True)
class _Choice:
    """A rule as it will be used."""

    name: str
    recipe: Recipe
    fitted: FittedRecipe
    price: PairedDifference | None
    shift: FoldAverageShift | None
    notes: tuple[str, ...]


def _choose(
    rule: str, referee: Referee, verdict: Verdict, members: Sequence[MemberLogits], averages_folds: bool
) -> _Choice:
    """Fit what the referee chose, or what was asked for, and measure what averaging folds does to it."""
    name, recipe, price, notes = verdict.name, verdict.recipe, None, []
    if rule != "auto":
        name, recipe = rule, RULES[rule]
        if referee.can_cross_fit:
            price = referee.compare(recipe, verdict.recipe)
            notes.append(_price_note(rule, verdict.name, price))
        else:
            notes.append(f"rule {rule} was forced; its price cannot be measured with a single fold")
    fitted = referee.fit(recipe)
    shift, shift_note = _measure_shift(members, fitted)
    if shift is None and recipe.thresholds == "per_label" and rule == "auto" and averages_folds:
        # What averaging does to many thresholds is unknown here: one threshold is the smaller risk.
        recipe = Recipe(recipe.weights, "plug_in", recipe.space)
        name = next(
            known
            for known, simple in RULES.items()
            if (simple.weights, simple.thresholds) == (recipe.weights, "plug_in")
        )
        fitted = referee.fit(recipe)
        shift_note += "; so thresholds per label, which the referee had kept, fall back to the plug-in threshold"
    return _Choice(name, recipe, fitted, price, shift, (*notes, shift_note))


def _cross_fitted(referee: Referee, recipe: Recipe) -> npt.NDArray[np.int8]:
    """Decisions of all rows by the recipe as fitted on the other folds; none where there are no other folds."""
    if referee.can_cross_fit or recipe.thresholds == "half":
        return referee.cross_fit(recipe)
    return np.zeros((0, referee.y_true.shape[1]), np.int8)


def _matching_bias(margins: npt.NDArray[np.floating[Any]], n_positive: float) -> float:
    """Return what must be added so that about n_positive margins are at 0 or above."""
    k = round(n_positive)
    descending = np.sort(margins.astype(np.float64))[::-1]
    if k <= 0 or k >= len(descending):
        return 0.0
    return -float(descending[k - 1] + descending[k]) / 2


def _measure_shift(members: Sequence[MemberLogits], fitted: FittedRecipe) -> tuple[FoldAverageShift | None, str]:
    """Measure the shift on all texts but the test set's, or say why that cannot be done."""
    common_folds = set.intersection(*(set(_fold_order(member)) for member in members))
    sets = set.intersection(*(set(member.evaluation) & set(member.evaluation_by_fold or {}) for member in members))
    usable = sorted(sets - {TEST_SET})
    if len(common_folds) < 2 or not usable:
        return (
            None,
            "what averaging over folds does to decisions was not measured: it needs logits of two folds by fold",
        )
    threshold = np.clip(fitted.thresholds.astype(np.float64), MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    cut = np.log(threshold) - np.log1p(-threshold)

    def margins(arrays: list[Float32Array]) -> npt.NDArray[np.float64]:
        logits = average_logits(np.stack(arrays), fitted.weights, space=fitted.space)
        calibrated = logits if fitted.calibration is None else fitted.calibration.apply(logits)
        margin: npt.NDArray[np.float64] = calibrated.astype(np.float64) - cut
        return margin

    average = np.concatenate([margins([member.evaluation[name] for member in members]) for name in usable])
    single = np.stack(
        [
            np.concatenate([margins([_of_fold(member, name, fold) for member in members]) for name in usable])
            for fold in sorted(common_folds)
        ]
    )
    shift = fold_average_shift(single, average, is_learned=fitted.calibration is not None)
    return shift, f"on {' and '.join(usable)} texts, without labels, {shift.note}"


def _fold_order(member: MemberLogits) -> list[int]:
    if not member.evaluation_by_fold:
        return []
    n_folds = len(next(iter(member.evaluation_by_fold.values())))
    return [int(fold) for fold in member.folds] if member.folds is not None else list(range(n_folds))


def _of_fold(member: MemberLogits, name: str, fold: int) -> Float32Array:
    assert member.evaluation_by_fold is not None
    return np.asarray(member.evaluation_by_fold[name][_fold_order(member).index(fold)])


def _n_folds(stack: Float32Array, fold_ids: npt.NDArray[np.int8]) -> int:
    """Most folds that any one member covers: how many models its evaluation logits average."""
    return max(len(np.unique(fold_ids[~np.isnan(member[:, 0])])) for member in stack)


def _coverage_notes(
    names: tuple[str, ...], stack: Float32Array, fold_ids: npt.NDArray[np.int8], common: npt.NDArray[np.bool_]
) -> list[str]:
    folds = len(np.unique(fold_ids[common]))
    notes = [
        f"fitted on {int(common.sum())} of {len(common)} rows, those that all members predicted, in {folds} folds; "
        "the members are not refitted"
    ]
    partial = {
        name: len(np.unique(fold_ids[~np.isnan(member[:, 0])]))
        for name, member in zip(names, stack, strict=True)
        if np.isnan(member[:, 0]).any()
    }
    if partial:
        covered = ", ".join(f"{name} {n}" for name, n in partial.items())
        notes.append(f"members that cover only some of the {len(np.unique(fold_ids))} folds: {covered}")
    return notes


def _price_note(rule: str, referee_rule: str, price: PairedDifference) -> str:
    interval = f"{price.low:+.4f} to {price.high:+.4f}"
    change = f"it changes the cross-fitted score by {price.difference:+.4f} ({interval})"
    return f"rule {rule} was forced; against the referee's choice, {referee_rule}, {change}"


def _stack(arrays: Sequence[Float32Array], names: Sequence[str]) -> Float32Array:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        listed = ", ".join(f"{name} {array.shape}" for name, array in zip(names, arrays, strict=True))
        raise InputError(f"members' logits differ in shape: {listed}; all must be of the same texts and labels")
    return np.stack(arrays)


def _checked_stack(
    members: Sequence[MemberLogits],
    names: tuple[str, ...],
    labels: npt.NDArray[np.int8],
    fold_ids: npt.NDArray[np.int8],
    label_names: Sequence[str],
) -> Float32Array:
    if not members:
        raise InputError("there is no member to combine: train at least one")
    if len(set(names)) < len(names):
        raise InputError(f"two members have the same name among {', '.join(names)}: rename one")
    stack = _stack([np.asarray(member.oof, np.float32) for member in members], names)
    if stack.shape[1:] != labels.shape or len(fold_ids) != len(labels) or labels.shape[1] != len(label_names):
        raise InputError(
            f"out-of-fold logits {stack.shape[1:]}, labels {labels.shape}, {len(fold_ids)} fold ids and "
            f"{len(label_names)} label names do not fit: all must be of the same train rows and labels"
        )
    return stack
