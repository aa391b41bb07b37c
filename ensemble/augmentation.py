"""More training rows from those there are: two texts joined, with the labels of both.

Only for the training rows of a member's own fold: a joined text must never carry a row into the fold that is held out.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["join_texts"]


def join_texts(
    texts: Sequence[str], labels: npt.NDArray[np.int8], share: float, seed: int
) -> tuple[list[str], npt.NDArray[np.int8]]:
    """Join pairs of texts; each gets the union of their labels.

    One text of a pair has a label that is drawn by the square root of its rows, which lies half-way between as they
    come and all alike: of 10,000 and 100 rows, the rare label is drawn in one of 11 pairs and not in one of 101. The
    other is any other text. Which comes first is drawn too.

    Parameters
    ----------
    texts : sequence of str
    labels : int8 array of shape (n_samples, n_labels), in {0, 1}
    share : float
        Joined rows per row, at least 0.
    seed : int

    Returns
    -------
    joined : list of str, round(share * n_samples) long
        Empty where no row has a label, or there is one row only.
    joined_labels : int8 array of shape (n_joined, n_labels)

    References
    ----------
    Mahajan, D. et al. (2018). Exploring the limits of weakly supervised pretraining. arXiv:1805.00932, section 2.2
    (sampling by the square root of a label's frequency).
    """
    n_rows = len(texts)
    counts = labels.sum(axis=0, dtype=np.float64)
    n_joined = round(share * n_rows) if counts.any() and n_rows > 1 else 0
    if not n_joined:
        return [], np.zeros((0, labels.shape[1]), np.int8)
    generator = np.random.default_rng([seed, 11])
    drawn = generator.choice(len(counts), n_joined, p=np.sqrt(counts) / np.sqrt(counts).sum())
    of_label = [np.flatnonzero(column) for column in labels.T]
    one = np.array([generator.choice(of_label[label]) for label in drawn])
    other = (one + generator.integers(1, n_rows, n_joined)) % n_rows
    swapped = generator.random(n_joined) < 0.5
    first, second = np.where(swapped, other, one), np.where(swapped, one, other)
    joined = [f"{texts[a]} {texts[b]}" for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return joined, np.maximum(labels[first], labels[second])
