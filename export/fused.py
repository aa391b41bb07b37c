"""Encoder weights to a short ONNX graph for ONNX Runtime's CPU kernels: the fast export.

The portable export takes the graph as a converter finds it; this one is written node by node, from the same weights,
with the operators that were measured to be fastest for one short text on one core (ONNX Runtime 1.32, 19 tokens of
width 384, microseconds): ``Sum`` and ``LayerNormalization`` 6, where the fused com.microsoft SkipLayerNormalization
takes 36 (it is a scalar loop; ``Add`` would be fused into it on loading, ``Sum`` is not); ai.onnx ``Attention`` on
split queries, keys and values 21, where MultiHeadAttention takes 29; the bias inside the matrix product and ``Gelu``
19 (15 in its tanh form), where BiasGelu takes 23. One packed matrix product makes queries, keys and values. Position
and segment embeddings are added beforehand. With pooling by the first token, the last layer computes queries, output
projection and feed-forward for that token alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from emodistill.checkpoints import Weights
from emodistill.encoder_config import EncoderConfig
from emodistill.errors import ConfigError

__all__ = ["MICROSOFT", "OPSET", "Embedding", "GraphWriter", "Linear", "build_fused", "float_embedding", "float_linear"]

OPSET = 23  # the first with Attention; ONNX Runtime runs it from 1.23 on
IR_VERSION = 10
MICROSOFT = "com.microsoft"

Linear = Callable[["GraphWriter", str, str, NDArray[np.float32], NDArray[np.float32]], str]
"""Writes ``x @ weight.T + bias``: (writer, x, name, weight (out, in), bias (out,)) to the name of the result."""

Embedding = Callable[["GraphWriter", str, str, NDArray[np.float32]], str]
"""Writes the rows of a table: (writer, ids, name, table (n, e)) to the name of the result, ids.shape + (e,)."""


@dataclass
class GraphWriter:
    """Nodes and constants of a graph under construction.

    Attributes
    ----------
    nodes, constants
        What was written so far, by name and in order.
    linear_inputs
        Names of the tensors that enter linear layers: what a calibration observes.
    """

    nodes: dict[str, onnx.NodeProto] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    linear_inputs: list[str] = field(default_factory=list)

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        """Add a constant, or find the one of that name, and return its name."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def node(self, operator: str, inputs: list[str], name: str, *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, named as the node, or find the one of that name, and return the name."""
        if name not in self.nodes:
            self.nodes[name] = helper.make_node(operator, inputs, [name], name=name, domain=domain, **attributes)
        return name

    def split(self, operator: str, inputs: list[str], name: str, n_outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        outputs = [f"{name}.{i}" for i in range(n_outputs)]
        self.nodes[name] = helper.make_node(operator, inputs, outputs, name=name, **attributes)
        return outputs


def float_linear(writer: GraphWriter, x: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
    """Write a linear layer in float32."""
    product = writer.node("MatMul", [x, writer.constant(f"{name}.weight", weight.T)], f"{name}.product")
    return writer.node("Add", [product, writer.constant(f"{name}.bias", bias)], name)


def float_embedding(writer: GraphWriter, ids: str, name: str, table: NDArray[np.float32]) -> str:
    """Write an embedding in float32."""
    return writer.node("Gather", [writer.constant(f"{name}.weight", table), ids], name)


def build_fused(
    config: EncoderConfig,
    weights: Weights,
    *,
    pooling: str,
    max_length_tokens: int,
    masked: bool,
    packed: bool = True,
    approximate_gelu: bool = False,
    linear: Linear = float_linear,
    embedding: Embedding = float_embedding,
    expose_linear_inputs: bool = False,
) -> onnx.ModelProto:
    """Write the graph of a classifier.

    Parameters
    ----------
    config
        Shape of the encoder, of any family.
    weights
        Canonical weights, classifier included.
    pooling
        "mean" over real tokens, or "cls".
    max_length_tokens
        Longest input; the position table is cut to it.
    masked
        With an input ``attention_mask``, so that texts of several lengths share a batch. Without it every position
        is a real token.
    packed
        Make queries, keys and values in one matrix product and split it. Where the activations are quantized by an
        operator of their own, three products are a little faster, because nothing has to be split.
    approximate_gelu
        Use the tanh form, a quarter faster and within 0.0005 of the exact one: for int8 graphs, whose next step
        rounds to a hundred times that.
    linear, embedding
        How linear layers and the word table are written: in float32, or one of `emodistill.export.quantization`.
        The classifier itself is always float32.
    expose_linear_inputs
        Make the inputs of all linear layers outputs too, under their tensor names, to observe their ranges.

    Returns
    -------
    onnx.ModelProto
        Inputs ``input_ids`` (and ``attention_mask``), int32 (batch, sequence), both dimensions symbolic; outputs
        ``logits`` and ``probabilities``, float32 (batch, n_labels).

    Raises
    ------
    ConfigError
        If the position table is shorter than `max_length_tokens` or the pooling is unknown.
    """
    if pooling not in ("cls", "mean"):
        raise ConfigError(f"pooling '{pooling}' is unknown: choose cls or mean")
    if max_length_tokens > config.max_length_tokens:
        raise ConfigError(
            f"max_length_tokens is {max_length_tokens}, but the encoder has positions for {config.max_length_tokens}"
        )
    writer = GraphWriter()
    graph = _ClassifierGraph(
        writer, config, weights, linear, embedding, max_length_tokens, masked, packed, approximate_gelu
    )
    hidden = graph.embeddings()
    for layer in range(config.n_layers):
        hidden = graph.layer(layer, hidden, first_token_only=pooling == "cls" and layer == config.n_layers - 1)
    pooled = graph.pooled(hidden, pooling)
    classifier = [
        pooled,
        writer.constant("classifier.weight", weights["classifier.weight"]),
        writer.constant("classifier.bias", weights["classifier.bias"]),
    ]
    writer.node("Gemm", classifier, "logits", transB=1)
    writer.node("Sigmoid", ["logits"], "probabilities")

    inputs = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    n_labels = len(weights["classifier.bias"])
    outputs = [_float_output(name, ["batch", n_labels]) for name in ("logits", "probabilities")]
    if expose_linear_inputs:
        outputs += [_float_output(name, None) for name in dict.fromkeys(writer.linear_inputs)]
    proto = helper.make_graph(
        list(writer.nodes.values()),
        "emodistill_classifier",
        [helper.make_tensor_value_info(name, TensorProto.INT32, ["batch", "sequence"]) for name in inputs],
        outputs,
        list(writer.constants.values()),
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="emodistill")


@dataclass
class _ClassifierGraph:
    """The parts of a classifier, each written by one method."""

    writer: GraphWriter
    config: EncoderConfig
    weights: Weights
    linear_writer: Linear
    embedding_writer: Embedding
    max_length_tokens: int
    masked: bool
    packed: bool
    approximate_gelu: bool

    def embeddings(self) -> str:
        """Write word + position + segment, normalized: (batch, sequence, hidden)."""
        table = self.weights["embeddings.word_embeddings.weight"]
        words = self.embedding_writer(self.writer, "input_ids", "embeddings.word_embeddings", table)
        if "embeddings.projection.weight" in self.weights:
            words = self._linear("embeddings.projection", words)
        return self._norm("embeddings.LayerNorm", [words, self._positions()])

    def layer(self, index: int, hidden: str, *, first_token_only: bool) -> str:
        """Write one transformer layer; with `first_token_only` its result is (batch, 1, hidden)."""
        prefix = f"layer.{index}"
        attention = f"{prefix}.attention"
        if first_token_only:
            keys = self._packed(f"{attention}.key_value", hidden, [f"{attention}.key", f"{attention}.value"])
            hidden = self._first_token(f"{prefix}.first", hidden)
            parts = [self._linear(f"{attention}.query", hidden), *keys]
        else:
            names = [f"{attention}.{part}" for part in ("query", "key", "value")]
            parts = self._packed(f"{attention}.query_key_value", hidden, names)
        bias = self._attention_bias(first_token_only=first_token_only)
        context = self.writer.node(
            "Attention",
            parts + ([bias] if bias else []),
            f"{attention}.context",
            q_num_heads=self.config.n_heads,
            kv_num_heads=self.config.n_heads,
        )
        context = self._linear(f"{attention}.output", context)
        hidden = self._norm(f"{attention}.LayerNorm", [context, hidden])
        wide = self._linear(f"{prefix}.intermediate", hidden)
        form = "tanh" if self.approximate_gelu else "none"
        wide = self.writer.node("Gelu", [wide], f"{prefix}.gelu", approximate=form)
        return self._norm(f"{prefix}.output.LayerNorm", [self._linear(f"{prefix}.output", wide), hidden])

    def pooled(self, hidden: str, pooling: str) -> str:
        """Write the state of each text: (batch, hidden)."""
        writer = self.writer
        axis = writer.constant("axis_1", np.array([1], np.int64))
        if pooling == "cls":
            return writer.node("Squeeze", [hidden, axis], "pooled")
        if not self.masked:
            return writer.node("ReduceMean", [hidden, axis], "pooled", keepdims=0)
        mask = writer.node("Cast", ["attention_mask"], "mask.float", to=TensorProto.FLOAT)
        share = writer.node("Div", [mask, writer.node("ReduceSum", [mask, axis], "mask.sum")], "mask.share")
        share = writer.node("Unsqueeze", [share, axis], "mask.row")  # (b, 1, t)
        return writer.node("Squeeze", [writer.node("MatMul", [share, hidden], "pooled.row"), axis], "pooled")

    def _linear(self, name: str, x: str) -> str:
        return self._packed_linear(name, x, [name])

    def _packed(self, name: str, x: str, parts: list[str]) -> list[str]:
        """Write several linear layers of one input, as one matrix product whose result is split, or one by one."""
        if not self.packed:
            return [self._linear(part, x) for part in parts]
        packed = self._packed_linear(name, x, parts)
        return self.writer.split("Split", [packed], f"{name}.split", len(parts), axis=2, num_outputs=len(parts))

    def _packed_linear(self, name: str, x: str, parts: list[str]) -> str:
        self.writer.linear_inputs.append(x)
        weight = np.concatenate([self.weights[f"{part}.weight"] for part in parts])
        bias = np.concatenate([self.weights[f"{part}.bias"] for part in parts])
        return self.linear_writer(self.writer, x, name, weight, bias)

    def _norm(self, name: str, terms: list[str]) -> str:
        # Sum and not Add: see the module's docstring.
        total = self.writer.node("Sum", terms, f"{name}.sum")
        scale, bias = (self.writer.constant(f"{name}.{part}", self.weights[f"{name}.{part}"]) for part in _NORM_PARTS)
        return self.writer.node("LayerNormalization", [total, scale, bias], name, epsilon=self.config.layer_norm_eps)

    def _first_token(self, name: str, hidden: str) -> str:
        starts, ends = self._zero(), self.writer.constant("axis_1", np.array([1], np.int64))
        return self.writer.node("Slice", [hidden, starts, ends, ends], name)  # axis 1 from 0 to 1

    def _zero(self) -> str:
        return self.writer.constant("zero", np.array([0], np.int64))

    def _length(self) -> str:
        """Write the sequence length, int64 (1,)."""
        return self.writer.node("Shape", ["input_ids"], "length", start=1, end=2)

    def _positions(self) -> str:
        first = self.config.position_offset
        table = self.weights["embeddings.position_embeddings.weight"][first : first + self.max_length_tokens]
        if "embeddings.token_type_embeddings.weight" in self.weights:
            table = table + self.weights["embeddings.token_type_embeddings.weight"][0]
        constant = self.writer.constant("embeddings.positions_and_segment.weight", table)
        return self.writer.node("Slice", [constant, self._zero(), self._length()], "embeddings.positions_and_segment")

    def _attention_bias(self, *, first_token_only: bool) -> str:
        """Write what is added to attention scores, or a boolean mask; "" where there is nothing to add."""
        name = "attention_bias.first" if first_token_only else "attention_bias"
        relative = self._relative_bias(first_token_only=first_token_only)
        padding = self._padding_mask(first_token_only=first_token_only)
        if not relative or not padding:
            return relative or padding
        zero = self.writer.constant("zero.float", np.float32(0))
        low = self.writer.constant("low.float", np.float32(-30000))
        shift = self.writer.node("Where", [padding, zero, low], f"{name}.padding")
        return self.writer.node("Add", [relative, shift], name)

    def _padding_mask(self, *, first_token_only: bool) -> str:
        """Write the mask as bool (b, 1, t or 1, t): the operator does not repeat it over queries by itself."""
        if not self.masked:
            return ""
        writer = self.writer
        boolean = writer.node("Cast", ["attention_mask"], "mask.bool", to=TensorProto.BOOL)
        axes = writer.constant("axes_1_2", np.array([1, 2], np.int64))
        keys = writer.node("Unsqueeze", [boolean, axes], "mask.keys")
        if first_token_only:
            return keys
        one = writer.constant("axis_1", np.array([1], np.int64))
        shape = writer.node("Concat", [one, one, self._length(), one], "mask.shape", axis=0)
        return writer.node("Expand", [keys, shape], "mask.queries_keys")

    def _relative_bias(self, *, first_token_only: bool) -> str:
        """Write mpnet's bias by distance, float (1, heads, t or 1, t)."""
        if not self.config.relative_attention_buckets:
            return ""
        writer = self.writer
        buckets = relative_buckets(self.max_length_tokens, self.config.relative_attention_buckets)
        rows = buckets[:1] if first_token_only else buckets
        suffix = ".first" if first_token_only else ""
        constant = writer.constant(f"relative.buckets{suffix}.all", rows.astype(np.int32))
        zero, length = self._zero(), self._length()
        axes = writer.constant("axes_0_1", np.array([0, 1], np.int64))
        starts = writer.constant("zeros", np.array([0, 0], np.int64))
        ends = writer.node("Concat", [length, length], f"relative.ends{suffix}", axis=0)
        cut = writer.node("Slice", [constant, starts, ends, axes], f"relative.buckets{suffix}")
        table = writer.constant("relative.weight", self.weights["relative_attention_bias.weight"].T)  # (heads, buckets)
        bias = writer.node("Gather", [table, cut], f"relative.bias{suffix}", axis=1)  # (heads, t or 1, t)
        return writer.node("Unsqueeze", [bias, zero], f"relative{suffix}")


_NORM_PARTS = ("weight", "bias")


def relative_buckets(length: int, n_buckets: int, max_distance: int = 128) -> NDArray[np.int64]:
    """Return the bucket of every (query, key) distance: near ones exact, far ones on a log scale (arXiv:1910.10683)."""
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    half = n_buckets // 2
    exact = half // 2
    side = np.where(distance < 0, half, 0)
    distance = np.abs(distance)
    scale = np.float32((half - exact) / np.log(max_distance / exact))
    logarithm = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = np.minimum(exact + (logarithm * scale).astype(np.int64), half - 1)
    return np.asarray(side + np.where(distance < exact, distance, far), np.int64)


def _float_output(name: str, shape: list[str | int] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
