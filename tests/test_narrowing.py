"""Narrower encoders: their shapes, what the same width gives, and what is kept."""

import numpy as np
import pytest
from models import random_weights, tiny_config, write_encoder_folder

keras = pytest.importorskip("tf_keras")

from emodistill.checkpoints import encoder_weight_shapes  # noqa: E402
from emodistill.distill.narrowing import narrow_encoder  # noqa: E402
from emodistill.distill.students import StudentConfig, student_start  # noqa: E402
from emodistill.encoder_graph import build_classifier, set_weights  # noqa: E402
from emodistill.errors import ConfigError  # noqa: E402
from emodistill.training import pad_batch  # noqa: E402

MPNET = dict(family="mpnet", type_vocab_size=0, pad_token_id=1, relative_attention_buckets=8)


def token_ids(n=120, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 14, generator.integers(3, 12)).astype(np.int32) for _ in range(n)]


def encoder(seed=0, **changes):
    config = tiny_config(**changes)
    weights = random_weights(config, 1, seed=seed, scale=0.2)
    return config, {name: value for name, value in weights.items() if not name.startswith("classifier")}


def states(config, weights, rows):
    model = build_classifier(config, 1)
    set_weights(model, config, weights)
    ids, mask = pad_batch(rows, config.pad_token_id)
    top = keras.Model(model.inputs, model.get_layer(f"layer_{config.n_layers - 1}_output_norm").output)
    return top([ids, mask]).numpy()[mask.ravel() == 1]


@pytest.mark.parametrize("changes", [{}, MPNET, {"embedding_size": 6}])
def test_every_weight_has_the_narrow_shape(changes):
    config, weights = encoder(**changes)
    narrow, made = narrow_encoder(config, weights, token_ids(), 8)
    assert (narrow.hidden_size, narrow.n_heads, narrow.head_size, narrow.intermediate_size) == (8, 2, 4, 16)
    assert {name: value.shape for name, value in made.items()} == encoder_weight_shapes(narrow)
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in made.values())
    assert np.isfinite(states(narrow, made, token_ids(3))).all()


@pytest.mark.parametrize("changes", [{}, MPNET])
def test_the_encoders_own_width_is_the_identity(changes):
    config, weights = encoder(**changes)
    same, made = narrow_encoder(config, weights, token_ids(), 16)
    assert same == config
    for name, value in weights.items():
        np.testing.assert_allclose(made[name], value, atol=2e-4, err_msg=name)


def test_a_narrow_encoder_answers_like_the_wide_one():
    config, weights = encoder()
    narrow, made = narrow_encoder(config, weights, token_ids(), 12)
    rows = token_ids(60, seed=1)  # texts that did not decide on the basis
    wide, slim = states(config, weights, rows), states(narrow, made, rows)
    cut = {name: value.copy() for name, value in weights.items()}  # the plain way: the first 12 of everything
    for name, shape in encoder_weight_shapes(narrow).items():
        cut[name] = weights[name][tuple(slice(n) for n in shape)]

    def explained(features):
        """Share of the wide states' variance that a linear map of the narrow ones explains."""
        inputs = np.column_stack([features, np.ones(len(features))])
        fitted, *_ = np.linalg.lstsq(inputs, wide, rcond=None)
        return 1 - ((wide - inputs @ fitted) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum()

    assert explained(slim) > explained(states(narrow, cut, rows)) + 0.05


def test_the_heads_and_units_that_write_are_kept():
    config, weights = encoder()
    for layer, heads in enumerate([(1, 3), (0, 2)]):
        silent = [unit for head in range(4) if head not in heads for unit in range(4 * head, 4 * head + 4)]
        weights[f"layer.{layer}.attention.output.weight"][:, silent] = 0
    weights["layer.0.output.weight"][:, ::2] = 0  # the odd units of 32 write
    _, made = narrow_encoder(config, weights, token_ids(), 8)
    # 24 position rows in 16 dimensions tell the basis p exactly: made = rows @ p.
    position = "embeddings.position_embeddings.weight"
    p, *_ = np.linalg.lstsq(weights[position], made[position], rcond=None)
    np.testing.assert_allclose(p.T @ p, np.eye(8), atol=1e-5)
    name = "layer.0.intermediate.weight"
    np.testing.assert_allclose(made[name], weights[name][1::2] @ p, atol=1e-5)
    for layer, kept in enumerate([(4, 5, 6, 7, 12, 13, 14, 15), (0, 1, 2, 3, 8, 9, 10, 11)]):
        query, output = (f"layer.{layer}.attention.{part}.weight" for part in ("query", "output"))
        np.testing.assert_allclose(made[query], weights[query][list(kept)] @ p, atol=1e-5)
        np.testing.assert_allclose(made[output], p.T @ weights[output][:, list(kept)], atol=1e-5)


def test_widths_that_heads_do_not_fill_are_refused(tmp_path):
    config, weights = encoder()
    for width in (10, 20):
        with pytest.raises(ConfigError, match=rf"hidden_size = {width}: expected a multiple of 4 .* up to 16"):
            narrow_encoder(config, weights, token_ids(), width)
    folder = write_encoder_folder(tmp_path)
    with pytest.raises(ConfigError, match="hidden_size = 24: expected a multiple of 4"):
        student_start(StudentConfig(layers=(0,), hidden_size=24), folder, ["a"], ("joy",))


def test_a_narrow_student_is_cut_and_factorized(tmp_path):
    folder = write_encoder_folder(tmp_path, n_layers=3)
    texts = ["thank you", "sorry a", "love lol great", "a . a"]
    student = StudentConfig(layers=(0, 2), vocabulary_size=12, hidden_size=12, embedding_size=8, max_length_tokens=9)
    start = student_start(student, folder, texts, ("joy", "anger"))
    assert (start.config.n_layers, start.config.hidden_size, start.config.embedding_size) == (2, 12, 8)
    shapes = encoder_weight_shapes(start.config) | {"classifier.weight": (2, 12), "classifier.bias": (2,)}
    assert {name: value.shape for name, value in start.weights.items()} == shapes
