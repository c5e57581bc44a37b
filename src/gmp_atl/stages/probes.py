"""Probes of a pre-training as a table and a figure, and its training curves."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pandas as pd

from gmp_atl.files import Output, write_text
from gmp_atl.formats import HISTORY, PREDICTIONS, PROBES
from gmp_atl.metrics import confusion_of_names, uar
from gmp_atl.plots import STYLES, curve, figure_of, svg
from gmp_atl.rendering import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def probes(
    *, names: list[str], probes: list[Path], histories: list[Path], output: Output, baseline: list[Path] | None = None
) -> None:
    """Write `tables/probes` as .csv, .md and .html, `figures/probes.svg` and `figures/pretraining.svg`.

    Args:
        names: Of the encoders that were probed.
        probes: One file each.
        histories: Of each iteration.
        baseline: Predictions of the classical reference, one file per fold.
    """
    found = [PROBES.read(path) for path in probes]
    means = {name: _means(table.to_pandas()) for name, (table, _) in zip(names, found, strict=True)}
    header = found[0][1]
    reference = None if baseline is None else fmean(map(_uar, baseline))
    table = _table(means, header["corpus"], header["utterances"], reference)
    for suffix, text in (("csv", table.csv()), ("md", table.markdown()), ("html", table.html())):
        write_text(output / f"tables/probes.{suffix}", text)
    write_text(output / "figures/probes.svg", svg(_over_layers(means, header["corpus"], reference)))
    write_text(output / "figures/pretraining.svg", svg(_over_updates(histories)))


def _means(rows: pd.DataFrame) -> dict[int, float]:
    """UAR by layer, from the first to the last, over the folds."""
    means = {int(layer): float(of_layer["uar"].mean()) for layer, of_layer in rows.groupby("layer")}
    return dict(sorted(means.items(), key=lambda item: (item[0] != 0, item[0])))


def _uar(predictions: Path) -> float:
    table, header = PREDICTIONS.read(predictions)
    labels, chosen = table["label"].to_pylist(), table["prediction"].to_pylist()
    return uar(confusion_of_names(labels, chosen, header["classes"]))


def _name(layer: int) -> str:
    return str(layer) if layer else "conv."


def _table(means: dict[str, dict[int, float]], corpus: str, utterances: int, reference: float | None) -> Table:
    rows = [
        {"Encoder": name, "Best layer": _name(max(layers, key=lambda layer: layers[layer]))}
        | {_name(layer): f"{value:.1f}" for layer, value in layers.items()}
        for name, layers in means.items()
    ]
    footer = [
        f"UAR in percent, mean over the folds, on {corpus}: {utterances} utterances, none heard in pre-training.",
        "Frozen encoder; mean and standard deviation over the frames, standardised; SVM with an RBF kernel.",
        "Layers are counted from the last, -1; conv. is the output of the convolutions.",
    ]
    if reference is not None:
        footer.append(f"eGeMAPS functionals with the same machine and folds: {reference:.1f}.")
    return Table("probes", "What the layers of the encoder tell of emotion", rows, footer=footer)


def _over_layers(means: dict[str, dict[int, float]], corpus: str, reference: float | None) -> Figure:
    figure = figure_of(8, 4.4)
    axes = figure.subplots()
    for style, (name, layers) in zip(cycle(STYLES), means.items(), strict=False):
        look = {"marker": style.marker, "linestyle": style.line, "color": style.color, "markersize": 4}
        axes.plot(range(len(layers)), list(layers.values()), label=name, **look)
    axes.set_xticks(range(len(layers)), [_name(layer) for layer in layers])
    if reference is not None:
        axes.axhline(reference, color="0.4", linewidth=1, label="eGeMAPS")
    axes.set(xlabel="layer", ylabel=f"UAR (%), {corpus}")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _over_updates(histories: list[Path]) -> Figure:
    figure = figure_of(9, 3 * len(histories))
    panels = figure.subplots(len(histories), 2, squeeze=False)
    for number, (row, path) in enumerate(zip(panels, histories, strict=True), start=1):
        history = HISTORY.read(path)[0].to_pandas().assign(job=0)
        for axes, label, scale in zip(row, ("loss", "accuracy"), (1.0, 100.0), strict=True):
            curves = history[history["quantity"].str.startswith(f"masked_{label}_")].groupby("quantity", sort=False)
            for style, (quantity, values) in zip(cycle(STYLES), curves, strict=False):
                curve(axes, values, f"{str(quantity).rpartition('_')[2]} centroids", style, scale)
            axes.set(xlabel="update", title=f"iteration {number}", ylabel=f"{label} on masked frames")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        axes.set_ylabel("accuracy on masked frames (%)")
    return figure
