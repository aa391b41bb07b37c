"""The fast graph against the definitions, node by node, for every family, pooling and batch."""

import numpy as np
import pytest
from tiny_checkpoints import make_checkpoint, make_rows, reference_logits, reference_states

onnx = pytest.importorskip("onnx")

from emodistill.errors import ConfigError  # noqa: E402
from emodistill.export.bundle import build_fast  # noqa: E402
from emodistill.export.fused import build_fused  # noqa: E402
from emodistill.export.verification import Session  # noqa: E402

FAMILIES = ("bert", "distilbert", "roberta", "mpnet")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_follow_the_definition(family, pooling):
    checkpoint = make_checkpoint(family, pooling=pooling)
    rows = make_rows(2, 3, 11, 48)
    logits = Session(build_fast(checkpoint, "fp32")).logits(rows)
    expected = reference_logits(checkpoint, rows)
    assert expected.std() > 0.3  # not a comparison of zeros
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_padded_batch_gives_each_text_its_own_logits(family, pooling):
    checkpoint = make_checkpoint(family, pooling=pooling)
    rows = make_rows(2, 30, 7, 48, 7)
    session = Session(build_fast(checkpoint, "fp32", masked=True))
    ids = np.full((5, 48), 37, np.int32)  # padded with an ordinary piece: only the mask says what is real
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    logits, probabilities = session.run(["logits", "probabilities"], session.feeds(ids, mask))
    expected = reference_logits(checkpoint, rows)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-expected)), atol=1e-4)


def test_factorized_embedding():
    checkpoint = make_checkpoint(embedding_size=16)
    rows = make_rows(5, 9)
    logits = Session(build_fast(checkpoint, "fp32")).logits(rows)
    np.testing.assert_allclose(logits, reference_logits(checkpoint, rows), atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_state_follows_the_definition(pooling):
    checkpoint = make_checkpoint(pooling=pooling)
    model = build_fused(
        checkpoint.config,
        checkpoint.weights,
        pooling=pooling,
        max_length_tokens=48,
        masked=False,
        expose_linear_inputs=True,
    )
    session = Session(model)
    row = make_rows(13)[0]
    states = reference_states(checkpoint, row)
    seen = 0
    for name in session.output_names[2:]:
        value = session.run([name], session.feeds(row[None]))[0][0]
        expected = states["layer.0.output.LayerNorm"] if name == "layer.1.first" else states[name]
        np.testing.assert_allclose(value, expected[: len(value)], atol=1e-4, err_msg=name)
        seen += 1
    # embeddings norm, then context, attention norm and gelu of two layers and the first layer's output norm between
    assert seen == (8 if pooling == "mean" else 9)


def test_approximate_gelu_is_within_its_bound():
    checkpoint = make_checkpoint()
    model = build_fused(
        checkpoint.config,
        checkpoint.weights,
        pooling="mean",
        max_length_tokens=48,
        masked=False,
        approximate_gelu=True,
        expose_linear_inputs=True,
    )
    session = Session(model)
    row = make_rows(40)[0]
    value = session.run(["layer.0.gelu"], session.feeds(row[None]))[0][0]
    difference = np.abs(value - reference_states(checkpoint, row)["layer.0.gelu"]).max()
    assert 1e-4 < difference < 6e-4  # it is the other form, and at most 0.00048 away (and float32 rounding)


def test_swapped_queries_and_keys_would_be_seen():
    checkpoint = make_checkpoint()
    rows = make_rows(9, 20)
    weights = dict(checkpoint.weights)
    for part in ("weight", "bias"):
        a, b = f"layer.0.attention.query.{part}", f"layer.0.attention.key.{part}"
        weights[a], weights[b] = weights[b], weights[a]
    swapped = Session(build_fused(checkpoint.config, weights, pooling="mean", max_length_tokens=48, masked=False))
    assert np.abs(swapped.logits(rows) - reference_logits(checkpoint, rows)).max() > 0.01


def test_last_layer_of_cls_pooling_computes_one_position():
    checkpoint = make_checkpoint(pooling="cls")
    model = build_fused(
        checkpoint.config,
        checkpoint.weights,
        pooling="cls",
        max_length_tokens=48,
        masked=False,
        expose_linear_inputs=True,
    )
    session = Session(model)
    names = ["layer.0.gelu", "layer.1.attention.context", "layer.1.gelu"]
    shapes = [value.shape for value in session.run(names, session.feeds(make_rows(13)[0][None]))]
    assert shapes == [(1, 13, 64), (1, 1, 32), (1, 1, 64)]


def test_inputs_are_int32_and_symbolic_and_nodes_are_few():
    model = build_fast(make_checkpoint(), "fp32")
    assert [value.name for value in model.graph.input] == ["input_ids"]
    tensor = model.graph.input[0].type.tensor_type
    assert tensor.elem_type == onnx.TensorProto.INT32
    assert [dimension.dim_param for dimension in tensor.shape.dim] == ["batch", "sequence"]
    # per layer: 4 products and 4 additions (packed), split, attention, gelu, 2 sums, 2 norms = 15
    assert len(model.graph.node) == 2 * 15 + 8
    # as int8 the additions move into the products: 11; the table takes 4 nodes instead of 1
    assert len(build_fast(make_checkpoint(), "int8-dynamic").graph.node) == 2 * 11 + 8 + 3
    onnx.checker.check_model(model, full_check=False)


def test_positions_too_few():
    checkpoint = make_checkpoint()
    with pytest.raises(ConfigError, match="max_length_tokens is 65, but the encoder has positions for 64"):
        build_fused(checkpoint.config, checkpoint.weights, pooling="mean", max_length_tokens=65, masked=False)


def test_unknown_pooling_and_precision():
    checkpoint = make_checkpoint()
    with pytest.raises(ConfigError, match="pooling 'max' is unknown"):
        build_fused(checkpoint.config, checkpoint.weights, pooling="max", max_length_tokens=8, masked=False)
    with pytest.raises(ConfigError, match="precision 'int4' is unknown"):
        build_fast(checkpoint, "int4")
    with pytest.raises(ConfigError, match="int8-static needs activation_ranges"):
        build_fast(checkpoint, "int8-static")
