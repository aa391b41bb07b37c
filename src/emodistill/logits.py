"""Saved predictions: the logits of a member or a model as npz files, and finding again whose they are.

Two layouts, both without pickle and with logits as float16. (Probabilities would not survive it: near 1 a float16
probability steps by 0.0005, which ruins the logit; a float16 logit steps by 0.004 at 4 to 8.)

`MemberLogits` is one variant trained on all folds but one: its held-out rows, and every other text file of the run.
`ModelLogits` is what a model said over the whole run: out-of-fold logits of the train rows, and for the other files the
average over the folds and each fold alone. Row fingerprints (a hash of each text) say which rows these are, so that a
later run on the same texts can count the members as trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from emodistill.artifacts import writing_beside
from emodistill.errors import ArtifactError

__all__ = [
    "EVALUATION_NAMES",
    "MemberLogits",
    "ModelLogits",
    "fold_mismatch",
    "read_member_logits",
    "read_model_logits",
    "write_member_logits",
    "write_model_logits",
]

EVALUATION_NAMES = ("dev", "test", "unlabeled")
FLOAT16_LIMIT = 60_000.0

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MemberLogits:
    """What one member (a variant trained without one fold) said.

    Attributes
    ----------
    valid_rows : int32 array of shape (n_valid,)
        Positions in train of the rows of the member's own fold; empty when it was trained on everything.
    valid : float32 array of shape (n_valid, n_labels)
        Logits of those rows.
    evaluations : dict of str to float32 array of shape (n, n_labels)
        Logits by file: any of "dev", "test", "unlabeled".
    label_names : tuple of str
        In the order of the columns.
    """

    valid_rows: NDArray[np.int32]
    valid: Float32Array
    evaluations: dict[str, Float32Array]
    label_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelLogits:
    """What one model (a variant over its folds, an ensemble, a student) said over a whole run.

    Attributes
    ----------
    oof : float32 array of shape (n_train, n_labels)
        Out-of-fold logits; NaN in rows whose fold was not trained.
    fold_ids : int8 array of shape (n_train,)
        Fold that holds each train row out.
    folds : int8 array of shape (n_folds,)
        Which folds were trained, in the order of the `by_fold` arrays.
    train_rows : uint64 array of shape (n_train,)
        Row fingerprints of the train texts.
    rows : dict of str to uint64 array
        Row fingerprints of the other files, by name.
    by_fold : dict of str to float32 array of shape (n_folds, n, n_labels)
        Logits of each fold's member, by file; empty for a model without folds.
    averages : dict of str to float32 array of shape (n, n_labels)
        Logits of the model, by file.
    label_names : tuple of str
        In the order of the columns.
    variant_fingerprint : str
        Fingerprint of the settings that the members were trained with; empty when the model is not a variant.
    """

    oof: Float32Array
    fold_ids: NDArray[np.int8]
    folds: NDArray[np.int8]
    train_rows: NDArray[np.uint64]
    rows: dict[str, NDArray[np.uint64]]
    averages: dict[str, Float32Array]
    label_names: tuple[str, ...]
    by_fold: dict[str, Float32Array] = field(default_factory=dict)
    variant_fingerprint: str = ""

    @classmethod
    def from_members(
        cls,
        members: Mapping[int, MemberLogits],
        *,
        fold_ids: NDArray[np.int8],
        train_rows: NDArray[np.uint64],
        rows: Mapping[str, NDArray[np.uint64]],
        variant_fingerprint: str = "",
    ) -> "ModelLogits":
        """Gather the members of one variant.

        Parameters
        ----------
        members : mapping of fold to MemberLogits
            At least one; folds that are absent leave NaN rows.
        fold_ids, train_rows, rows, variant_fingerprint
            As the attributes.

        Returns
        -------
        ModelLogits

        Raises
        ------
        ArtifactError
            If a member holds other rows than its fold.
        """
        folds = sorted(members)
        label_names = members[folds[0]].label_names
        oof = np.full((len(fold_ids), len(label_names)), np.nan, dtype=np.float32)
        for fold in folds:
            member = members[fold]
            if not np.array_equal(member.valid_rows, np.flatnonzero(fold_ids == fold)):
                raise ArtifactError(
                    f"the logits of fold {fold} are of {len(member.valid_rows)} other rows than the "
                    f"{int((fold_ids == fold).sum())} of that fold: train the member again"
                )
            oof[member.valid_rows] = member.valid
        by_fold = {name: np.stack([members[fold].evaluations[name] for fold in folds]) for name in rows}
        return cls(
            oof=oof,
            fold_ids=fold_ids,
            folds=np.array(folds, dtype=np.int8),
            train_rows=train_rows,
            rows=dict(rows),
            by_fold=by_fold,
            averages={name: values.mean(axis=0) for name, values in by_fold.items()},
            label_names=label_names,
            variant_fingerprint=variant_fingerprint,
        )

    def member(self, fold: int) -> MemberLogits:
        """Return what the member of one trained fold said."""
        position = int(np.flatnonzero(self.folds == fold)[0])
        valid_rows = np.flatnonzero(self.fold_ids == fold).astype(np.int32)
        return MemberLogits(
            valid_rows=valid_rows,
            valid=self.oof[valid_rows],
            evaluations={name: values[position] for name, values in self.by_fold.items()},
            label_names=self.label_names,
        )


def fold_mismatch(
    saved: ModelLogits,
    fold: int,
    *,
    variant_fingerprint: str,
    label_names: Sequence[str],
    fold_ids: NDArray[np.int8],
    train_rows: NDArray[np.uint64],
    rows: Mapping[str, NDArray[np.uint64]],
) -> str:
    """Say why saved logits cannot stand for a member of this run; nothing if they can.

    Parameters
    ----------
    saved : ModelLogits
        Read from a results folder.
    fold : int
        The member wanted.
    variant_fingerprint, label_names, fold_ids, train_rows, rows
        Of the run at hand. Every file of the run must be in `saved`; `saved` may hold more.

    Returns
    -------
    str
        One clause, or "" if the member can be reused.
    """
    if saved.variant_fingerprint != variant_fingerprint:
        return "its settings differ"
    if tuple(saved.label_names) != tuple(label_names):
        return f"its labels are {', '.join(saved.label_names)}"
    if fold not in saved.folds:
        return f"fold {fold} was not trained there"
    if not np.array_equal(saved.train_rows, train_rows):
        return f"its train rows differ ({len(saved.train_rows):,} there, {len(train_rows):,} here)"
    if not np.array_equal(saved.fold_ids == fold, fold_ids == fold):
        return "its folds were split otherwise"
    if not np.isfinite(saved.oof[saved.fold_ids == fold]).all():
        return f"fold {fold} has rows without logits there"
    for name, fingerprints in rows.items():
        if name not in saved.by_fold:
            return f"it has no logits for the {name} file"
        if not np.array_equal(saved.rows[name], fingerprints):
            return f"its {name} rows differ ({len(saved.rows[name]):,} there, {len(fingerprints):,} here)"
    return ""


# ---------------------------------------------------------------- files


def write_member_logits(path: Path, member: MemberLogits) -> None:
    """Write ``valid_rows, valid, dev, test, unlabeled, label_names`` (the files that there are)."""
    arrays: dict[str, NDArray[Any]] = {
        "valid_rows": member.valid_rows.astype(np.int32),
        "valid": _half(member.valid, "valid"),
        "label_names": np.array(member.label_names, dtype=np.str_),
    }
    arrays |= {name: _half(values, name) for name, values in member.evaluations.items()}
    _write_npz(path, arrays)


def read_member_logits(path: Path) -> MemberLogits:
    """Read what `write_member_logits` wrote.

    Raises
    ------
    ArtifactError
        If the file is missing, damaged or of another layout.
    """
    arrays = _read_npz(path, ("valid_rows", "valid", "label_names"))
    label_names = tuple(str(name) for name in arrays.pop("label_names"))
    valid_rows = arrays.pop("valid_rows").astype(np.int32)
    logits = {name: values.astype(np.float32) for name, values in arrays.items()}
    valid = logits.pop("valid")
    for name, values in {"valid": valid, **logits}.items():
        if values.ndim != 2 or values.shape[1] != len(label_names):
            raise ArtifactError(
                f"{path}: '{name}' has shape {values.shape}, expected (rows, {len(label_names)}): "
                "delete the member's folder and train it again"
            )
    if len(valid) != len(valid_rows):
        raise ArtifactError(f"{path}: {len(valid_rows)} valid_rows but {len(valid)} rows of logits: train it again")
    return MemberLogits(valid_rows=valid_rows, valid=valid, evaluations=logits, label_names=label_names)


def write_model_logits(path: Path, model: ModelLogits) -> None:
    """Write the layout of ``benchmarks/results/RUN/logits/MODEL.npz``."""
    arrays: dict[str, NDArray[Any]] = {
        "oof": _half(model.oof, "oof"),
        "fold_ids": model.fold_ids.astype(np.int8),
        "folds": model.folds.astype(np.int8),
        "train_rows": model.train_rows.astype(np.uint64),
        "label_names": np.array(model.label_names, dtype=np.str_),
        "variant_fingerprint": np.array(model.variant_fingerprint, dtype=np.str_),
    }
    arrays |= {f"{name}_rows": values.astype(np.uint64) for name, values in model.rows.items()}
    arrays |= {name: _half(values, name) for name, values in model.averages.items()}
    arrays |= {f"{name}_by_fold": _half(values, name) for name, values in model.by_fold.items()}
    _write_npz(path, arrays)


def read_model_logits(path: Path) -> ModelLogits:
    """Read what `write_model_logits` wrote.

    Raises
    ------
    ArtifactError
        If the file is missing, damaged or of another layout.
    """
    arrays = _read_npz(path, ("oof", "fold_ids", "folds", "train_rows", "label_names"))
    names = [name for name in EVALUATION_NAMES if name in arrays]
    fingerprint = arrays.get("variant_fingerprint")
    try:
        return ModelLogits(
            oof=arrays["oof"].astype(np.float32),
            fold_ids=arrays["fold_ids"],
            folds=arrays["folds"],
            train_rows=arrays["train_rows"],
            rows={name: arrays[f"{name}_rows"] for name in names},
            averages={name: arrays[name].astype(np.float32) for name in names},
            by_fold={
                name: arrays[f"{name}_by_fold"].astype(np.float32) for name in names if f"{name}_by_fold" in arrays
            },
            label_names=tuple(str(name) for name in arrays["label_names"]),
            variant_fingerprint="" if fingerprint is None else str(fingerprint),
        )
    except KeyError as error:
        raise ArtifactError(f"{path} lacks the array {error}: it is not a file of saved logits") from error


def _half(logits: NDArray[Any], name: str) -> NDArray[np.float16]:
    values = np.asarray(logits, dtype=np.float32)
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    if largest > FLOAT16_LIMIT:
        raise ArtifactError(f"logits '{name}' reach {largest:g}, more than float16 holds: the model has diverged")
    return values.astype(np.float16)


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    with writing_beside(path) as beside, beside.open("wb") as handle:
        np.savez_compressed(handle, **arrays)  # no array is of dtype object: nothing is pickled


def _read_npz(path: Path, required: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist: train the member, or name another folder") from error
    except (BadZipFile, ValueError, EOFError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete it and run the stage again") from error
    missing = [name for name in required if name not in arrays]
    if missing:
        raise ArtifactError(f"{path} lacks the arrays {', '.join(missing)}: it is not a file of saved logits")
    return arrays
