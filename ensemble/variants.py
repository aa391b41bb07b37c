"""A variant as plain data: what distinguishes the members of an ensemble from each other."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from emodistill.errors import ConfigError
from emodistill.training_config import TrainingConfig, check_settings, encoder_checks

__all__ = ["KINDS", "VariantConfig"]

KINDS = ("encoder", "tfidf", "head")
# What decides on the numbers of the cheap kinds; all settings do for encoders.
USED_BY_CHEAP_KINDS = {
    "tfidf": ("name", "kind", "seed"),
    "head": ("name", "kind", "encoder", "seed", "pooling", "max_length_tokens", "precision"),
}


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """One variant; a member is a variant trained without one fold.

    Parameters
    ----------
    name
        Names the variant's files: letters, digits, dash and underscore.
    kind
        "encoder" fine-tunes a BERT-family encoder; "tfidf" fits logistic regression on n-grams and uses `seed` only;
        "head" fits a small network on the states of an encoder that stays as it is, and uses `encoder`, `seed`,
        `pooling`, `max_length_tokens` and `precision`.
    encoder
        Name or folder of the encoder (`emodistill encoder list`).
    seed
        Of the classifier's start, row order and dropout.
    epochs, batch_size, learning_rate, warmup_fraction, weight_decay, layerwise_decay, clip_norm
        See `emodistill.training_config.TrainingConfig`.
    dropout_rate, attention_dropout_rate, classifier_dropout_rate
        In [0, 1).
    joined_texts
        Extra training rows per row, made of two texts each (`augmentation.join_texts`); at least 0.
    pooling
        "mean" or "cls".
    max_length_tokens
        Longer texts are cut.
    precision
        "bfloat16" or "float32".
    folds
        Which folds to train; None for all.

    Raises
    ------
    ConfigError
        If a value is out of its range; the sentence names variant and setting.
    """

    name: str
    kind: str = "encoder"
    encoder: str = "minilm-l6"
    seed: int = 0
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1.5e-4
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    layerwise_decay: float = 1.0
    clip_norm: float = 1.0
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    classifier_dropout_rate: float = 0.1
    joined_texts: float = 0.0
    pooling: str = "mean"
    max_length_tokens: int = 128
    precision: str = "bfloat16"
    folds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.folds is not None:
            object.__setattr__(self, "folds", tuple(self.folds))
        owner, hint = f"variant '{self.name}'", "see 'emodistill train --help' for the settings of a variant"
        checks = {
            "name": bool(self.name) and all(c.isalnum() or c in "-_" for c in self.name),
            "kind": self.kind in KINDS,
            "joined_texts": 0 <= self.joined_texts < float("inf"),
        }
        check_settings(owner, self, checks | encoder_checks(self), hint=hint)
        TrainingConfig.of(self, owner=owner, hint=hint)

    def training(self) -> TrainingConfig:
        """Return the settings of the fit."""
        return TrainingConfig.of(self)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "VariantConfig":
        """Make a variant from a TOML table.

        Raises
        ------
        ConfigError
            If a setting is unknown or missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"variant setting '{unknown[0]}' is unknown: known are {', '.join(sorted(known))}")
        if "name" not in settings:
            raise ConfigError('a variant has no name: add  name = "..."  to its table')
        return cls(**settings)

    def fingerprint_parts(self) -> dict[str, Any]:
        """Return the settings that decide on a member's numbers.

        Which folds are trained does not, and settings at their default are left out: one that is added later, with a
        default that changes nothing, leaves saved members valid.
        """
        used = USED_BY_CHEAP_KINDS.get(self.kind, tuple(field.name for field in fields(self)))
        always = ("name", "kind", "encoder", "seed", "epochs", "learning_rate")
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in used
            and field.name != "folds"
            and (field.name in always or getattr(self, field.name) != field.default)
        }
