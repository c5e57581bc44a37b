"""Verdicts on the paper's claims: made results for each, and what must hold of the rule whatever the results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_tables import PAPERS, Run, config

from gmp_atl import paper
from gmp_atl.claims import Verdict, claims, together, verdict
from gmp_atl.evaluations import Corpus, Evaluations, Result
from gmp_atl.provenance import Lineage
from gmp_atl.statistics import Interval, evidence
from gmp_atl.systems import System

ORDER = [Verdict.NOT_SUPPORTED, Verdict.UNDECIDED, Verdict.SUPPORTED]
POINTS = st.integers(-200, 200).map(lambda tenths: tenths / 10)
GRIDS = (
    st.integers(1, 4)
    .flatmap(lambda seeds: st.lists(st.lists(POINTS, min_size=seeds, max_size=seeds), min_size=2, max_size=6))
    .map(pd.DataFrame)
)


def decide(grid: pd.DataFrame, margin: float) -> Verdict:
    found = evidence(grid, margin, 0.95)
    assert found is not None
    return verdict(found.interval, margin)


NOWHERE = Path("nowhere")
Scores = dict[tuple[int | None, str], list[float]]


def made(scores: Scores, corpus: str = "iemocap", complete: bool = True, **changes: Any) -> Evaluations:
    """UAR per fold, in whole percent, of rows given by layer and loss; the second seed is a point better."""
    header = {"selection": "last", "fit_on": "training", **changes.pop("header", {})}
    results = [
        Result(System(layer=layer, loss=loss), fold, seed, header, pd.DataFrame(), matrix(uar + seed), NOWHERE)
        for (layer, loss), uars in scores.items()
        for fold, uar in enumerate(uars, start=1)
        for seed in (0, 1)
    ]
    settings = config(**{**PAPERS, "tables": {"layers": [*paper.TABLE_4]}, **changes})
    nothing = pd.DataFrame()
    corpus_read = Corpus(corpus, complete, "", {}, nothing)
    return Evaluations(settings, corpus_read, tuple(results), nothing, Lineage((), (), ()), NOWHERE)


def matrix(uar: float) -> np.ndarray:
    """Confusions of 100 clips of each class, equally often mistaken for the next one."""
    return uar * np.eye(4) + (100 - uar) * np.roll(np.eye(4), 1, axis=1)


def verdicts(run: Evaluations) -> dict[str, str]:
    return {claim.label: claim.verdict.value for claim in claims(run)}


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (2.1, 5, 2, "supported"),
        (2, 5, 2, "cannot tell yet"),
        (-1, 5, 2, "cannot tell yet"),
        (-1, 2, 2, "cannot tell yet"),
        (-1, 1.9, 2, "not supported"),
        (0.1, 1.9, 2, "not supported"),
    ],
)
def test_the_whole_interval_must_lie_on_one_side(low, high, margin, expected):
    assert verdict(Interval(low, high, 5), margin) == expected


def test_without_an_interval_nothing_is_said():
    assert verdict(None, 0) == Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("with_ce", "with_ams", "expected"),
    [
        ([5, 6, 5, 6, 5], [4, 5, 4, 5, 4], "supported"),
        ([5, 6, 5, 6, 5], [1, 0, 1, 0, 1], "not supported"),
        ([5, 6, 5, 6, 5], [9, -4, 3, 8, -1], "cannot tell yet"),
        ([5, 6, 5, 6, 5], None, "cannot tell yet"),
        ([1, 0, 1, 0, 1], None, "not supported"),
        ([2, 2, 2, 2, 2], [5, 6, 5, 6, 5], "cannot tell yet"),
    ],
)
def test_gmps_must_add_two_points_with_both_losses(with_ce, with_ams, expected):
    without = [50, 55, 60, 65, 70]
    scores: Scores = {(None, "ce"): without, (None, "ams"): without}
    for loss, effects in (("ce", with_ce), ("ams", with_ams)):
        if effects:
            scores[-3, loss] = np.add(without, effects).tolist()
    assert verdicts(made(scores))["GMPs add at least 2 points"] == expected


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ([3, 4, 3, 4, 3], "supported"),
        ([-3, -4, -3, -4, -3], "not supported"),
        ([3, -4, 3, -4, 3], "cannot tell yet"),
    ],
)
def test_ams_must_beat_ce(effects, expected):
    scores: Scores = {(layer, "ce"): [60] * 5 for layer in (None, -3)}
    scores |= {(layer, "ams"): [60 + effect for effect in effects] for layer in (None, -3)}
    assert verdicts(made(scores))["AMS beats CE"] == expected


@pytest.mark.parametrize(
    ("of_layers", "expected"),
    [
        ({-3: 70, -4: 69}, "supported"),
        ({-3: 70, -4: 69, -7: 75}, "not supported"),
        ({-3: 70, -4: 60}, "cannot tell yet"),
        ({-3: 70}, "cannot tell yet"),
    ],
)
def test_both_layers_must_beat_each_other_one(of_layers, expected):
    others = dict.fromkeys({*paper.TABLE_4} - {-3, -4}, 60)
    scores: Scores = {
        (layer, "ams"): [mean + (fold % 2 if layer in (-3, -4) else 0) for fold in range(5)]
        for layer, mean in (others | of_layers).items()
    }
    assert verdicts(made(scores))["Layers -3 and -4 beat the others"] == expected


@pytest.mark.parametrize(
    ("uars", "expected"),
    [
        ([80, 82, 81, 84, 83], "supported"),
        ([70, 72, 71, 74, 73], "not supported"),
        ([70, 90, 75, 84, 73], "cannot tell yet"),
    ],
)
def test_the_mean_is_held_against_the_best_published_one(uars, expected):
    assert verdicts(made({(-3, "ams"): uars}))["Best of the unimodal systems"] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus": "emodb"},
        {"complete": False},
        {"folds": {"by": "session", "held_out": [["Ses01", "Ses02"], ["Ses03"], ["Ses04"], ["Ses05"]]}},
        {"header": {"selection": "oracle"}},
        {"header": {"fit_on": "all"}},
        {"encoder": {"source": "packaged"}},
    ],
    ids=["corpus", "partial", "folds", "oracle", "transductive", "encoder"],
)
def test_another_protocol_is_not_compared_with_published_systems(changes):
    run = made({(-3, "ams"): [90] * (4 if "folds" in changes else 5)}, **changes)
    assert verdicts(run)["Best of the unimodal systems"] == "not comparable"


def test_rows_that_lack_a_fold_decide_nothing():
    effect = {(None, "ce"): [50, 51], (None, "ams"): [50, 51], (-3, "ce"): [60, 61], (-3, "ams"): [60, 61]}
    some, all_ = (
        verdicts(made({row: uars * times for row, uars in effect.items()}, **changes))
        for times, changes in (
            (1, {}),
            (2, {"folds": {"by": "session", "held_out": [["Ses01"], ["Ses02"], ["Ses03"], ["Ses04"]]}}),
        )
    )
    assert all_["GMPs add at least 2 points"] == "supported"
    assert set(some.values()) <= {"cannot tell yet", "not comparable"}


def test_the_papers_own_differences_are_above_the_margins():
    found = claims(made({}))
    assert [len(claim.comparisons) for claim in found] == [2, 2, 2, 12, 1]
    assert all(comparison.published > claim.margin for claim in found for comparison in claim.comparisons)


def test_intervals_of_a_claim_are_simultaneous():
    better, worse = [70, 72, 71, 75, 73], [68, 71, 70, 70, 70]
    [claim] = [each for each in claims(made({(-3, "ams"): better, (-1, "ams"): worse})) if len(each.comparisons) == 12]
    found = {comparison.label: comparison.evidence for comparison in claim.comparisons}
    interval, expected = found["-3 over -1"].interval, stats.ttest_rel(better, worse).confidence_interval(1 - 0.05 / 12)
    assert (interval.low, interval.high, interval.n) == pytest.approx((*expected, 5))
    assert found["-4 over -1"] is None


def test_the_page_says_verdicts_rule_and_corpus(tmp_path):
    run = Run(tmp_path, config(seeds=[0]))
    run.write_corpus(corpus="emodb")
    for loss, layer in ((loss, layer) for loss in ("ce", "ams") for layer in (None, -3)):
        for fold in (1, 2):
            run.predict(fold, 0, [5 + fold * (loss == "ams")] * 4, loss=loss, layer=layer, corpus="emodb")
    text = run.tables()["claims.md"]
    for part in ("NOT COMPARABLE", "(here: emodb)", "cannot tell yet", "+2.2", "1 - 0.05/k"):
        assert part in text
    row = pd.read_csv(run.output / "claims.csv", comment="#").set_index("comparison").loc["with GMPs"]
    assert (row["this_run"], row["folds_n"], row["claim_is"]) == (15.0, 2, "cannot tell yet")
    assert "<td>cannot tell yet</td>" in (run.output / "claims.html").read_text()


@given(GRIDS, POINTS, POINTS)
def test_a_shift_of_differences_and_margin_changes_nothing(grid, margin, shift):
    here, there = evidence(grid, margin, 0.95), evidence(grid + shift, margin + shift, 0.95)
    assert there.interval.low - here.interval.low == pytest.approx(shift, abs=1e-9)
    assert there.interval.high - here.interval.high == pytest.approx(shift, abs=1e-9)
    if abs(here.mean - margin) > 1e-6 and abs(here.interval.low - margin) > 1e-6 < abs(here.interval.high - margin):
        assert verdict(there.interval, margin + shift) == verdict(here.interval, margin)


@given(GRIDS, POINTS)
def test_exchanged_rows_have_the_opposite_verdict(grid, margin):
    opposite = dict(zip(ORDER, reversed(ORDER), strict=True))
    assert decide(-grid, -margin) == opposite[decide(grid, margin)]
    assert evidence(-grid, -margin, 0.95).seeds == evidence(grid, margin, 0.95).seeds


@given(GRIDS, POINTS, st.floats(0.1, 100))
def test_a_larger_effect_never_has_a_worse_verdict(grid, margin, more):
    assert ORDER.index(decide(grid + more, margin)) >= ORDER.index(decide(grid, margin))


@given(GRIDS, POINTS)
def test_more_confidence_never_decides_more(grid, margin):
    strict = verdict(evidence(grid, margin, 1 - 0.05 / 12).interval, margin)
    assert strict in (Verdict.UNDECIDED, decide(grid, margin))


@given(st.lists(st.sampled_from(ORDER), min_size=1))
def test_a_claim_is_as_good_as_its_worst_comparison(verdicts):
    assert together(verdicts) == min(verdicts, key=ORDER.index)


@given(GRIDS, POINTS)
def test_seeds_needed_are_the_fewest_that_would_decide(grid, margin):
    """Against the interval that a fold variance of between + within / S gives, computed another way."""
    n, seeds = grid.shape
    found = evidence(grid, margin, 0.95)
    decided = decide(grid, margin) != Verdict.UNDECIDED
    if seeds == 1:
        assert found.seeds == (1 if decided else None)
        return
    within = np.mean(np.var(grid, axis=1, ddof=1))
    between = max(0.0, np.var(np.mean(grid, axis=1), ddof=1) - within / seeds)

    def margin_of(number: float) -> float:
        """How far the interval keeps from the margin; below zero it holds it."""
        half_width = stats.t.ppf(0.975, n - 1) * np.sqrt((between + within / number) / n)
        return abs(found.mean - margin) - half_width

    if decided:
        assert 1 <= found.seeds <= seeds
    elif found.seeds == math.inf:
        assert margin_of(1e15) <= 1e-6
    else:
        assert found.seeds > seeds
        assert margin_of(found.seeds) > -1e-6
        assert margin_of(found.seeds - 1) <= 1e-6


def test_no_number_of_seeds_decides_where_folds_differ_too_much():
    grid = pd.DataFrame([[mean, mean] for mean in (-9, 12, -5, 10)])
    assert evidence(grid, 0.0, 0.95).seeds == math.inf


def test_seeds_needed_by_hand():
    """Fold means 0, 1, 2, 1; seeds deviate by 3 about them: within 18, between 2/3 - 18/2 < 0, taken for none."""
    grid = pd.DataFrame([[mean - 3, mean + 3] for mean in (0, 1, 2, 1)])
    t = stats.t.ppf(0.975, 3)
    assert evidence(grid, 0.0, 0.95).seeds == math.floor(18 * t**2 / 4) + 1
