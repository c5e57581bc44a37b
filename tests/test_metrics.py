"""UAR and WAR are scikit-learn's, and the paper's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from gmp_atl.metrics import confusion, confusion_of_names, uar, war

CLASSES = 4
PAIRS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=60)


@given(PAIRS)
def test_figures_are_those_of_scikit_learn(pairs):
    labels, predictions = np.array(pairs).T
    matrix = confusion(labels, predictions, CLASSES)

    np.testing.assert_array_equal(matrix, confusion_matrix(labels, predictions, labels=range(CLASSES)))
    macro = recall_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0)
    assert uar(matrix) == pytest.approx(100 * macro)
    assert war(matrix) == pytest.approx(100 * accuracy_score(labels, predictions))


@given(PAIRS, st.permutations("abcd"))
def test_confusions_of_names_are_in_the_order_of_the_classes(pairs, classes):
    labels, predictions = (["abcd"[number] for number in numbers] for numbers in zip(*pairs, strict=True))
    expected = confusion_matrix(labels, predictions, labels=classes)
    np.testing.assert_array_equal(confusion_of_names(labels, predictions, classes), expected)


@given(PAIRS)
def test_war_is_recall_weighted_by_class_size(pairs):
    labels, predictions = np.array(pairs).T
    weighted = recall_score(labels, predictions, average="weighted", zero_division=0)
    assert war(confusion(labels, predictions, CLASSES)) == pytest.approx(100 * weighted)


def test_a_class_that_a_fold_lacks_does_not_count():
    """Two classes occur: 3 of 4 and 1 of 2 are right; the third is predicted once but never a label."""
    matrix = confusion(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 2, 1, 0]), 3)
    assert uar(matrix) == pytest.approx((75 + 50) / 2)
    assert war(matrix) == pytest.approx(100 * 4 / 6)
