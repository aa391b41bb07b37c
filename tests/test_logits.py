"""Saved logits: both layouts survive the file, and only what is the same member is taken for it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emodistill.errors import ArtifactError
from emodistill.logits import (
    MemberLogits,
    ModelLogits,
    fold_mismatch,
    read_member_logits,
    read_model_logits,
    write_member_logits,
    write_model_logits,
)

LABELS = ("joy", "Ärger")
FOLD_IDS = np.array([0, 1, 0, 1, 2], dtype=np.int8)
TRAIN_ROWS = np.array([11, 12, 13, 14, 2**64 - 1], dtype=np.uint64)
ROWS = {"dev": np.array([21, 22], dtype=np.uint64)}


def make_member(fold: int) -> MemberLogits:
    rows = np.flatnonzero(fold == FOLD_IDS).astype(np.int32)
    return MemberLogits(
        valid_rows=rows,
        valid=np.stack([rows + 0.5, -rows - 0.25], axis=1).astype(np.float32),
        evaluations={"dev": np.full((2, 2), float(fold), dtype=np.float32)},
        label_names=LABELS,
    )


def make_model(folds: tuple[int, ...] = (0, 1)) -> ModelLogits:
    return ModelLogits.from_members(
        {fold: make_member(fold) for fold in folds},
        fold_ids=FOLD_IDS,
        train_rows=TRAIN_ROWS,
        rows=ROWS,
        variant_fingerprint="v1",
    )


def mismatch(model: ModelLogits, fold: int = 0, **changes) -> str:
    wanted = {
        "variant_fingerprint": "v1",
        "label_names": LABELS,
        "fold_ids": FOLD_IDS,
        "train_rows": TRAIN_ROWS,
        "rows": ROWS,
    }
    return fold_mismatch(model, fold, **{**wanted, **changes})


def test_members_gather_into_out_of_fold_rows_and_fold_averages() -> None:
    model = make_model((0, 1))
    # fold 0 holds rows 0 and 2, fold 1 rows 1 and 3; nobody trained without fold 2, so row 4 stays unknown
    np.testing.assert_array_equal(model.oof[:, 0], [0.5, 1.5, 2.5, 3.5, np.nan])
    np.testing.assert_array_equal(model.averages["dev"], np.full((2, 2), (0 + 1) / 2))
    assert model.by_fold["dev"].shape == (2, 2, 2)
    back = model.member(1)
    np.testing.assert_array_equal(back.valid, make_member(1).valid)
    np.testing.assert_array_equal(back.evaluations["dev"], np.ones((2, 2)))


def test_a_member_of_another_split_is_refused() -> None:
    with pytest.raises(ArtifactError, match="fold 0 are of 2 other rows"):
        ModelLogits.from_members({0: make_member(0)}, fold_ids=FOLD_IDS[::-1].copy(), train_rows=TRAIN_ROWS, rows=ROWS)


def test_both_layouts_survive_the_file(tmp_path: Path) -> None:
    write_member_logits(tmp_path / "m.npz", make_member(1))
    member = read_member_logits(tmp_path / "m.npz")
    np.testing.assert_array_equal(member.valid, make_member(1).valid)  # quarters are exact in float16
    assert member.label_names == LABELS
    assert list(member.evaluations) == ["dev"]

    write_model_logits(tmp_path / "v.npz", make_model())
    model = read_model_logits(tmp_path / "v.npz")
    np.testing.assert_array_equal(model.oof, make_model().oof)
    np.testing.assert_array_equal(model.train_rows, TRAIN_ROWS)
    np.testing.assert_array_equal(model.by_fold["dev"], make_model().by_fold["dev"])
    assert (model.label_names, model.variant_fingerprint) == (LABELS, "v1")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as archive:
        assert {archive[name].dtype for name in ("oof", "dev", "dev_by_fold")} == {np.dtype(np.float16)}
        assert archive["dev_rows"].dtype == np.uint64


def test_float16_keeps_a_logit_to_a_thousandth_of_its_size(tmp_path: Path) -> None:
    logits = np.linspace(-12, 12, 1001, dtype=np.float32).reshape(-1, 1).repeat(2, axis=1)
    member = replace(make_member(0), evaluations={"test": logits})
    write_member_logits(tmp_path / "m.npz", member)
    read = read_member_logits(tmp_path / "m.npz").evaluations["test"]
    # float16 has 11 significant bits: half a step is at most 2**-11 of the value
    assert float(np.abs(read - logits).max()) <= 12 * 2**-11


def test_logits_beyond_float16_are_refused(tmp_path: Path) -> None:
    member = replace(make_member(0), valid=np.full((2, 2), 1e6, dtype=np.float32))
    with pytest.raises(ArtifactError, match="'valid' reach 1e\\+06"):
        write_member_logits(tmp_path / "m.npz", member)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    write_member_logits(tmp_path / "m.npz", make_member(1))
    whole = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "m.npz").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(ArtifactError, match=r"m\.npz is damaged"):
        read_member_logits(tmp_path / "m.npz")
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    with pytest.raises(ArtifactError, match="lacks the arrays oof, fold_ids"):
        read_model_logits(tmp_path / "x.npz")
    np.savez(tmp_path / "p.npz", oof=np.array([{}], dtype=object))
    with pytest.raises(ArtifactError, match="damaged"):
        read_model_logits(tmp_path / "p.npz")


def test_the_same_member_is_reused() -> None:
    assert mismatch(make_model(), 0) == ""
    assert mismatch(make_model(), 1) == ""
    assert mismatch(make_model(), 0, rows={}) == ""  # fewer files are fine


@pytest.mark.parametrize(
    ("fold", "changes", "reason"),
    [
        (0, {"variant_fingerprint": "v2"}, "settings differ"),
        (0, {"label_names": ("Ärger", "joy")}, "labels are joy, Ärger"),
        (2, {}, "fold 2 was not trained"),
        (0, {"train_rows": TRAIN_ROWS[::-1].copy()}, "train rows differ"),
        (0, {"fold_ids": np.array([0, 1, 1, 0, 2], dtype=np.int8)}, "split otherwise"),
        (0, {"rows": {"dev": ROWS["dev"][:1]}}, r"dev rows differ \(2 there, 1 here\)"),
        (0, {"rows": {**ROWS, "unlabeled": ROWS["dev"]}}, "no logits for the unlabeled file"),
    ],
)
def test_anything_else_is_not_reused_and_says_why(fold: int, changes: dict, reason: str) -> None:
    assert re.search(reason, mismatch(make_model(), fold, **changes))
