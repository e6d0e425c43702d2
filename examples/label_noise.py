"""Wrong labels on purpose, and a part of the training set to choose settings on."""

import numpy as np


def flip_labels(
    labels: np.ndarray, fraction: float, classes: int, seed: int
) -> np.ndarray:
  """Symmetric noise: round(fraction * n) of the n labels become another class.

  Which labels, and which of the other classes (each as likely), goes by the seed.

  Args:
    labels: integers [n] in [0, classes); not changed.
    fraction: the share of wrong labels, in [0, 1].
    classes: how many there are, at least 2.
    seed: of the draw.

  Returns:
    A new array of the labels' dtype.

  Raises:
    ValueError: for a fraction, a number of classes or a label out of range.

  Example:
    >>> labels = np.array([0, 1, 2, 0])
    >>> noisy = flip_labels(labels, 0.5, classes=3, seed=0)
    >>> int(np.sum(noisy != labels))
    2
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f"fraction={fraction}: must lie in [0, 1].")
  if classes < 2:
    raise ValueError(f"classes={classes}: there must be another class to flip to.")
  if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
    raise ValueError(
        f"labels from {labels.min()} to {labels.max()}: must lie in [0, {classes})."
    )
  rng = np.random.default_rng([seed, 0])
  flipped = rng.permutation(len(labels))[: round(fraction * len(labels))]
  noisy = labels.copy()
  # The sum of two labels may not fit into their dtype.
  wrong = noisy[flipped].astype(np.int32)
  wrong += rng.integers(1, classes, len(flipped), dtype=np.int32)
  noisy[flipped] = wrong % classes
  return noisy


def validation_split(
    size: int, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Two disjoint sets of indices: to train on, and to validate on.

  Args:
    size: the number of examples.
    fraction: the share that is held out to validate on, in (0, 1).
    seed: of the draw.

  Returns:
    The indices to train on and those held out; together each of range(size) once.

  Raises:
    ValueError: for a fraction out of range.

  Example:
    >>> kept, held_out = validation_split(10, 0.2, seed=0)
    >>> len(kept), len(held_out)
    (8, 2)
  """
  if not 0 < fraction < 1:
    raise ValueError(f"fraction={fraction}: must lie in (0, 1).")
  order = np.random.default_rng([seed, 1]).permutation(size)
  held_out = round(fraction * size)
  return order[held_out:], order[:held_out]
