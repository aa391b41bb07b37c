"""Folds: the written cases, and the laws of stratified folds on any labels."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emodistill.data import read_dataset
from emodistill.errors import ConfigError
from emodistill.folds import assign_folds, fold_warnings

CASES = Path(__file__).parent / "cases"
SHARED = Path(os.environ.get("EMODISTILL_SHARED", Path(__file__).parents[2] / "shared"))
RATES = (0.164, 0.092, 0.106, 0.083, 0.0044, 0.0061, 0.0216)  # of the seven labels in the competition's train.csv


def folds_of(name: str, n_folds: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    dataset = read_dataset(CASES / name)
    assert dataset.labels is not None
    return dataset.labels, assign_folds(dataset.texts, dataset.labels, n_folds, seed), dataset.label_names


@pytest.mark.parametrize("seed", range(10))
def test_d08_rare_labels_are_spread(seed: int) -> None:
    labels, fold_ids, names = folds_of("D08_rare_label.csv", seed=seed)
    assert fold_ids.dtype == np.int8
    sizes = np.bincount(fold_ids)
    assert sizes.sum() == 20  # each row is validated once
    assert len(sizes) == 5
    assert 3 <= sizes.min() <= sizes.max() <= 5
    assert fold_ids[2] != fold_ids[3]  # the two `pride` rows, lines 4 and 5
    relief_fold = fold_ids[10]  # line 12
    assert fold_warnings(labels, fold_ids, names) == [
        "'amusement' has 0 positive rows: it cannot be learned, and its F1 is undefined",
        "'love' has 0 positive rows: it cannot be learned, and its F1 is undefined",
        "'pride' has 2 positive rows in 2 of 5 folds: look at its F1 over all folds together only",
        f"'relief' has 1 positive row, all in fold {relief_fold}: "
        f"the model validated on fold {relief_fold} never sees one",
        "'remorse' has 0 positive rows: it cannot be learned, and its F1 is undefined",
    ]


def test_d07_names_the_label_without_positives() -> None:
    labels, fold_ids, names = folds_of("D07_zero_positive_train.csv")
    assert fold_warnings(labels, fold_ids, names) == [
        "'relief' has 0 positive rows: it cannot be learned, and its F1 is undefined"
    ]


def test_twins_of_d02_and_d05_have_the_same_folds() -> None:
    assert np.array_equal(folds_of("D05_float_labels.csv")[1], folds_of("D05_int_twin.csv")[1])
    assert np.array_equal(folds_of("D02_bom_crlf.csv", 2)[1], folds_of("D02_plain_twin.csv", 2)[1])


def test_d12_folds_depend_on_the_seed_and_on_nothing_else() -> None:
    code = (
        "from emodistill.data import read_dataset; from emodistill.folds import assign_folds; import sys;"
        "d = read_dataset(sys.argv[1]); print([assign_folds(d.texts, d.labels, 5, s).tolist() for s in (0, 1)])"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, str(CASES / "D05_int_twin.csv")],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("0", "1")
    ]
    assert printed[0] == printed[1]
    first, second = (folds_of("D05_int_twin.csv", seed=seed)[1].tolist() for seed in (0, 1))
    assert printed[0].strip() == str([first, second])
    assert first != second


def test_texts_that_differ_in_capitals_or_spaces_share_a_fold() -> None:
    texts = ["Thank you", "THANK YOU", "thank  you ", "Straße", "STRASSE", *(f"text {i}" for i in range(45))]
    labels = np.zeros((50, 2), dtype=np.int8)
    labels[[0, 1, 3, 7, 9], 0] = 1
    for seed in range(20):
        fold_ids = assign_folds(texts, labels, 5, seed)
        assert len(set(fold_ids[:3].tolist())) == 1
        assert fold_ids[3] == fold_ids[4]
        assert np.bincount(fold_ids).tolist() == [10] * 5


def test_a_label_in_one_text_only_is_warned_about() -> None:
    labels = np.array([[1], [1], [1], [0], [0], [0]])
    fold_ids = assign_folds(["lol", "LOL", "Lol", "a", "b", "c"], labels, 2, seed=0)
    fold = fold_ids[0]
    assert fold_warnings(labels, fold_ids, ["amusement"]) == [
        f"'amusement' has 3 positive rows, all in fold {fold}: the model validated on fold {fold} never sees one"
    ]


@pytest.mark.parametrize(
    ("texts", "shape", "n_folds", "message"),
    [
        (["a", "b", "c"], (3, 1), 1, "n_folds is 1: give 2 to 3"),
        (["a", "b", "c"], (3, 1), 4, "n_folds is 4: give 2 to 3"),
        (["a", "A", "b"], (3, 1), 3, "n_folds is 3: give 2 to 2, at most the number of distinct texts"),
        (["a", "b", "c"], (2, 1), 2, r"labels have the shape \(2, 1\), expected \(3, n_labels\)"),
        (["a", "b", "c"], (3,), 2, r"labels have the shape \(3,\)"),
        ([str(i) for i in range(200)], (200, 1), 128, "n_folds is 128: give 2 to 127"),
    ],
)
def test_impossible_folds_are_refused(texts: list[str], shape: tuple[int, ...], n_folds: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assign_folds(texts, np.zeros(shape, dtype=np.int8), n_folds, seed=0)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), min_size=4, max_size=60),
    n_folds=st.integers(2, 4),
    seed=st.integers(0, 3),
)
def test_laws_of_folds(rows: list[tuple[int, int]], n_folds: int, seed: int) -> None:
    texts = [f"text {number}" for number, _ in rows]
    labels = np.array([[bits & 1, bits >> 1 & 1, bits >> 2 & 1] for _, bits in rows])
    if len(set(texts)) < n_folds:
        return
    fold_ids = assign_folds(texts, labels, n_folds, seed)
    assert fold_ids.shape == (len(rows),)
    assert set(fold_ids.tolist()) == set(range(n_folds))  # no fold is empty
    for text in set(texts):
        assert len({fold for fold, other in zip(fold_ids.tolist(), texts, strict=True) if other == text}) == 1
    rarest = min(
        (label for label in range(3) if labels[:, label].any()), key=lambda i: labels[:, i].sum(), default=None
    )
    if rarest is not None and len(set(texts)) == len(texts):  # dealt first, so in parts that differ by one at most
        per_fold = np.bincount(fold_ids, weights=labels[:, rarest], minlength=n_folds)
        assert per_fold.max() - per_fold.min() <= 1


def test_folds_of_a_large_file_are_even_and_fast() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((25_196, 7)) < RATES).astype(np.int8)
    texts = [f"text {number}" for number in generator.permutation(25_196)]
    start = time.perf_counter()
    fold_ids = assign_folds(texts, labels, 5, seed=0)
    assert time.perf_counter() - start < 2  # measured: 0.13 s
    assert_even(labels, fold_ids)


@pytest.mark.real_data
def test_folds_of_the_competition_are_even() -> None:
    path = SHARED / "data" / "competition" / "train.csv"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    dataset = read_dataset(path)
    assert dataset.labels is not None
    assert dataset.labels.sum(axis=0).tolist() == [4130, 2328, 2662, 2086, 111, 153, 545]  # as its README says
    fold_ids = assign_folds(dataset.texts, dataset.labels, 5, seed=0)
    assert_even(dataset.labels, fold_ids)
    assert fold_warnings(dataset.labels, fold_ids, dataset.label_names) == []


def assert_even(labels: np.ndarray, fold_ids: np.ndarray) -> None:
    """Rows and positives of each label differ by at most 2 between folds (a plain random split: by about 60 of 826)."""
    for weights in (np.ones(len(labels)), *labels.T):
        per_fold = np.bincount(fold_ids, weights=weights, minlength=5)
        assert per_fold.max() - per_fold.min() <= 2
