"""The gate: sums that saturate, neighbours that matter, limits that refuse."""

import shutil

import numpy as np
import pytest
from tiny_checkpoints import make_checkpoint, make_rows

onnx = pytest.importorskip("onnx")

from emodistill.errors import VerificationError  # noqa: E402
from emodistill.export.bundle import build_fast  # noqa: E402
from emodistill.export.fused import build_fused  # noqa: E402
from emodistill.export.quantization import observe_ranges  # noqa: E402
from emodistill.export.verification import (  # noqa: E402
    PairSums,
    Session,
    VerificationLimits,
    compare_on_cpu,
    compare_with_reference,
    judge,
    measure_latency,
    neighbour_test,
    pair_sums,
    saturation_report,
)

HALF = np.full(7, 0.5, np.float32)


@pytest.fixture(scope="module")
def graphs():
    checkpoint = make_checkpoint()
    exposed = build_fused(
        checkpoint.config,
        checkpoint.weights,
        pooling="mean",
        max_length_tokens=48,
        masked=False,
        expose_linear_inputs=True,
    )
    ranges = observe_ranges(exposed, make_rows(*range(2, 49)))
    return {
        "fp32": build_fast(checkpoint, "fp32"),
        "fp32 masked": build_fast(checkpoint, "fp32", masked=True),
        "dynamic": build_fast(checkpoint, "int8-dynamic"),
        "static": build_fast(checkpoint, "int8-static", activation_ranges=ranges),
        "static 8 bits": build_fast(checkpoint, "int8-static", activation_ranges=ranges, weight_bits=8),
    }


def test_pair_sums_by_hand():
    # 255 * 64 + 255 * 64 = 32,640 fits 16 bits; 255 * 127 + 255 * 127 = 64,770 does not; -255 * 127 * 2 does not either
    activations = np.full((1, 4), 255, np.uint8)
    assert pair_sums(activations, np.full((4, 1), 64, np.int8)) == PairSums(32640, 0, 2)
    assert pair_sums(activations, np.full((4, 1), -127, np.int8)) == PairSums(64770, 2, 2)
    # opposite signs cancel inside a pair: 255 * 127 - 255 * 127 = 0
    assert pair_sums(activations, np.array([[127], [-127], [127], [-127]], np.int8)) == PairSums(0, 0, 2)
    # an odd inner dimension is filled up with nothing: 3 pairs of 5
    assert pair_sums(np.ones((1, 5), np.uint8), np.ones((5, 1), np.int8)) == PairSums(2, 0, 3)


def test_saturation_of_the_shipped_setting_and_of_full_range(graphs):
    rows = make_rows(20, 30)
    safe = saturation_report(graphs["dynamic"], rows)
    assert (safe["largest_weight"], safe["safe_without_vnni"], safe["n_products"]) == (64, True, 8)
    assert 0 < safe["pair_sums"]["largest"] <= 32640
    assert safe["pair_sums"]["n_saturated"] == 0
    full = saturation_report(graphs["static 8 bits"], rows)
    assert (full["largest_weight"], full["safe_without_vnni"]) == (127, False)
    assert full["pair_sums"]["largest"] > safe["pair_sums"]["largest"]
    assert saturation_report(graphs["fp32"], rows)["safe_without_vnni"]


def test_full_range_weights_with_full_activations_saturate():
    checkpoint = make_checkpoint()
    checkpoint.weights["layer.0.intermediate.weight"][:] = 1.0
    checkpoint.weights["layer.0.attention.LayerNorm.weight"][:] = 0.0
    checkpoint.weights["layer.0.attention.LayerNorm.bias"][:] = 1.0  # activations are all 1, which is 255
    full = saturation_report(build_fast(checkpoint, "int8-dynamic", weight_bits=8), make_rows(4))
    assert full["pair_sums"]["largest"] == 2 * 255 * 127
    assert full["pair_sums"]["n_saturated"] >= 4 * 16 * 64  # 4 tokens, 32 inputs in pairs, 64 outputs
    safe = saturation_report(build_fast(checkpoint, "int8-dynamic"), make_rows(4))
    assert safe["pair_sums"] == {**safe["pair_sums"], "largest": 2 * 255 * 64, "n_saturated": 0}


@pytest.mark.parametrize(
    ("name", "kind", "minds"),
    [
        ("fp32", "equal length", False),
        ("fp32 masked", "padded", False),
        ("static", "equal length", False),
        ("dynamic", "equal length", True),
    ],
)
def test_neighbours(graphs, name, kind, minds):
    rows = make_rows(*np.random.default_rng(1).integers(2, 49, 80))
    found = neighbour_test(Session(graphs[name]), rows, 0, HALF)
    assert found["kind"] == kind
    assert (found["max_logit_difference"] > 1e-3) == minds
    assert found["n_compared"] == (128 if kind == "padded" else 256)
    if not minds:
        assert found["changed_decisions"] == 0


def test_few_texts_can_be_tested_too(graphs):
    for name in ("fp32", "fp32 masked"):
        assert neighbour_test(Session(graphs[name]), make_rows(3, 9), 0, HALF)["max_logit_difference"] < 1e-4


def test_comparison_by_hand():
    reference = np.array([[2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, 2.0]], np.float32)
    logits = reference + np.array([[0.5, 0], [0, 0], [-3.0, 0], [0, 0]], np.float32)
    y_true = (reference > 0).astype(np.int8)
    half = np.full(2, 0.5, np.float32)
    report = compare_with_reference(
        logits, reference, y_true=y_true, thresholds=half, reference_thresholds=half, seed=0
    )
    assert report["max_logit_difference"] == 3.0
    assert report["mean_logit_difference"] == pytest.approx(3.5 / 8)
    assert (report["changed_decisions"], report["n_decisions"]) == (1, 8)
    assert report["micro_f1_keras"] == 1.0
    assert report["micro_f1"] < 1.0
    assert "micro_f1" not in compare_with_reference(
        logits, reference, y_true=None, thresholds=half, reference_thresholds=half
    )


def _report(**changes):
    report = {
        "precision": "int8-static",
        "n_texts": 3000,
        "max_logit_difference": 0.2,
        "mean_logit_difference": 0.02,
        "logit_standard_deviation": 2.0,
        "changed_decisions": 20,
        "n_decisions": 21000,
        "micro_f1": 0.85,
        "micro_f1_keras": 0.851,
        "micro_f1_difference": {"difference": -0.001, "low": -0.003, "high": 0.001},
        "latency": {"p50_ms": 0.8},
        "float_latency": {"p50_ms": 2.5},
        "saturation": {"safe_without_vnni": True, "largest_weight": 64},
    }
    return report | changes


def test_a_good_graph_passes():
    assert judge(_report(), VerificationLimits()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mean_logit_difference": 0.3}, "the mean logit difference to Keras (in standard deviations) is 0.15"),
        ({"max_logit_difference": 3.0}, "the largest logit difference to Keras (in standard deviations) is 1.5"),
        (
            {"max_logit_difference": float("nan")},
            "the largest logit difference to Keras (in standard deviations) is nan",
        ),
        ({"changed_decisions": 420}, "the share of changed decisions is 0.02, the limit is 0.01"),
        ({"micro_f1": 0.847}, "the loss of micro-F1 is 0.004, the limit is 0.003"),
        ({"latency": {"p50_ms": 2.6}}, "median latency against fp32 is 1.04, the limit is 1"),
        ({"saturation": {"safe_without_vnni": False, "largest_weight": 127}}, "weights reach 127"),
        (
            {"other_cpu": {"cpu": "Haswell", "max_logit_difference": 0.3}},
            "the largest logit difference on Haswell is 0.3, the limit is 0.02",
        ),
        ({"precision": "fp32"}, "the largest logit difference to Keras is 0.2, the limit is 0.001"),
    ],
)
def test_each_limit_refuses_with_a_sentence(changes, sentence):
    failed = judge(_report(**changes), VerificationLimits())
    assert len(failed) == 1
    assert failed[0].startswith(sentence)


def test_on_few_rows_a_loss_within_its_interval_is_no_reason():
    few = {"n_texts": 150, "micro_f1": 0.84}
    wide = {"micro_f1_difference": {"difference": -0.011, "low": -0.03, "high": 0.01}}
    sure = {"micro_f1_difference": {"difference": -0.011, "low": -0.02, "high": -0.002}}
    assert judge(_report(**few, **wide), VerificationLimits()) == []
    assert judge(_report(**few, **sure), VerificationLimits()) == ["the loss of micro-F1 is 0.011, the limit is 0.003"]


def test_latency_is_reported_for_each_graph(graphs):
    sessions = {name: Session(graphs[name]) for name in ("fp32", "dynamic")}
    latency = measure_latency(sessions, make_rows(5, 9, 12))
    assert set(latency) == {"fp32", "dynamic"}
    assert all(0 < entry["p50_ms"] <= entry["p95_ms"] for entry in latency.values())


def test_emulated_processor_is_named_and_needs_its_emulator(tmp_path, monkeypatch):
    with pytest.raises(VerificationError, match="processor 'z80' is unknown: choose from haswell"):
        compare_on_cpu(tmp_path / "x.onnx", make_rows(3), HALF, cpu="z80")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VerificationError, match="install the package qemu-user"):
        compare_on_cpu(tmp_path / "x.onnx", make_rows(3), HALF)


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-x86_64 (Debian's qemu-user) is not installed")
def test_safe_weights_answer_the_same_on_a_processor_with_avx2_only(graphs, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(graphs["static"], path)
    found = compare_on_cpu(path, make_rows(5, 12), HALF)
    assert found["max_logit_difference"] < 0.02
    assert found["changed_decisions"] == 0
