"""The classifier of whatever is not fine-tuned: the classical reference, and probes of encoders."""

from __future__ import annotations

from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC


def support_vector_machine() -> Pipeline:
    """Standardised features, missing ones imputed with the training data's median, and an SVM with an RBF kernel."""
    # Without break_ties, the names of the classes would decide between classes with equally many votes.
    return make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
        SVC(C=1.0, kernel="rbf", class_weight="balanced", break_ties=True),
    )
