"""Float32 weights to int8: how linear layers and word tables of the fast graph are written, and portable int8 files.

Weights are symmetric, one scale per output channel. By default they use 7 bits (values within +-64): processors
without VNNI add products of u8 activations and s8 weights in pairs in 16 bits, and 2 * 255 * 64 = 32,640 still fits
there, while full-range weights saturate (microsoft/onnxruntime#6004).

Activations are u8 with one scale per tensor: taken from the tensor itself at run time ("dynamic": then a text's result
depends on its neighbours in the batch), or fixed beforehand from a calibration set ("static").
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from emodistill.errors import ConfigError
from emodistill.export.fused import MICROSOFT, Embedding, GraphWriter, Linear

__all__ = [
    "INTEGER_PRODUCTS",
    "ActivationRange",
    "QuantizedWeight",
    "dynamic_linear",
    "int8_embedding",
    "integer_weights",
    "largest_weight",
    "observe_ranges",
    "quantize_portable",
    "quantize_weight",
    "static_linear",
]


INTEGER_PRODUCTS = ("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention", "QLinearMatMul")


class QuantizedWeight(NamedTuple):
    """int8 values and their scales: ``weight.T ~ values * scales``."""

    values: NDArray[np.int8]  # (in, out)
    scales: NDArray[np.float32]  # (out,)


@dataclass(frozen=True)
class ActivationRange:
    """Smallest and largest value that a tensor is expected to hold; both ends are widened to include 0."""

    low: float
    high: float

    def scale_and_zero_point(self) -> tuple[np.float32, np.uint8]:
        """Return the parameters of ``u8 = round(x / scale) + zero_point`` that cover the range."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = max(high - low, 1e-8) / 255
        return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, 255))


def quantize_weight(weight: NDArray[np.float32], *, n_bits: int = 7) -> QuantizedWeight:
    """Round a (out, in) matrix to int8 with one scale per output channel.

    Parameters
    ----------
    weight
        float32 array of shape (out, in).
    n_bits
        7: values within +-64, safe on every processor. 8: within +-127.

    Examples
    --------
    >>> quantize_weight(np.array([[0.5, -1.0]], np.float32)).values.tolist()
    [[32], [-64]]
    """
    if n_bits not in (7, 8):
        raise ConfigError(f"weights of {n_bits} bits are not offered: choose 7 or 8")
    limit = 64 if n_bits == 7 else 127
    scales = np.maximum(np.abs(weight).max(axis=1), np.float32(1e-12)) / np.float32(limit)
    values = np.rint(weight / scales[:, None]).astype(np.int8)
    return QuantizedWeight(np.ascontiguousarray(values.T), scales.astype(np.float32))


def dynamic_linear(*, n_bits: int = 7) -> Linear:
    """Return a writer of linear layers whose activations get their scale at run time, in one operator."""

    def write(writer: GraphWriter, x: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        inputs = [x, *_weight_constants(writer, name, weight, n_bits), "", writer.constant(f"{name}.bias", bias)]
        return writer.node("DynamicQuantizeMatMul", inputs, name, domain=MICROSOFT)

    return write


def static_linear(ranges: Mapping[str, ActivationRange], *, n_bits: int = 7) -> Linear:
    """Return a writer of linear layers whose activations have fixed scales.

    Parameters
    ----------
    ranges
        By name of the tensor that enters a linear layer, from `observe_ranges`.
    n_bits
        Of the weights.
    """

    def write(writer: GraphWriter, x: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        scale, zero_point = ranges[x].scale_and_zero_point()
        parameters = [writer.constant(f"{x}.scale", scale), writer.constant(f"{x}.zero_point", zero_point)]
        quantized = writer.node("QuantizeLinear", [x, *parameters], f"{x}.u8")
        values, scales = _weight_constants(writer, name, weight, n_bits)
        inputs = [quantized, values, parameters[0], scales, parameters[1], "", writer.constant(f"{name}.bias", bias)]
        return writer.node("MatMulIntegerToFloat", inputs, name, domain=MICROSOFT)

    return write


def _weight_constants(writer: GraphWriter, name: str, weight: NDArray[np.float32], n_bits: int) -> tuple[str, str]:
    quantized = quantize_weight(weight, n_bits=n_bits)
    return (
        writer.constant(f"{name}.weight_int8", quantized.values),
        writer.constant(f"{name}.weight_scale", quantized.scales),
    )


def int8_embedding() -> Embedding:
    """Return a writer of word tables in int8 with one scale per row, made float again after the rows are taken."""

    def write(writer: GraphWriter, ids: str, name: str, table: NDArray[np.float32]) -> str:
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), np.float32(1e-12)) / np.float32(127)
        values = writer.constant(f"{name}.weight_int8", np.rint(table / scales).astype(np.int8))
        rows = writer.node("Gather", [values, ids], f"{name}.rows")
        rows = writer.node("Cast", [rows], f"{name}.rows_float", to=TensorProto.FLOAT)
        scale = writer.constant(f"{name}.weight_scale", scales.astype(np.float32))
        return writer.node("Mul", [rows, writer.node("Gather", [scale, ids], f"{name}.row_scale")], name)

    return write


def observe_ranges(
    model: onnx.ModelProto, token_ids: Sequence[NDArray[np.int32]], *, percentile: float = 100.0
) -> dict[str, ActivationRange]:
    """Run texts, one by one, through a float graph and return the range of every tensor that enters a linear layer.

    Parameters
    ----------
    model
        From `emodistill.export.fused.build_fused`, without mask, its linear inputs exposed.
    token_ids
        int32 arrays of shape (n_tokens,), one per text.
    percentile
        Of all values seen, on either side; 100 keeps the extremes. Few large values carry much in these encoders:
        99.99 was no better and 99.9 changed five times as many decisions.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()][2:]
    tails: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for row in token_ids:
        for name, value in zip(names, session.run(names, {"input_ids": row[None]}), strict=True):
            # Keeping each text's own tails bounds memory; at 100 they are the extremes.
            tails[name].append(np.percentile(value, [100 - percentile, percentile]).astype(np.float32))
    return {
        name: ActivationRange(float(min(low for low, _ in pairs)), float(max(high for _, high in pairs)))
        for name, pairs in tails.items()
    }


def quantize_portable(source: Path, target: Path, *, n_bits: int = 7) -> None:
    """Write the dynamic int8 form of a portable file: linear layers and the word table, standard operators only.

    Parameters
    ----------
    source, target
        ONNX files.
    n_bits
        Of the weights, per output channel; 7 is safe on processors without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it advises to run a pre-processing that changes nothing here
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            nodes_to_exclude=[n.name for n in onnx.load(source).graph.node if "/classifier/" in n.name],
            per_channel=True,
            reduce_range=n_bits == 7,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)


def integer_weights(model: onnx.ModelProto) -> dict[str, NDArray[np.int8]]:
    """Return the constant int8 (in, out) matrix of each integer matrix product, by node name."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.name: numpy_helper.to_array(constants[node.input[1]])
        for node in model.graph.node
        if node.op_type in INTEGER_PRODUCTS and node.input[1] in constants
    }


def largest_weight(model: onnx.ModelProto) -> int:
    """Return the largest absolute int8 value that enters an integer matrix product of the graph, 0 without any.

    64 or less cannot saturate the 16-bit pair sums of processors without VNNI.
    """
    return max((int(np.abs(w.astype(np.int32)).max()) for w in integer_weights(model).values()), default=0)
