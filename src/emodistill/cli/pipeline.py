"""The stages of a run, one function each: find what is missing or stale, make it, publish it, say what came out.

A stage reads the pieces of the stages before it and writes its own; nothing passes between them in memory, so that a
stage called alone and a stage of a whole run do the same.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
import numpy as np

from emodistill.artifacts import (
    Piece,
    part_folder,
    piece_state,
    publish_piece,
    read_json,
    start_piece,
    write_bytes,
    write_json,
)
from emodistill.cli.planning import MemberPlan, Plan
from emodistill.cli.run_folder import RunFolder
from emodistill.cli.tables import format_table
from emodistill.encoders import resolve_encoder
from emodistill.errors import ArtifactError, ConfigError, EmodistillError, MissingExtraError
from emodistill.logits import (
    MemberLogits,
    ModelLogits,
    fold_mismatch,
    read_member_logits,
    read_model_logits,
    write_member_logits,
    write_model_logits,
)
from emodistill.metrics import bootstrap_interval, f1_report, micro_f1, paired_bootstrap, parse_metric
from emodistill.progress import Progress, format_duration
from emodistill.thresholds import cross_fit, decide, search_shared_threshold, sigmoid

if TYPE_CHECKING:
    from emodistill.distill.students import StudentConfig
    from emodistill.ensemble.combination import Combination
    from emodistill.ensemble.combination import MemberLogits as VariantLogits

__all__ = [
    "Outcome",
    "bench",
    "combine",
    "describe_plan",
    "distill",
    "export",
    "inspect",
    "publish",
    "run_all",
    "submit",
    "train",
]


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say: a table for people, plain values for programs."""

    text: str
    summary: dict[str, Any] = field(default_factory=dict)


def say(sentence: str) -> None:
    """Tell people what happens, beside the results."""
    click.echo(sentence, err=True)


# ---------------------------------------------------------------- what would be done


def describe_plan(
    run: RunFolder, *, stage: str | None = None, only: Sequence[str] = (), folds: Sequence[int] = ()
) -> Outcome:
    """Say what a run consists of, what is there, and about how long the rest takes; change nothing."""
    plan = Plan(run)
    wanted = {member.name for member in plan.select_members(only, folds)}
    rows = [row for row in plan.stages() if (stage is None or row.stage == stage)]
    rows = [row for row in rows if row.stage != "train" or row.name in wanted]
    reusable = _reusable_members(run, plan.select_members(only, folds))
    cells, seconds, unknown = [], 0.0, []
    for row in rows:
        state, reason, cost = row.state, row.reason, row.seconds
        if row.name in reusable and row.state != "done":
            state, reason, cost = "reused", f"from {reusable[row.name]}", 0.0
        if cost is None:
            unknown.append(row.name)
        seconds += cost or 0.0
        cells.append((row.stage, row.name, state, "?" if cost is None else format_duration(cost), reason))
    table = format_table(("stage", "piece", "state", "about", "why"), cells)
    total = f"about {format_duration(seconds)} on two cores" + (
        f", and what is not known yet: {', '.join(unknown)}" if unknown else ""
    )
    summary = {
        "stages": [dict(zip(("stage", "name", "state", "about", "reason"), row, strict=True)) for row in cells],
        "seconds": round(seconds),
        "unknown": unknown,
    }
    return Outcome(f"{table}\n\n{total}", summary)


# ---------------------------------------------------------------- members


def train(run: RunFolder, *, only: Sequence[str] = (), folds: Sequence[int] = ()) -> Outcome:
    """Train the members that are missing, stale or damaged; take those whose saved logits match from elsewhere."""
    plan = _checked_plan(run)
    members = plan.select_members(only, folds)
    run.save()
    _warn_about_folds(run)
    _reuse_members(run, members)
    waiting = [member for member in members if not member.state.is_done]
    if waiting:
        _load_training_libraries()
    for position, member in enumerate(waiting):
        found = member.state
        if found.state != "missing":
            say(f"{member.name}: {found.reason}, {_what_now(found)}")
        say(f"member {position + 1} of {len(waiting)}: {member.name}")
        _train_one(run, member)
    rows = [_member_row(run, member) for member in members]
    header = ("member", "oof micro-F1", "dev micro-F1", "time")
    text = format_table(header, [_text_row(row) for row in rows])
    return Outcome(f"{text}\n(at threshold 0.5)", {"members": rows, "trained": len(waiting)})


def _train_one(run: RunFolder, member: MemberPlan) -> None:
    from emodistill.ensemble.members import train_member

    data = run.data
    encoder_dir = None if member.variant.kind == "tfidf" else resolve_encoder(member.variant.encoder)
    work_dir = start_piece(member.folder, member.fingerprint)
    with run.timed(member.name):
        train_member(
            member.variant,
            member.fold,
            encoder_dir=encoder_dir,
            texts=data.train_texts,
            labels=data.train_labels,
            fold_ids=run.fold_ids,
            label_names=data.label_names,
            evaluation_texts=data.evaluation_texts,
            work_dir=work_dir,
            fingerprint=member.fingerprint,
            progress_factory=Progress,
        )
        _publish(
            member.folder, member.fingerprint, {"variant": member.variant.fingerprint_parts(), "fold": member.fold}
        )


def _publish(folder: Path, fingerprint: str, description: Any) -> None:
    """End mark a piece; the checkpoint that a killed run would have gone on from is not part of it."""
    for checkpoint in part_folder(folder).glob("checkpoint.*"):
        checkpoint.unlink()
    publish_piece(folder, fingerprint, description=description)


def _member_row(run: RunFolder, member: MemberPlan) -> dict[str, Any]:
    logits = read_member_logits(member.folder / "logits.npz")
    truth = run.data.train_labels[logits.valid_rows]
    dev = logits.evaluations.get("dev")
    return {
        "member": member.name,
        "oof_micro_f1": round(_plain_f1(truth, logits.valid), 4),
        "dev_micro_f1": None
        if dev is None or run.data.dev_labels is None
        else round(_plain_f1(run.data.dev_labels, dev), 4),
        "seconds": run.seconds.get(member.name),
    }


def _plain_f1(y_true: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> float:
    return micro_f1(y_true, decide(sigmoid(logits), 0.5))


def _text_row(row: dict[str, Any]) -> tuple[str, ...]:
    def show(value: Any) -> str:
        return "-" if value is None else f"{value:.4f}"

    seconds = row["seconds"]
    time = "reused" if seconds is None else format_duration(seconds)
    return row["member"], show(row["oof_micro_f1"]), show(row["dev_micro_f1"]), time


def _warn_about_folds(run: RunFolder) -> None:
    from emodistill.folds import fold_warnings

    for warning in fold_warnings(run.data.train_labels, run.fold_ids, run.data.label_names):
        say(f"note: {warning}")


def _load_training_libraries() -> None:
    """Load TensorFlow before the work, without its chatter.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    for module in ("tensorflow", "tf_keras", "sklearn", "safetensors"):
        if find_spec(module) is None:
            raise MissingExtraError.for_extra(module, "train")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # a graph per length bucket is meant, and warned about
    with _silent_descriptor(sys.stderr, 2):
        tensorflow = import_module("tensorflow")
        import_module("tf_keras")
        tensorflow.config.list_physical_devices()


@contextmanager
def _silent_descriptor(stream: TextIO, descriptor: int) -> Iterator[None]:
    """Drop what compiled code writes on a descriptor: TensorFlow does so before any of its settings can reach it."""
    stream.flush()
    kept = os.dup(descriptor)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), descriptor)
            try:
                yield
            finally:
                stream.flush()
                os.dup2(kept, descriptor)
    finally:
        os.close(kept)


# ---------------------------------------------------------------- the whole job


def run_all(run: RunFolder) -> Outcome:
    """Do every stage; each does only what is missing or stale."""
    train(run)
    plan = Plan(run)
    combine(run)
    if plan.students:
        distill(run)
        export(run)
    report = bench(run)
    submitted = submit(run)
    shipped = run.settings.shipped_student
    places = {
        "bundle": None if shipped is None else str(run.bundle_folder(shipped)),
        "submission": str(run.path / "submission.zip") if run.data.test is not None else None,
        "report": str(run.report_folder / "index.html"),
    }
    lines = [report.text, "", *(f"{name + ':':<12}{place}" for name, place in places.items() if place)]
    return Outcome("\n".join(lines), {**report.summary, **submitted.summary, **places})


# ---------------------------------------------------------------- the ensemble


def variant_logits(run: RunFolder, members: Sequence[MemberPlan]) -> dict[str, ModelLogits]:
    """Gather the finished members of each variant, by its name, in the order of the settings."""
    by_variant: dict[str, list[MemberPlan]] = {}
    for member in members:
        by_variant.setdefault(member.variant.name, []).append(member)
    return {
        name: ModelLogits.from_members(
            {member.fold: read_member_logits(member.folder / "logits.npz") for member in of_variant},
            fold_ids=run.fold_ids,
            train_rows=run.data.train_rows,
            rows=run.data.rows,
            variant_fingerprint=of_variant[0].variant_fingerprint,
        )
        for name, of_variant in by_variant.items()
    }


def combine(run: RunFolder) -> Outcome:
    """Choose weights and thresholds on the out-of-fold rows of the members that are there."""
    from emodistill.ensemble.combination import Combination
    from emodistill.ensemble.referee import render_steps

    plan = _checked_plan(run)
    members = _finished_members(plan)
    for member in plan.members:
        if member not in members:
            say(f"{member.name} is not there ({member.state.reason}): combining without it")
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


def _combine(run: RunFolder, members: Sequence[MemberPlan], fingerprint: str) -> None:
    from emodistill.ensemble import combination as stage

    data, settings = run.data, run.settings.combine
    variants = variant_logits(run, members)
    inputs = [
        stage.MemberLogits(
            name=name,
            oof=model.oof,
            evaluation=model.averages,
            evaluation_by_fold=model.by_fold,
            folds=model.folds.tolist(),
        )
        for name, model in variants.items()
    ]
    say(f"combining {len(variants)} variants, {len(members)} members, on {len(data.train_texts):,} rows")
    combined = stage.combine(
        inputs,
        data.train_labels,
        run.fold_ids,
        data.label_names,
        rule=settings.rule,
        metric=settings.metric,
        seed=run.settings.seed,
    )
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
    test_decisions, rule_scores = _by_rule(run, inputs, variants, combined)
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
    with (part / "rules.npz").open("wb") as handle:
        np.savez_compressed(handle, **test_decisions)
    _publish(run.ensemble_folder, fingerprint, {"settings": settings, "members": [member.name for member in members]})


def _by_rule(
    run: RunFolder,
    inputs: "Sequence[VariantLogits]",
    variants: Mapping[str, ModelLogits],
    combined: "Combination",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what each rule decides on test, for its submission, and how it scores on dev, for the table only."""
    from emodistill.ensemble.combination import combine as combine_by
    from emodistill.ensemble.referee import RULES

    data, settings = run.data, run.settings
    decisions, scores = {}, {}
    with Progress("combining by each rule", len(RULES), "rules") as progress:
        for rule in RULES:
            one = combined
            if rule != combined.rule:
                one = combine_by(
                    inputs,
                    data.train_labels,
                    run.fold_ids,
                    data.label_names,
                    rule=rule,
                    metric=settings.combine.metric,
                    seed=settings.seed,
                )
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
            progress.advance()
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


def _checked_plan(run: RunFolder) -> Plan:
    """Return the plan of a run whose settings fit its data."""
    plan = Plan(run)
    parse_metric(run.settings.combine.metric, run.data.label_names)
    if run.settings.combine.rule != "auto":
        from emodistill.ensemble.referee import RULES

        if run.settings.combine.rule not in RULES:
            raise ConfigError(f"rule '{run.settings.combine.rule}' is unknown: choose auto, {', '.join(RULES)}")
    assert plan.variants is not None
    assert plan.students is not None
    return plan


def _finished_members(plan: Plan) -> list[MemberPlan]:
    members = plan.finished_members
    if not members:
        raise ArtifactError(f"{plan.run.path} has no finished member: run  emodistill train {plan.run.path}  first")
    return members


# ---------------------------------------------------------------- students


def distill(run: RunFolder, *, only: Sequence[str] = ()) -> Outcome:
    """Train the students that are missing or stale on what the ensemble says."""
    from emodistill.distill.students import train_student

    plan = _checked_plan(run)
    ensemble = _need_ensemble(plan)
    teacher = read_model_logits(run.ensemble_folder / "oof.npz")
    n_unknown = int((~np.isfinite(teacher.oof)).any(axis=1).sum())
    if n_unknown:
        raise ArtifactError(
            f"{n_unknown:,} train rows have no out-of-fold prediction, so no soft targets: "
            f"train at least one variant on all folds with  emodistill train {run.path}"
        )
    data, rows = run.data, []
    for student in _select_students(plan, only):
        fingerprint = plan.student_fingerprint(student, ensemble)
        folder = run.student_folder(student.name)
        found = piece_state(folder, fingerprint)
        if not found.is_done:
            if found.state != "missing":
                say(f"student {student.name}: {found.reason}, {_what_now(found)}")
            _load_training_libraries()
            run.save()
            encoder_dir = resolve_encoder(student.encoder)
            work_dir = start_piece(folder, fingerprint)
            with run.timed(f"student {student.name}"):
                train_student(
                    student,
                    encoder_dir=encoder_dir,
                    texts=data.train_texts,
                    hard_targets=data.train_labels,
                    soft_logits=teacher.oof,
                    transfer_texts=data.evaluation_texts.get("unlabeled", []),
                    transfer_logits=teacher.averages.get("unlabeled", teacher.oof[:0]),
                    label_names=data.label_names,
                    evaluation_texts=data.evaluation_texts,
                    work_dir=work_dir,
                    fingerprint=fingerprint,
                    progress_factory=Progress,
                )
                _publish(folder, fingerprint, {"student": student.fingerprint_parts()})
        rows.append(_student_row(run, student.name))
    header = ("student", "held-out micro-F1", "dev micro-F1", "time")
    cells = [
        (
            row["student"],
            f"{row['held_out_micro_f1']:.4f}",
            "-" if row["dev_micro_f1"] is None else f"{row['dev_micro_f1']:.4f}",
            format_duration(row["seconds"] or 0.0),
        )
        for row in rows
    ]
    return Outcome(f"{format_table(header, cells)}\n(at threshold 0.5)", {"students": rows})


def _student_row(run: RunFolder, student: str) -> dict[str, Any]:
    with np.load(run.student_folder(student) / "logits.npz", allow_pickle=False) as saved:
        held_out = _plain_f1(run.data.train_labels[saved["held_out_rows"]], saved["held_out"])
        dev = None if run.data.dev_labels is None else _plain_f1(run.data.dev_labels, saved["dev"])
    return {
        "student": student,
        "held_out_micro_f1": round(held_out, 4),
        "dev_micro_f1": None if dev is None else round(dev, 4),
        "seconds": run.seconds.get(f"student {student}"),
    }


def _select_students(plan: Plan, only: Sequence[str]) -> "list[StudentConfig]":
    names = plan.run.settings.student_names
    if not names:
        raise ConfigError('this run has no students: add a [[students]] table, for example with  name = "tiny"')
    for name in only:
        if name not in names:
            raise ConfigError(f"student '{name}' is unknown: this run has {', '.join(names)}")
    return [student for student in plan.students if not only or student.name in only]


def _need_ensemble(plan: Plan) -> str:
    """Return the fingerprint of the ensemble that is there; refuse a stale one."""
    fingerprint = plan.ensemble_fingerprint(_finished_members(plan))
    found = piece_state(plan.run.ensemble_folder, fingerprint)
    if not found.is_done:
        raise ArtifactError(
            f"the ensemble of {plan.run.path} is {found.state} ({found.reason}): "
            f"run  emodistill combine {plan.run.path}  first"
        )
    return fingerprint


def _what_now(found: Piece) -> str:
    return "going on" if found.state == "interrupted" else "training again"


# ---------------------------------------------------------------- bundles


def export(run: RunFolder, *, only: Sequence[str] = ()) -> Outcome:
    """Write the bundles that are missing or stale."""
    plan = _checked_plan(run)
    ensemble = _need_ensemble(plan)
    rows = []
    for student in _select_students(plan, only):
        own = plan.student_fingerprint(student, ensemble)
        checkpoint = run.student_folder(student.name)
        if not (found := piece_state(checkpoint, own)).is_done:
            raise ArtifactError(
                f"student {student.name} is {found.state} ({found.reason}): run  emodistill distill {run.path}  first"
            )
        fingerprint = plan.bundle_fingerprint(own)
        folder = run.bundle_folder(student.name)
        if not piece_state(folder, fingerprint).is_done:
            _load_training_libraries()
            run.save()
            with run.timed(f"bundle {student.name}"):
                _export(run, student.name, fingerprint)
        report = read_json(folder / "verification.json")
        for name, entry in report["graphs"].items():
            rows.append(
                {
                    "student": student.name,
                    "graph": name,
                    "precision": entry["precision"],
                    "is_default": name == report["default_graph"],
                    "size_bytes": entry["size_bytes"],
                    "micro_f1": entry.get("micro_f1"),
                    "p50_ms": entry["latency"]["p50_ms"],
                    "failed": entry["failed"],
                }
            )
    header = ("student", "graph", "precision", "MB", "held-out micro-F1", "ms", "verdict")
    cells = [
        (
            row["student"],
            row["graph"],
            row["precision"],
            f"{row['size_bytes'] / 1e6:.1f}",
            "-" if row["micro_f1"] is None else f"{row['micro_f1']:.4f}",
            f"{row['p50_ms']:.2f}",
            "; ".join(row["failed"]) or ("default" if row["is_default"] else "passed"),
        )
        for row in rows
    ]
    return Outcome(format_table(header, cells), {"graphs": rows})


def _export(run: RunFolder, student: str, fingerprint: str) -> None:
    from emodistill.export.bundle import ExportSettings, write_bundle
    from emodistill.export.portable import LATEST_TESTED_OPSET
    from emodistill.export.verification import VerificationLimits

    data, settings = run.data, run.settings.export
    checkpoint = run.student_folder(student)
    with np.load(checkpoint / "logits.npz", allow_pickle=False) as saved:
        held_out = saved["held_out_rows"]
    folder = run.bundle_folder(student)
    part = start_piece(folder, fingerprint)
    write_bundle(
        checkpoint,
        part,
        held_out_texts=[data.train_texts[row] for row in held_out],
        held_out_labels=data.train_labels[held_out],
        settings=ExportSettings(
            fast_precisions=settings.fast_precisions,
            weight_bits=settings.weight_bits,
            shared_threshold=settings.shared_threshold,
            verify_cpu=settings.verify_cpu,
            limits=VerificationLimits(micro_f1_loss=settings.max_f1_loss),
            opset=settings.opset or LATEST_TESTED_OPSET,
        ),
        card=_card(run, student),
        say=lambda sentence: say(f"bundle {student}: {sentence}"),
    )
    _publish(folder, fingerprint, {"settings": settings})


def _card(run: RunFolder, student: str) -> dict[str, str]:
    data = run.data
    members = read_json(run.ensemble_folder / "combination.json")["member_names"]
    n_unlabeled = len(data.evaluation_texts.get("unlabeled", []))
    extra = f", and {n_unlabeled:,} unlabeled texts" if n_unlabeled else ""
    return {
        "title": f"{run.path.resolve().name}: {student}",
        "Data": f"Trained on {len(data.train_texts):,} labelled texts of {run.paths.train.name}{extra}. "
        "Scores above are on a tenth of them that the student never saw.",
        "Training": f"Distilled by emodistill from an ensemble of {len(members)} variants ({', '.join(members)}), "
        "whose predictions on the train texts are out-of-fold.",
        "Licence": "The weights derive from the pretrained encoder and the data named here: their licences apply.",
    }


# ---------------------------------------------------------------- results


def bench(run: RunFolder) -> Outcome:
    """Measure every model and write the trade-off report."""
    from emodistill.cli.results import write_report

    plan = _checked_plan(run)
    ensemble, bundles = _save_logits(plan)
    fingerprint = plan.report_fingerprint(ensemble, list(bundles.values()))
    if not piece_state(run.report_folder, fingerprint).is_done:
        run.save()
        with run.timed("report"):
            start_piece(run.report_folder, fingerprint)
            write_report(plan, list(bundles), part_folder(run.report_folder), say)
            _publish(run.report_folder, fingerprint, {"settings": run.settings.bench})
    report = read_json(run.report_folder / "tradeoff.json")
    text = (run.report_folder / "table.txt").read_text(encoding="utf-8").rstrip("\n")
    return Outcome(text, {"scored_on": report["scored_on"], "models": report["models"]})


def submit(run: RunFolder) -> Outcome:
    """Write every model's logits, one submission per model, and submission.zip."""
    from emodistill.cli.results import write_submissions

    plan = _checked_plan(run)
    ensemble, bundles = _save_logits(plan)
    fingerprint = plan.submissions_fingerprint(ensemble, list(bundles.values()))
    if run.data.test is None:
        return Outcome("no test file was given: no submission", {"submissions": []})
    if not piece_state(run.submissions_folder, fingerprint).is_done:
        write_submissions(plan, list(bundles), start_piece(run.submissions_folder, fingerprint))
        _publish(run.submissions_folder, fingerprint, None)
    write_bytes(run.path / "submission.zip", (run.submissions_folder / "ensemble.zip").read_bytes())
    names = sorted(path.name for path in run.submissions_folder.glob("*.zip"))
    text = f"{run.path / 'submission.zip'} (the ensemble's)\n{run.submissions_folder}: {', '.join(names)}"
    return Outcome(text, {"submissions": names})


def publish(run: RunFolder, *, target: Path) -> Outcome:
    """Copy what is small and worth keeping."""
    from emodistill.cli.results import copy_results

    files = copy_results(Plan(run), target)
    total = sum(path.stat().st_size for path in files)
    return Outcome(
        f"{target}: {len(files)} files, {total / 1e6:.1f} MB",
        {"files": [path.relative_to(target).as_posix() for path in files], "size_bytes": total},
    )


def inspect(run: RunFolder) -> Outcome:
    """Look into the members' out-of-fold predictions."""
    from emodistill.ensemble import inspection

    plan = _checked_plan(run)
    raise NotImplementedError(inspection, plan)


def _save_logits(plan: Plan) -> tuple[str, dict[str, str]]:
    """Write every model's logits if they are missing or stale; return ensemble and bundles, by their fingerprints."""
    from emodistill.cli.results import write_logits

    run, ensemble, bundles = plan.run, _need_ensemble(plan), _finished_bundles(plan)
    fingerprint = plan.logits_fingerprint(ensemble, list(bundles.values()))
    if not piece_state(run.logits_folder, fingerprint).is_done:
        run.save()
        write_logits(plan, list(bundles), start_piece(run.logits_folder, fingerprint), say)
        _publish(run.logits_folder, fingerprint, None)
    return ensemble, bundles


def _finished_bundles(plan: Plan) -> dict[str, str]:
    """Return name and fingerprint of the bundles that are there, whole and fresh; say which are not."""
    ensemble = _need_ensemble(plan)
    finished = {}
    for student in plan.students:
        fingerprint = plan.bundle_fingerprint(plan.student_fingerprint(student, ensemble))
        found = piece_state(plan.run.bundle_folder(student.name), fingerprint)
        if found.is_done:
            finished[student.name] = fingerprint
        else:
            say(f"bundle {student.name} is {found.state} ({found.reason}): going on without it")
    return finished


# ---------------------------------------------------------------- members from elsewhere


def _reuse_members(run: RunFolder, members: Sequence[MemberPlan]) -> None:
    """Publish the saved logits of members that match; say which were taken, and why the others were not."""
    missing = [member for member in members if not member.state.is_done]
    if not run.reuse_folders or not missing:
        return
    sources = [_ReuseSource(folder) for folder in run.reuse_folders]
    for member in missing:
        reasons = []
        for source in sources:
            logits, reason = source.find(run, member)
            if logits is not None:
                part = start_piece(member.folder, member.fingerprint)
                for left in part.glob("checkpoint.*"):
                    left.unlink()
                write_member_logits(part / "logits.npz", logits)
                publish_piece(member.folder, member.fingerprint, description={"reused_from": source.folder.name})
                say(f"{member.name}: reused from {source.folder}")
                break
            reasons.append(f"{source.folder}: {reason}")
        else:
            say(f"{member.name}: not reused ({'; '.join(reasons)})")


def _reusable_members(run: RunFolder, members: Sequence[MemberPlan]) -> dict[str, Path]:
    sources = [_ReuseSource(folder) for folder in run.reuse_folders]
    found = {}
    for member in members:
        for source in sources:
            if source.find(run, member)[0] is not None:
                found[member.name] = source.folder
                break
    return found


class _ReuseSource:
    """A results folder (logits/VARIANT.npz) or another run folder (members/VARIANT-foldK/)."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "logits").is_dir() and not (folder / "members").is_dir():
            raise ArtifactError(
                f"--reuse {folder} has neither a folder 'logits' nor a folder 'members': "
                "give a results folder or a run folder"
            )
        self.folder = folder
        self._models: dict[str, ModelLogits | str] = {}

    def find(self, run: RunFolder, member: MemberPlan) -> tuple[MemberLogits | None, str]:
        """Return what stands for a member, or None and why not."""
        twin = self.folder / "members" / member.folder.name
        if piece_state(twin, member.fingerprint).is_done:
            return read_member_logits(twin / "logits.npz"), ""
        model = self._model(member.variant.name)
        if isinstance(model, str):
            return None, model
        data = run.data
        reason = fold_mismatch(
            model,
            member.fold,
            variant_fingerprint=member.variant_fingerprint,
            label_names=data.label_names,
            fold_ids=run.fold_ids,
            train_rows=data.train_rows,
            rows=data.rows,
        )
        if reason:
            return None, reason
        found = model.member(member.fold)
        wanted = {name: found.evaluations[name] for name in data.rows}
        return (
            MemberLogits(
                valid_rows=found.valid_rows, valid=found.valid, evaluations=wanted, label_names=found.label_names
            ),
            "",
        )

    def _model(self, variant: str) -> ModelLogits | str:
        if variant not in self._models:
            path = self.folder / "logits" / f"{variant}.npz"
            try:
                self._models[variant] = read_model_logits(path) if path.is_file() else f"it has no {path.name}"
            except EmodistillError as error:
                self._models[variant] = str(error)
        return self._models[variant]
