"""The encoder as a function: padding, batches, dropout and precision change nothing they should not."""

import numpy as np
import pytest
from models import random_weights, tiny_checkpoint, tiny_config

tf = pytest.importorskip("tensorflow")

from emodistill.checkpoints import encoder_weight_shapes, load_checkpoint, save_checkpoint  # noqa: E402
from emodistill.encoder_graph import build_classifier, get_weights, set_dropout_state, set_weights  # noqa: E402
from emodistill.errors import ArtifactError, ConfigError, EncoderError  # noqa: E402

IDS = np.array([[2, 5, 6, 11, 3], [2, 7, 3, 0, 0], [2, 8, 9, 3, 0]], np.int32)
MASK = (IDS > 0).astype(np.int32)


def model_of(config, n_labels=3, **settings):
    model = build_classifier(config, n_labels, **settings)
    set_weights(model, config, random_weights(config, n_labels))
    return model


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_padding_and_neighbours_leave_logits_unchanged(family, pooling):
    extra = {"family": "mpnet", "type_vocab_size": 0, "relative_attention_buckets": 8} if family == "mpnet" else {}
    model = model_of(tiny_config(**extra), pooling=pooling)
    together = model([IDS, MASK]).numpy()
    assert np.ptp(together, axis=0).min() > 0.05  # the rows differ: the comparison below is not vacuous
    for row in range(3):
        n = MASK[row].sum()
        alone = model([IDS[row : row + 1, :n], MASK[row : row + 1, :n]]).numpy()
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_weights_come_back_as_they_went_in():
    config = tiny_config(embedding_size=8)
    weights = random_weights(config, 3)
    model = build_classifier(config, 3)
    set_weights(model, config, weights)
    found = get_weights(model, config)
    assert set(found) == set(encoder_weight_shapes(config)) | {"classifier.weight", "classifier.bias"}
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_missing_or_misshapen_weight_is_refused():
    config = tiny_config()
    weights = random_weights(config, 3)
    model = build_classifier(config, 3)
    name = "layer.1.attention.key.weight"
    with pytest.raises(EncoderError, match=r"layer\.1\.attention\.key\.weight' is missing"):
        set_weights(model, config, {n: w for n, w in weights.items() if n != name})
    with pytest.raises(EncoderError, match=r"has shape \(16, 15\), expected \(16, 16\)"):
        set_weights(model, config, weights | {name: weights[name][:, :15]})


def test_dropout_is_a_function_of_seed_and_step():
    model = model_of(tiny_config(), dropout_rate=0.3, attention_dropout_rate=0.3)

    def logits(seed, step):
        set_dropout_state(model, seed, step)
        return model([IDS, MASK], training=True).numpy()

    np.testing.assert_array_equal(logits(1, 5), logits(1, 5))
    assert np.abs(logits(1, 5) - logits(1, 6)).max() > 1e-3
    assert np.abs(logits(1, 5) - logits(2, 5)).max() > 1e-3


def test_dropout_keeps_the_mean():
    from emodistill.encoder_graph import _dropout

    dropped = _dropout(tf.ones((400, 500)), 0.1, tf.constant([3, 4])).numpy()
    # 26 of 256 levels drop, so 0.8984 of 200,000 entries stay and are scaled by 256/230; sd of the share 0.0007.
    assert abs((dropped > 0).mean() - 230 / 256) < 0.004
    assert abs(dropped.mean() - 1) < 0.004


def test_training_mode_has_the_same_values_and_right_gradients():
    config = tiny_config()
    model = model_of(config, dropout_rate=0.0, attention_dropout_rate=0.0, classifier_dropout_rate=0.0)
    np.testing.assert_allclose(model([IDS, MASK], training=True), model([IDS, MASK]), atol=1e-5)
    gamma = model.get_layer("layer_0_output_norm").gamma
    kernel = model.get_layer("layer_0_intermediate").kernel
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(model([IDS, MASK], training=True) ** 2)
    gradients = tape.gradient(value, [gamma, kernel])
    for variable, gradient in zip((gamma, kernel), gradients, strict=True):
        start = variable.numpy()
        direction = np.random.default_rng(0).standard_normal(start.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        step = 1e-2
        sides = []
        for sign in (1, -1):
            variable.assign(start + sign * step * direction)
            sides.append(float(tf.reduce_sum(model([IDS, MASK]) ** 2)))
        variable.assign(start)
        expected = (sides[0] - sides[1]) / (2 * step)
        assert expected == pytest.approx(float(np.sum(gradient.numpy() * direction)), rel=0.02, abs=1e-3)


def test_bfloat16_is_near_float32_in_batches_of_very_short_and_long_rows():
    # D11: the number that hides padding stays finite, and so do the logits.
    config = tiny_config()
    ids = np.zeros((2, 20), np.int32)
    ids[0, :2] = [2, 3]
    ids[1] = [2, *([5, 6, 7, 8, 9] * 4)[:18], 3]
    mask = (ids > 0).astype(np.int32)
    exact = model_of(config).predict([ids, mask], verbose=0)
    rounded = model_of(config, precision="bfloat16").predict([ids, mask], verbose=0)
    assert np.isfinite(rounded).all()
    np.testing.assert_allclose(rounded, exact, atol=0.05)


def test_a_checkpoint_folder_reads_back(tmp_path):
    checkpoint = tiny_checkpoint()
    save_checkpoint(tmp_path, checkpoint)
    found = load_checkpoint(tmp_path)
    assert (found.config, found.pooling, found.label_names) == (checkpoint.config, "mean", ("gratitude", "remorse"))
    for name, value in checkpoint.weights.items():
        np.testing.assert_array_equal(found.weights[name], value)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match="pooling 'max' is unknown: choose from cls, mean"):
        build_classifier(tiny_config(), 2, pooling="max")
    with pytest.raises(EncoderError, match="encoder family 'gpt2' is unknown: known are bert, distilbert"):
        tiny_config(family="gpt2")


def test_a_checkpoint_in_several_files_is_the_same(tmp_path):
    checkpoint = tiny_checkpoint()
    save_checkpoint(tmp_path, checkpoint)
    limit = checkpoint.weights["embeddings.word_embeddings.weight"].nbytes
    save_checkpoint(tmp_path, checkpoint, max_file_bytes=limit)
    paths = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(paths) > 1
    assert paths[-1] == f"weights-{len(paths):05d}-of-{len(paths):05d}.safetensors"  # and no earlier one is left
    for name, array in load_checkpoint(tmp_path).weights.items():
        np.testing.assert_array_equal(array, checkpoint.weights[name])
    (tmp_path / paths[0]).unlink()
    with pytest.raises(ArtifactError, match=rf"{paths[0]} is missing"):
        load_checkpoint(tmp_path)
