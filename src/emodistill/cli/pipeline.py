"""The stages of a run, one function each: find what is missing or stale, make it, publish it, say what came out.

A stage reads the pieces of the stages before it and writes its own; nothing passes between them in memory, so that a
stage called alone and a stage of a whole run do the same.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import click
import numpy as np

from emodistill.artifacts import part_folder, piece_state, publish_piece, start_piece
from emodistill.cli.planning import MemberPlan, Plan
from emodistill.cli.run_folder import RunFolder
from emodistill.cli.tables import format_table
from emodistill.encoders import resolve_encoder
from emodistill.errors import ArtifactError, EmodistillError, MissingExtraError
from emodistill.logits import (
    MemberLogits,
    ModelLogits,
    fold_mismatch,
    read_member_logits,
    read_model_logits,
    write_member_logits,
)
from emodistill.metrics import micro_f1
from emodistill.progress import Progress, format_duration
from emodistill.thresholds import decide, sigmoid

__all__ = ["Outcome", "describe_plan", "train"]


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
    plan = Plan(run)
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
            say(f"{member.name}: {found.reason}, {'going on' if found.state == 'interrupted' else 'training again'}")
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
