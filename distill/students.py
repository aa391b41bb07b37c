"""Train one small student on the ensemble's logits.

Soft targets on train rows are out-of-fold, so that the student learns what the ensemble says about texts it never
saw. A fixed stratified tenth of train is kept from every student: its threshold and calibration are set there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emodistill.artifacts import write_json
from emodistill.checkpoints import ModelCheckpoint, Weights, load_encoder_weights, save_checkpoint
from emodistill.encoder_config import EncoderConfig
from emodistill.errors import ConfigError
from emodistill.folds import assign_folds
from emodistill.progress import Progress
from emodistill.thresholds import sigmoid
from emodistill.training_config import TrainingConfig, check_settings, encoder_checks

if TYPE_CHECKING:
    from emodistill.classifier_training import Arrange

__all__ = [
    "COMPRESSIONS",
    "STUDENT_PRESETS",
    "StudentConfig",
    "draw_transfer_rows",
    "held_out_rows",
    "student_start",
    "train_student",
]

COMPRESSIONS = ("clustered", "none", "pruned", "quantization_aware")
_HELD_OUT_PARTS = 10
_HELD_OUT_SEED = 20_000
_COMPRESSION_FOLDER = "compression"  # of the second training's log and checkpoint
_WORD_TABLE = "embeddings.word_embeddings.weight"
# Settings that came later: at these values a student is what it was before, so its fingerprint leaves them out.
_NEUTRAL = {
    "hidden_size": None,
    "hidden_weight": 0.0,
    "relation_weight": 0.0,
    "compression": "none",
    "compression_epochs": 1,
    "compression_learning_rate": 5e-5,
    "sparsity": 0.5,
    "n_clusters": 32,
}


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Settings of a student.

    Parameters
    ----------
    name
        Names the student's files.
    encoder
        Pretrained encoder whose layers it starts from.
    layers
        Which layers of it, counted from 0 at the bottom.
    vocabulary_size
        Word pieces kept: the most frequent ones in the texts at hand, and all single characters; None keeps all.
    hidden_size
        Width of the student; None is the encoder's. Smaller ones start from it by `narrowing.narrow_encoder`.
    embedding_size
        Width of the word table; None is the student's. Smaller ones start from its singular value decomposition.
    pooling
        "mean" or "cls".
    max_length_tokens
        Longer texts are cut; the position table holds just these.
    distillation_temperature, hard_weight
        See `losses.distillation_loss`. hard_weight 1 trains without a teacher.
    hidden_weight, relation_weight
        Of losses that draw states and attention relations to those of the pretrained encoder, see `transfer`; 0 leaves
        them out.
    transfer_texts
        How many rows of unlabeled text to add, at most; of more, `draw_transfer_rows` chooses.
    compression
        A second training, see `compression`: "quantization_aware", "pruned", "clustered" or "none".
    compression_epochs, compression_learning_rate
        Of the second training, which computes in float32 and on logits alone.
    sparsity
        Share of zeros that "pruned" reaches in the linear layers, in (0, 1).
    n_clusters
        Different values that "clustered" leaves in each linear layer, at least 2.
    epochs, batch_size, learning_rate, warmup_fraction, weight_decay, seed
        See `emodistill.training_config.TrainingConfig`.
    dropout_rate, attention_dropout_rate, classifier_dropout_rate, precision
        See `emodistill.encoder_graph.build_classifier`.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    name: str = "tiny"
    encoder: str = "minilm-l6"
    layers: tuple[int, ...] = (0, 1, 2)
    vocabulary_size: int | None = 10_500
    hidden_size: int | None = None
    embedding_size: int | None = None
    pooling: str = "mean"
    max_length_tokens: int = 128
    distillation_temperature: float = 2.0
    hard_weight: float = 0.3
    hidden_weight: float = 0.0
    relation_weight: float = 0.0
    transfer_texts: int = 20_000
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup_fraction: float = 0.06
    weight_decay: float = 0.01
    seed: int = 0
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    classifier_dropout_rate: float = 0.1
    precision: str = "bfloat16"
    compression: str = "none"
    compression_epochs: int = 1
    compression_learning_rate: float = 5e-5
    sparsity: float = 0.5
    n_clusters: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        checks = {
            "name": bool(self.name) and all(c.isalnum() or c in "-_" for c in self.name),
            "layers": len(self.layers) > 0 and all(layer >= 0 for layer in self.layers),
            "vocabulary_size": self.vocabulary_size is None or self.vocabulary_size >= 1,
            "hidden_size": self.hidden_size is None or self.hidden_size >= 8,
            "embedding_size": self.embedding_size is None or self.embedding_size >= 8,
            "distillation_temperature": self.distillation_temperature > 0,
            "hard_weight": 0 <= self.hard_weight <= 1,
            "hidden_weight": self.hidden_weight >= 0,
            "relation_weight": self.relation_weight >= 0,
            "transfer_texts": self.transfer_texts >= 0,
            "compression": self.compression in COMPRESSIONS,
            "compression_epochs": self.compression_epochs >= 1,
            "compression_learning_rate": self.compression_learning_rate > 0,
            "sparsity": 0 < self.sparsity < 1,
            "n_clusters": self.n_clusters >= 2,
        }
        owner = f"student '{self.name}'"
        check_settings(owner, self, checks | encoder_checks(self))
        TrainingConfig.of(self, owner=owner)

    def training(self) -> TrainingConfig:
        """Return the settings of the fit; a second training changes epochs and rate."""
        return TrainingConfig.of(self)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "StudentConfig":
        """Make a student from a TOML table, starting from the preset of its name where there is one.

        Raises
        ------
        ConfigError
            If a setting is unknown.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"student setting '{unknown[0]}' is unknown: known are {', '.join(sorted(known))}")
        start = STUDENT_PRESETS.get(str(settings.get("name", "tiny")), StudentConfig())
        return replace(start, **settings)

    def fingerprint_parts(self) -> dict[str, Any]:
        """Return the settings that decide on the student's numbers: all but later ones that change nothing."""
        return {name: value for name, value in asdict(self).items() if name not in _NEUTRAL or value != _NEUTRAL[name]}


STUDENT_PRESETS = {
    "small": StudentConfig(
        name="small",
        layers=(0, 1, 2, 3, 4, 5),
        vocabulary_size=20_000,
        learning_rate=2e-4,
        epochs=4,
        transfer_texts=12_500,
    ),
    "tiny": StudentConfig(name="tiny", pooling="cls", relation_weight=0.1, epochs=8, transfer_texts=12_500),
    "nano": StudentConfig(name="nano", hidden_size=256, pooling="cls", epochs=10, transfer_texts=12_500),
}


def held_out_rows(texts: Sequence[str], labels: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the rows of train (about a tenth, stratified, always the same) that no student is trained on."""
    return np.flatnonzero(assign_folds(texts, labels, _HELD_OUT_PARTS, _HELD_OUT_SEED) == 0)


def train_student(
    student: StudentConfig,
    *,
    encoder_dir: Path,
    texts: Sequence[str],
    hard_targets: NDArray[np.int8],
    soft_logits: NDArray[np.float32],
    transfer_texts: Sequence[str],
    transfer_logits: NDArray[np.float32],
    label_names: Sequence[str],
    evaluation_texts: Mapping[str, Sequence[str]],
    work_dir: Path,
    fingerprint: str = "",
    progress_factory: Callable[..., Progress] = Progress,
) -> None:
    """Distil the ensemble into a student and leave its checkpoint and logits in `work_dir`.

    Parameters
    ----------
    student
        Settings.
    encoder_dir
        Hugging Face folder of the pretrained encoder.
    texts
        n_rows train texts.
    hard_targets
        int8 (n_rows, n_labels), multi-hot.
    soft_logits
        float32 (n_rows, n_labels): the ensemble's out-of-fold logits.
    transfer_texts, transfer_logits
        Unlabeled texts and the ensemble's logits of them, float32 (n_transfer, n_labels).
    label_names
        In the order of the columns.
    evaluation_texts
        Texts to predict after training, by name.
    work_dir
        Gets weights.safetensors, config.json, tokenizer.json, metrics.jsonl and logits.npz with `held_out_rows`
        int32, `held_out` and one float16 array per evaluation name. A compressed student has compression.json besides
        (what it gained), and activation_ranges.json where it was trained for int8: {tensor of the fast graph: [low,
        high]}. A killed call goes on from its checkpoint.
    fingerprint
        Of everything that the student depends on.
    progress_factory
        Makes progress lines.

    Raises
    ------
    ConfigError
        If a layer does not exist or the teacher's logits do not fit the texts.
    TrainingError
        If the loss is not finite.
    """
    from emodistill.classifier_training import train_classifier
    from emodistill.distill.losses import distillation_loss, soft_targets
    from emodistill.training import Loss

    if len(soft_logits) != len(texts) or len(transfer_logits) != len(transfer_texts):
        raise ConfigError(
            f"the teacher's logits ({len(soft_logits)} train, {len(transfer_logits)} transfer rows) do not fit the "
            f"texts ({len(texts)} train, {len(transfer_texts)} transfer rows): combine again on these files"
        )
    held_out = held_out_rows(texts, hard_targets)
    kept = np.setdiff1d(np.arange(len(texts)), held_out)
    if student.hard_weight == 1:
        transfer_texts, transfer_logits = [], transfer_logits[:0]
    chosen = draw_transfer_rows(transfer_logits, student.transfer_texts, seed=student.seed)
    transfer_texts, transfer_logits = [transfer_texts[row] for row in chosen], transfer_logits[chosen]
    train_texts = [texts[i] for i in kept] + transfer_texts
    start = student_start(student, encoder_dir, train_texts, label_names)
    temperature = student.distillation_temperature
    soft = soft_targets(np.concatenate([soft_logits[kept], transfer_logits]), temperature)
    hard = np.concatenate([hard_targets[kept], np.zeros((len(transfer_texts), len(label_names)), np.int8)])
    has_labels = np.concatenate([np.ones(len(kept), np.float32), np.zeros(len(transfer_texts), np.float32)])
    loss: Loss = distillation_loss(temperature, student.hard_weight)
    arrange = None
    if student.hidden_weight or student.relation_weight:
        from emodistill.distill.transfer import arrange_transfer, with_transfer

        loss = with_transfer(loss)
        arrange = arrange_transfer(
            start,
            encoder_dir,
            hidden_weight=student.hidden_weight,
            relation_weight=student.relation_weight,
            precision=student.precision,
        )
    training = student.training()
    targets = [soft, hard.astype(np.float32), has_labels]
    evaluation_texts = {"held_out": [texts[i] for i in held_out], **evaluation_texts}
    fit_student = partial(
        train_classifier,
        texts=train_texts,
        targets=targets,
        dropout_rate=student.dropout_rate,
        attention_dropout_rate=student.attention_dropout_rate,
        classifier_dropout_rate=student.classifier_dropout_rate,
        fingerprint=fingerprint,
        progress_factory=progress_factory,
    )
    is_compressed = student.compression != "none"
    trained, logits = fit_student(
        start,
        loss=loss,
        config=training,
        precision=student.precision,
        evaluation_texts=evaluation_texts,  # even if a second training follows: their pieces belong to the table
        work_dir=work_dir,
        arrange=arrange,
        description=f"student {student.name}",
    )
    if is_compressed:
        training = replace(training, epochs=student.compression_epochs, learning_rate=student.compression_learning_rate)
        compress, report = _compression(student, trained, training.n_steps(len(train_texts)))
        compressed, logits = fit_student(
            trained,
            loss=distillation_loss(temperature, student.hard_weight),
            config=training,
            precision="float32",
            evaluation_texts=evaluation_texts,
            work_dir=work_dir / _COMPRESSION_FOLDER,
            arrange=compress,
            description=f"student {student.name}, {student.compression.replace('_', '-')}",
        )
        for name, content in report(compressed).items():
            write_json(work_dir / name, content)
        (work_dir / _COMPRESSION_FOLDER / "checkpoint.safetensors").unlink()
        trained = compressed
    save_checkpoint(work_dir, trained)
    saved_logits: dict[str, Any] = {name: values.astype(np.float16) for name, values in logits.items()}
    np.savez_compressed(
        work_dir / "logits.npz",
        held_out_rows=held_out.astype(np.int32),
        label_names=np.array(list(label_names)),
        **saved_logits,
    )


def draw_transfer_rows(logits: NDArray[np.float32], n: int, *, seed: int) -> NDArray[np.int64]:
    """Draw which rows of unlabeled text are learned from: rather those in which the teacher finds something.

    Most texts express none of the labels, and a student learns little from one more of them. Drawn without replacement,
    the largest of a row's probabilities its weight.

    Parameters
    ----------
    logits
        float32 (n_rows, n_labels), the teacher's.
    n
        How many; all rows, in their order, where there are no more.
    seed
        Of the draw.

    Returns
    -------
    ndarray
        int64 (min(n, n_rows),).

    References
    ----------
    Efraimidis and Spirakis (2006), Weighted random sampling with a reservoir.
    """
    if n >= len(logits):
        return np.arange(len(logits))
    keys = np.random.default_rng(seed).exponential(size=len(logits)) / sigmoid(logits).max(axis=1)
    return np.argsort(keys, kind="stable")[:n]


def student_start(
    student: StudentConfig, encoder_dir: Path, texts: Sequence[str], label_names: Sequence[str]
) -> ModelCheckpoint:
    """Cut the student out of a pretrained encoder: layers, vocabulary, width, word table, positions; a new classifier.

    Raises
    ------
    ConfigError
        If the encoder has not got the layers, or heads of its size do not fill the width.
    """
    from emodistill.tokenization import load_tokenizer

    config, weights = load_encoder_weights(encoder_dir)
    tokenizer_json = load_tokenizer(encoder_dir).to_str()
    missing = [layer for layer in student.layers if layer >= config.n_layers]
    if missing:
        raise ConfigError(
            f"student '{student.name}' wants layer {missing[0]}, but '{student.encoder}' has {config.n_layers} layers "
            "(counted from 0)"
        )
    max_length_tokens = min(student.max_length_tokens, config.max_length_tokens)
    config, weights = _chosen_layers(config, weights, student.layers)
    config, weights = _short_positions(config, weights, max_length_tokens)
    if student.vocabulary_size is not None and student.vocabulary_size < config.vocab_size:
        config, weights, tokenizer_json = _frequent_pieces(
            config, weights, tokenizer_json, texts, student.vocabulary_size
        )
    if student.hidden_size is not None and student.hidden_size != config.hidden_size:
        config, weights = _narrowed(config, weights, tokenizer_json, texts, student.hidden_size, max_length_tokens)
    if student.embedding_size is not None and student.embedding_size < config.hidden_size:
        config, weights = _factorized_table(config, weights, student.embedding_size)
    generator = np.random.default_rng([student.seed, 7])
    weights["classifier.weight"] = generator.normal(0, 0.02, (len(label_names), config.hidden_size)).astype(np.float32)
    weights["classifier.bias"] = np.zeros(len(label_names), np.float32)
    return ModelCheckpoint(
        config=config,
        pooling=student.pooling,
        label_names=tuple(label_names),
        max_length_tokens=max_length_tokens,
        weights=weights,
        tokenizer_json=tokenizer_json,
    )


def _compression(
    student: StudentConfig, trained: ModelCheckpoint, n_steps: int
) -> "tuple[Arrange, Callable[[ModelCheckpoint], dict[str, Any]]]":
    """Return the arrangement of the second training, and what to write after it: JSON contents by file name."""
    from emodistill.distill.compression import (
        Clustered,
        Pruned,
        QuantizationAware,
        compressed_sizes,
        distinct_values,
        sparsity_of,
    )

    aware = QuantizationAware(trained.config, trained.pooling)
    choices: dict[str, Arrange] = {
        "clustered": Clustered(student.n_clusters),
        "pruned": Pruned(student.sparsity, n_steps),
        "quantization_aware": aware,
    }
    arrange = choices[student.compression]

    def report(compressed: ModelCheckpoint) -> dict[str, Any]:
        gained = {
            "compression": student.compression,
            "gzip_bytes_before": compressed_sizes(trained.weights),
            "gzip_bytes_after": compressed_sizes(compressed.weights),
            "sparsity": round(sparsity_of(compressed.weights), 4),
            "distinct_values": distinct_values(compressed.weights),
        }
        ranges = {"activation_ranges.json": aware.ranges} if arrange is aware else {}
        return {"compression.json": gained, **ranges}

    return arrange, report


def _chosen_layers(config: EncoderConfig, weights: Weights, layers: Sequence[int]) -> tuple[EncoderConfig, Weights]:
    chosen = {name: value for name, value in weights.items() if not name.startswith("layer.")}
    for new, old in enumerate(layers):
        prefix = f"layer.{old}."
        chosen |= {f"layer.{new}.{n[len(prefix) :]}": v for n, v in weights.items() if n.startswith(prefix)}
    return config.with_layers(len(layers)), chosen


def _short_positions(config: EncoderConfig, weights: Weights, max_length_tokens: int) -> tuple[EncoderConfig, Weights]:
    n_rows = config.position_offset + max_length_tokens
    name = "embeddings.position_embeddings.weight"
    return replace(config, max_positions=n_rows), weights | {name: weights[name][:n_rows].copy()}


def _frequent_pieces(
    config: EncoderConfig, weights: Weights, tokenizer_json: str, texts: Sequence[str], vocabulary_size: int
) -> tuple[EncoderConfig, Weights, str]:
    """Keep the pieces that occur most often in `texts`; the tokenizer spells the others with shorter ones."""
    from tokenizers import Tokenizer

    from emodistill.tokenization import encode, shrink_vocabulary

    ids = encode(Tokenizer.from_str(tokenizer_json), texts, config.max_length_tokens)
    counts = np.bincount(np.concatenate(ids), minlength=config.vocab_size)
    _, always_kept = shrink_vocabulary(tokenizer_json, [])
    order = np.lexsort((np.arange(config.vocab_size), -counts))  # ties by id
    order = order[~np.isin(order, always_kept)]
    n_chosen = max(0, vocabulary_size - len(always_kept))
    tokenizer_json, old_ids = shrink_vocabulary(tokenizer_json, order[:n_chosen].tolist())
    weights = weights | {_WORD_TABLE: weights[_WORD_TABLE][old_ids].copy()}
    pad_token_id = int(np.flatnonzero(old_ids == config.pad_token_id)[0])
    return replace(config, vocab_size=len(old_ids), pad_token_id=pad_token_id), weights, tokenizer_json


def _narrowed(
    config: EncoderConfig,
    weights: Weights,
    tokenizer_json: str,
    texts: Sequence[str],
    hidden_size: int,
    max_length_tokens: int,
) -> tuple[EncoderConfig, Weights]:
    from tokenizers import Tokenizer

    from emodistill.distill.narrowing import narrow_encoder
    from emodistill.tokenization import encode

    token_ids = encode(Tokenizer.from_str(tokenizer_json), texts, max_length_tokens)
    return narrow_encoder(config, weights, token_ids, hidden_size)


def _factorized_table(config: EncoderConfig, weights: Weights, embedding_size: int) -> tuple[EncoderConfig, Weights]:
    """Replace the word table (V, d) by its best rank-E product (V, E) (E, d) around its mean."""
    table = weights[_WORD_TABLE].astype(np.float64)
    mean = table.mean(0)
    _, values, directions = np.linalg.svd(table - mean, full_matrices=False)
    basis = directions[:embedding_size]  # (E, d)
    scale = np.sqrt(values[:embedding_size].mean() / np.sqrt(len(table)))
    factorized = weights | {
        _WORD_TABLE: ((table - mean) @ basis.T / scale).astype(np.float32),
        "embeddings.projection.weight": (basis.T * scale).astype(np.float32),
        "embeddings.projection.bias": mean.astype(np.float32),
    }
    return replace(config, embedding_size=embedding_size), factorized
