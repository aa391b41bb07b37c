"""The portable file: standard operators, any batch, the same logits as Keras, the definitions and the fast graph."""

import json

import numpy as np
import pytest
from tiny_checkpoints import CASES, make_checkpoint, make_rows, reference_logits

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorflow")
pytest.importorskip("tf2onnx")

from tokenizers import Tokenizer  # noqa: E402

from emodistill.errors import ConfigError, VerificationError  # noqa: E402
from emodistill.export.bundle import build_fast  # noqa: E402
from emodistill.export.portable import LATEST_TESTED_OPSET, KerasReference, pad, write_portable  # noqa: E402
from emodistill.export.quantization import integer_weights, largest_weight, quantize_portable  # noqa: E402
from emodistill.export.verification import Session  # noqa: E402
from emodistill.tokenization import encode  # noqa: E402

FAMILIES = ("bert", "distilbert", "roberta", "mpnet")


@pytest.fixture(scope="module", params=[*FAMILIES, "bert-cls", "bert-factorized"])
def written(request, tmp_path_factory):
    family, _, variant = request.param.partition("-")
    checkpoint = make_checkpoint(
        family, pooling="cls" if variant == "cls" else "mean", embedding_size=16 if variant == "factorized" else 0
    )
    reference = KerasReference(checkpoint)
    path = tmp_path_factory.mktemp("portable") / "model.onnx"
    write_portable(reference, path)
    return checkpoint, reference, path


def test_every_batch_of_d22_runs_and_agrees(written):
    checkpoint, reference, path = written
    session = Session(path)
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    batches = [json.loads(line)["texts"] for line in (CASES / "D22_batches.jsonl").read_text().splitlines()]
    assert [len(batch) for batch in batches] == [1, 3, 1, 5, 2]
    for batch in batches:
        rows = encode(tokenizer, batch, checkpoint.max_length_tokens)
        ids, mask = pad(rows, checkpoint.config.pad_token_id)
        logits = session.run(["logits"], session.feeds(ids, mask))[0]
        expected = reference_logits(checkpoint, rows)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(logits, reference.logits(rows), atol=1e-4)


def test_fast_graph_keras_and_portable_file_agree(written):
    checkpoint, reference, path = written
    rows = make_rows(2, 48, 17, 5)
    portable = Session(path).logits(rows)
    assert portable.std() > 0.3
    np.testing.assert_allclose(Session(build_fast(checkpoint, "fp32")).logits(rows), portable, atol=1e-4)
    np.testing.assert_allclose(reference.logits(rows), portable, atol=1e-4)


def test_inputs_outputs_and_operators_are_standard(written):
    _, _, path = written
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask"]
    for value in model.graph.input:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    assert [value.name for value in model.graph.output] == ["logits", "probabilities"]
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert next(o.version for o in model.opset_import if not o.domain) == LATEST_TESTED_OPSET


def test_int8_file_is_near_and_safe_on_every_processor(written, tmp_path):
    checkpoint, _, path = written
    target = tmp_path / "model_quantized.onnx"
    quantize_portable(path, target)
    rows = make_rows(4, 12, 33, 48, seed=8)
    expected = reference_logits(checkpoint, rows)
    error = np.abs(Session(target).logits(rows) - expected)
    assert 1e-4 < error.max() < 0.5 * expected.std()
    model = onnx.load(target)
    assert largest_weight(model) <= 64
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    is_factorized = checkpoint.config.embedding_size != checkpoint.config.hidden_size
    assert len(integer_weights(model)) == 2 * 4 + is_factorized
    tables = [t.data_type for t in model.graph.initializer if t.dims[:1] == [checkpoint.config.vocab_size]]
    assert tables == [onnx.TensorProto.UINT8]


def test_probabilities_are_one_sigmoid_of_the_logits(tmp_path):
    # D10: logits -4, 0, 4 give 0.0180, 0.5, 0.9820; a sigmoid of a sigmoid gives 0.5045, 0.6225, 0.7275
    checkpoint = make_checkpoint()
    checkpoint.weights["classifier.weight"][:] = 0
    checkpoint.weights["classifier.bias"][:] = [-4, 0, 4, 0, 0, 0, 0]
    path = tmp_path / "model.onnx"
    write_portable(KerasReference(checkpoint), path)
    for session in (Session(path), Session(build_fast(checkpoint, "fp32"))):
        probabilities = session.run(["probabilities"], session.feeds(make_rows(6)[0][None]))[0]
        np.testing.assert_allclose(probabilities[0, :3], [0.0180, 0.5, 0.9820], atol=5e-5)


def test_older_opset(tmp_path):
    path = tmp_path / "model.onnx"
    write_portable(KerasReference(make_checkpoint()), path, opset=14)
    assert next(o.version for o in onnx.load(path).opset_import if not o.domain) == 14


def test_opset_out_of_range(tmp_path):
    with pytest.raises(ConfigError, match="opset 99 is not offered: choose 13 to 18"):
        write_portable(KerasReference(make_checkpoint()), tmp_path / "model.onnx", opset=99)


def test_a_file_that_answers_otherwise_is_refused(tmp_path, monkeypatch):
    reference = KerasReference(make_checkpoint())
    true_logits = reference.logits
    monkeypatch.setattr(reference, "logits", lambda rows: true_logits(rows) + 0.001)
    with pytest.raises(VerificationError, match=r"differs from Keras by 0\.001 in a logit, the limit is 0\.0001"):
        write_portable(reference, tmp_path / "model.onnx")


def test_a_file_that_does_not_load_is_refused(tmp_path, monkeypatch):
    reference = KerasReference(make_checkpoint())
    model = build_fast(reference.checkpoint, "fp32")
    model.graph.node[3].op_type = "Erfc"
    monkeypatch.setattr("emodistill.export.portable._convert", lambda reference, opset: model)
    with pytest.raises(VerificationError, match="was written but ONNX Runtime cannot load it"):
        write_portable(reference, tmp_path / "model.onnx")
