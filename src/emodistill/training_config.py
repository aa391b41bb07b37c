"""Settings of training that members and students share, and their ranges; needs no training library."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from emodistill.checkpoints import POOLINGS
from emodistill.errors import ConfigError

__all__ = ["PRECISIONS", "TrainingConfig", "check_settings", "encoder_checks"]

PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one fit.

    Parameters
    ----------
    epochs
        Passes over the rows, at least 1.
    batch_size
        Rows per step.
    learning_rate
        Peak of the schedule.
    warmup_fraction
        Share of all steps in which the rate rises from 0, in [0, 1).
    weight_decay
        Decoupled decay, not applied to biases and norms.
    layerwise_decay
        Factor of the learning rate from one layer to the one below it, in (0, 1].
    clip_norm
        Largest global norm of the gradient.
    seed
        Of row order and dropout.
    checkpoint_minutes
        Time between checkpoints.
    """

    epochs: int
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    layerwise_decay: float = 1.0
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_minutes: float = 3.0

    @classmethod
    def of(cls, settings: object, *, owner: str = "", hint: str = "") -> "TrainingConfig":
        """Take the settings of the fit from something that has them under the same names, a variant or a student.

        Raises
        ------
        ConfigError
            If one is out of its range; with owner and hint, see `check_settings`.
        """
        names = [field.name for field in fields(cls) if hasattr(settings, field.name)]
        try:
            return cls(**{name: getattr(settings, name) for name in names})
        except ConfigError as error:
            raise ConfigError((f"{owner}: " if owner else "") + str(error) + (f"; {hint}" if hint else "")) from None

    def n_steps(self, n_rows: int) -> int:
        """Return how many steps so many rows take."""
        return self.epochs * math.ceil(n_rows / self.batch_size)

    def __post_init__(self) -> None:
        check_settings(
            "",
            self,
            {
                "epochs": self.epochs >= 1,
                "batch_size": self.batch_size >= 1,
                "learning_rate": self.learning_rate > 0,
                "warmup_fraction": 0 <= self.warmup_fraction < 1,
                "weight_decay": self.weight_decay >= 0,
                "layerwise_decay": 0 < self.layerwise_decay <= 1,
                "clip_norm": self.clip_norm > 0,
            },
        )


def check_settings(owner: str, settings: object, checks: Mapping[str, bool], *, hint: str = "") -> None:
    """Refuse the first setting that is out of its range.

    Parameters
    ----------
    owner
        What the settings belong to, such as "student 'tiny'"; may be empty.
    settings
        Has an attribute per setting.
    checks
        By setting: whether it is fine.
    hint
        What to do, after the sentence.

    Raises
    ------
    ConfigError
        With owner, setting and value.
    """
    for name, fine in checks.items():
        if not fine:
            sentence = f"{name} = {getattr(settings, name)!r} is out of range"
            raise ConfigError((f"{owner}: " if owner else "") + sentence + (f"; {hint}" if hint else ""))


def encoder_checks(settings: Any) -> dict[str, bool]:
    """Check what members and students say about their network: pooling, length, dropout and precision."""
    return {
        "dropout_rate": 0 <= settings.dropout_rate < 1,
        "attention_dropout_rate": 0 <= settings.attention_dropout_rate < 1,
        "classifier_dropout_rate": 0 <= settings.classifier_dropout_rate < 1,
        "pooling": settings.pooling in POOLINGS,
        "max_length_tokens": settings.max_length_tokens >= 3,
        "precision": settings.precision in PRECISIONS,
    }
