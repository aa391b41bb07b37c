"""The stages of a run: each finds what is missing or stale, makes it, publishes it, and says what came out.

A stage reads the pieces of the stages before it and writes its own; nothing passes between them in memory, so that a
stage called alone and a stage of a whole run do the same.
"""

from collections.abc import Sequence
from pathlib import Path

from emodistill.artifacts import part_folder, piece_state, read_json, start_piece, write_bytes
from emodistill.cli.combining import combination_inputs, combine
from emodistill.cli.console import Outcome, say
from emodistill.cli.members import reusable_members, train, variant_logits
from emodistill.cli.planning import Plan
from emodistill.cli.results import copy_results, copy_students, write_logits, write_report, write_submissions
from emodistill.cli.run_folder import RunFolder
from emodistill.cli.students import distill, export
from emodistill.cli.tables import format_table
from emodistill.progress import format_duration

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


def describe_plan(
    run: RunFolder, *, stage: str | None = None, only: Sequence[str] = (), folds: Sequence[int] = ()
) -> Outcome:
    """Say what a run consists of, what is there, and about how long the rest takes; change nothing."""
    plan = Plan(run)
    wanted = {member.name for member in plan.select_members(only, folds)}
    rows = [row for row in plan.stages() if (stage is None or row.stage == stage)]
    rows = [row for row in rows if row.stage != "train" or row.name in wanted]
    reusable = reusable_members(run, plan.select_members(only, folds))
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


def bench(run: RunFolder) -> Outcome:
    """Measure every model and write the trade-off report."""
    plan = Plan.checked(run)
    ensemble, bundles = _save_logits(plan)
    fingerprint = plan.report_fingerprint(ensemble, list(bundles.values()))
    if not piece_state(run.report_folder, fingerprint).is_done:
        run.save()
        with run.timed("report"):
            start_piece(run.report_folder, fingerprint)
            write_report(plan, list(bundles), part_folder(run.report_folder), say)
            run.publish(run.report_folder, fingerprint, {"settings": run.settings.bench})
    report = read_json(run.report_folder / "tradeoff.json")
    text = (run.report_folder / "table.txt").read_text(encoding="utf-8").rstrip("\n")
    return Outcome(text, {"scored_on": report["scored_on"], "models": report["models"]})


def submit(run: RunFolder) -> Outcome:
    """Write every model's logits, one submission per model, and submission.zip."""
    plan = Plan.checked(run)
    ensemble, bundles = _save_logits(plan)
    fingerprint = plan.submissions_fingerprint(ensemble, list(bundles.values()))
    if run.data.test is None:
        return Outcome("no test file was given: no submission", {"submissions": []})
    if not piece_state(run.submissions_folder, fingerprint).is_done:
        write_submissions(plan, list(bundles), start_piece(run.submissions_folder, fingerprint))
        run.publish(run.submissions_folder, fingerprint, None)
    write_bytes(run.path / "submission.zip", (run.submissions_folder / "ensemble.zip").read_bytes())
    names = sorted(path.name for path in run.submissions_folder.glob("*.zip"))
    text = f"{run.path / 'submission.zip'} (the ensemble's)\n{run.submissions_folder}: {', '.join(names)}"
    return Outcome(text, {"submissions": names})


def publish(run: RunFolder, *, target: Path, students: Path | None = None) -> Outcome:
    """Copy what is small and worth keeping, and to another folder the students with their weights."""
    plan = Plan(run)
    copied = {target: copy_results(plan, target)}
    if students is not None:
        copied[students] = copy_students(plan, students)
    sizes = {folder: sum(path.stat().st_size for path in files) for folder, files in copied.items()}
    return Outcome(
        "\n".join(f"{folder}: {len(files)} files, {sizes[folder] / 1e6:.1f} MB" for folder, files in copied.items()),
        {
            "files": [path.relative_to(folder).as_posix() for folder, files in copied.items() for path in files],
            "size_bytes": sum(sizes.values()),
        },
    )


def inspect(run: RunFolder) -> Outcome:
    """Look into the members' out-of-fold predictions."""
    from emodistill.ensemble.combination import Combination
    from emodistill.ensemble.inspection import inspect_ensemble, render_text

    plan = Plan.checked(run)
    plan.need_ensemble()
    report = inspect_ensemble(
        combination_inputs(variant_logits(run, plan.combined_members)),
        run.data.train_labels,
        run.fold_ids,
        Combination.from_json(read_json(run.ensemble_folder / "combination.json")),
        texts=run.data.train_texts,
        seed=run.settings.seed,
    )
    return Outcome(render_text(report).rstrip("\n"), report)


def _save_logits(plan: Plan) -> tuple[str, dict[str, str]]:
    """Write every model's logits if they are missing or stale; return ensemble and bundles, by their fingerprints."""
    run, ensemble, bundles = plan.run, plan.need_ensemble(), _finished_bundles(plan)
    fingerprint = plan.logits_fingerprint(ensemble, list(bundles.values()))
    if not piece_state(run.logits_folder, fingerprint).is_done:
        run.save()
        write_logits(plan, list(bundles), start_piece(run.logits_folder, fingerprint), say)
        run.publish(run.logits_folder, fingerprint, None)
    return ensemble, bundles


def _finished_bundles(plan: Plan) -> dict[str, str]:
    """Return name and fingerprint of the bundles that are there, whole and fresh; say which are not."""
    teacher = plan.need_teacher()
    finished = {}
    for student in plan.students:
        fingerprint = plan.bundle_fingerprint(plan.student_fingerprint(student, teacher))
        found = piece_state(plan.run.bundle_folder(student.name), fingerprint)
        if found.is_done:
            finished[student.name] = fingerprint
        else:
            say(f"bundle {student.name} is {found.state} ({found.reason}): going on without it")
    return finished
