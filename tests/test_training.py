"""Fine-tuning: the schedule, the optimizer against another implementation, and runs that are killed."""

import json

import numpy as np
import pytest
from models import random_weights, tiny_checkpoint, tiny_config

tf = pytest.importorskip("tensorflow")

from emodistill.classifier_training import train_classifier  # noqa: E402
from emodistill.encoder_graph import build_classifier, set_dropout_state, set_weights  # noqa: E402
from emodistill.errors import ConfigError, TrainingError  # noqa: E402
from emodistill.losses import binary_cross_entropy  # noqa: E402
from emodistill.training import (  # noqa: E402
    AdamW,
    epoch_batches,
    fit,
    learning_rate_at,
    pad_batch,
    predict_logits,
)
from emodistill.training_config import TrainingConfig  # noqa: E402

DROPOUTS = ("dropout_rate", "attention_dropout_rate", "classifier_dropout_rate")


def test_the_learning_rate_rises_and_falls_linearly():
    config = TrainingConfig(epochs=1, learning_rate=0.1, warmup_fraction=0.2)
    rates = [learning_rate_at(step, 10, config) for step in range(10)]
    # 2 steps of warm-up to 0.1, then 8 steps from 0.1 by eighths: the last is 0.1 / 8.
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[-1] == pytest.approx(0.0125)


def test_batches_hold_each_row_once_and_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(2, 60, 1000)
    batches = epoch_batches(lengths, 16, seed=3, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    padding = sum(lengths[b].max() * len(b) - lengths[b].sum() for b in batches) / lengths.sum()
    assert padding < 0.1  # unsorted batches of 16 would pad by about 0.9
    again = epoch_batches(lengths, 16, seed=3, epoch=1)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    other = epoch_batches(lengths, 16, seed=3, epoch=2)
    assert not all((a == b).all() for a, b in zip(batches, other, strict=True) if len(a) == len(b))


def test_pad_batch_rounds_the_length_up():
    ids, mask = pad_batch([np.array([7, 8, 9, 4, 5], np.int32), np.array([7], np.int32)], pad_token_id=1)
    assert ids.tolist() == [[7, 8, 9, 4, 5, 1, 1, 1], [7, 1, 1, 1, 1, 1, 1, 1]]
    assert mask.sum(1).tolist() == [5, 1]


def test_adamw_follows_the_paper():
    generator = np.random.default_rng(0)
    matrix = tf.Variable(generator.standard_normal((3, 2)).astype(np.float32))
    vector = tf.Variable(generator.standard_normal(2).astype(np.float32))
    expected = {"matrix": matrix.numpy().astype(np.float64), "vector": vector.numpy().astype(np.float64)}
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in expected.items()}
    optimizer = AdamW([matrix, vector], weight_decay=0.1, rate_factors=[1.0, 0.5], clip_norm=1.0)
    for step in range(4):
        gradients = {
            "matrix": generator.standard_normal((3, 2)).astype(np.float32) * 3,
            "vector": generator.standard_normal(2).astype(np.float32) * 3,
        }
        norm = optimizer.apply([tf.constant(g) for g in gradients.values()], tf.constant(0.01), tf.constant(step))
        exact_norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        assert float(norm) == pytest.approx(exact_norm, rel=1e-5)
        for name, factor in (("matrix", 1.0), ("vector", 0.5)):
            gradient = gradients[name] * min(1.0, 1.0 / exact_norm)
            rate = 0.01 * factor
            m, v = moments[name]
            m[...] = 0.9 * m + 0.1 * gradient
            v[...] = 0.999 * v + 0.001 * gradient**2
            if name == "matrix":
                expected[name] *= 1 - rate * 0.1
            corrected = rate * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            expected[name] -= corrected * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(matrix, expected["matrix"], rtol=1e-4)
    np.testing.assert_allclose(vector, expected["vector"], rtol=1e-4)


def test_layerwise_decay_slows_the_lower_layers():
    from emodistill.training import _rate_factors

    model = build_classifier(tiny_config(), 2)
    factors = dict(
        zip(
            (v.name for v in model.trainable_variables),
            _rate_factors(model, model.trainable_variables, 0.5),
            strict=True,
        )
    )
    # Two layers: classifier and layer 1 at 1, layer 0 at 1/2, embeddings at 1/4.
    assert factors["classifier/kernel:0"] == factors["layer_1_qkv/kernel:0"] == 1.0
    assert factors["layer_0_output/kernel:0"] == 0.5
    assert {f for name, f in factors.items() if "embeddings" in name} == {0.25}


def rows_of(n, seed=0):
    generator = np.random.default_rng(seed)
    ids = [np.array([2, *generator.integers(5, 14, generator.integers(1, 12)), 3], np.int32) for _ in range(n)]
    targets = np.array([[5 in row, 7 in row] for row in ids], np.float32)
    return ids, targets


def fitted(tmp_path, *, stop_at=None, seed=0, config=None):
    """Fit a tiny model; with `stop_at`, be killed at that step and go on."""
    shape = tiny_config()
    config = config or TrainingConfig(epochs=3, batch_size=8, learning_rate=1e-3, seed=seed, checkpoint_minutes=0)
    ids, targets = rows_of(60)

    def run():
        model = build_classifier(shape, 2)
        set_weights(model, shape, random_weights(shape, 2, scale=0.1))
        calls = 0

        def loss(logits, target):
            return binary_cross_entropy(logits, target)

        class Killed(Exception):
            pass

        class Killer:
            def __init__(self, *_, **__):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def advance(self, n=1, note=""):
                nonlocal calls
                calls += 1
                if stop_at is not None and calls == stop_at:
                    raise Killed

            def skip(self, n):
                pass

        killed = False
        try:
            fit(
                model, ids, [targets], loss, config,
                pad_token_id=0, work_dir=tmp_path, fingerprint="f", progress_factory=Killer,
            )  # fmt: skip
        except Killed:
            killed = True
        return model, killed

    model, killed = run()
    if stop_at is not None:
        assert killed
        stop_at = None
        model, _ = run()
    return predict_logits(model, ids, pad_token_id=0)


def test_a_killed_fit_ends_with_the_numbers_of_an_unbroken_one(tmp_path):
    whole = fitted(tmp_path / "whole")
    broken = fitted(tmp_path / "broken", stop_at=13)
    np.testing.assert_allclose(broken, whole, atol=1e-6)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert [entry["step"] for entry in logs[1]] == list(range(24))  # 60 rows in batches of 8, 3 epochs
    assert [e["loss"] for e in logs[0]] == pytest.approx([e["loss"] for e in logs[1]], abs=1e-6)


def test_a_damaged_or_foreign_checkpoint_is_not_used(tmp_path):
    whole = fitted(tmp_path / "whole")
    for name, damage in {"cut": lambda b: b[: int(len(b) * 0.6)], "empty": lambda b: b""}.items():
        fitted(tmp_path / name, stop_at=13, config=None)
        path = tmp_path / name / "checkpoint.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        np.testing.assert_allclose(fitted(tmp_path / name), whole, atol=1e-6)


def fitted_in_parts(tmp_path, monkeypatch, n_cores, *, n_rows, dropout_rate):
    monkeypatch.setattr("emodistill.training._cores_side_by_side", lambda: n_cores)
    shape = tiny_config()
    model = build_classifier(shape, 2, **dict.fromkeys(DROPOUTS, dropout_rate))
    set_weights(model, shape, random_weights(shape, 2))
    ids, targets = rows_of(n_rows)
    config = TrainingConfig(epochs=2, batch_size=24, learning_rate=1e-3)
    fit(
        model, ids, [targets], binary_cross_entropy, config,
        pad_token_id=0, work_dir=tmp_path / f"{n_cores}", fingerprint="f",
    )  # fmt: skip
    return predict_logits(model, ids, pad_token_id=0)


def test_a_batch_in_parts_gives_the_update_of_the_whole_batch(tmp_path, monkeypatch):
    # 49 rows in batches of 24: the last batch is a single row, fewer than the parts; the others are split in 8 + 8 + 8.
    whole, parts = (fitted_in_parts(tmp_path, monkeypatch, n, n_rows=49, dropout_rate=0.0) for n in (1, 3))
    np.testing.assert_allclose(parts, whole, atol=2e-5)


def test_parts_of_a_batch_draw_different_masks(tmp_path):
    model = build_classifier(tiny_config(), 2)
    states = []
    for part in (0, 1, 0):
        set_dropout_state(model, 3, 7, part=part)
        states.append(
            [layer.state.numpy().tolist() for layer in model.layers if getattr(layer, "state", None) is not None]
        )
    assert states[0] == states[2]
    seen = [tuple(state) for state in states[0] + states[1]]
    assert len(set(seen)) == len(seen)


def test_another_seed_gives_other_numbers(tmp_path):
    assert np.abs(fitted(tmp_path / "a") - fitted(tmp_path / "b", seed=1)).max() > 1e-3


def test_a_loss_that_is_no_number_stops_the_fit_and_is_not_stored(tmp_path):
    shape = tiny_config()
    model = build_classifier(shape, 2)
    set_weights(model, shape, random_weights(shape, 2))
    ids, targets = rows_of(20)
    targets[7] = np.nan
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+ of training: lower the learning rate"):
        fit(
            model, ids, [targets], binary_cross_entropy, TrainingConfig(epochs=1, batch_size=4),
            pad_token_id=0, work_dir=tmp_path, fingerprint="f",
        )  # fmt: skip
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_predictions_keep_the_order_of_the_rows():
    shape = tiny_config()
    model = build_classifier(shape, 2)
    set_weights(model, shape, random_weights(shape, 2))
    ids, _ = rows_of(53)
    together = predict_logits(model, ids, pad_token_id=0)
    alone = np.concatenate([predict_logits(model, [row], pad_token_id=0) for row in ids])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_two_words_are_learned_and_unused_word_rows_stay(tmp_path):
    # D10: one sigmoid per label, so each of two words drives its own label and neither drives the other's.
    start = tiny_checkpoint()
    texts = ["thank you", "sorry", "thank you . sorry", "a"] * 16
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]] * 16, np.float32)
    trained, logits = train_classifier(
        start, texts, [labels], binary_cross_entropy,
        TrainingConfig(epochs=25, batch_size=8, learning_rate=5e-3, checkpoint_minutes=60),
        precision="float32", dropout_rate=0.0, attention_dropout_rate=0.0, classifier_dropout_rate=0.0,
        evaluation_texts={"dev": texts[:4]}, work_dir=tmp_path, fingerprint="f",
    )  # fmt: skip
    probabilities = 1 / (1 + np.exp(-logits["dev"]))
    assert (np.abs(probabilities - labels[:4]) < 0.2).all(), probabilities
    word = "embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(trained.weights[word][8], start.weights[word][8])  # "love" never occurs
    assert np.abs(trained.weights[word][7] - start.weights[word][7]).max() > 1e-3  # "sorry" does


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="epochs = 0 is out of range"):
        TrainingConfig(epochs=0)
