"""The head on a frozen encoder: its embeddings are the definition's, and it learns from the other folds alone."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("sklearn")

from tiny_runs import write_encoder

from emodistill.checkpoints import load_encoder_weights
from emodistill.encoder_graph import build_classifier, set_weights
from emodistill.ensemble.embeddings import embed_texts
from emodistill.ensemble.heads import train_head_member
from emodistill.ensemble.members import embed_member_texts, train_member
from emodistill.ensemble.variants import VariantConfig
from emodistill.errors import ConfigError, InputError
from emodistill.logits import read_member_logits
from emodistill.tokenization import encode, load_tokenizer

TEXTS = ["glad door", "a longer text, with many words in it", "mad", "hooray hooray"]


def separable(n_rows: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return embeddings whose first two features give two labels by XOR and AND, a third label that never occurs."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2, (n_rows, 2))
    embeddings = np.concatenate([3 + 5 * bits, generator.normal(0, 1, (n_rows, 3))], axis=1).astype(np.float32)
    labels = np.stack([bits[:, 0] ^ bits[:, 1], bits[:, 0] & bits[:, 1], np.zeros(n_rows)], axis=1).astype(np.int8)
    return embeddings, labels, (np.arange(n_rows) % 3).astype(np.int8)


# ---------------------------------------------------------------- embeddings


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_what_an_identity_classifier_sees(encoder: Path, pooling: str) -> None:
    found = embed_texts(encoder, {"a": TEXTS, "none": []}, pooling=pooling, precision="float32")
    config, weights = load_encoder_weights(encoder)
    d = config.hidden_size
    classifier = build_classifier(config, d, pooling=pooling)
    whole = {**weights, "classifier.weight": np.eye(d, dtype=np.float32), "classifier.bias": np.zeros(d, np.float32)}
    set_weights(classifier, config, whole)
    for text, row in zip(TEXTS, found["a"], strict=True):
        ids = encode(load_tokenizer(encoder), [text], 128)[0][None]
        np.testing.assert_allclose(row, classifier([ids, np.ones_like(ids)]).numpy()[0], atol=2e-5)
    assert found["none"].shape == (0, d)
    assert np.ptp(found["a"], axis=0).max() > 0.1


def test_texts_are_cut_where_asked(encoder: Path) -> None:
    short, long = (embed_texts(encoder, {"a": [text]}, max_length_tokens=6, precision="float32")["a"] for text in
                   ("glad", "glad door under the car"))  # fmt: skip
    np.testing.assert_allclose(short, long, atol=2e-5)  # [CLS] g l a d [SEP]


# ---------------------------------------------------------------- the head


def test_it_learns_what_no_linear_model_can_and_predicts_its_fold_in_order() -> None:
    embeddings, labels, folds = separable(1200)
    rows, logits, evaluation = train_head_member(embeddings, labels, folds, 1, {"dev": embeddings[:5]}, seed=0)
    assert rows.tolist() == list(range(1, 1200, 3))
    assert rows.dtype == np.int32
    assert logits.dtype == np.float32
    assert ((logits[:, :2] > 0) == (labels[rows, :2] == 1)).mean() > 0.98
    np.testing.assert_allclose(evaluation["dev"][[1, 4]], logits[:2], rtol=1e-4)
    # a label that never occurs: its smoothed frequency, (0 + 1/2) of 800 rows + 1
    np.testing.assert_allclose(logits[:, 2], np.log(0.5 / 800.5), rtol=1e-6)


def test_rows_of_the_fold_change_nothing_and_the_seed_does() -> None:
    embeddings, labels, folds = separable()
    dev = {"dev": embeddings[:4]}
    first = train_head_member(embeddings, labels, folds, 2, dev, seed=0)[2]["dev"]
    changed, other_labels = embeddings.copy(), labels.copy()
    changed[folds == 2] *= -7
    other_labels[folds == 2] = 1
    second = train_head_member(changed, other_labels, folds, 2, dev, seed=0)[2]["dev"]
    np.testing.assert_array_equal(first, second)
    assert (train_head_member(embeddings, labels, folds, 2, dev, seed=1)[2]["dev"] != first).any()


def test_one_label_and_none_to_learn() -> None:
    embeddings, labels, folds = separable(1200)
    alone = train_head_member(embeddings, labels[:, [1]], folds, 0, {}, seed=0)[1]
    assert alone.shape == (400, 1)
    assert ((alone > 0) == (labels[folds == 0][:, [1]] == 1)).mean() > 0.95
    nothing = train_head_member(embeddings, labels[:, [2]], folds, 0, {}, seed=0)[1]
    np.testing.assert_allclose(nothing, np.log(0.5 / 800.5), rtol=1e-6)
    with pytest.raises(InputError, match="holds all 1200 rows"):
        train_head_member(embeddings, labels, np.zeros(1200, np.int8), 0, {}, seed=0)


# ---------------------------------------------------------------- the variant


def test_a_member_of_kind_head_writes_logits_like_any_other(encoder: Path, tmp_path: Path) -> None:
    variant = VariantConfig(name="frozen", kind="head", encoder=str(encoder), precision="float32")
    texts = ["glad door", "mad car", "glad paper", "mad walk"] * 6
    labels = np.array([[1, 0], [0, 1]] * 12, np.int8)
    folds = np.repeat([0, 1], 12).astype(np.int8)
    rest = {"texts": texts, "evaluation_texts": {"dev": ["glad", "mad", "glad"]}}
    embeddings = embed_member_texts(variant, encoder, **rest)
    assert {name: len(values) for name, values in embeddings.items()} == {"train": 24, "dev": 3}
    arguments = {**rest, "encoder_dir": None, "labels": labels, "fold_ids": folds, "label_names": ("joy", "anger")}
    train_member(variant, 0, **arguments, work_dir=tmp_path, embeddings=embeddings)
    logits = read_member_logits(tmp_path / "logits.npz")
    assert logits.valid_rows.tolist() == list(range(12))
    assert ((logits.valid > 0) == (labels[:12] == 1)).all()
    assert logits.evaluations["dev"].shape == (3, 2)
    with pytest.raises(ConfigError, match="variant 'frozen' needs the embeddings"):
        train_member(variant, 0, **arguments, work_dir=tmp_path)


def test_only_what_a_kind_uses_is_in_its_fingerprint() -> None:
    base = {"name": "x", "encoder": "mpnet-base", "seed": 3}
    head = VariantConfig(**base, kind="head").fingerprint_parts()
    assert head == {**base, "kind": "head"}
    assert VariantConfig(**base, kind="head", epochs=9, dropout_rate=0.5).fingerprint_parts() == head
    for setting in ({"pooling": "cls"}, {"max_length_tokens": 64}, {"precision": "float32"}):
        assert VariantConfig(**base, kind="head", **setting).fingerprint_parts() == {**head, **setting}
    # the other kinds stay as they were: what is saved under them stays valid
    assert VariantConfig(**base, kind="tfidf").fingerprint_parts() == {"name": "x", "kind": "tfidf", "seed": 3}
    assert VariantConfig(**base).fingerprint_parts() == {
        **base, "kind": "encoder", "epochs": 3, "learning_rate": 1.5e-4
    }  # fmt: skip
