"""Summaries and confidence intervals over folds and seeds.

A *grid* holds one figure (UAR or WAR, in percent) per fold, as rows, and seed, as columns; NaN is a fold
and seed that was not evaluated. Folds and seeds are never mixed: folds differ by their speakers (about 9
points on IEMOCAP), seeds by chance alone (about 0.6 points of a five-fold mean).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit


@dataclass(frozen=True)
class Summary:
    """A grid in three figures, each None where too little was evaluated to tell."""

    mean: float | None
    """Mean over folds, as the paper averages (Sec. 4.1.2), and over seeds."""
    std_folds: float | None
    """Sample standard deviation of the folds' means over seeds."""
    std_seeds: float | None
    """Sample standard deviation of the seeds' means over all folds; seeds that lack a fold are left out."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval of a mean of `n` values."""

    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """What one row of a table has over another, in points."""

    mean: float
    over_folds: Interval | None
    """Paired over folds (their means over seeds); None with fewer than two folds."""
    over_seeds: Interval | None
    """Paired over seeds (their means over all folds); None with fewer than two complete seeds."""


@dataclass(frozen=True)
class Evidence:
    """What differences per fold and seed say of their mean being above or below a margin."""

    mean: float
    """Over folds, of the means over seeds."""
    interval: Interval | None
    """Over folds; None with fewer than two."""
    seeds: float | None
    """Seeds needed for the interval to exclude the margin, if mean and variances stayed the same; infinite where the
    folds differ too much for any number; None where one seed cannot tell."""


def summarise(grid: pd.DataFrame) -> Summary:
    """Mean and spreads of a grid."""
    folds = _means_of_folds(grid)
    return Summary(
        mean=float(folds.mean()) if len(folds) else None,
        std_folds=_deviation(folds),
        std_seeds=_deviation(_means_of_seeds(grid)),
    )


def paired_difference(treated: pd.DataFrame, reference: pd.DataFrame) -> Difference | None:
    """`treated` minus `reference`, from the folds and seeds that both have; None where they share none."""
    differences = treated - reference
    folds = _means_of_folds(differences)
    if folds.empty:
        return None
    return Difference(float(folds.mean()), t_interval(folds), t_interval(_means_of_seeds(differences)))


def evidence(differences: pd.DataFrame, margin: float, confidence: float) -> Evidence | None:
    """Differences, folds x seeds, held against a margin; None where there is none."""
    folds = _means_of_folds(differences)
    if folds.empty:
        return None
    seeds = _seeds_to_decide(differences.loc[folds.index], margin, confidence)
    return Evidence(float(folds.mean()), t_interval(folds, confidence), seeds)


def _seeds_to_decide(differences: pd.DataFrame, margin: float, confidence: float) -> float | None:
    """Seeds are nested in folds, so that a fold's mean over S seeds has the variance between + within / S."""
    folds, counts = _means_of_folds(differences), differences.count(axis="columns")
    n, most = len(folds), int(counts.max())
    if n < 2:
        return None
    observed = float(folds.var(ddof=1))
    # The variance of the folds' means at which the interval would just touch the margin.
    bearable = n * ((folds.mean() - margin) / stdtrit(n - 1, (1 + confidence) / 2)) ** 2
    if most < 2:
        return 1 if observed < bearable else None
    residuals = differences.sub(folds, axis="index").to_numpy()
    within = float(np.nansum(residuals**2) / (counts - 1).sum())
    between = max(0.0, observed - within * float((1 / counts).mean()))
    if between >= bearable:
        return math.inf
    needed = math.floor(within / (bearable - between)) + 1
    # Where chance made the folds agree better than their seeds do, the interval may be decided already.
    return min(needed, most) if observed < bearable else needed


def t_interval(values: Iterable[float], confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean; None for fewer than two values."""
    sample = np.asarray(list(values), dtype=float)
    n = len(sample)
    if n < 2:
        return None
    half_width = stdtrit(n - 1, (1 + confidence) / 2) * sample.std(ddof=1) / np.sqrt(n)
    return Interval(float(sample.mean() - half_width), float(sample.mean() + half_width), n)


def sampling_interval(matrices: Sequence[np.ndarray], measure: str) -> Interval:
    """The 95 % interval of UAR or WAR, in percent, over other utterances of the same classes and speakers.

    Recalls are of all matrices together, but vary as those of one: seeds are tested on the same utterances. Two
    successes and two failures are added, shared out among the classes (Price and Bonett 2004; of one class, Agresti and
    Coull 1998), so that a recall of 0 or 1 is not taken for certain. `n` is the number of utterances.

    Args:
        matrices: Confusion counts, (classes, classes), one per seed.
        measure: UAR or WAR.
    """
    pooled = np.sum(matrices, axis=0)
    present = pooled.sum(axis=1) > 0
    n = pooled.sum(axis=1)[present] / len(matrices)
    hits = np.diag(pooled)[present] / len(matrices)
    if measure == "WAR":
        n, hits = np.array([n.sum()]), np.array([hits.sum()])
    added = 2 / len(n)
    recalls = (hits + added) / (n + 2 * added)
    variances = recalls * (1 - recalls) / (n + 2 * added)
    half_width = ndtri(0.975) * float(np.sqrt(variances.sum())) / len(n)
    middle = float(recalls.mean())
    return Interval(100 * max(0.0, middle - half_width), 100 * min(1.0, middle + half_width), int(n.sum()))


def _means_of_folds(grid: pd.DataFrame) -> pd.Series:
    return grid.mean(axis="columns").dropna()


def _means_of_seeds(grid: pd.DataFrame) -> pd.Series:
    return grid.dropna(axis="columns").mean(axis="index")


def _deviation(values: pd.Series) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
