"""Train one member: a variant, all folds but one, its predictions on everything it never saw."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emodistill.checkpoints import ModelCheckpoint, load_encoder_weights, save_checkpoint
from emodistill.ensemble.augmentation import join_texts
from emodistill.ensemble.variants import VariantConfig
from emodistill.errors import ConfigError
from emodistill.logits import MemberLogits, write_member_logits
from emodistill.progress import Progress

__all__ = ["embed_member_texts", "train_member"]

TRAIN_TEXTS = "train"  # beside the names of the other files


def train_member(
    variant: VariantConfig,
    fold: int,
    *,
    encoder_dir: Path | None,
    texts: Sequence[str],
    labels: NDArray[np.int8],
    fold_ids: NDArray[np.int8],
    label_names: Sequence[str],
    evaluation_texts: Mapping[str, Sequence[str]],
    work_dir: Path,
    fingerprint: str = "",
    embeddings: Mapping[str, NDArray[np.float32]] | None = None,
    progress_factory: Callable[..., Progress] = Progress,
) -> None:
    """Train `variant` on the rows outside `fold` and write what it says about the others into `work_dir`.

    Parameters
    ----------
    variant
        Settings.
    fold
        The fold left out. Rows with another id, also negative ones, are trained on.
    encoder_dir
        Hugging Face folder of the pretrained encoder; None for kind "tfidf".
    texts
        n_rows train texts.
    labels
        int8 (n_rows, n_labels), multi-hot.
    fold_ids
        int8 (n_rows,).
    label_names
        In the order of the columns of `labels`.
    evaluation_texts
        Further texts by name ("dev", "test", "unlabeled").
    work_dir
        Gets weights.safetensors, config.json, tokenizer.json (encoder variants), logits.npz and metrics.jsonl. A
        killed call goes on from the checkpoint that it left here.
    fingerprint
        Of everything that the member depends on; a checkpoint with another one is not used.
    embeddings
        For kind "head", what `embed_member_texts` returned for these texts: it is the same for every fold.
    progress_factory
        Makes progress lines.

    Raises
    ------
    TrainingError
        If the loss is not finite.
    ConfigError
        If nothing is left to train on.
    """
    if not (fold_ids != fold).any():
        raise ConfigError(f"variant '{variant.name}', fold {fold}: no row is left to train on")
    work_dir.mkdir(parents=True, exist_ok=True)
    if variant.kind == "tfidf":
        from emodistill.ensemble.tfidf import train_tfidf_member

        valid_rows, valid, evaluations = train_tfidf_member(
            texts, labels, fold_ids, fold, evaluation_texts, variant.seed
        )
    elif variant.kind == "head":
        from emodistill.ensemble.heads import train_head_member

        if embeddings is None:
            raise ConfigError(f"variant '{variant.name}' needs the embeddings of its texts")
        others = {name: embeddings[name] for name in evaluation_texts}
        valid_rows, valid, evaluations = train_head_member(
            embeddings[TRAIN_TEXTS], labels, fold_ids, fold, others, variant.seed
        )
    else:
        if encoder_dir is None:
            raise ConfigError(f"variant '{variant.name}' needs the folder of its encoder")
        valid_rows = np.flatnonzero(fold_ids == fold).astype(np.int32)
        training_texts = [texts[i] for i in np.flatnonzero(fold_ids != fold).tolist()]
        training_labels = labels[fold_ids != fold]
        joined, joined_labels = join_texts(training_texts, training_labels, variant.joined_texts, variant.seed)
        valid, evaluations = _fine_tune(
            variant,
            encoder_dir,
            training_texts + joined,
            np.concatenate([training_labels, joined_labels]),
            label_names,
            {"valid": [texts[i] for i in valid_rows.tolist()], **evaluation_texts},
            work_dir,
            fingerprint,
            progress_factory,
            f"{variant.name} fold {fold}",
        )
    member = MemberLogits(
        valid_rows=valid_rows, valid=valid, evaluations=dict(evaluations), label_names=tuple(label_names)
    )
    write_member_logits(work_dir / "logits.npz", member)


def embed_member_texts(
    variant: VariantConfig,
    encoder_dir: Path,
    texts: Sequence[str],
    evaluation_texts: Mapping[str, Sequence[str]],
    progress_factory: Callable[..., Progress] = Progress,
) -> dict[str, NDArray[np.float32]]:
    """Embed all texts of a variant of kind "head", once for all its folds.

    Parameters
    ----------
    variant, encoder_dir, texts, evaluation_texts, progress_factory
        As for `train_member`.

    Returns
    -------
    dict of str to float32 array of shape (n_texts, hidden_size)
        By the names of `evaluation_texts`, and "train".
    """
    from emodistill.ensemble.embeddings import embed_texts

    return embed_texts(
        encoder_dir,
        {TRAIN_TEXTS: texts, **evaluation_texts},
        pooling=variant.pooling,
        max_length_tokens=variant.max_length_tokens,
        precision=variant.precision,
        progress_factory=progress_factory,
        description=f"{variant.name}: embedding",
    )


def _fine_tune(
    variant: VariantConfig,
    encoder_dir: Path,
    texts: Sequence[str],
    labels: NDArray[np.int8],
    label_names: Sequence[str],
    evaluation_texts: Mapping[str, Sequence[str]],
    work_dir: Path,
    fingerprint: str,
    progress_factory: Callable[..., Progress],
    description: str,
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """Fine-tune, save the checkpoint folder, and return the logits of "valid" and of the other texts."""
    from emodistill.classifier_training import train_classifier
    from emodistill.losses import binary_cross_entropy
    from emodistill.tokenization import load_tokenizer

    config, weights = load_encoder_weights(encoder_dir)
    generator = np.random.default_rng([variant.seed, 7])
    weights["classifier.weight"] = generator.normal(0, 0.02, (len(label_names), config.hidden_size)).astype(np.float32)
    weights["classifier.bias"] = np.zeros(len(label_names), np.float32)
    start = ModelCheckpoint(
        config=config,
        pooling=variant.pooling,
        label_names=tuple(label_names),
        max_length_tokens=min(variant.max_length_tokens, config.max_length_tokens),
        weights=weights,
        tokenizer_json=load_tokenizer(encoder_dir).to_str(),
    )
    trained, logits = train_classifier(
        start,
        texts,
        [labels.astype(np.float32)],
        binary_cross_entropy,
        variant.training(),
        dropout_rate=variant.dropout_rate,
        attention_dropout_rate=variant.attention_dropout_rate,
        classifier_dropout_rate=variant.classifier_dropout_rate,
        precision=variant.precision,
        evaluation_texts=evaluation_texts,
        work_dir=work_dir,
        fingerprint=fingerprint,
        progress_factory=progress_factory,
        description=description,
    )
    save_checkpoint(work_dir, trained)
    valid = logits.pop("valid")
    return valid, logits
