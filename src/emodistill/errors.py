"""The errors that emodistill raises on purpose: one sentence each, with the place and the next step.

The command line prints the sentence and exits with `exit_code`; a traceback is a bug.
"""

__all__ = [
    "ArtifactError",
    "ConfigError",
    "EmodistillError",
    "EncoderError",
    "InputError",
    "MissingExtraError",
    "TrainingError",
    "VerificationError",
]


class EmodistillError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 2


class InputError(EmodistillError):
    """A file, row, column or value that was given cannot be used."""


class ConfigError(EmodistillError):
    """A setting is unknown, out of range or contradicts another."""


class ArtifactError(EmodistillError):
    """A piece of a run folder or bundle is missing, damaged or made from other inputs."""


class EncoderError(EmodistillError):
    """An encoder is unknown, cannot be fetched, or its weights do not fit its configuration."""


class MissingExtraError(EmodistillError):
    """A command needs an optional dependency that is not installed."""

    @classmethod
    def for_extra(cls, module: str, extra: str) -> "MissingExtraError":
        """Say which extra brings `module`."""
        return cls(f"this needs '{module}', which is not installed: run  pip install 'emodistill[{extra}]'")


class TrainingError(EmodistillError):
    """Training cannot go on, for example because the loss is no longer finite."""

    exit_code = 1


class VerificationError(EmodistillError):
    """An exported model does not answer as the model it was made from."""

    exit_code = 1
