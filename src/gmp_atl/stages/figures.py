"""Plots of a run as SVG: Table 4 as curves, and confusions. Equal evaluations give equal files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gmp_atl import paper
from gmp_atl.config import Config
from gmp_atl.evaluations import BASELINE, MEASURES, Evaluations, System, load, main_system
from gmp_atl.formats import Output, write_text
from gmp_atl.statistics import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"
"""Told apart by colour-blind readers; the markers and line styles tell them apart in grey."""


def figures(*, config: Config, evaluations: Path, output: Output) -> None:
    """Write `table4.svg` and `confusion.svg` into the folder `output`.

    Raises:
        UserError: as `evaluations.load` does.
    """
    run = load(config, evaluations)
    _write(_layers(run), output / "table4.svg")
    _write(_confusions(run), output / "confusion.svg")


def _layers(run: Evaluations) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    layers = sorted({*paper.TABLE_4, *run.config.tables.layers}, reverse=True)
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        published = [getattr(score, measure.lower()) for score in paper.TABLE_4.values()]
        axes.plot(list(paper.TABLE_4), published, "s--", color=ORANGE, markerfacecolor="white", label="paper, IEMOCAP")
        summaries = [summarise(run.grid(System(layer=layer, loss="ams"), measure)) for layer in layers]
        means = [np.nan if summary.mean is None else summary.mean for summary in summaries]  # NaN interrupts the line
        deviations = [summary.std_folds or 0.0 for summary in summaries]
        label = f"this run, {_corpus(run)}, ± std over folds" + (" (not run)" if np.isnan(means).all() else "")
        axes.errorbar(layers, means, deviations, fmt="o-", color=BLUE, capsize=3, label=label)
        axes.set(xlabel="layer of the GMPs", ylabel=f"{measure} (%)", xticks=layers)
        axes.invert_xaxis()
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _confusions(run: Evaluations) -> Figure:
    from matplotlib.figure import Figure

    shown = [system for system in (main_system(run.config), BASELINE) if run.of(system)]
    figure = Figure(figsize=(4.2 * max(1, len(shown)), 4.2), layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "not run", ha="center")
        return figure
    for axes, system in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        _confusion(axes, run.confusion(system), run.config.classes)
        axes.set_title(f"{system.label}\n{_corpus(run)}")
    return figure


def _confusion(axes: Axes, matrix: np.ndarray, classes: list[str]) -> None:
    support = matrix.sum(axis=1)
    shares = 100 * matrix / np.maximum(support, 1)[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        ink = "white" if share > 55 else "black"
        axes.text(column, row, f"{share:.1f}", ha="center", va="center", color=ink)
    positions = range(len(classes))
    axes.set_xticks(positions, classes, rotation=30)
    axes.set_yticks(positions, [f"{name}\nn={n}" for name, n in zip(classes, support, strict=True)])
    axes.set(xlabel="prediction", ylabel="label (rows sum to 100 %)")


def _corpus(run: Evaluations) -> str:
    return f"{run.corpus.name}{'' if run.corpus.complete else ' (PARTIAL)'}"


def _write(figure: Figure, path: Path) -> None:
    import matplotlib

    stream = io.StringIO()
    # Without these two, every file would carry random identifiers and the time.
    with matplotlib.rc_context({"svg.hashsalt": "gmp-atl"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    write_text(path, stream.getvalue())
