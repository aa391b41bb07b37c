"""Compression: what the second training leaves in the weights, and that the student still answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import PIECES, tiny_checkpoint

pytest.importorskip("tensorflow_model_optimization")

from emodistill.checkpoints import ModelCheckpoint
from emodistill.classifier_training import train_classifier
from emodistill.distill.compression import (
    Clustered,
    Pruned,
    QuantizationAware,
    compressed_sizes,
    distinct_values,
    input_names,
    sparsity_of,
)
from emodistill.losses import binary_cross_entropy
from emodistill.training_config import TrainingConfig

PLAIN = dict(dropout_rate=0.0, attention_dropout_rate=0.0, classifier_dropout_rate=0.0, precision="float32")
WORDS = [piece for piece in PIECES[5:] if piece.isalpha()]
ROWS = 96


def fitted(start, arrange, folder: Path, epochs=4, rate=1e-2, checkpoint_minutes=3.0):
    """Train to tell thanks and regret; return the checkpoint and the logits of the training texts."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(2, 6))) for _ in range(ROWS)]
    labels = np.array([["thank" in text, "sorry" in text] for text in texts], np.float32)
    config = TrainingConfig(
        epochs=epochs, batch_size=8, learning_rate=rate, warmup_fraction=0.1, checkpoint_minutes=checkpoint_minutes
    )
    trained, logits = train_classifier(
        start, texts, [labels], binary_cross_entropy, config, evaluation_texts={"train": texts}, work_dir=folder,
        fingerprint="f", arrange=arrange, **PLAIN,
    )  # fmt: skip
    return trained, logits["train"], labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> ModelCheckpoint:
    start = tiny_checkpoint(hidden_size=32, intermediate_size=64, embedding_size=16)
    checkpoint, logits, labels = fitted(start, None, tmp_path_factory.mktemp("plain"), epochs=10)
    assert ((logits > 0) == labels).mean() > 0.98
    return replace(checkpoint, pooling="mean")


def test_half_of_the_weights_become_zero_and_the_file_smaller(trained, tmp_path):
    assert sparsity_of(trained.weights) < 0.01
    pruned, logits, labels = fitted(trained, Pruned(0.5, n_steps=4 * 12), tmp_path, rate=3e-3)
    for name, value in pruned.weights.items():
        if name.startswith("layer.") and value.ndim == 2 and "attention" not in name:
            assert (value == 0).mean() == pytest.approx(0.5, abs=0.01), name
    assert sparsity_of(pruned.weights) == pytest.approx(0.5, abs=0.01)
    assert (pruned.weights["classifier.weight"] != 0).all()
    before, after = compressed_sizes(trained.weights), compressed_sizes(pruned.weights)
    assert after["float16"] < 0.85 * before["float16"]
    assert after["int8"] < 0.95 * before["int8"]
    assert ((logits > 0) == labels).mean() > 0.95


def test_few_values_are_left_and_the_file_smaller(trained, tmp_path):
    assert distinct_values(trained.weights) > 500
    clustered, logits, labels = fitted(trained, Clustered(8), tmp_path, epochs=2, rate=1e-3)
    assert 4 <= distinct_values(clustered.weights) <= 8
    before, after = compressed_sizes(trained.weights), compressed_sizes(clustered.weights)
    assert after["float16"] < 0.5 * before["float16"]
    assert ((logits > 0) == labels).mean() > 0.95


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_training_for_int8_leaves_ranges_for_each_linear_layer(trained, tmp_path, pooling):
    onnxruntime = pytest.importorskip("onnxruntime")
    from emodistill.export.fused import build_fused
    from emodistill.export.quantization import ActivationRange, observe_ranges, static_linear

    arrange = QuantizationAware(trained.config, pooling)
    student, logits, labels = fitted(replace(trained, pooling=pooling), arrange, tmp_path, epochs=6, rate=3e-3)
    assert ((logits > 0) == labels).mean() > 0.95
    ranges = {name: ActivationRange(*ends) for name, ends in arrange.ranges.items()}

    settings = dict(pooling=pooling, max_length_tokens=16, masked=False)
    exact = build_fused(student.config, student.weights, **settings, expose_linear_inputs=True)
    ids = [np.array([2, 5, 6, 7, 3], np.int32), np.array([2, 7, 12, 8, 9, 3], np.int32), np.array([2, 10, 3], np.int32)]
    observed = observe_ranges(exact, ids)
    assert ranges.keys() == observed.keys()  # one for each tensor that enters a linear layer, by the exporter's name
    for name, seen in observed.items():
        span = seen.high - seen.low
        assert ranges[name].low < seen.low + 0.5 * span, name
        assert ranges[name].high > seen.high - 0.5 * span, name
        assert ranges[name].high - ranges[name].low < 4 * span, name

    static = build_fused(student.config, student.weights, **settings, linear=static_linear(ranges))
    sessions = [onnxruntime.InferenceSession(m.SerializeToString()) for m in (exact, static)]
    for row in ids:
        whole, rounded = (session.run(["logits"], {"input_ids": row[None]})[0] for session in sessions)
        assert np.isfinite(rounded).all()
        assert np.abs(whole - rounded).max() < 0.15 * np.abs(whole).max() + 0.3


def test_weights_are_trained_on_the_exporters_grid():
    from emodistill.distill.compression import _WeightGrid
    from emodistill.export.quantization import quantize_weight

    kernel = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    values, scales = quantize_weight(kernel.T, n_bits=7)
    np.testing.assert_allclose(_WeightGrid()(kernel, True, {}), values * scales, atol=1e-6)


def test_all_linear_layers_but_the_classifier_have_names():
    config = tiny_checkpoint(hidden_size=32, embedding_size=16).config
    assert input_names(config, "cls")["layer_1_qkv"] == ("layer.0.output.LayerNorm", "layer.1.first")
    assert input_names(config, "mean")["layer_1_qkv"] == ("layer.0.output.LayerNorm",)
    assert len(input_names(config, "cls")) == 4 * 2 + 1


@pytest.mark.parametrize("arrange", [lambda s: QuantizationAware(s.config, s.pooling), lambda s: Pruned(0.5, 24)])
def test_a_killed_compression_goes_on_to_the_same_numbers(trained, tmp_path, monkeypatch, arrange):
    from emodistill import training

    first, killed, resumed = (arrange(trained) for _ in range(3))
    _, whole, _ = fitted(trained, first, tmp_path / "whole", epochs=2)
    save, steps = training._Checkpoint.save, []

    def stop(self, next_step):
        save(self, next_step)
        steps.append(next_step)
        if len(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        fitted(trained, killed, tmp_path / "killed", epochs=2, checkpoint_minutes=0.0)  # one each step
    monkeypatch.undo()
    _, again, _ = fitted(trained, resumed, tmp_path / "killed", epochs=2)
    np.testing.assert_allclose(again, whole, atol=1e-4)
    if isinstance(resumed, QuantizationAware):
        assert resumed.ranges.keys() == first.ranges.keys()
        for name, ends in first.ranges.items():
            assert resumed.ranges[name] == pytest.approx(ends, abs=1e-5)
