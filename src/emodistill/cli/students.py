"""The stages `distill` and `export`: students that answer like the ensemble, and their bundles."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emodistill.artifacts import piece_state, read_json, start_piece
from emodistill.cli.console import Outcome, load_training_libraries, say, what_now
from emodistill.cli.members import plain_f1
from emodistill.cli.planning import Plan
from emodistill.cli.run_folder import RunFolder
from emodistill.cli.tables import format_table
from emodistill.encoders import resolve_encoder
from emodistill.errors import ArtifactError, ConfigError, InputError
from emodistill.logits import read_model_logits
from emodistill.progress import Progress, format_duration
from emodistill.teacher import read_teacher_logits

if TYPE_CHECKING:
    from emodistill.distill.students import StudentConfig

__all__ = ["distill", "export"]

ENSEMBLE_TEACHER = "ensemble"  # what --teacher-logits says to go back to the run's own


@dataclass(frozen=True, kw_only=True)
class _Teacher:
    """What the students of a run learn from.

    Attributes
    ----------
    fingerprint : str
    soft_logits : float32 array of shape (n_train, n_labels)
    transfer_texts : list of str
    transfer_logits : float32 array of shape (n_transfer, n_labels)
    """

    fingerprint: str
    soft_logits: NDArray[np.float32]
    transfer_texts: list[str]
    transfer_logits: NDArray[np.float32]


def distill(
    run: RunFolder, *, only: Sequence[str] = (), teacher_logits: str | None = None, teacher_scale: str | None = None
) -> Outcome:
    """Train the students that are missing or stale on what the ensemble, or a file of logits, says."""
    from emodistill.distill.students import train_student

    plan = Plan.checked(run)
    if teacher_logits is not None:
        run.teacher_file = None if teacher_logits == ENSEMBLE_TEACHER else (Path(teacher_logits), teacher_scale)
    teacher = _ensemble_teacher(plan) if run.teacher_file is None else _file_teacher(plan, *run.teacher_file)
    data, rows = run.data, []
    for student in select_students(plan, only):
        fingerprint = plan.student_fingerprint(student, teacher.fingerprint)
        folder = run.student_folder(student.name)
        found = piece_state(folder, fingerprint)
        if not found.is_done:
            if found.state != "missing":
                say(f"student {student.name}: {found.reason}, {what_now(found)}")
            load_training_libraries()
            run.save()
            encoder_dir = resolve_encoder(student.encoder)
            work_dir = start_piece(folder, fingerprint)
            with run.timed(f"student {student.name}"):
                train_student(
                    student,
                    encoder_dir=encoder_dir,
                    texts=data.train_texts,
                    hard_targets=data.train_labels,
                    soft_logits=teacher.soft_logits,
                    transfer_texts=teacher.transfer_texts,
                    transfer_logits=teacher.transfer_logits,
                    label_names=data.label_names,
                    evaluation_texts=data.evaluation_texts,
                    work_dir=work_dir,
                    fingerprint=fingerprint,
                    progress_factory=Progress,
                )
                run.publish(folder, fingerprint, {"student": student.fingerprint_parts()})
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


def _ensemble_teacher(plan: Plan) -> _Teacher:
    run, found = plan.run, plan.need_ensemble()
    ensemble = read_model_logits(run.ensemble_folder / "oof.npz")
    n_unknown = int((~np.isfinite(ensemble.oof)).any(axis=1).sum())
    if n_unknown:
        raise ArtifactError(
            f"{n_unknown:,} train rows have no out-of-fold prediction, so no soft targets: "
            f"train at least one variant on all folds with  emodistill train {run.path}"
        )
    return _Teacher(
        fingerprint=found,
        soft_logits=ensemble.oof,
        transfer_texts=run.data.evaluation_texts.get("unlabeled", []),
        transfer_logits=ensemble.averages.get("unlabeled", ensemble.oof[:0]),
    )


def _file_teacher(plan: Plan, path: Path, scale: str | None) -> _Teacher:
    """Match a file's rows with those of train, all of which it must know, and of unlabeled."""
    data = plan.run.data
    logits = read_teacher_logits(path, data.label_names, scale=scale)
    texts = {"train": data.train_texts, "unlabeled": data.evaluation_texts.get("unlabeled", [])}
    if logits.key == "id" and "train" not in data.ids:
        raise InputError(
            f"{path} names its rows by id, but {plan.run.paths.train.name} has no column 'id': add one there, or "
            "name the rows by 'text'"
        )
    names = texts if logits.key == "text" else {"unlabeled": [], **data.ids}
    known, soft = logits.of(names["train"])
    if not known.all():
        first = int(np.argmin(known))
        raise InputError(
            f"{path} knows {int(known.sum()):,} of the {len(known):,} train rows; the first that it lacks is row "
            f"{first + 1}, {logits.key} '{names['train'][first][:60]}': add them (out-of-fold, so that the student "
            "learns what the teacher says about texts it never saw)"
        )
    also_known, transfer = logits.of(names["unlabeled"])
    transfer_texts = [texts["unlabeled"][row] for row in np.flatnonzero(also_known)]
    say(f"teacher: {path.name}, {len(soft):,} train rows and {len(transfer):,} of unlabeled text")
    return _Teacher(
        fingerprint=plan.need_teacher(), soft_logits=soft, transfer_texts=transfer_texts, transfer_logits=transfer
    )


def _student_row(run: RunFolder, student: str) -> dict[str, Any]:
    with np.load(run.student_folder(student) / "logits.npz", allow_pickle=False) as saved:
        held_out = plain_f1(run.data.train_labels[saved["held_out_rows"]], saved["held_out"])
        dev = None if run.data.dev_labels is None else plain_f1(run.data.dev_labels, saved["dev"])
    return {
        "student": student,
        "held_out_micro_f1": round(held_out, 4),
        "dev_micro_f1": None if dev is None else round(dev, 4),
        "seconds": run.seconds.get(f"student {student}"),
    }


def select_students(plan: Plan, only: Sequence[str]) -> "list[StudentConfig]":
    names = plan.run.settings.student_names
    if not names:
        raise ConfigError('this run has no students: add a [[students]] table, for example with  name = "tiny"')
    for name in only:
        if name not in names:
            raise ConfigError(f"student '{name}' is unknown: this run has {', '.join(names)}")
    return [student for student in plan.students if not only or student.name in only]


# ---------------------------------------------------------------- bundles


def export(run: RunFolder, *, only: Sequence[str] = ()) -> Outcome:
    """Write the bundles that are missing or stale."""
    plan = Plan.checked(run)
    teacher = plan.need_teacher()
    rows = []
    for student in select_students(plan, only):
        own = plan.student_fingerprint(student, teacher)
        checkpoint = run.student_folder(student.name)
        if not (found := piece_state(checkpoint, own)).is_done:
            raise ArtifactError(
                f"student {student.name} is {found.state} ({found.reason}): run  emodistill distill {run.path}  first"
            )
        fingerprint = plan.bundle_fingerprint(own)
        folder = run.bundle_folder(student.name)
        if not piece_state(folder, fingerprint).is_done:
            load_training_libraries()
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
    run.publish(folder, fingerprint, {"settings": settings})


def _card(run: RunFolder, student: str) -> dict[str, str]:
    data = run.data
    if run.teacher_file is None:
        members = read_json(run.ensemble_folder / "combination.json")["member_names"]
        taught = f"an ensemble of {len(members)} variants ({', '.join(members)}), whose predictions on the train texts "
        taught += "are out-of-fold"
    else:
        taught = f"the logits in {run.teacher_file[0].name}"
    n_unlabeled = len(data.evaluation_texts.get("unlabeled", []))
    extra = f", and {n_unlabeled:,} unlabeled texts" if n_unlabeled else ""
    return {
        "title": f"{run.path.resolve().name}: {student}",
        "Data": f"Trained on {len(data.train_texts):,} labelled texts of {run.paths.train.name}{extra}. "
        "Scores above are on a tenth of them that the student never saw.",
        "Training": f"Distilled by emodistill from {taught}.",
        "Licence": "The weights derive from the pretrained encoder and the data named here: their licences apply.",
    }
