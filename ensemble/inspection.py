"""What an ensemble is good and bad at: from out-of-fold logits to one JSON-ready report.

All numbers are of rows that every member predicted out of fold, decided by rules that were fitted on the other folds.
Members, leave-one-out and the curve are judged by one simple rule (uniform weights in the ensemble's space, calibrated,
plug-in threshold), so that they compare.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emodistill.ensemble.combination import Combination, MemberLogits
from emodistill.ensemble.referee import Recipe, Referee, render_steps
from emodistill.ensemble.weights import selection_order
from emodistill.errors import InputError
from emodistill.metrics import (
    bootstrap_interval,
    bootstrap_label_intervals,
    f1_report,
    paired_bootstrap,
    parse_metric,
)
from emodistill.thresholds import sigmoid

__all__ = ["error_correlation", "find_label_errors", "inspect_ensemble", "likely_label_errors", "render_text"]

N_SHOWN = 20
TEXT_WIDTH = 90

Float32Array = npt.NDArray[np.float32]


def inspect_ensemble(
    members: Sequence[MemberLogits],
    labels: npt.NDArray[np.int8],
    fold_ids: npt.NDArray[np.int8],
    combination: Combination,
    *,
    texts: Sequence[str] | None = None,
    n_shown: int = N_SHOWN,
    seed: int = 0,
) -> dict[str, Any]:
    """Report on an ensemble and its members.

    Parameters
    ----------
    members : sequence of MemberLogits
        Those of the combination.
    labels : int8 array of shape (n_samples, n_labels), in {0, 1}
    fold_ids : int8 array of shape (n_samples,)
    combination : Combination
        As `combine` returned it, or read from JSON.
    texts : sequence of str, optional
        Of the train rows, to show beside row numbers.
    n_shown : int
        At most this many confident errors and likely label errors.
    seed : int
        Of the bootstrap.

    Returns
    -------
    dict
        JSON-ready; keys "n_rows", "micro_f1", "macro_f1" (each with its interval), "labels", "confident_errors",
        "n_label_errors", "label_errors_by", "label_errors", "co_occurrence", "members", "leave_one_out", "curve",
        "error_correlation", "steps", "notes".
    """
    names = [member.name for member in members]
    if tuple(names) != combination.member_names:
        raise InputError(f"members {', '.join(names)} are not those combined: {', '.join(combination.member_names)}")
    stack = np.stack([np.asarray(member.oof, np.float32) for member in members])
    rows = np.flatnonzero(~np.isnan(stack).any(axis=(0, 2)))
    stack, truth, folds = stack[:, rows], labels[rows], fold_ids[rows]
    if len(np.unique(folds)) < 2:
        raise InputError("all members have only one fold in common: train another fold to have rows to inspect")
    metric = parse_metric(combination.metric, combination.label_names)
    referee = Referee(stack, truth, folds, metric, seed)
    decisions = referee.cross_fit(combination.recipe)
    probabilities = _cross_fitted_probabilities(referee, combination)

    def describe(position: int, label: int) -> dict[str, Any]:
        row = int(rows[position])
        given = [combination.label_names[i] for i in np.flatnonzero(truth[position])]
        return {
            "row": row,
            "text": None if texts is None else texts[row],
            "label": combination.label_names[label],
            "probability": round(float(probabilities[position, label]), 4),
            "given": given,
        }

    report = f1_report(truth, decisions, combination.label_names)
    wrong = _clearest_first(truth != decisions, truth, probabilities)[:n_shown]
    suspects, found_by = find_label_errors(truth, probabilities)
    simple = {name: Referee(stack[[i]], truth, folds, metric, seed) for i, name in enumerate(names)}
    return {
        "n_rows": len(rows),
        "micro_f1": report["micro_f1"],
        "micro_f1_interval": _finite(bootstrap_interval(truth, decisions, seed=seed)),
        "macro_f1": report["macro_f1"],
        "macro_f1_interval": _finite(bootstrap_interval(truth, decisions, metric="macro_f1", seed=seed)),
        "labels": _label_table(report, truth, decisions, seed),
        "confident_errors": [describe(*at) for at in wrong],
        "n_label_errors": len(suspects),
        "label_errors_by": found_by,
        "label_errors": [describe(*at) for at in suspects[:n_shown]],
        "co_occurrence": _co_occurrence(truth, decisions, combination.label_names),
        "members": _member_table(simple, truth, combination),
        "leave_one_out": _leave_one_out(stack, truth, folds, names, combination, seed),
        "curve": _curve(stack, truth, folds, names, combination, seed),
        "error_correlation": {"names": names, "matrix": error_correlation(stack, truth).round(4).tolist()},
        "steps": [step.to_json() for step in combination.steps],
        "steps_text": render_steps(combination.steps, combination.metric),
        "notes": list(combination.notes),
    }


def find_label_errors(y_true: npt.NDArray[np.int8], probabilities: Float32Array) -> tuple[list[tuple[int, int]], str]:
    """Find likely label errors: by cleanlab where it is installed, else by `likely_label_errors`.

    cleanlab also estimates how many errors a label has, and keeps no more than those.

    Parameters
    ----------
    y_true : int8 array of shape (n_samples, n_labels), in {0, 1}
    probabilities : float array of shape (n_samples, n_labels), in [0, 1]
        Calibrated, out of fold.

    Returns
    -------
    errors : list of (row, label)
        Least probable given value first.
    method : str
        What found them, for the report.

    References
    ----------
    Thyagarajan, A., Snorrason, E., Northcutt, C., Mueller, J. (2023). Identifying incorrect annotations in multi-label
    classification data. arXiv:2211.13895.
    """
    try:
        import cleanlab
        from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
    except ImportError:
        return likely_label_errors(y_true, probabilities), (
            "confident learning for each label; with  pip install 'emodistill[inspect]'  by cleanlab"
        )
    suspect = np.zeros(y_true.shape, bool)
    mixed = np.flatnonzero(y_true.any(axis=0) & ~y_true.all(axis=0))  # a label of one value has nothing to learn from
    if len(mixed):
        given = [np.flatnonzero(row).tolist() for row in y_true[:, mixed]]
        suspect[:, mixed] = find_multilabel_issues_per_class(
            given, probabilities[:, mixed].astype(np.float64), n_jobs=1
        )
    return _clearest_first(suspect, y_true, probabilities), f"cleanlab {cleanlab.__version__}"


def likely_label_errors(y_true: npt.NDArray[np.int8], probabilities: Float32Array) -> list[tuple[int, int]]:
    """Find labels that the ensemble, which never saw the row, contradicts with more than its usual confidence.

    Confident learning for each label alone: the mean probability among rows with the label (and of its absence among
    rows without) is the confidence that is usual for it. A given label is suspect when the opposite is the more
    probable and reaches its own usual confidence.

    Parameters
    ----------
    y_true : int8 array of shape (n_samples, n_labels), in {0, 1}
    probabilities : float array of shape (n_samples, n_labels), in [0, 1]
        Calibrated, out of fold.

    Returns
    -------
    list of (row, label)
        Least probable given value first.

    References
    ----------
    Northcutt, C., Jiang, L., Chuang, I. (2021). Confident learning: estimating uncertainty in dataset labels. JAIR 70.
    """
    p = probabilities.astype(np.float64)
    truth = y_true.astype(bool)
    n_positive = truth.sum(axis=0)
    usual_positive = np.where(n_positive > 0, (p * truth).sum(axis=0) / np.maximum(n_positive, 1), np.inf)
    n_negative = (~truth).sum(axis=0)
    usual_negative = np.where(n_negative > 0, ((1 - p) * ~truth).sum(axis=0) / np.maximum(n_negative, 1), np.inf)
    suspect = np.where(truth, (p < 0.5) & (1 - p >= usual_negative), (p > 0.5) & (p >= usual_positive))
    return _clearest_first(suspect, y_true, probabilities)


def error_correlation(stack: Float32Array, y_true: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
    """Correlate members' errors, probability minus truth, over all rows and labels: averaging feeds on low values.

    Parameters
    ----------
    stack : float32 array of shape (n_members, n_samples, n_labels)
        Out-of-fold logits without NaN.
    y_true : int8 array of shape (n_samples, n_labels), in {0, 1}

    Returns
    -------
    float64 array of shape (n_members, n_members), in [-1, 1]
        Pearson correlation; 0 beside a member that makes the same error everywhere.
    """
    errors = (sigmoid(stack) - y_true).reshape(len(stack), -1).astype(np.float64)
    errors -= errors.mean(axis=1, keepdims=True)
    norms = np.sqrt((errors**2).sum(axis=1))
    products = errors @ errors.T
    correlation = np.zeros_like(products)
    np.divide(products, np.outer(norms, norms), out=correlation, where=np.outer(norms, norms) > 0)
    np.fill_diagonal(correlation, 1.0)
    return np.clip(correlation, -1.0, 1.0)


def render_text(report: dict[str, Any]) -> str:
    """Write the report as tables for people.

    Parameters
    ----------
    report : dict
        From `inspect_ensemble`.

    Returns
    -------
    str
    """
    parts = [_heading(report), _render_labels(report)]
    parts.append("What the referee tried\n\n" + report["steps_text"])
    parts.append("\n".join(f"- {note}" for note in report["notes"]))
    parts.append(_render_members(report))
    parts.append(_render_gains(report))
    parts.append(_render_correlation(report))
    parts.append(_render_co_occurrence(report))
    parts.append(_render_rows("Most confident wrong decisions, out of fold", report["confident_errors"]))
    title = f"Likely label errors, by {report['label_errors_by']}: {report['n_label_errors']} found, the clearest"
    parts.append(_render_rows(title, report["label_errors"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _cross_fitted_probabilities(referee: Referee, combination: Combination) -> Float32Array:
    """Probabilities of each row by the recipe that was fitted on the other folds."""
    probabilities = np.zeros(referee.y_true.shape, np.float32)
    for fold in referee.folds:
        inside = referee.fold_ids == fold
        fitted = referee.fit(combination.recipe, without_fold=fold)
        probabilities[inside] = fitted.probabilities(referee.stack[:, inside])
    return probabilities


def _clearest_first(
    cells: npt.NDArray[np.bool_], truth: npt.NDArray[np.int8], probabilities: Float32Array
) -> list[tuple[int, int]]:
    """Order marked cells by the probability of what was given, lowest first."""
    given = np.where(truth == 1, probabilities, 1 - probabilities)[cells]
    positions = np.argwhere(cells)[np.argsort(given, kind="stable")]
    return [(int(row), int(label)) for row, label in positions]


def _label_table(
    report: dict[str, Any], truth: npt.NDArray[np.int8], decisions: npt.NDArray[np.int8], seed: int
) -> list[dict[str, Any]]:
    intervals = bootstrap_label_intervals(truth, decisions, seed=seed)
    return [
        {"name": name, **values, "f1_interval": _finite((float(low), float(high)))}
        for (name, values), (low, high) in zip(report["per_label"].items(), intervals, strict=True)
    ]


def _simple_rule(combination: Combination) -> Recipe:
    return Recipe("uniform", "plug_in", combination.space)


def _co_occurrence(
    truth: npt.NDArray[np.int8], decisions: npt.NDArray[np.int8], label_names: Sequence[str]
) -> dict[str, Any]:
    """Rows that have both labels; on the diagonal those with the label at all."""
    true, decided = truth.astype(np.int64), decisions.astype(np.int64)
    return {"names": list(label_names), "true": (true.T @ true).tolist(), "decided": (decided.T @ decided).tolist()}


def _member_table(
    referees: dict[str, Referee], truth: npt.NDArray[np.int8], combination: Combination
) -> list[dict[str, Any]]:
    rule, label_names = _simple_rule(combination), combination.label_names
    reports = {name: f1_report(truth, referee.cross_fit(rule), label_names) for name, referee in referees.items()}
    f1 = {name: {label: v["f1"] for label, v in report["per_label"].items()} for name, report in reports.items()}
    best = {
        label: max(f1, key=lambda name: -1.0 if f1[name][label] is None else f1[name][label]) for label in label_names
    }
    return [
        {
            "name": name,
            "micro_f1": report["micro_f1"],
            "macro_f1": report["macro_f1"],
            "f1": f1[name],
            "best_at": [label for label in label_names if best[label] == name and f1[name][label] is not None],
        }
        for name, report in reports.items()
    ]


def _leave_one_out(
    stack: Float32Array,
    truth: npt.NDArray[np.int8],
    folds: npt.NDArray[np.int8],
    names: Sequence[str],
    combination: Combination,
    seed: int,
) -> list[dict[str, Any]]:
    """What each member adds to the plain average of the others."""
    if len(names) < 2:
        return []
    metric = parse_metric(combination.metric, combination.label_names)
    everyone = Referee(stack, truth, folds, metric, seed).cross_fit(_simple_rule(combination))
    gains = []
    for i, name in enumerate(names):
        without = Referee(np.delete(stack, i, axis=0), truth, folds, metric, seed).cross_fit(_simple_rule(combination))
        gain = paired_bootstrap(truth, everyone, without, metric=metric, seed=seed)
        gains.append({"name": name, **gain.to_json()})
    return gains


def _curve(
    stack: Float32Array,
    truth: npt.NDArray[np.int8],
    folds: npt.NDArray[np.int8],
    names: Sequence[str],
    combination: Combination,
    seed: int,
) -> list[dict[str, Any]]:
    """Score as members are added, the one that helps most next, and what each adds to those before it."""
    metric = parse_metric(combination.metric, combination.label_names)
    order = selection_order(stack, truth, metric)
    curve: list[dict[str, Any]] = []
    before = None
    for n_members in range(1, len(order) + 1):
        decisions = Referee(stack[order[:n_members]], truth, folds, metric, seed).cross_fit(_simple_rule(combination))
        report = f1_report(truth, decisions, combination.label_names)
        added = names[order[n_members - 1]]
        gain = None if before is None else paired_bootstrap(truth, decisions, before, metric=metric, seed=seed)
        curve.append(
            {
                "n_members": n_members,
                "added": added,
                "micro_f1": report["micro_f1"],
                "macro_f1": report["macro_f1"],
                "gain": None if gain is None else gain.to_json(),
            }
        )
        before = decisions
    return curve


def _heading(report: dict[str, Any]) -> str:
    scores = [
        f"{name.replace('_f1', '-F1')} {_show(report[name])} {_show_interval(report[f'{name}_interval'])}"
        for name in ("micro_f1", "macro_f1")
    ]
    return f"{report['n_rows']} rows, out of fold, decided by rules fitted on the other folds: {', '.join(scores)}"


def _render_labels(report: dict[str, Any]) -> str:
    rows = [
        [
            label["name"],
            str(label["support"]),
            str(label["predicted"]),
            *(_show(label[key]) for key in ("precision", "recall", "f1")),
            _show_interval(label["f1_interval"]),
        ]
        for label in report["labels"]
    ]
    return _table(["label", "support", "predicted", "precision", "recall", "f1", "95 % interval"], rows)


def _render_members(report: dict[str, Any]) -> str:
    names = [label["name"] for label in report["labels"]]
    rows = [
        [m["name"], _show(m["micro_f1"]), _show(m["macro_f1"]), *(_show(m["f1"][name]) for name in names)]
        for m in report["members"]
    ]
    best = [f"{m['name']} is best at {', '.join(m['best_at'])}" for m in report["members"] if m["best_at"]]
    head = ["member", "micro_f1", "macro_f1", *names]
    return "Members alone, calibrated, plug-in threshold\n\n" + _table(head, rows) + "\n" + "; ".join(best)


def _render_gains(report: dict[str, Any]) -> str:
    if len(report["curve"]) < 2:
        return ""
    curve = [
        [
            str(point["n_members"]),
            point["added"],
            _show(point["micro_f1"]),
            _show(point["macro_f1"]),
            *_show_gain(point["gain"]),
        ]
        for point in report["curve"]
    ]
    gains = [[gain["name"], *_show_gain(gain)] for gain in report["leave_one_out"]]
    return (
        "Plain average as members are added\n\n"
        + _table(["members", "added", "micro_f1", "macro_f1", "gain", "95 % interval"], curve)
        + "\n\nWhat each member adds to the plain average of the others\n\n"
        + _table(["member", "gain", "95 % interval"], gains)
    )


def _render_correlation(report: dict[str, Any]) -> str:
    names, matrix = report["error_correlation"]["names"], report["error_correlation"]["matrix"]
    if len(names) < 2:
        return ""
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in zip(names, matrix, strict=True)]
    return "Correlation of errors\n\n" + _table(["", *names], rows)


def _render_co_occurrence(report: dict[str, Any]) -> str:
    co = report["co_occurrence"]
    rows = [
        [name, *(f"{t}/{d}" for t, d in zip(true, decided, strict=True))]
        for name, true, decided in zip(co["names"], co["true"], co["decided"], strict=True)
    ]
    return "Labels together: rows that have both / are decided to have both\n\n" + _table(["", *co["names"]], rows)


def _render_rows(title: str, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [title, ""]
    for row in rows:
        given = ", ".join(row["given"]) or "no label"
        text = "" if row["text"] is None else "  " + _shorten(row["text"])
        lines.append(f"row {row['row']}: {row['label']} at {row['probability']:.3f}, given {given}{text}")
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"


def _show(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _show_interval(interval: list[float] | None) -> str:
    return "n/a" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def _show_gain(gain: dict[str, float] | None) -> tuple[str, str]:
    if gain is None:
        return "", ""
    return f"{gain['difference']:+.4f}", f"{gain['low']:+.4f} to {gain['high']:+.4f}"


def _finite(interval: tuple[float, float]) -> list[float] | None:
    return None if np.isnan(interval).any() else list(interval)
