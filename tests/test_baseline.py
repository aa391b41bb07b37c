"""Baselines: fair, and able to learn what is easy."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the train extra")

from emodistill.benchmarks.baseline import TfidfBaseline, all_negative
from emodistill.metrics import micro_f1

TEXTS = ["thank you so much", "sorry about that", "thank you and sorry", "the train left"] * 10
LABELS = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]] * 10, np.int8)


def test_all_negative_gives_nothing() -> None:
    decisions = all_negative(4, 3)
    assert decisions.dtype == np.int8
    assert decisions.sum() == 0
    assert micro_f1(LABELS[:4], decisions) == 0.0


def test_tfidf_learns_words_and_leaves_an_absent_label_alone() -> None:
    model = TfidfBaseline.fit(TEXTS, LABELS)
    assert model.decide(["thank you so much!", "Sorry about that", "the train"]).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 0],
    ]
    assert model.predict_proba(["thank you"])[0, 2] < 1e-6


def test_timed_path_gives_the_probabilities_of_the_batch_path() -> None:
    model = TfidfBaseline.fit(TEXTS, LABELS)
    one_by_one = np.vstack([model(text) for text in TEXTS[:4]])
    np.testing.assert_allclose(one_by_one, model.predict_proba(TEXTS[:4]), rtol=0, atol=1e-12)


def test_threshold_comes_from_rows_the_fit_did_not_see() -> None:
    # Random labels on unique texts: rows that were fitted would be separated at any threshold, unseen ones are not.
    generator = np.random.default_rng(0)
    words = [f"word{i}" for i in range(40)]
    texts = [" ".join(generator.choice(words, 6)) for _ in range(200)]
    labels = (generator.random((200, 2)) < 0.3).astype(np.int8)
    model = TfidfBaseline.fit(texts, labels)
    # F1 of always-yes at a rate of 0.3 is 0.46; on unseen noise nothing beats it by much, so the threshold is low.
    assert model.threshold < 0.3


def test_size_counts_weights_and_words() -> None:
    model = TfidfBaseline.fit(TEXTS, LABELS)
    n_features = len(model.vectorizer.vocabulary_)
    letters = sum(len(word) + 1 for word in model.vectorizer.vocabulary_)
    assert model.size_bytes == 4 * (n_features * 3 + 3 + n_features) + letters
