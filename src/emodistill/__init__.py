"""Train an ensemble of BERT variants, distil it, and ship one small int8 ONNX classifier for multi-label text."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emodistill.errors import EmodistillError as EmodistillError
    from emodistill.runtime import Classifier as Classifier

__all__ = ["Classifier", "EmodistillError", "__version__"]
__version__ = "0.1.0"

_HOME = {"Classifier": "emodistill.runtime", "EmodistillError": "emodistill.errors"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import emodistill` costs nothing."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'emodistill' has no attribute '{name}'")
