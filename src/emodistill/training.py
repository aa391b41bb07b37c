"""Fine-tuning of a classifier with AdamW on length-bucketed batches, resumable to the same numbers.

Everything random is a function of (seed, epoch) or (seed, step, part), so that a killed run goes on as if nothing had
happened. The number of epochs is fixed and the last weights are kept: nothing is ever selected on held-out rows.
AdamW follows Loshchilov and Hutter (2017, arXiv:1711.05101); the learning rate warms up and decays linearly.

A batch is split into as many parts as `use_cores` allows; each part's forward and backward pass is one core's work, and
their gradients are added. Threads that share one small matrix product wait for each other at each of hundreds of steps;
parts meet once, at the update.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from emodistill.encoder_graph import set_dropout_state
from emodistill.errors import TrainingError
from emodistill.progress import Progress, ProgressFactory
from emodistill.training_config import TrainingConfig

__all__ = [
    "AdamW",
    "Loss",
    "epoch_batches",
    "fit",
    "learning_rate_at",
    "pad_batch",
    "predict_logits",
    "use_cores",
]

Loss = Callable[..., tf.Tensor]

_BUCKET_BATCHES = 50  # batches that are sorted by length together: short enough to keep epochs random
_LENGTH_MULTIPLE = 4  # rows are padded to a multiple, so that few shapes occur
_PREDICT_TOKENS = 4096  # tokens of one prediction batch
_PART_ROWS = 8  # least rows of a part of a batch: smaller products no longer fill a core
_MOST_PARTS = 4  # of a batch; further cores share the work of a part


def use_cores(n_cores: int) -> None:
    """Let this process train on so many cores, in parts of batches side by side; call it before TensorFlow works.

    Where TensorFlow has begun, or its threads were set by TF_NUM_INTRAOP_THREADS, nothing changes.
    """
    if "TF_NUM_INTRAOP_THREADS" in os.environ:
        return
    n_parts = max(1, min(n_cores, _MOST_PARTS))
    try:
        tf.config.threading.set_inter_op_parallelism_threads(n_parts)
        tf.config.threading.set_intra_op_parallelism_threads(max(1, n_cores // n_parts))
    except RuntimeError:  # it has begun
        pass


class AdamW:
    """AdamW with TensorFlow's fused Adam kernel, one pass over each variable and its two moments.

    Parameters
    ----------
    variables
        What is trained.
    weight_decay
        Decoupled decay of matrices; vectors (biases, norms) have none.
    rate_factors
        One factor of the learning rate per variable.
    clip_norm
        Largest global norm of the gradient.
    """

    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-8

    def __init__(
        self, variables: Sequence[tf.Variable], *, weight_decay: float, rate_factors: Sequence[float], clip_norm: float
    ) -> None:
        self.variables = list(variables)
        self.weight_decay = weight_decay
        self.rate_factors = list(rate_factors)
        self.clip_norm = clip_norm
        self.first = [tf.Variable(tf.zeros_like(v), trainable=False) for v in variables]
        self.second = [tf.Variable(tf.zeros_like(v), trainable=False) for v in variables]

    def apply(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Update all variables; `step` counts from 0. Returns the gradient's global norm before clipping."""
        gradients = [tf.convert_to_tensor(g) for g in gradients]  # the word table's rows, summed into one matrix
        norm = tf.sqrt(tf.add_n([2.0 * tf.nn.l2_loss(g) for g in gradients]))
        scale = tf.minimum(1.0, self.clip_norm / (norm + 1e-6))
        time_ = tf.cast(step + 1, tf.float32)
        for variable, m, v, gradient, factor in zip(
            self.variables, self.first, self.second, gradients, self.rate_factors, strict=True
        ):
            rate = learning_rate * factor
            if self.weight_decay and len(variable.shape) > 1:
                tf.raw_ops.ResourceApplyGradientDescent(
                    var=variable.handle, alpha=rate * self.weight_decay, delta=variable
                )
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=tf.pow(self.beta_1, time_),
                beta2_power=tf.pow(self.beta_2, time_),
                lr=rate,
                beta1=self.beta_1,
                beta2=self.beta_2,
                epsilon=self.epsilon,
                grad=gradient * scale,
            )
        return norm


def fit(
    model: keras.Model,
    token_ids: Sequence[NDArray[np.int32]],
    targets: Sequence[NDArray[Any]],
    loss: Loss,
    config: TrainingConfig,
    *,
    pad_token_id: int,
    work_dir: Path,
    fingerprint: str,
    state: Sequence[tf.Variable] = (),
    progress_factory: ProgressFactory = Progress,
    description: str = "training",
) -> None:
    """Train `model` in place for a fixed number of epochs, going on from a checkpoint in `work_dir` if one fits.

    Parameters
    ----------
    model
        From `encoder_graph.build_classifier`, its starting weights set.
    token_ids
        One int32 array per row.
    targets
        Arrays with n_rows first; the rows of a batch are passed to `loss`.
    loss
        `loss(outputs, *targets)`: the model's outputs (logits, float32 (batch, n_labels)) to a scalar, the mean over
        rows.
    config
        Settings.
    pad_token_id
        Fills short rows.
    work_dir
        Holds metrics.jsonl (one line per step: step, loss, learning_rate, gradient_norm) and the checkpoint.
    fingerprint
        Of everything that the result depends on; a checkpoint with another one is not used.
    state
        Further variables that steps change (ranges, masks): part of the checkpoint.
    progress_factory
        Makes the progress line.
    description
        What the progress line calls this.

    Raises
    ------
    TrainingError
        If the loss is not finite; no checkpoint is written then.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(ids) for ids in token_ids])
    n_steps = config.n_steps(len(token_ids))
    variables = model.trainable_variables
    optimizer = AdamW(
        variables,
        weight_decay=config.weight_decay,
        rate_factors=_rate_factors(model, variables, config.layerwise_decay),
        clip_norm=config.clip_norm,
    )
    checkpoint = _Checkpoint(work_dir / "checkpoint.safetensors", optimizer, state, fingerprint)
    first_step = checkpoint.restore()
    log = _StepLog(work_dir / "metrics.jsonl", first_step)
    step_function = _step_function(model, loss, optimizer, config.seed)
    n_parts = max(1, min(_cores_side_by_side(), config.batch_size // _PART_ROWS))
    saved_at = time.monotonic()
    with log, progress_factory(description, len(token_ids) * config.epochs, "examples") as progress:
        for step, rows in _steps(lengths, config):
            if step < first_step:
                progress.skip(len(rows))
                continue
            parts = [
                (*pad_batch([token_ids[row] for row in part], pad_token_id), *(t[part] for t in targets))
                for part in np.array_split(rows, min(n_parts, len(rows)))
            ]
            rate = learning_rate_at(step, n_steps, config)
            value, norm = step_function(parts, rate, step)
            loss_value = float(value)
            if not math.isfinite(loss_value):
                raise TrainingError(
                    f"the loss is {loss_value} at step {step} of {description}: lower the learning rate "
                    f"({config.learning_rate:g}) or train in float32; nothing of this step was kept"
                )
            log.write(step=step, loss=loss_value, learning_rate=rate, gradient_norm=float(norm))
            progress.advance(len(rows), note=f"loss {loss_value:.4f}")
            if time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                log.flush()
                checkpoint.save(step + 1)
                saved_at = time.monotonic()
        log.flush()
        checkpoint.save(n_steps)


def predict_logits(
    model: keras.Model, token_ids: Sequence[NDArray[np.int32]], *, pad_token_id: int, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Return logits (n, n_labels) of the rows in their order; rows of like length are computed together."""
    n_labels = model.output_shape[-1]
    logits = np.empty((len(token_ids), n_labels), dtype=np.float32)
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    predict = _prediction_function(model)

    def predict_batch(rows: NDArray[np.int64]) -> int:
        ids, mask = pad_batch([token_ids[row] for row in rows], pad_token_id)
        logits[rows] = predict(ids, mask).numpy()
        return len(rows)

    with ThreadPoolExecutor(_cores_side_by_side()) as pool:
        for n_rows in pool.map(predict_batch, _prediction_batches(lengths)):
            if progress is not None:
                progress.advance(n_rows)
    return logits


def pad_batch(rows: Sequence[NDArray[np.int32]], pad_token_id: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return ids and mask, both int32 (n_rows, length), the length a multiple of 4 that holds the longest row."""
    longest = max(len(row) for row in rows)
    length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    ids = np.full((len(rows), length), pad_token_id, dtype=np.int32)
    mask = np.zeros((len(rows), length), dtype=np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def epoch_batches(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the row numbers of an epoch's batches: random order, rows of like length together."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[NDArray[np.int64]] = []
    pool = batch_size * _BUCKET_BATCHES
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def learning_rate_at(step: int, n_steps: int, config: TrainingConfig) -> float:
    """Return the rate of a step: a linear rise over the warm-up, then a linear fall to 0 after the last step."""
    n_warmup = math.ceil(config.warmup_fraction * n_steps)
    if step < n_warmup:
        return config.learning_rate * (step + 1) / n_warmup
    return config.learning_rate * (n_steps - step) / max(1, n_steps - n_warmup)


def _steps(lengths: NDArray[np.int64], config: TrainingConfig) -> Iterator[tuple[int, NDArray[np.int64]]]:
    step = 0
    for epoch in range(config.epochs):
        for rows in epoch_batches(lengths, config.batch_size, config.seed, epoch):
            yield step, rows
            step += 1


def _step_function(model: keras.Model, loss: Loss, optimizer: AdamW, seed: int) -> Callable[..., Any]:
    """Make the update from a batch in parts: (ids, mask, *targets) each; returns loss and norm of the gradient."""

    @tf.function(reduce_retracing=True)
    def update(parts: list[tuple[tf.Tensor, ...]], rate: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        sizes = [tf.cast(tf.shape(ids)[0], tf.float32) for ids, *_ in parts]
        with tf.GradientTape() as tape:
            losses = []
            for number, (ids, mask, *targets) in enumerate(parts):
                set_dropout_state(model, seed, step, part=number)
                losses.append(loss(model([ids, mask], training=True), *targets))
            value = tf.add_n([size * part for size, part in zip(sizes, losses, strict=True)]) / tf.add_n(sizes)
        norm = optimizer.apply(tape.gradient(value, optimizer.variables), rate, step)
        return value, norm

    def call(parts: list[tuple[Any, ...]], rate: float, step: int) -> Any:
        tensors = [tuple(tf.convert_to_tensor(array) for array in part) for part in parts]
        return update(tensors, tf.constant(rate, tf.float32), tf.constant(step, tf.int32))

    return call


def _cores_side_by_side() -> int:
    if tf.config.list_physical_devices("GPU"):  # parts are for cores; a GPU takes a batch at once
        return 1
    return int(tf.config.threading.get_inter_op_parallelism_threads()) or 1


def _prediction_function(model: keras.Model) -> Callable[[Any, Any], tf.Tensor]:
    signature = [tf.TensorSpec((None, None), tf.int32), tf.TensorSpec((None, None), tf.int32)]
    function: Callable[[Any, Any], tf.Tensor] = tf.function(
        lambda ids, mask: model([ids, mask], training=False), input_signature=signature
    )
    return function


def _prediction_batches(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield rows of like length: as many as fit a token budget, so that few different shapes occur.

    Every new shape costs a compiled kernel that stays in memory; a length has one full batch size and one remainder.
    """
    padded = -(-lengths // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    order = np.argsort(padded, kind="stable")
    ordered = padded[order]
    for length in np.unique(ordered):
        rows = order[np.searchsorted(ordered, length, "left") : np.searchsorted(ordered, length, "right")]
        size = max(1, _PREDICT_TOKENS // int(length))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _rate_factors(model: keras.Model, variables: Sequence[tf.Variable], layerwise_decay: float) -> list[float]:
    """Return a factor per variable: 1 for the classifier and the top layer, times the decay for each layer below."""
    depth_of: dict[int, int] = {}
    n_layers = 0
    for layer in model.layers:
        depth = int(layer.name.split("_")[1]) + 1 if layer.name.startswith("layer_") else 0
        n_layers = max(n_layers, depth)
        for variable in layer.trainable_variables:
            depth_of[id(variable)] = 10**6 if layer.name == "classifier" else depth
    return [layerwise_decay ** (n_layers - min(depth_of[id(v)], n_layers)) for v in variables]


class _Checkpoint:
    """Weights, optimizer moments and position of a fit, in one file that is either whole or absent."""

    def __init__(self, path: Path, optimizer: AdamW, state: Sequence[tf.Variable], fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.arrays: dict[str, tf.Variable] = {}
        groups = {"w": optimizer.variables, "m": optimizer.first, "v": optimizer.second, "s": state}
        for kind, variables in groups.items():
            self.arrays |= {f"{kind}{i}": variable for i, variable in enumerate(variables)}

    def save(self, next_step: int) -> None:
        beside = self.path.with_suffix(".part")
        metadata = {"next_step": str(next_step), "fingerprint": self.fingerprint}
        save_file(
            {name: np.asarray(variable.numpy()) for name, variable in self.arrays.items()}, beside, metadata=metadata
        )
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(self.path)

    def restore(self) -> int:
        """Load the checkpoint if it is whole and fits; return the step to go on with (0 without one)."""
        try:
            with safe_open(self.path, "np") as file:
                metadata = file.metadata() or {}
            if metadata.get("fingerprint") != self.fingerprint:
                return 0
            arrays = load_file(self.path)
        except (FileNotFoundError, SafetensorError):
            return 0
        for name, variable in self.arrays.items():
            variable.assign(arrays[name])
        return int(metadata["next_step"])


class _StepLog:
    """metrics.jsonl, cut back to the step from which a resumed run goes on."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] < first_step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    break
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, **values: float) -> None:
        self.file.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> "_StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
