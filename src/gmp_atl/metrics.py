"""UAR and WAR, the paper's two figures (Sec. 4.1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts, (classes, classes): row is the label, column the prediction."""
    return np.bincount(labels * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)


def confusion_of_names(labels: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """As `confusion`, of names of classes."""
    numbers = {name: number for number, name in enumerate(classes)}
    of_labels, of_predictions = (np.array([numbers[each] for each in names]) for names in (labels, predictions))
    return confusion(of_labels, of_predictions, len(classes))


def uar(matrix: np.ndarray) -> float:
    """Unweighted average recall in percent: mean recall of the classes that occur among the labels."""
    support = matrix.sum(axis=1)
    present = support > 0
    return float(100 * np.mean(np.diag(matrix)[present] / support[present]))


def war(matrix: np.ndarray) -> float:
    """Weighted average recall in percent, which is the accuracy."""
    return float(100 * np.trace(matrix) / matrix.sum())
