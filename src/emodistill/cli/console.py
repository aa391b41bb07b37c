"""What the verbs share in talking to people, and loading what is noisy without its noise."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TextIO

import click

from emodistill.artifacts import Piece
from emodistill.errors import MissingExtraError

__all__ = ["Outcome", "load_training_libraries", "say", "silent_descriptor", "what_now"]


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say: a table for people, plain values for programs."""

    text: str
    summary: dict[str, Any] = field(default_factory=dict)


def say(sentence: str) -> None:
    """Tell people what happens, beside the results."""
    click.echo(sentence, err=True)


def what_now(found: Piece) -> str:
    """Say what happens to a piece that is there and not as it should be."""
    return "going on" if found.state == "interrupted" else "training again"


def load_training_libraries() -> None:
    """Load TensorFlow before the work, without its chatter.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    for module in ("tensorflow", "tf_keras", "sklearn", "safetensors"):
        if find_spec(module) is None:
            raise MissingExtraError.for_extra(module, "train")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # a graph per length bucket is meant, and warned about
    with silent_descriptor(sys.stderr, 2):
        tensorflow = import_module("tensorflow")
        import_module("tf_keras")
        import_module("emodistill.training").use_cores(import_module("emodistill.runtime").usable_cores())
        tensorflow.config.list_physical_devices()


@contextmanager
def silent_descriptor(stream: TextIO, descriptor: int) -> Iterator[None]:
    """Drop what compiled code writes on a descriptor: TensorFlow does so before any of its settings can reach it."""
    stream.flush()
    kept = os.dup(descriptor)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), descriptor)
            try:
                yield
            finally:
                stream.flush()
                os.dup2(kept, descriptor)
    finally:
        os.close(kept)
