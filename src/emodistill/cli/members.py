"""The stage `train`: members that are missing, stale or damaged are trained, or taken from saved logits that match."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emodistill.artifacts import piece_state, start_piece
from emodistill.cli.console import Outcome, load_training_libraries, say, what_now
from emodistill.cli.planning import MemberPlan, Plan
from emodistill.cli.run_folder import RunFolder
from emodistill.cli.side_by_side import (
    WORTH_A_PROCESS_S,
    gpu_free_bytes,
    memory_need_bytes,
    processes_for,
    train_side_by_side,
)
from emodistill.cli.tables import format_table
from emodistill.encoders import resolve_encoder
from emodistill.errors import ArtifactError, EmodistillError
from emodistill.logits import (
    MemberLogits,
    ModelLogits,
    fold_mismatch,
    read_member_logits,
    read_model_logits,
    write_member_logits,
)
from emodistill.metrics import micro_f1
from emodistill.progress import Progress, ProgressFactory, format_duration
from emodistill.thresholds import decide, sigmoid

if TYPE_CHECKING:
    from emodistill.ensemble.variants import VariantConfig

__all__ = ["plain_f1", "reusable_members", "train", "variant_logits"]

EMBEDDINGS_NAME = "embeddings.npz"


def train(run: RunFolder, *, only: Sequence[str] = (), folds: Sequence[int] = ()) -> Outcome:
    """Train the members that are missing, stale or damaged; take those whose saved logits match from elsewhere."""
    plan = Plan.checked(run)
    members = plan.select_members(only, folds)
    run.save()
    _warn_about_folds(run)
    _reuse_members(run, members)
    waiting = [member for member in members if not member.state.is_done]
    if waiting:
        load_training_libraries()
    for member in waiting:
        if member.state.state != "missing":
            say(f"{member.name}: {member.state.reason}, {what_now(member.state)}")
    for variant in {
        member.variant.name: member.variant for member in waiting if member.variant.kind == "head"
    }.values():
        _embed(run, plan, variant)
    n_processes = _n_processes(run, plan, waiting)
    if n_processes > 1:
        say(f"{len(waiting)} members to train, {n_processes} side by side")
        train_side_by_side([m.name for m in waiting], n_processes, partial(_train_in_process, run.path), run.timed)
    else:
        for position, member in enumerate(waiting):
            say(f"member {position + 1} of {len(waiting)}: {member.name}")
            with run.timed(member.name):
                _train_one(run, member)
    rows = [_member_row(run, member) for member in members]
    header = ("member", "oof micro-F1", "dev micro-F1", "time")
    text = format_table(header, [_text_row(row) for row in rows])
    return Outcome(f"{text}\n(at threshold 0.5)", {"members": rows, "trained": len(waiting)})


def _n_processes(run: RunFolder, plan: Plan, members: Sequence[MemberPlan]) -> int:
    """Return how many members to train at a time: the setting, or what cores and memory allow."""
    wanted = run.settings.training_processes
    if wanted is not None:
        return min(wanted, len(members))
    import tensorflow as tf

    long_ones = [m for m in members if (plan.member_seconds(m) or 0.0) > WORTH_A_PROCESS_S]
    if len(long_ones) < 2:
        return 1
    needs = [memory_need_bytes(m.variant.encoder if m.variant.kind == "encoder" else "") for m in members]
    n_processes = processes_for(needs)
    if tf.config.list_physical_devices("GPU"):
        n_processes = min(n_processes, processes_for(needs, available_bytes=gpu_free_bytes()))
    return n_processes


def _train_in_process(run_path: Path, name: str) -> None:
    """Train one member in a process of its own; run.json is left to the process that started this one."""
    run = RunFolder.open(run_path)
    member = next(member for member in Plan.checked(run).members if member.name == name)
    load_training_libraries()
    _train_one(run, member, partial(Progress, in_place=False))


def _embed(run: RunFolder, plan: Plan, variant: "VariantConfig") -> None:
    """Embed all texts for the members of a variant, unless that is done: as float16, a third of a gigabyte at most."""
    from emodistill.ensemble.members import embed_member_texts

    piece = plan.embeddings_of(variant)
    if piece_state(piece.folder, piece.fingerprint).is_done:
        return
    say(f"{variant.name}: embedding all texts with {variant.encoder}, once for all folds")
    data = run.data
    with run.timed(f"embeddings {variant.name}"):
        part = start_piece(piece.folder, piece.fingerprint)
        found = embed_member_texts(variant, resolve_encoder(variant.encoder), data.train_texts, data.evaluation_texts)
        with (part / EMBEDDINGS_NAME).open("wb") as handle:
            np.savez(handle, **{name: values.astype(np.float16) for name, values in found.items()})  # type: ignore[arg-type]
        run.publish(piece.folder, piece.fingerprint, {"encoder": variant.encoder})


def _train_one(run: RunFolder, member: MemberPlan, progress_factory: ProgressFactory = Progress) -> None:
    from emodistill.ensemble.members import train_member

    data = run.data
    encoder_dir = resolve_encoder(member.variant.encoder) if member.variant.kind == "encoder" else None
    embeddings = None
    if member.variant.kind == "head":
        piece = Plan(run).embeddings_of(member.variant)
        with np.load(piece.folder / EMBEDDINGS_NAME, allow_pickle=False) as saved:
            embeddings = {name: saved[name].astype(np.float32) for name in saved.files}
    work_dir = start_piece(member.folder, member.fingerprint)
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
        embeddings=embeddings,
        progress_factory=progress_factory,
    )
    run.publish(member.folder, member.fingerprint, {"variant": member.variant.fingerprint_parts(), "fold": member.fold})


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


def _member_row(run: RunFolder, member: MemberPlan) -> dict[str, Any]:
    logits = read_member_logits(member.folder / "logits.npz")
    truth = run.data.train_labels[logits.valid_rows]
    dev = logits.evaluations.get("dev")
    return {
        "member": member.name,
        "oof_micro_f1": round(plain_f1(truth, logits.valid), 4),
        "dev_micro_f1": None
        if dev is None or run.data.dev_labels is None
        else round(plain_f1(run.data.dev_labels, dev), 4),
        "seconds": run.seconds.get(member.name),
    }


def plain_f1(y_true: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> float:
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
                write_member_logits(part / "logits.npz", logits)
                run.publish(member.folder, member.fingerprint, {"reused_from": source.folder.name})
                say(f"{member.name}: reused from {source.folder}")
                break
            reasons.append(f"{source.folder}: {reason}")
        else:
            say(f"{member.name}: not reused ({'; '.join(reasons)})")


def reusable_members(run: RunFolder, members: Sequence[MemberPlan]) -> dict[str, Path]:
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
