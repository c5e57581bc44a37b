"""What the paper claims, held against a run: the verdicts follow from intervals by the rule of docs/claims.md.

A claim is one comparison of UAR or several that must all hold. Each is judged on the mean over folds, with a t
interval over folds; the intervals of a claim are simultaneous (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from gmp_atl import paper
from gmp_atl.evaluations import Evaluations
from gmp_atl.statistics import Evidence, Interval, evidence
from gmp_atl.systems import System, main_system, table_3_systems

ERROR = 0.05
"""Probability that one of a claim's intervals misses, shared out among them."""


class Verdict(StrEnum):
    """On a comparison, or on a claim."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    UNDECIDED = "cannot tell yet"
    NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim speaks of, in points of UAR."""

    label: str
    published: float
    evidence: Evidence | None
    """Of this run; None where nothing can be compared."""
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: each of its differences is above the margin."""

    label: str
    margin: float
    comparisons: tuple[Comparison, ...]
    verdict: Verdict


def claims(run: Evaluations) -> tuple[Claim, ...]:
    """The paper's claims (Secs. 4.2 and 4.3), with this run's evidence and the verdicts."""
    return (*_gmps_help(run), _ams_beats_ce(run), _best_layers(run), _best_unimodal(run))


def verdict(interval: Interval | None, margin: float) -> Verdict:
    """Whether a difference is above the margin: the whole interval must lie on one side."""
    if interval is not None and interval.low > margin:
        return Verdict.SUPPORTED
    if interval is not None and interval.high < margin:
        return Verdict.NOT_SUPPORTED
    return Verdict.UNDECIDED


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Of a claim: all comparisons must support it, one can refute it."""
    found = set(verdicts)
    if Verdict.NOT_SUPPORTED in found:
        return Verdict.NOT_SUPPORTED
    return found.pop() if len(found) == 1 else Verdict.UNDECIDED


def _gmps_help(run: Evaluations) -> tuple[Claim, Claim]:
    """Sec. 4.3.1: GMPs "are beneficial"; without them the performance "has dropped by at least 2%"."""
    rows = [(f"with {loss.upper()}", (True, loss), (False, loss)) for loss in ("ce", "ams")]
    return _of_table_3(run, "GMPs help", 0.0, rows), _of_table_3(run, "GMPs add at least 2 points", 2.0, rows)


def _ams_beats_ce(run: Evaluations) -> Claim:
    """Sec. 4.3.1: "Without AMS-loss, the performance drops as well"."""
    rows = [(f"{name} GMPs", (gmps, "ams"), (gmps, "ce")) for name, gmps in (("without", False), ("with", True))]
    return _of_table_3(run, "AMS beats CE", 0.0, rows)


def _best_layers(run: Evaluations) -> Claim:
    """Sec. 4.3.2: the third-to-last and fourth-to-last layers are superior."""
    best = (-3, -4)
    pairs = [(layer, other) for layer in best for other in paper.TABLE_4 if other not in best]
    return _claim(
        "Layers -3 and -4 beat the others",
        0.0,
        [
            (
                f"{layer} over {other}",
                _of_paper(paper.TABLE_4[layer], paper.TABLE_4[other]),
                _grid(run, System(layer=layer, loss="ams")) - _grid(run, System(layer=other, loss="ams")),
            )
            for layer, other in pairs
        ],
    )


def _best_unimodal(run: Evaluations) -> Claim:
    """Sec. 4.2: better than every unimodal system, hence than the best; only its mean is published."""
    audio = [system for system in paper.TABLE_2 if system.modalities == "A" and system.score.uar is not None]
    best = max(audio, key=lambda system: system.score.uar or 0.0)
    name = "Best of the unimodal systems"
    label, published = f"over {best.name} [{best.reference}]", _of_paper(paper.GMP_ATL, best.score)
    if not _has_the_papers_protocol(run):
        comparison = Comparison(label, published, None, Verdict.NOT_COMPARABLE)
        return Claim(name, 0.0, (comparison,), Verdict.NOT_COMPARABLE)
    return _claim(name, 0.0, [(label, published, _grid(run, main_system(run.config)) - best.score.uar)])


def _has_the_papers_protocol(run: Evaluations) -> bool:
    """Its corpus, folds and encoder, all folds, and nothing fitted or chosen on what is held out."""
    main = main_system(run.config)
    headers = [result.header for result in run.of(main)]
    clean = all(header["selection"] != "oracle" and header["fit_on"] == "training" for header in headers)
    return not run.unlike_paper and run.covers(main) and clean


def _of_table_3(
    run: Evaluations, label: str, margin: float, rows: list[tuple[str, tuple[bool, str], tuple[bool, str]]]
) -> Claim:
    known = table_3_systems(run.config)
    return _claim(
        label,
        margin,
        [
            (
                name,
                _of_paper(paper.TABLE_3[treated], paper.TABLE_3[reference]),
                _grid(run, known[treated]) - _grid(run, known[reference]),
            )
            for name, treated, reference in rows
        ],
    )


def _claim(label: str, margin: float, comparisons: list[tuple[str, float, pd.DataFrame]]) -> Claim:
    """Of comparisons given by their label, the paper's difference, and the differences per fold and seed."""
    confidence = 1 - ERROR / len(comparisons)
    judged = []
    for name, published, differences in comparisons:
        found = evidence(differences, margin, confidence)
        judged.append(Comparison(name, published, found, verdict(found.interval if found else None, margin)))
    return Claim(label, margin, tuple(judged), together(each.verdict for each in judged))


def _grid(run: Evaluations, system: System) -> pd.DataFrame:
    """UAR, folds x seeds; nothing of a row that lacks a fold, since sessions differ by more than systems do."""
    grid = run.grid(system, "UAR")
    return grid if run.covers(system) else grid * np.nan


def _of_paper(better: paper.Score, worse: paper.Score) -> float:
    return better.minus(worse, "UAR")
