"""int8 against integer arithmetic done by hand, and the laws that static and dynamic scales obey."""

import numpy as np
import pytest
from tiny_checkpoints import make_checkpoint, make_rows, reference_logits, reference_states

onnx = pytest.importorskip("onnx")

from emodistill.errors import ConfigError  # noqa: E402
from emodistill.export.bundle import build_fast  # noqa: E402
from emodistill.export.fused import build_fused  # noqa: E402
from emodistill.export.quantization import (  # noqa: E402
    ActivationRange,
    integer_weights,
    largest_weight,
    observe_ranges,
    quantize_weight,
)
from emodistill.export.verification import Session  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint():
    return make_checkpoint()


@pytest.fixture(scope="module")
def ranges(checkpoint):
    return observe_ranges(_exposed(checkpoint), make_rows(*range(2, 49)))


def _exposed(checkpoint):
    return build_fused(
        checkpoint.config,
        checkpoint.weights,
        pooling=checkpoint.pooling,
        max_length_tokens=48,
        masked=False,
        expose_linear_inputs=True,
    )


def test_weights_by_hand():
    # row 0: scale 1 / 64, so 1.0 -> 64 and -0.5 -> -32; row 1: scale 0.2 / 64, so 0.1 -> 32 and 0.2 -> 64
    quantized = quantize_weight(np.array([[1.0, -0.5], [0.1, 0.2]], np.float32))
    assert quantized.values.tolist() == [[64, 32], [-32, 64]]  # (in, out)
    np.testing.assert_allclose(quantized.scales, [1 / 64, 0.2 / 64], rtol=1e-6)


@pytest.mark.parametrize(("n_bits", "limit"), [(7, 64), (8, 127)])
def test_every_channel_uses_its_whole_range(n_bits, limit):
    weight = np.random.default_rng(0).normal(0, [[0.01], [1.0], [100.0]], (3, 50)).astype(np.float32)
    values = quantize_weight(weight, n_bits=n_bits).values
    assert np.abs(values).max(axis=0).tolist() == [limit] * 3


def test_a_channel_of_zeros_stays_zero():
    quantized = quantize_weight(np.zeros((1, 4), np.float32))
    assert not quantized.values.any()
    assert np.isfinite(quantized.scales).all()


def test_other_bits_are_refused():
    with pytest.raises(ConfigError, match="4 bits are not offered: choose 7 or 8"):
        quantize_weight(np.ones((1, 1), np.float32), n_bits=4)


def test_range_by_hand():
    # -1 .. 3 in 255 steps: scale 4 / 255, zero at 1 / (4 / 255) = 63.75 -> 64
    scale, zero_point = ActivationRange(-1.0, 3.0).scale_and_zero_point()
    assert scale == pytest.approx(4 / 255)
    assert zero_point == 64
    # 2 .. 5 is widened to 0 .. 5
    assert ActivationRange(2.0, 5.0).scale_and_zero_point() == (pytest.approx(5 / 255), 0)


def test_observed_ranges_are_the_extremes(checkpoint):
    rows = make_rows(5, 21)
    ranges = observe_ranges(_exposed(checkpoint), rows)
    states = [reference_states(checkpoint, row)["layer.1.gelu"] for row in rows]
    assert ranges["layer.1.gelu"].low == pytest.approx(min(s.min() for s in states), abs=1e-4)
    assert ranges["layer.1.gelu"].high == pytest.approx(max(s.max() for s in states), abs=1e-4)


def test_one_static_layer_is_integer_arithmetic(checkpoint, ranges):
    model = build_fast(checkpoint, "int8-static", activation_ranges=ranges)
    name = "layer.0.intermediate"
    x, u8 = "layer.0.attention.LayerNorm", "layer.0.attention.LayerNorm.u8"
    for output in (x, u8, name):
        model.graph.output.append(onnx.ValueInfoProto(name=output))
    session = Session(model)
    value, codes, result = session.run([x, u8, name], session.feeds(make_rows(9)[0][None]))
    scale, zero_point = ranges[x].scale_and_zero_point()
    expected_codes = np.clip(np.rint(value / scale) + zero_point, 0, 255)
    assert (codes == expected_codes).all()
    weight = quantize_weight(checkpoint.weights[f"{name}.weight"])
    sums = (codes.astype(np.int64) - int(zero_point)) @ weight.values.astype(np.int64)
    expected = sums * float(scale) * weight.scales.astype(np.float64) + checkpoint.weights[f"{name}.bias"]
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "pooling", "embedding_size"),
    [("bert", "mean", 0), ("bert", "cls", 0), ("bert", "cls", 16), ("mpnet", "mean", 0), ("mpnet", "cls", 0)],
)
def test_int8_stays_near_float(family, pooling, embedding_size):
    checkpoint = make_checkpoint(family, pooling=pooling, embedding_size=embedding_size)
    ranges = observe_ranges(_exposed(checkpoint), make_rows(*range(2, 49)))
    rows = make_rows(4, 12, 33, 48, seed=8)
    expected = reference_logits(checkpoint, rows)
    for precision in ("int8-dynamic", "int8-static"):
        logits = Session(build_fast(checkpoint, precision, activation_ranges=ranges)).logits(rows)
        error = np.abs(logits - expected)
        assert 1e-4 < error.max() < 0.25 * expected.std(), precision  # int8 rounds; a wrong scale would be far off
        assert error.mean() < 0.06 * expected.std(), precision


def test_static_scales_do_not_mind_neighbours_and_dynamic_ones_do(checkpoint, ranges):
    rows = make_rows(17, 17, 17, 17)
    rows[3][:] = rows[3][0]
    differences = {}
    for precision in ("int8-static", "int8-dynamic"):
        session = Session(build_fast(checkpoint, precision, activation_ranges=ranges))
        together = session.run(["logits"], session.feeds(np.stack(rows)))[0]
        differences[precision] = np.abs(together - session.logits(rows)).max()
    assert differences["int8-static"] < 1e-5
    assert differences["int8-dynamic"] > 1e-3


def test_static_graph_with_a_mask_answers_the_same(checkpoint, ranges):
    rows = make_rows(6, 20)
    alone = Session(build_fast(checkpoint, "int8-static", activation_ranges=ranges)).logits(rows)
    session = Session(build_fast(checkpoint, "int8-static", activation_ranges=ranges, masked=True))
    ids, mask = np.zeros((2, 20), np.int32), np.zeros((2, 20), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    np.testing.assert_allclose(session.run(["logits"], session.feeds(ids, mask))[0], alone, atol=1e-5)


def test_shipped_weights_cannot_saturate_and_full_range_ones_can(checkpoint, ranges):
    for precision in ("int8-dynamic", "int8-static"):
        safe = build_fast(checkpoint, precision, activation_ranges=ranges)
        full = build_fast(checkpoint, precision, activation_ranges=ranges, weight_bits=8)
        assert largest_weight(safe) == 64
        assert largest_weight(full) == 127
        # per layer query, key and value packed or apart, two projections and the output
        assert len(integer_weights(safe)) == (8 if precision == "int8-dynamic" else 12)


def test_word_table_is_int8_with_a_scale_per_row(checkpoint):
    model = build_fast(checkpoint, "int8-dynamic")
    model.graph.output.append(onnx.ValueInfoProto(name="embeddings.word_embeddings"))
    session = Session(model)
    row = make_rows(8)[0]
    found = session.run(["embeddings.word_embeddings"], session.feeds(row[None]))[0][0]
    table = checkpoint.weights["embeddings.word_embeddings.weight"][row]
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - table) <= step / 2 + 1e-6).all()
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored["embeddings.word_embeddings.weight_int8"].data_type == onnx.TensorProto.INT8
