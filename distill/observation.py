"""What layers of an encoder give on some texts, real tokens alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import tf_keras as keras
from numpy.typing import NDArray

from emodistill.training import pad_batch

__all__ = ["evenly_spaced", "states_by_batch"]

_BATCH_TEXTS = 32

TokenIds = Sequence[NDArray[np.int32]]


def evenly_spaced(token_ids: TokenIds, n_texts: int) -> list[NDArray[np.int32]]:
    """Return so many texts, the first and the last among them; all where there are fewer."""
    chosen = np.linspace(0, len(token_ids) - 1, min(n_texts, len(token_ids))).astype(int)
    return [token_ids[i] for i in chosen]


def states_by_batch(
    observer: keras.Model, token_ids: TokenIds, pad_token_id: int
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yield, for each batch of texts, the rows of real tokens: (n_tokens, width) by name.

    Parameters
    ----------
    observer
        A model on the inputs of `encoder_graph.build_classifier` with a dict of outputs (batch * length, width).
    token_ids
        One int32 array per text.
    pad_token_id
        Fills short rows.
    """
    for start in range(0, len(token_ids), _BATCH_TEXTS):
        ids, mask = pad_batch(token_ids[start : start + _BATCH_TEXTS], pad_token_id)
        outputs = observer([ids, mask], training=False)
        yield {name: value.numpy()[mask.ravel() == 1] for name, value in outputs.items()}
