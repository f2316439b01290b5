"""Few labels: which training examples have one, and how many rows of a batch are theirs."""

import numpy as np

from dgm_jax.core import Labelled, UserError


def checked(num: int, share: float, labels: np.ndarray, num_classes: int) -> Labelled | None:
    """Of how many examples the label is told; None where it is of all.

    Args:
      num: `data.labelled`.
      share: `data.labelled_share`.
      labels: int32 `[N]`, of the training split.
      num_classes: C.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if not num:
        if share:
            raise UserError(
                f"data.labelled_share={share}: set data.labelled, the number of training examples "
                "whose labels are told, or leave the share at 0"
            )
        return None
    if not num_classes:
        raise UserError(f"data.labelled={num}: these data have no labels")
    fewest = int(np.bincount(labels[labels >= 0], minlength=num_classes).min())
    if num < 0 or num % num_classes or num > fewest * num_classes:
        raise UserError(
            f"data.labelled={num}: a multiple of the {num_classes} classes, as many of each, up to "
            f"the {fewest:,} training examples of the rarest"
        )
    if not 0 <= share < 1:
        raise UserError(f"data.labelled_share={share}: at least 0 and below 1")
    return Labelled(num, share + (1 - share) * num / len(labels))


def told(labels: np.ndarray, num: int, num_classes: int, seed: int) -> np.ndarray:
    """`labels` int32 `[N]` with -1 for all but `num` of them, as many of each class; 0: all."""
    if not num:
        return labels
    rng, found = np.random.default_rng(seed), np.full_like(labels, -1)
    for label in range(num_classes):
        of_class = np.flatnonzero(labels == label)
        found[rng.permutation(of_class)[: num // num_classes]] = label
    return found


def num_rows(num: int, share: float, batch_size: int) -> int:
    """Rows of a training batch that are drawn from the `num` labelled examples.

    Raises:
      UserError: they are no whole number, or more than there are such examples.
    """
    rows = share * batch_size
    if abs(rows - round(rows)) > 1e-6 * batch_size or rows > num:
        raise UserError(
            f"data.labelled_share={share} of train.batch_size={batch_size} are {rows:g} rows: a "
            f"whole number, at most data.labelled={num}"
        )
    return round(rows)
