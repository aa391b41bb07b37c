"""States and relations drawn towards the pretrained encoder: what the loss is, whom it moves, whom it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
from models import write_encoder_folder
from test_students import LABELS, rows
from tokenizers import Tokenizer

tf = pytest.importorskip("tensorflow")

from emodistill.checkpoints import load_checkpoint  # noqa: E402
from emodistill.distill import transfer  # noqa: E402
from emodistill.distill.students import StudentConfig, student_start, train_student  # noqa: E402
from emodistill.encoder_graph import build_classifier, set_weights  # noqa: E402
from emodistill.tokenization import encode  # noqa: E402
from emodistill.training import pad_batch  # noqa: E402

TEXTS = ["thank you sorry", "love a", "great lol . a thanks", "lol"]
PLAIN = dict(dropout_rate=0.0, attention_dropout_rate=0.0, classifier_dropout_rate=0.0, precision="float32")


def outputs(student, encoder, *, hidden_weight=1.0, relation_weight=1.0, change=None, trained=None):
    """Return the trainee, transfer losses (b,) of TEXTS and their gradients, of a start with one weight changed."""
    start = trained or student_start(student, encoder, TEXTS, LABELS)
    if change:
        weights = dict(start.weights)
        weights[change] = weights[change] + np.random.default_rng(1).normal(0, 0.2, weights[change].shape)
        start = replace(start, weights=weights)
    classifier = build_classifier(start.config, len(LABELS), pooling=start.pooling, **PLAIN)
    set_weights(classifier, start.config, start.weights)
    used = np.arange(start.config.vocab_size, dtype=np.int32)
    arrange = transfer.arrange_transfer(
        start, encoder, hidden_weight=hidden_weight, relation_weight=relation_weight, precision="float32"
    )
    trainee = arrange(classifier, used, [])
    ids, mask = pad_batch(encode(Tokenizer.from_str(start.tokenizer_json), TEXTS, 16), start.config.pad_token_id)
    with tf.GradientTape() as tape:
        logits, losses = trainee.model([ids, mask], training=True)
        total = tf.reduce_mean(losses)
    np.testing.assert_allclose(logits, classifier([ids, mask]), atol=1e-6)
    return trainee, losses.numpy(), tape.gradient(total, trainee.model.trainable_variables)


WHOLE = StudentConfig(layers=(0, 1, 2, 3), vocabulary_size=None, max_length_tokens=16)


@pytest.mark.parametrize("vocabulary_size", [None, 11])
def test_the_encoder_itself_has_nothing_to_learn(tmp_path, vocabulary_size):
    encoder = write_encoder_folder(tmp_path, n_layers=4)
    _, losses, _ = outputs(replace(WHOLE, vocabulary_size=vocabulary_size), encoder)
    # The student is the whole encoder, and with fewer pieces the teacher reads the same ones: rounding alone differs.
    assert np.abs(losses).max() < 1e-6


@pytest.mark.parametrize(("hidden_weight", "relation_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_another_weight_makes_a_loss_with_a_gradient(tmp_path, hidden_weight, relation_weight):
    encoder = write_encoder_folder(tmp_path, n_layers=4)
    trainee, losses, gradients = outputs(
        WHOLE, encoder, hidden_weight=hidden_weight, relation_weight=relation_weight,
        change="layer.1.intermediate.weight",
    )  # fmt: skip
    assert losses.min() > 1e-4
    moved = {
        v.name: g is not None and float(tf.norm(tf.convert_to_tensor(g))) > 0
        for v, g in zip(trainee.model.trainable_variables, gradients, strict=True)
    }
    assert moved["layer_1_intermediate/kernel:0"]
    assert moved["layer_0_qkv/kernel:0"]
    assert not moved["classifier/kernel:0"]
    assert not any(name.startswith("pretrained_encoder") for name in moved)  # frozen


def test_the_losses_are_those_of_the_papers():
    generator = np.random.default_rng(0)
    n, t, d, heads = 2, 3, 4, 2
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    own, other = generator.standard_normal((2, n * t, d)).astype(np.float32)
    own_qkv, other_qkv = generator.standard_normal((2, n * t, 3 * d)).astype(np.float32)
    layer = transfer.TransferLoss(0.5, 0.25, heads)
    got = layer(
        {"mask": mask, "student_states": [own], "teacher_states": [other],
         "student_qkv": own_qkv, "teacher_qkv": other_qkv}
    ).numpy()  # fmt: skip

    def normed(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-6)

    def relation(qkv, row, part, head, length):
        vectors = qkv.reshape(n, t, 3, heads, d // heads)[row, :length, part, head]
        scores = vectors @ vectors.T / np.sqrt(d // heads)
        return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

    for row, length in enumerate((3, 2)):
        states = [((normed(own[row * t + i]) - normed(other[row * t + i])) ** 2).mean() for i in range(length)]
        divergences = []
        for part in range(3):
            for head in range(heads):
                p = relation(other_qkv, row, part, head, length)
                q = relation(own_qkv, row, part, head, length)
                divergences.append((p * np.log(p / q)).sum(1).mean())
        # Relations: averaged over queries, keys, values and heads; the padded token takes no part.
        expected = 0.5 * np.mean(states) + 0.25 * np.mean(divergences)
        assert got[row] == pytest.approx(expected, rel=1e-4)


def test_layers_are_matched_evenly():
    assert transfer.matched_layers(3, 6) == [0, 2, 4, 6]
    assert transfer.matched_layers(2, 6) == [0, 3, 6]
    assert transfer.matched_layers(4, 4) == [0, 1, 2, 3, 4]


def test_a_narrow_factorized_student_is_projected_to_the_encoder(tmp_path):
    encoder = write_encoder_folder(tmp_path, n_layers=4)
    student = StudentConfig(layers=(0, 1), vocabulary_size=None, hidden_size=8, embedding_size=8, max_length_tokens=16)
    trainee, losses, gradients = outputs(student, encoder)
    names = [v.name for v in trainee.model.trainable_variables]
    kernels = [v for v in trainee.model.trainable_variables if v.name.startswith("transfer_projection")]
    assert [k.shape.as_list() for k in kernels] == [[8, 16]] * 3
    assert np.isfinite(losses).all()
    assert losses.min() > 0
    assert float(tf.norm(gradients[names.index("transfer_projection_2/kernel:0")])) > 0


def train(tmp_path, encoder, name, **changes):
    texts, labels = rows(40)
    student = StudentConfig(
        layers=(0, 1), vocabulary_size=None, epochs=3, batch_size=8, learning_rate=1e-2, precision="float32", **changes
    )
    train_student(
        student, encoder_dir=encoder, texts=texts, hard_targets=labels,
        soft_logits=np.where(labels, 4.0, -4.0).astype(np.float32), transfer_texts=["thank you"],
        transfer_logits=np.zeros((1, 2), np.float32), label_names=LABELS, evaluation_texts={"dev": ["thank you lol"]},
        work_dir=tmp_path / name,
    )  # fmt: skip
    return load_checkpoint(tmp_path / name)


def test_a_student_trained_with_transfer_stays_nearer_to_its_encoder(tmp_path):
    encoder = write_encoder_folder(tmp_path / "encoder")
    free = train(tmp_path, encoder, "free")
    drawn = train(tmp_path, encoder, "drawn", hidden_weight=1.0, relation_weight=1.0)
    assert drawn.weights.keys() == free.weights.keys()  # nothing of the teacher is saved
    far, near = (outputs(None, encoder, trained=checkpoint)[1].mean() for checkpoint in (free, drawn))
    assert near < 0.7 * far


def test_without_weights_nothing_changes(tmp_path, monkeypatch):
    encoder = write_encoder_folder(tmp_path / "encoder")
    free = train(tmp_path, encoder, "free")
    monkeypatch.setattr(transfer, "arrange_transfer", lambda *_, **__: pytest.fail("a teacher without a weight"))
    zero = train(tmp_path, encoder, "zero", hidden_weight=0.0, relation_weight=0.0)
    for name, value in free.weights.items():
        np.testing.assert_array_equal(zero.weights[name], value)


def test_settings_that_change_nothing_leave_fingerprints_alone():
    before = {
        "name", "encoder", "layers", "vocabulary_size", "embedding_size", "pooling", "max_length_tokens",
        "distillation_temperature", "hard_weight", "transfer_texts", "epochs", "batch_size", "learning_rate",
        "warmup_fraction", "weight_decay", "seed", "dropout_rate", "attention_dropout_rate",
        "classifier_dropout_rate", "precision",
    }  # fmt: skip
    assert StudentConfig().fingerprint_parts().keys() == before
    changed = StudentConfig(hidden_size=192, hidden_weight=0.01).fingerprint_parts()
    assert changed.keys() - before == {"hidden_size", "hidden_weight"}
