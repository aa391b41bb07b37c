"""From one checkpoint and texts to a trained checkpoint and its logits: what members and students share.

While training, the word table holds only the pieces that occur in the texts at hand: Adam then updates half as many
weights each step. The other rows keep their pretrained values, and the table that is returned is whole again.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from numpy.typing import NDArray
from tokenizers import Tokenizer

from emodistill.checkpoints import ModelCheckpoint, Weights
from emodistill.encoder_graph import build_classifier, get_weights, set_weights
from emodistill.progress import Progress
from emodistill.tokenization import encode
from emodistill.training import Loss, fit, predict_logits
from emodistill.training_config import TrainingConfig

__all__ = ["Arrange", "Trainee", "train_classifier"]

_WORD_TABLE = "embeddings.word_embeddings.weight"

TokenIds = list[NDArray[np.int32]]


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model that is fitted in place of a classifier, whose variables it shares.

    Attributes
    ----------
    model : tf_keras.Model
        Takes the classifier's inputs; its outputs go to the loss.
    state : sequence of tf.Variable
        What steps change besides its trainable variables.
    finish : callable
        Called after the fit: leaves the result in the classifier's own variables.
    """

    model: keras.Model
    state: Sequence[tf.Variable] = ()
    finish: Callable[[], None] = lambda: None


Arrange = Callable[[keras.Model, NDArray[np.int32], Sequence[NDArray[np.int32]]], Trainee]
"""Make the trainee of a classifier: (classifier, rows kept of the word table, training texts as ids of these rows)."""


def train_classifier(
    start: ModelCheckpoint,
    texts: Sequence[str],
    targets: Sequence[NDArray[Any]],
    loss: Loss,
    config: TrainingConfig,
    *,
    dropout_rate: float = 0.1,
    attention_dropout_rate: float = 0.1,
    classifier_dropout_rate: float = 0.1,
    precision: str = "bfloat16",
    evaluation_texts: Mapping[str, Sequence[str]],
    work_dir: Path,
    fingerprint: str,
    arrange: Arrange | None = None,
    progress_factory: Callable[..., Progress] = Progress,
    description: str = "training",
) -> tuple[ModelCheckpoint, dict[str, NDArray[np.float32]]]:
    """Train a classifier from `start` and predict further texts with it.

    Parameters
    ----------
    start
        Shape, starting weights (classifier included) and tokenizer.
    texts
        n training texts.
    targets
        Arrays with n rows, given to `loss` batch by batch.
    loss
        `loss(outputs, *targets)` to a scalar; the outputs are the logits, or those of the trainee.
    config
        Settings of the fit.
    dropout_rate, attention_dropout_rate, classifier_dropout_rate, precision
        See `encoder_graph.build_classifier`.
    evaluation_texts
        Texts to predict after training, by name.
    work_dir, fingerprint, progress_factory, description
        See `training.fit`.
    arrange
        Makes what is fitted instead of the plain classifier.

    Returns
    -------
    tuple
        The trained checkpoint, and float32 logits (n_texts, n_labels) by name of `evaluation_texts`.

    Raises
    ------
    TrainingError
        If the loss is not finite.
    """
    tokenizer = Tokenizer.from_str(start.tokenizer_json)
    train_ids = encode(tokenizer, texts, start.max_length_tokens)
    evaluation_ids = {name: encode(tokenizer, t, start.max_length_tokens) for name, t in evaluation_texts.items()}
    used = _used_pieces([train_ids, *evaluation_ids.values()], start.config.pad_token_id)
    compact, renumber = _compact(start, used)
    model = build_classifier(
        compact.config,
        len(start.label_names),
        pooling=start.pooling,
        dropout_rate=dropout_rate,
        attention_dropout_rate=attention_dropout_rate,
        classifier_dropout_rate=classifier_dropout_rate,
        precision=precision,
    )
    set_weights(model, compact.config, compact.weights)
    pad_token_id = compact.config.pad_token_id
    compact_ids = [renumber[ids] for ids in train_ids]
    trainee = Trainee(model=model) if arrange is None else arrange(model, used, compact_ids)
    fit(
        trainee.model,
        compact_ids,
        targets,
        loss,
        config,
        pad_token_id=pad_token_id,
        work_dir=work_dir,
        fingerprint=fingerprint,
        state=trainee.state,
        progress_factory=progress_factory,
        description=description,
    )
    trainee.finish()
    logits = {}
    n_texts = sum(len(rows) for rows in evaluation_ids.values())
    with progress_factory(f"{description}: predicting", n_texts) as progress:
        for name, rows in evaluation_ids.items():
            logits[name] = predict_logits(
                model, [renumber[ids] for ids in rows], pad_token_id=pad_token_id, progress=progress
            )
    trained = replace(start, weights=_whole_weights(start.weights, get_weights(model, compact.config), used))
    del model, trainee
    keras.backend.clear_session()
    gc.collect()  # graphs and optimizer slots hang in reference cycles
    return trained, logits


def _used_pieces(groups: Sequence[TokenIds], pad_token_id: int) -> NDArray[np.int32]:
    """Return the sorted ids that occur, and all up to the padding id: position rules count from that one."""
    pieces = [np.arange(pad_token_id + 1, dtype=np.int32), *(ids for group in groups for ids in group)]
    return np.unique(np.concatenate(pieces))


def _compact(start: ModelCheckpoint, used: NDArray[np.int32]) -> tuple[ModelCheckpoint, NDArray[np.int32]]:
    """Return the checkpoint with only the used rows of the word table, and the map from old to new ids."""
    renumber = np.zeros(start.config.vocab_size, np.int32)
    renumber[used] = np.arange(len(used), dtype=np.int32)
    weights = dict(start.weights)
    weights[_WORD_TABLE] = weights[_WORD_TABLE][used]
    return replace(start, config=replace(start.config, vocab_size=len(used)), weights=weights), renumber


def _whole_weights(start: Weights, trained: Weights, used: NDArray[np.int32]) -> Weights:
    """Put the trained rows back into the whole word table."""
    table = start[_WORD_TABLE].copy()
    table[used] = trained[_WORD_TABLE]
    return trained | {_WORD_TABLE: table}
