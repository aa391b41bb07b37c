"""The TF-IDF member: it learns words, sees nothing of its fold, and lives with labels that have no positives."""

import numpy as np
import pytest

from emodistill.ensemble.tfidf import constant_logit, train_tfidf_member
from emodistill.errors import InputError
from emodistill.thresholds import sigmoid

THANKS = ["thank you so much", "thanks for the help", "many thanks friend", "thank you kindly", "thanks a lot mate"]
SORRY = ["sorry about that", "i am sorry friend", "so sorry for the noise", "sorry a lot mate", "very sorry indeed"]
TEXTS = (THANKS + SORRY) * 3
LABELS = np.array(([[1, 0, 0]] * 5 + [[0, 1, 0]] * 5) * 3, np.int8)  # the third label never occurs
FOLDS = np.repeat([0, 1, 2], 10).astype(np.int8)


def test_it_learns_words_and_predicts_its_fold_in_order() -> None:
    new = ["thank you", "sorry", "thanks!"]
    rows, logits, evaluation = train_tfidf_member(TEXTS, LABELS, FOLDS, 1, {"dev": new, "none": []}, seed=0)
    assert rows.tolist() == list(range(10, 20))
    assert rows.dtype == np.int32
    assert logits.shape == (10, 3)
    assert logits.dtype == np.float32
    assert ((logits[:, :2] > 0) == (LABELS[10:20, :2] == 1)).all()
    assert ((evaluation["dev"][:, 0] > 0) == [True, False, True]).all()
    assert evaluation["none"].shape == (0, 3)


def test_a_label_without_positives_gets_its_smoothed_frequency() -> None:
    _, logits, evaluation = train_tfidf_member(TEXTS, LABELS, FOLDS, 0, {"dev": ["sorry"]}, seed=0)
    np.testing.assert_allclose(logits[:, 2], np.log(0.5 / 20.5), rtol=1e-6)  # (0 + 1/2) of 20 rows + 1
    assert evaluation["dev"][0, 2] == logits[0, 2]
    assert sigmoid(constant_logit(3, 3)) == pytest.approx(3.5 / 4)


def test_labels_and_texts_of_the_fold_change_nothing() -> None:
    dev = ["thanks sorry friend mate"]
    _, _, first = train_tfidf_member(TEXTS, LABELS, FOLDS, 2, {"dev": dev}, seed=0)
    texts, labels = list(TEXTS), LABELS.copy()
    for row in np.flatnonzero(FOLDS == 2):
        texts[row] = "thanks sorry friend mate " * 3
        labels[row] = [0, 1, 1]
    _, _, second = train_tfidf_member(texts, labels, FOLDS, 2, {"dev": dev}, seed=0)
    np.testing.assert_array_equal(first["dev"], second["dev"])


def test_the_same_seed_gives_the_same_logits() -> None:
    first, second = (train_tfidf_member(TEXTS, LABELS, FOLDS, 0, {}, seed=4)[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_fold_without_rows_and_texts_without_words_are_refused() -> None:
    with pytest.raises(InputError, match="fold 7 holds 0 of 30"):
        train_tfidf_member(TEXTS, LABELS, FOLDS, 7, {}, seed=0)
    with pytest.raises(InputError, match="no word occurs in 2 of 20"):
        train_tfidf_member([""] * 30, LABELS, FOLDS, 0, {}, seed=0)
