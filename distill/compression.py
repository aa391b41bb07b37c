"""A short second training that makes a student's linear layers fit for int8, sparse, or of few values.

With tensorflow-model-optimization, whose wrappers go around each linear layer but the classifier (which the exports
leave in float32). Quantization-aware training rounds weights and inputs as the exporter will: weights to 7 bits per
output channel, inputs to u8 with one range per tensor, the moving average of their extremes (Jacob et al., 2017,
arXiv:1712.05877). Pruning sets the smallest weights to zero, more of them step by step (Zhu and Gupta, 2017,
arXiv:1710.01878). Clustering leaves a number of different values per matrix (Han et al., 2015, arXiv:1510.00149). The
last two make the file smaller once it is compressed, and change nothing else: dense kernels multiply zeros, too.
"""

import gzip
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from numpy.typing import NDArray
from tensorflow_model_optimization.clustering.keras import CentroidInitialization
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import GradientAggregation
from tensorflow_model_optimization.python.core.clustering.keras.cluster_wrapper import ClusterWeights
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import QuantizeWrapperV2
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude
from tensorflow_model_optimization.quantization.keras import QuantizeConfig
from tensorflow_model_optimization.quantization.keras.quantizers import MovingAverageQuantizer, Quantizer
from tensorflow_model_optimization.sparsity.keras import PolynomialDecay

from emodistill.checkpoints import Weights
from emodistill.classifier_training import Trainee
from emodistill.distill.observation import evenly_spaced, states_by_batch
from emodistill.encoder_config import EncoderConfig

__all__ = [
    "Clustered",
    "Pruned",
    "QuantizationAware",
    "compressed_sizes",
    "distinct_values",
    "input_names",
    "sparsity_of",
]

_WEIGHT_LIMIT = 64  # of int8 weights: products in pairs still fit 16 bits on processors without VNNI
_CALIBRATION_TEXTS = 128
_PRUNING_SHARE = 0.6  # of the steps; in the rest the weights that are left settle
_PRUNING_FREQUENCY = 20
_LLOYD_ROUNDS = 20

TokenIds = Sequence[NDArray[np.int32]]


def input_names(config: EncoderConfig, pooling: str) -> dict[str, tuple[str, ...]]:
    """Name, for each linear layer of `encoder_graph`, the tensors of the fast graph that enter it.

    With pooling "cls" the last layer's queries are made for the first token alone, which the fast graph cuts out under
    a name of its own; it shares the range of what it is cut from.
    """
    names: dict[str, tuple[str, ...]] = {}
    if config.embedding_size != config.hidden_size:
        names["embeddings_projection"] = ("embeddings.word_embeddings",)
    stream = "embeddings.LayerNorm"
    for i in range(config.n_layers):
        first = (f"layer.{i}.first",) if pooling == "cls" and i == config.n_layers - 1 else ()
        names[f"layer_{i}_qkv"] = (stream, *first)
        names[f"layer_{i}_attention_output"] = (f"layer.{i}.attention.context",)
        names[f"layer_{i}_intermediate"] = (f"layer.{i}.attention.LayerNorm",)
        names[f"layer_{i}_output"] = (f"layer.{i}.gelu",)
        stream = f"layer.{i}.output.LayerNorm"
    return names


class QuantizationAware:
    """Train with weights and inputs rounded as in a static int8 graph; for `classifier_training.train_classifier`.

    Parameters
    ----------
    config, pooling
        Of the student.

    Attributes
    ----------
    ranges : dict of str to (float, float)
        After training: smallest and largest value by tensor name of the fast graph, all that
        ``export.quantization.static_linear`` needs, as ``{name: ActivationRange(*ends)}``. The weights need nothing:
        the exporter rounds them to the very grid that they were trained on.
    """

    def __init__(self, config: EncoderConfig, pooling: str) -> None:
        self._names = input_names(config, pooling)
        self._pad_token_id = config.pad_token_id
        self.ranges: dict[str, tuple[float, float]] = {}

    def __call__(self, classifier: keras.Model, used_pieces: NDArray[np.int32], token_ids: TokenIds) -> Trainee:
        seen = self._observe(classifier, evenly_spaced(token_ids, _CALIBRATION_TEXTS))
        kernels = {name: classifier.get_layer(name).kernel for name in self._names}
        model, wrappers = _wrap(classifier, _QuantizedDense)
        for name, wrapper in wrappers.items():
            for variable, end in zip(wrapper.input_range, seen[name], strict=True):
                variable.assign(end)

        def finish() -> None:
            for name, wrapper in wrappers.items():
                wrapper.layer.kernel = kernels[name]  # the wrapper had put the rounded tensor there
                low, high = (float(variable.numpy()) for variable in wrapper.input_range)
                self.ranges |= dict.fromkeys(self._names[name], (low, high))

        state = [variable for wrapper in wrappers.values() for variable in wrapper.input_range]
        return Trainee(model=model, state=state, finish=finish)

    def _observe(self, classifier: keras.Model, token_ids: TokenIds) -> dict[str, tuple[float, float]]:
        """Return the extremes, 0 included, of what enters each layer in a few texts."""
        observer = keras.Model(classifier.inputs, {name: classifier.get_layer(name).input for name in self._names})
        ends = dict.fromkeys(self._names, (0.0, 0.0))
        for states in states_by_batch(observer, token_ids, self._pad_token_id):
            for name, rows in states.items():
                ends[name] = (min(ends[name][0], float(rows.min())), max(ends[name][1], float(rows.max())))
        return ends


class Pruned:
    """Set the smallest weights of each matrix to zero while training; for `classifier_training.train_classifier`.

    Parameters
    ----------
    sparsity
        Share of zeros that is reached, in [0, 1).
    n_steps
        Of the training.
    """

    def __init__(self, sparsity: float, n_steps: int) -> None:
        self._schedule = PolynomialDecay(
            initial_sparsity=0.0,
            final_sparsity=sparsity,
            begin_step=0,
            end_step=max(2, int(_PRUNING_SHARE * n_steps)),
            frequency=max(1, min(_PRUNING_FREQUENCY, n_steps // 10)),
        )

    def __call__(self, classifier: keras.Model, used_pieces: NDArray[np.int32], token_ids: TokenIds) -> Trainee:
        model, wrappers = _wrap(classifier, lambda layer: PruneLowMagnitude(layer, pruning_schedule=self._schedule))

        def finish() -> None:
            for wrapper in wrappers.values():
                for weight, mask, _ in wrapper.pruning_vars:
                    weight.assign(weight * mask)  # the last update came after the last mask

        for wrapper in wrappers.values():
            wrapper.pruning_step.assign(0)  # what the library's callback would do; each forward pass counts it up
        masks = [variable for w in wrappers.values() for _, *own in w.pruning_vars for variable in own]
        steps = [wrapper.pruning_step for wrapper in wrappers.values()]
        return Trainee(model=model, state=[*masks, *steps], finish=finish)


class Clustered:
    """Train each matrix with a few different values; for `classifier_training.train_classifier`.

    Parameters
    ----------
    n_clusters
        Values per matrix, at least 2. They start from Lloyd's k-means of the weights.
    """

    def __init__(self, n_clusters: int) -> None:
        self.n_clusters = n_clusters

    def __call__(self, classifier: keras.Model, used_pieces: NDArray[np.int32], token_ids: TokenIds) -> Trainee:
        model, wrappers = _wrap(
            classifier,
            lambda layer: ClusterWeights(
                layer,
                number_of_clusters=self.n_clusters,
                cluster_centroids_init=CentroidInitialization.LINEAR,
                cluster_gradient_aggregation=GradientAggregation.AVG,
            ),
        )
        for wrapper in wrappers.values():
            weight = wrapper.original_clusterable_weights["kernel"].numpy()
            wrapper.cluster_centroids["kernel"].assign(_lloyd(weight, self.n_clusters))

        def finish() -> None:
            for wrapper in wrappers.values():
                weight, centroids = wrapper.original_clusterable_weights["kernel"], wrapper.cluster_centroids["kernel"]
                weight.assign(_nearest(weight.numpy(), centroids.numpy()))
                wrapper.layer.kernel = weight  # the wrapper had put the clustered tensor there

        return Trainee(model=model, finish=finish)


def compressed_sizes(weights: Weights) -> dict[str, int]:
    """Return the bytes of all weights after gzip, in "float16" and in "int8".

    The int8 form has a scale per row, as the exports have it; vectors (biases, norms) stay float32 in it.
    """
    half = b"".join(value.astype(np.float16).tobytes() for value in weights.values())
    rounded = []
    for value in weights.values():
        if value.ndim == 2:
            scales = np.maximum(np.abs(value).max(axis=1, keepdims=True), 1e-12) / _WEIGHT_LIMIT
            rounded += [np.rint(value / scales).astype(np.int8).tobytes(), scales.astype(np.float32).tobytes()]
        else:
            rounded.append(value.astype(np.float32).tobytes())
    return {"float16": len(gzip.compress(half, mtime=0)), "int8": len(gzip.compress(b"".join(rounded), mtime=0))}


def sparsity_of(weights: Weights) -> float:
    """Return the share of zeros in the matrices of the linear layers, classifier and tables left out."""
    matrices = _linear_matrices(weights)
    return float(sum((m == 0).sum() for m in matrices) / sum(m.size for m in matrices))


def distinct_values(weights: Weights) -> int:
    """Return the largest number of different values in one matrix of a linear layer."""
    return max(len(np.unique(matrix)) for matrix in _linear_matrices(weights))


def _linear_matrices(weights: Weights) -> list[NDArray[np.float32]]:
    return [m for n, m in weights.items() if m.ndim == 2 and (n.startswith("layer.") or "projection" in n)]


def _wrap(
    classifier: keras.Model, wrap: Callable[[keras.layers.Layer], keras.layers.Layer]
) -> tuple[keras.Model, dict[str, Any]]:
    """Rebuild a classifier on its own layers, a wrapper around each linear one; return it and the wrappers."""
    wrappers: dict[str, Any] = {}

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.layers.Dense) and layer.name != "classifier":
            wrappers[layer.name] = wrap(layer)
            return wrappers[layer.name]
        return layer

    return keras.models.clone_model(classifier, clone_function=clone), wrappers


def _nearest(values: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace each value by the nearest centroid."""
    ordered = np.sort(centroids)
    chosen: NDArray[np.float32] = ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, values)]
    return chosen


def _lloyd(values: NDArray[np.float32], n_clusters: int) -> NDArray[np.float32]:
    """Return the centroids of k-means in one dimension, started evenly over the range."""
    flat = values.ravel().astype(np.float64)
    centroids = np.linspace(flat.min(), flat.max(), n_clusters)
    for _ in range(_LLOYD_ROUNDS):
        cluster = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, flat)
        counts = np.bincount(cluster, minlength=n_clusters)
        sums = np.bincount(cluster, weights=flat, minlength=n_clusters)
        centroids = np.where(counts > 0, sums / np.maximum(counts, 1), centroids)
    return centroids.astype(np.float32)


class _WeightGrid(Quantizer):
    """Round a kernel (in, out) to the exporter's grid: symmetric, one scale per output channel, gradients pass."""

    def build(self, tensor_shape: Any, name: str, layer: keras.layers.Layer) -> dict[str, Any]:
        return {}

    def __call__(self, inputs: tf.Tensor, training: bool, weights: Mapping[str, Any], **kwargs: Any) -> tf.Tensor:
        kernel = tf.convert_to_tensor(inputs)
        scales = tf.maximum(tf.reduce_max(tf.abs(kernel), 0, keepdims=True), 1e-12) / _WEIGHT_LIMIT
        return kernel + tf.stop_gradient(tf.round(kernel / scales) * scales - kernel)

    def get_config(self) -> dict[str, Any]:
        return {}


class _KernelOnly(QuantizeConfig):
    """Quantize the kernel of a linear layer; its input is seen to by `_QuantizedDense`."""

    def get_weights_and_quantizers(self, layer: keras.layers.Layer) -> list[tuple[tf.Variable, Quantizer]]:
        return [(layer.kernel, _WeightGrid())]

    def get_activations_and_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def set_quantize_weights(self, layer: keras.layers.Layer, quantize_weights: Sequence[tf.Tensor]) -> None:
        layer.kernel = quantize_weights[0]

    def set_quantize_activations(self, layer: keras.layers.Layer, quantize_activations: Sequence[Any]) -> None:
        pass

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def get_config(self) -> dict[str, Any]:
        return {}


class _QuantizedDense(QuantizeWrapperV2):
    """A linear layer whose kernel and input are rounded; `input_range` holds the ends of the input's range."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        super().__init__(layer, _KernelOnly())
        self.quantizer = MovingAverageQuantizer(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.input_variables = self.quantizer.build(input_shape, "input", self)

    @property
    def input_range(self) -> tuple[tf.Variable, tf.Variable]:
        return self.input_variables["min_var"], self.input_variables["max_var"]

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if training is None:
            training = False
        return super().call(self.quantizer(inputs, training, weights=self.input_variables), training)
