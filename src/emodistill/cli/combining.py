"""The stage `combine`: from the members' out-of-fold logits to the ensemble's folder."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emodistill.artifacts import piece_state, read_json, start_piece, write_json
from emodistill.cli.console import Outcome, say
from emodistill.cli.members import variant_logits
from emodistill.cli.planning import MemberPlan, Plan
from emodistill.cli.run_folder import RunFolder
from emodistill.logits import ModelLogits, read_model_logits, write_model_logits
from emodistill.metrics import bootstrap_interval, f1_report, micro_f1, paired_bootstrap
from emodistill.thresholds import cross_fit, decide, search_shared_threshold, sigmoid

if TYPE_CHECKING:
    from emodistill.ensemble.combination import Combination
    from emodistill.ensemble.combination import MemberLogits as VariantLogits

__all__ = ["combination_inputs", "combine"]


def combine(run: RunFolder) -> Outcome:
    """Choose weights and thresholds on the out-of-fold rows of the members that are there."""
    from emodistill.ensemble.combination import Combination
    from emodistill.ensemble.referee import render_steps

    plan = Plan.checked(run)
    members = plan.need_members()
    for member in plan.members:
        if member not in members:
            reason = "its variant has no second fold yet" if member.state.is_done else member.state.reason
            say(f"combining without {member.name}: {reason}")
    fingerprint = plan.ensemble_fingerprint(members)
    if not piece_state(run.ensemble_folder, fingerprint).is_done:
        run.save()
        with run.timed("ensemble"):
            _combine(run, members, fingerprint)
    combination = Combination.from_json(read_json(run.ensemble_folder / "combination.json"))
    metrics = read_json(run.ensemble_folder / "metrics.json")
    lines = [render_steps(combination.steps, combination.metric), "", f"rule: {combination.rule}"]
    lines += [f"note: {note}" for note in combination.notes]
    lines += [_score_line(name, report) for name, report in metrics["scores"].items() if report]
    if metrics["gain_over_best_member"]:
        gain = metrics["gain_over_best_member"]
        lines.append(
            f"gain over the best member, {gain['member']}, on out-of-fold rows: {gain['difference']:+.4f} "
            f"({gain['low']:+.4f} to {gain['high']:+.4f})"
        )
    return Outcome("\n".join(lines), {"rule": combination.rule, **metrics})


def combination_inputs(variants: Mapping[str, ModelLogits]) -> "list[VariantLogits]":
    """Say what the variants of a run said, in the words of the ensemble stage."""
    from emodistill.ensemble.combination import MemberLogits as VariantLogits

    return [
        VariantLogits(
            name=name,
            oof=model.oof,
            evaluation=model.averages,
            evaluation_by_fold=model.by_fold,
            folds=model.folds.tolist(),
        )
        for name, model in variants.items()
    ]


def _combine(run: RunFolder, members: Sequence[MemberPlan], fingerprint: str) -> None:
    from emodistill.ensemble import combination as stage
    from emodistill.ensemble.referee import RULES

    data, settings = run.data, run.settings.combine
    variants = variant_logits(run, members)
    inputs = combination_inputs(variants)
    say(f"combining {len(variants)} variants, {len(members)} members, on {len(data.train_texts):,} rows")
    combinations = stage.combine_by_rules(
        inputs,
        data.train_labels,
        run.fold_ids,
        data.label_names,
        rules=tuple(dict.fromkeys((settings.rule, *RULES))),
        metric=settings.metric,
        seed=run.settings.seed,
    )
    combined = combinations[settings.rule]
    evaluations = {
        name: combined.calibrated_logits(combined.apply({v: model.averages[name] for v, model in variants.items()}))
        for name in data.rows
    }
    logits = ModelLogits(
        oof=combined.calibrated_logits(combined.oof_logits),
        fold_ids=run.fold_ids,
        folds=np.unique(run.fold_ids),
        train_rows=data.train_rows,
        rows=data.rows,
        averages=evaluations,
        label_names=data.label_names,
    )
    test_decisions, rule_scores = _by_rule(run, variants, {rule: combinations[rule] for rule in RULES})
    part = start_piece(run.ensemble_folder, fingerprint)
    names = list(data.label_names)
    write_model_logits(part / "oof.npz", logits)
    write_json(part / "combination.json", combined.to_json())
    write_json(
        part / "member_weights.json",
        {
            "rule": combined.rule,
            "label_names": names,
            "space": combined.space,
            "weights": {
                name: dict(zip(names, row, strict=True))
                for name, row in zip(combined.member_names, combined.member_weights.tolist(), strict=True)
            },
        },
    )
    write_json(
        part / "thresholds.json",
        {
            "rule": combined.rule,
            "metric": combined.metric,
            "positive": "where the calibrated probability is at least the threshold",
            "thresholds": dict(zip(names, combined.thresholds.tolist(), strict=True)),
        },
    )
    metrics = _ensemble_metrics(run, combined, variants, read_model_logits(part / "oof.npz"))
    write_json(part / "metrics.json", {**metrics, "dev_by_rule": rule_scores})
    with (part / "cross_fitted.npz").open("wb") as handle:
        np.savez_compressed(handle, rows=combined.cross_fitted_rows, decisions=combined.cross_fitted_decisions)
    with (part / "rules.npz").open("wb") as handle:
        np.savez_compressed(handle, **test_decisions)
    run.publish(
        run.ensemble_folder, fingerprint, {"settings": settings, "members": [member.name for member in members]}
    )


def _by_rule(
    run: RunFolder, variants: Mapping[str, ModelLogits], combinations: "Mapping[str, Combination]"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what each rule decides on test, for its submission, and how it scores on dev, for the table only."""
    data = run.data
    decisions, scores = {}, {}
    for rule, one in combinations.items():
        decided = {
            name: one.decide(one.apply({variant: model.averages[name] for variant, model in variants.items()}))
            for name in ("dev", "test")
            if name in data.rows
        }
        if "test" in decided:
            decisions[rule] = decided["test"]
        if data.dev_labels is not None:
            report = f1_report(data.dev_labels, decided["dev"], data.label_names)
            scores[rule] = {metric: report[metric] for metric in ("micro_f1", "macro_f1")}
    return decisions, scores


def _ensemble_metrics(
    run: RunFolder, combined: "Combination", variants: Mapping[str, ModelLogits], saved: ModelLogits
) -> dict[str, Any]:
    """Score the ensemble on the rows it was not fitted on, and on dev; from the logits as they are saved."""
    data = run.data
    rows, decisions = combined.cross_fitted_rows, combined.cross_fitted_decisions
    has_cross_fit = len(decisions) == len(rows)
    out_of_fold = score(data.train_labels[rows], decisions, data.label_names) if has_cross_fit else None
    dev = None
    if data.dev_labels is not None:
        dev = score(data.dev_labels, decide(sigmoid(saved.averages["dev"]), combined.thresholds), data.label_names)
    gain = _gain_over_best_member(run, combined, variants) if has_cross_fit and len(variants) > 1 else None
    return {"scores": {"out-of-fold": out_of_fold, "dev": dev}, "gain_over_best_member": gain}


def _gain_over_best_member(
    run: RunFolder, combined: "Combination", variants: Mapping[str, ModelLogits]
) -> dict[str, Any] | None:
    """Compare with the variant that scores best with one threshold, chosen for it as for the ensemble."""
    rows = combined.cross_fitted_rows
    truth, folds = run.data.train_labels[rows], run.fold_ids[rows]
    if len(np.unique(folds)) < 2:
        return None
    decisions = {
        name: cross_fit(folds, truth, sigmoid(model.oof[rows]), search_shared_threshold)
        for name, model in variants.items()
    }
    best = max(decisions, key=lambda name: micro_f1(truth, decisions[name]))
    gain = paired_bootstrap(truth, combined.cross_fitted_decisions, decisions[best])
    return {"member": best, "member_micro_f1": micro_f1(truth, decisions[best]), **gain.to_json()}


def score(y_true: np.ndarray[Any, Any], y_pred: np.ndarray[Any, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """Return an F1 report with the 95 % intervals of micro- and macro-F1."""
    report = f1_report(y_true, y_pred, label_names)
    for metric in ("micro_f1", "macro_f1"):
        low, high = bootstrap_interval(y_true, y_pred, metric=metric)
        report[f"{metric}_interval"] = None if np.isnan([low, high]).any() else [low, high]
    return report


def _score_line(name: str, report: Mapping[str, Any]) -> str:
    def show(metric: str) -> str:
        value, interval = report[metric], report[f"{metric}_interval"]
        if value is None:
            return "n/a"
        return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")

    return f"{name}: micro-F1 {show('micro_f1')}, macro-F1 {show('macro_f1')} on {report['n_rows']:,} rows"
