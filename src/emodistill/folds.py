"""From multi-hot labels to cross-validation folds that all hold every label in nearly equal parts.

The rows are assigned by iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011): the label with the fewest rows
left goes first, and each of its rows goes to the fold that still wants most of that label. What is assigned is not a
row but a group of rows with the same text (case-folded, spaces collapsed), because a text that is trained on and
validated on in other capitals leaks its label.

References
----------
.. [1] Sechidis, K., Tsoumakas, G., Vlahavas, I. (2011). On the stratification of multi-label data. ECML PKDD 2011,
   LNCS 6913, 145-158, algorithm 1. doi:10.1007/978-3-642-23808-6_10
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emodistill.errors import ConfigError

__all__ = ["assign_folds", "fold_warnings"]

_MAX_FOLDS = 127  # fold ids are int8


def assign_folds(
    texts: Sequence[str], labels: npt.NDArray[np.integer], n_folds: int, seed: int
) -> npt.NDArray[np.int8]:
    """Assign each row to the one fold that validates it.

    Parameters
    ----------
    texts : sequence of str
    labels : int array of shape (n_rows, n_labels), in {0, 1}
    n_folds : int
        From 2 to 127, and at most the number of distinct texts.
    seed : int
        Equal seeds give equal folds, on every machine and under every PYTHONHASHSEED.

    Returns
    -------
    int8 array of shape (n_rows,), in [0, n_folds)

    Raises
    ------
    ConfigError
        If the shapes do not fit, or there are too few distinct texts for so many folds.

    Examples
    --------
    >>> labels = np.array([[1], [1], [0], [0], [0], [0]])
    >>> fold_ids = assign_folds(["a", "b", "c", "d", "e", "f"], labels, n_folds=2, seed=0)
    >>> np.bincount(fold_ids).tolist(), np.bincount(fold_ids, weights=labels[:, 0]).tolist()
    ([3, 3], [1.0, 1.0])
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or len(labels) != len(texts):
        raise ConfigError(f"labels have the shape {labels.shape}, expected ({len(texts)}, n_labels): one row per text")
    groups = _text_groups(texts)
    n_groups = int(groups.max(initial=-1)) + 1
    if not 2 <= n_folds <= min(_MAX_FOLDS, n_groups):
        limit = min(_MAX_FOLDS, n_groups)
        raise ConfigError(f"n_folds is {n_folds}: give 2 to {limit}, at most the number of distinct texts")
    group_rows = np.bincount(groups, minlength=n_groups)
    group_positives = np.zeros((n_groups, labels.shape[1]), dtype=np.int64)
    np.add.at(group_positives, groups, labels.astype(np.int64))
    group_folds = _stratify(group_rows, group_positives, n_folds, np.random.default_rng(seed))
    return np.asarray(group_folds, dtype=np.int8)[groups]


def fold_warnings(
    labels: npt.NDArray[np.integer], fold_ids: npt.NDArray[np.integer], label_names: Sequence[str]
) -> list[str]:
    """Say which labels are too rare for the folds.

    Parameters
    ----------
    labels : int array of shape (n_rows, n_labels), in {0, 1}
    fold_ids : int array of shape (n_rows,)
    label_names : sequence of str

    Returns
    -------
    list of str
        One sentence for each label without positives, with fewer positives than folds, or with all of them in one fold.
    """
    n_folds = int(np.max(fold_ids)) + 1
    warnings = []
    for name, column in zip(label_names, np.asarray(labels).T, strict=True):
        per_fold = np.bincount(fold_ids, weights=column, minlength=n_folds).astype(int)
        n_positives, n_with = int(per_fold.sum()), int(np.count_nonzero(per_fold))
        count = f"'{name}' has {n_positives} positive row{'s' * (n_positives != 1)}"
        if n_positives == 0:
            warnings.append(f"{count}: it cannot be learned, and its F1 is undefined")
        elif n_with == 1:
            fold = int(per_fold.argmax())
            warnings.append(f"{count}, all in fold {fold}: the model validated on fold {fold} never sees one")
        elif n_with < n_folds:
            warnings.append(f"{count} in {n_with} of {n_folds} folds: look at its F1 over all folds together only")
    return warnings


def _text_groups(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Number the distinct texts, case-folded and with spaces collapsed, in the order of their first row."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(" ".join(text.casefold().split()), len(numbers)) for text in texts], np.int64)


def _stratify(
    group_rows: npt.NDArray[np.int64],
    group_positives: npt.NDArray[np.int64],
    n_folds: int,
    generator: np.random.Generator,
) -> list[int]:
    """Return the fold of each group; large groups go first, equals in random order."""
    n_groups, n_labels = group_positives.shape
    order = generator.permutation(n_groups)
    order = order[np.argsort(-group_rows[order], kind="stable")]
    tie_breaks = generator.random((n_groups, n_folds)).tolist()
    rows, positives = group_rows.tolist(), group_positives.tolist()
    folds = [-1] * n_groups
    rows_wanted = [sum(rows) / n_folds] * n_folds
    positives_wanted = [[total / n_folds] * n_folds for total in group_positives.sum(axis=0).tolist()]
    left = group_positives.sum(axis=0).tolist()

    def assign(group: int, fold: int) -> None:
        folds[group] = fold
        rows_wanted[fold] -= rows[group]
        for label, count in enumerate(positives[group]):
            if count:
                positives_wanted[label][fold] -= count
                left[label] -= count

    while any(left):
        rarest = min((label for label in range(n_labels) if left[label]), key=left.__getitem__)
        wanted = positives_wanted[rarest]
        for group in order[group_positives[order, rarest] > 0].tolist():
            if folds[group] < 0:
                ties = tie_breaks[group]
                assign(group, max(range(n_folds), key=lambda fold: (wanted[fold], rows_wanted[fold], ties[fold])))
    for group in order.tolist():
        if folds[group] < 0:
            ties = tie_breaks[group]
            assign(group, max(range(n_folds), key=lambda fold: (rows_wanted[fold], ties[fold])))
    return folds
