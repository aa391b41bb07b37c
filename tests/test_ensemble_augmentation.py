"""Joined texts: pairs of different training rows, the union of their labels, rare labels by the square root."""

from pathlib import Path

import numpy as np
import pytest

from emodistill.ensemble.augmentation import join_texts
from emodistill.ensemble.variants import VariantConfig
from emodistill.errors import ConfigError


def rows(n_rows: int = 10_101) -> tuple[list[str], np.ndarray]:
    """Return rows of which all but 101 have the first label and 100 the second; the last has neither."""
    labels = np.zeros((n_rows, 3), np.int8)
    labels[:-101, 0] = 1
    labels[-101:-1, 1] = 1
    return [f"t{i}" for i in range(n_rows)], labels


def test_labels_are_the_union_of_two_different_rows() -> None:
    texts, labels = rows(300)
    joined, joined_labels = join_texts(texts, labels, 2.0, seed=0)
    assert len(joined) == 600
    assert joined_labels.dtype == np.int8
    seen = set()
    for text, given in zip(joined, joined_labels, strict=True):
        first, second = (int(part[1:]) for part in text.split(" "))
        assert first != second
        np.testing.assert_array_equal(given, labels[first] | labels[second])
        seen |= {first, second}
    assert 299 in seen  # the row without labels is joined to others
    firsts = [int(text.split(" ")[0][1:]) for text in joined]
    assert 0.3 < np.mean([row < 199 for row in firsts]) < 0.9  # the drawn label is not always in front


def test_rare_labels_are_drawn_by_the_square_root() -> None:
    # sqrt(10,000) = 100 and sqrt(100) = 10: one draw in 11 is of the rare label; of the other texts 1 in 101 has it:
    # 1/11 + 10/11 * 1/101 = 0.0999
    _, labels = join_texts(*rows(), 1.0, seed=0)
    assert labels[:, 1].mean() == pytest.approx(0.0999, abs=0.009)  # 3 standard deviations of 10,101 draws
    assert not labels[:, 2].any()


def test_the_seed_decides_and_nothing_is_joined_without_share_or_labels() -> None:
    texts, labels = rows(300)
    assert join_texts(texts, labels, 0.5, seed=3)[0] == join_texts(texts, labels, 0.5, seed=3)[0]
    assert join_texts(texts, labels, 0.5, seed=3)[0] != join_texts(texts, labels, 0.5, seed=4)[0]
    for nothing in (
        join_texts(texts, labels, 0.0, seed=0),
        join_texts(texts, np.zeros_like(labels), 1.0, seed=0),
        join_texts(texts[:1], labels[:1], 1.0, seed=0),
    ):
        assert nothing[0] == []
        assert nothing[1].shape == (0, 3)


def test_members_are_fitted_on_joined_rows_of_their_own_training_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorflow")
    from tiny_runs import write_encoder

    from emodistill import classifier_training
    from emodistill.ensemble.members import train_member

    seen = {}

    def stop(_: object, texts: list[str], targets: list[np.ndarray], *__: object, **___: object) -> None:
        seen["texts"], seen["targets"] = texts, targets[0]
        raise InterruptedError

    monkeypatch.setattr(classifier_training, "train_classifier", stop)
    encoder = write_encoder(tmp_path / "bert")
    texts, labels = [f"t{i}" for i in range(12)], np.tile(np.eye(3, dtype=np.int8), (4, 1))
    variant = VariantConfig(name="x", encoder=str(encoder), joined_texts=0.5)
    with pytest.raises(InterruptedError):
        train_member(
            variant,
            1,
            encoder_dir=encoder,
            texts=texts,
            labels=labels,
            fold_ids=np.repeat([0, 1], 6).astype(np.int8),
            label_names=("a", "b", "c"),
            evaluation_texts={},
            work_dir=tmp_path / "member",
        )
    assert seen["texts"][:6] == texts[:6]
    assert len(seen["texts"]) == len(seen["targets"]) == 9
    assert all(part in texts[:6] for text in seen["texts"] for part in text.split(" "))
    assert seen["targets"][6:].sum(axis=1).min() >= 1


def test_the_default_leaves_fingerprints_and_a_negative_share_is_refused() -> None:
    plain = VariantConfig(name="x").fingerprint_parts()
    assert "joined_texts" not in plain
    assert VariantConfig(name="x", joined_texts=0.2).fingerprint_parts() == {**plain, "joined_texts": 0.2}
    cheap = VariantConfig(name="x", kind="tfidf", joined_texts=0.2).fingerprint_parts()
    assert cheap == {"name": "x", "kind": "tfidf", "seed": 0}
    with pytest.raises(ConfigError, match=r"variant 'x': joined_texts = -0.1"):
        VariantConfig(name="x", joined_texts=-0.1)
