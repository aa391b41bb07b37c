"""Checkpoint to a portable ONNX file: standard operators only, for every runtime.

tf2onnx converts the tf_keras model of `emodistill.encoder_graph`. It can write a file that no runtime loads and return
normally (an operator it has no handler for), so what was written is loaded and compared with Keras before it is used.
"""

import logging
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from emodistill.checkpoints import ModelCheckpoint
from emodistill.errors import ConfigError, MissingExtraError, VerificationError

__all__ = ["LATEST_TESTED_OPSET", "KerasReference", "write_portable"]

LATEST_TESTED_OPSET = 18  # the newest that tf2onnx 1.17 writes
_OLDEST_OPSET = 13
_PARITY_LIMIT = 1e-4


class KerasReference:
    """The classifier of a checkpoint as a tf_keras model: what every exported file has to agree with.

    Parameters
    ----------
    checkpoint
        A member or student.
    """

    def __init__(self, checkpoint: ModelCheckpoint) -> None:
        try:
            from emodistill import encoder_graph
        except ImportError as error:
            raise MissingExtraError.for_extra(error.name or "tensorflow", "train") from error
        self.checkpoint = checkpoint
        self.model = encoder_graph.build_classifier(
            checkpoint.config, len(checkpoint.label_names), pooling=checkpoint.pooling
        )
        encoder_graph.set_weights(self.model, checkpoint.config, checkpoint.weights)

    def logits(self, token_ids: list[NDArray[np.int32]], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Return float32 logits of shape (n_texts, n_labels); batches hold texts of similar length."""
        order = np.argsort([len(row) for row in token_ids], kind="stable")
        logits = np.zeros((len(token_ids), len(self.checkpoint.label_names)), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = pad([token_ids[i] for i in chosen], self.checkpoint.config.pad_token_id)
            logits[chosen] = self.model({"input_ids": ids, "attention_mask": mask}, training=False).numpy()
        return logits


def write_portable(reference: KerasReference, path: Path, *, opset: int = LATEST_TESTED_OPSET) -> None:
    """Write a checkpoint's classifier through tf2onnx, load it again and compare it with Keras.

    Parameters
    ----------
    reference
        The model to convert.
    path
        ONNX file; inputs ``input_ids`` and ``attention_mask``, int64 (batch, sequence), both symbolic; outputs
        ``logits`` and ``probabilities``, float32 (batch, n_labels).
    opset
        Of the standard operators.

    Raises
    ------
    ConfigError
        If the opset is outside of what was tested.
    VerificationError
        If the file does not load in ONNX Runtime or its logits differ from Keras by more than 1e-4.
    """
    if not _OLDEST_OPSET <= opset <= LATEST_TESTED_OPSET:
        raise ConfigError(f"opset {opset} is not offered: choose {_OLDEST_OPSET} to {LATEST_TESTED_OPSET}")
    model = _convert(reference, opset)
    standard = {entry.domain for entry in model.opset_import if any(n.domain == entry.domain for n in model.graph.node)}
    if standard - {"", "ai.onnx"}:
        raise VerificationError(f"the converted graph uses operators outside of the standard: {sorted(standard)}")
    onnx.save(model, path)
    _compare(reference, path)


def pad(token_ids: list[NDArray[np.int32]], pad_token_id: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return ids and mask, int32 (batch, longest), short rows filled up at their ends."""
    longest = max(len(row) for row in token_ids)
    ids = np.full((len(token_ids), longest), pad_token_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(token_ids):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def _convert(reference: KerasReference, opset: int) -> onnx.ModelProto:
    try:
        import tensorflow as tf
        import tf2onnx
    except ImportError as error:
        raise MissingExtraError.for_extra(error.name or "tf2onnx", "train") from error

    signature = [tf.TensorSpec((None, None), tf.int64, name=name) for name in ("input_ids", "attention_mask")]

    @tf.function(input_signature=signature)
    def classify(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs = {"input_ids": tf.cast(input_ids, tf.int32), "attention_mask": tf.cast(attention_mask, tf.int32)}
        logits = reference.model(inputs, training=False)
        return {"logits": tf.identity(logits, "logits"), "probabilities": tf.sigmoid(logits, "probabilities")}

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    model, _ = tf2onnx.convert.from_function(classify, input_signature=signature, opset=opset)
    return _with_plain_names(model)


def _with_plain_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name the symbolic dimensions."""
    for value in model.graph.input:
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "sequence"), strict=True):
            dimension.dim_param = name
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


def _compare(reference: KerasReference, path: Path) -> None:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no narrower base
        raise VerificationError(f"{path} was written but ONNX Runtime cannot load it: {error}") from error
    longest = min(reference.checkpoint.max_length_tokens, 24)
    rng = np.random.default_rng(0)
    vocab_size = reference.checkpoint.config.vocab_size
    rows = [rng.integers(0, vocab_size, n).astype(np.int32) for n in (3, longest, longest // 2, 2)]
    ids, mask = pad(rows, reference.checkpoint.config.pad_token_id)
    logits = session.run(["logits"], {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)})[0]
    difference = float(np.abs(logits - reference.logits(rows)).max())
    if not difference <= _PARITY_LIMIT:
        raise VerificationError(
            f"{path} differs from Keras by {difference:.2g} in a logit, the limit is {_PARITY_LIMIT}: "
            "choose another opset"
        )
