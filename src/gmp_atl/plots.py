"""The figures of a run: one function each, from its evaluations to a matplotlib figure.

Colours are Okabe and Ito's, told apart by colour-blind readers; markers, line styles and hatches tell them apart in
grey. What was not run is said in the figure's place.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from gmp_atl import paper
from gmp_atl.evaluations import MEASURES, Evaluations, matrix_of
from gmp_atl.frames import FRAME_SECONDS
from gmp_atl.provenance import Record
from gmp_atl.statistics import sampling_interval, summarise, t_interval
from gmp_atl.systems import System, main_system, systems, table_3_systems

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BLUE, ORANGE = "#0072B2", "#D55E00"


class Style(NamedTuple):
    """Of one of several kinds in a figure."""

    color: str
    hatch: str
    marker: str
    line: Any


STYLES = (
    Style(BLUE, "", "o", "-"),
    Style(ORANGE, "//", "s", "--"),
    Style("#009E73", "..", "^", ":"),
    Style("#CC79A7", "xx", "D", "-."),
    Style("#E69F00", "\\\\", "v", (0, (5, 1))),
    Style("#56B4E9", "++", "P", (0, (1, 1))),
)
_STAGES = {
    "multitask": "stage 1: emotion and gender",
    "retraining": "stage 3: masked prediction of the GMPs",
    "finetuning": "stage 4: fine-tuning",
}
_POINTS = 200
"""Of a training curve; more updates are averaged."""


def table4(run: Evaluations) -> Figure:
    """Table 4 as curves, the paper's beside the run's."""
    figure = figure_of(8, 3.6)
    layers = sorted({*paper.TABLE_4, *run.config.tables.layers}, reverse=True)
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        published = [score.of(measure) for score in paper.TABLE_4.values()]
        axes.plot(list(paper.TABLE_4), published, "s--", color=ORANGE, markerfacecolor="white", label="paper, IEMOCAP")
        summaries = [summarise(run.grid(System(layer=layer, loss="ams"), measure)) for layer in layers]
        means = [np.nan if summary.mean is None else summary.mean for summary in summaries]  # NaN interrupts the line
        deviations = [summary.std_folds or 0.0 for summary in summaries]
        label = f"this run, {run.corpus.label}, ± std over folds" + (" (not run)" if np.isnan(means).all() else "")
        axes.errorbar(layers, means, deviations, fmt="o-", color=BLUE, capsize=3, label=label)
        axes.set(xlabel="layer of the GMPs", ylabel=f"{measure} (%)", xticks=layers)
        axes.invert_xaxis()
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def scores(run: Evaluations) -> Figure:
    """Every system: its folds, their mean and a 95 % confidence interval of it."""
    shown = [system for system in systems(run.config) if run.of(system)]
    figure = figure_of(9, 1.4 + 0.34 * max(3, len(shown)))
    if not shown:
        return _empty(figure)
    figure.suptitle(
        f"{run.corpus.label}; rings: folds (means over seeds); dot and bar: mean and 95 % t interval over folds",
        fontsize=9,
    )
    rows = range(len(shown))
    for axes, measure in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        for row, system in zip(rows, shown, strict=True):
            folds = run.grid(system, measure).mean(axis="columns").dropna()
            axes.plot(folds, [row] * len(folds), "o", color="0.45", markerfacecolor="none", markersize=5)
            interval = t_interval(folds)
            if interval is not None:
                axes.plot(np.clip([interval.low, interval.high], 0, 100), [row, row], color=BLUE, linewidth=2)
            axes.plot(folds.mean(), row, "o", color=BLUE)
        axes.set(xlabel=f"{measure} (%)", ylim=(len(shown) - 0.5, -0.5))
        axes.set_yticks(rows, [f"{system.label}, n={len(run.of(system))}" for system in shown], fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    return figure


def folds(run: Evaluations) -> Figure:
    """Table 3's systems on every fold and every session, as bars."""
    asked = table_3_systems(run.config).values() if 3 in run.config.tables.numbers else [main_system(run.config)]
    shown = [system for system in asked if run.of(system)]
    figure = figure_of(10, 6.4)
    if not shown:
        return _empty(figure)
    kinds = {"fold": _by_fold, "session": _by_session}
    grid = figure.subplots(len(kinds), len(MEASURES), squeeze=False)
    for row, (kind, parts_of) in zip(grid, kinds.items(), strict=True):
        parts = {system: parts_of(run, system) for system in shown}
        names = sorted({name for part in parts.values() for name in part}, key=lambda name: (len(name), name))
        for axes, measure in zip(row, MEASURES, strict=True):
            for number, (system, matrices) in enumerate(parts.items()):
                _bars(axes, number, len(shown), names, matrices, measure, system.label)
            n = [_utterances(parts.values(), name) for name in names]
            axes.set_xticks(
                range(len(names)), [f"{name}\nn={count}" for name, count in zip(names, n, strict=True)], fontsize=8
            )
            axes.set(xlabel=kind, ylabel=f"{measure} (%)", ylim=(0, 100))
            axes.grid(axis="y", alpha=0.3)
    figure.suptitle(
        f"{run.corpus.label}; means over seeds; bars of error: 95 % intervals of sampling n utterances", fontsize=9
    )
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown))
    return figure


def confusions(run: Evaluations) -> Figure:
    """Confusion matrix of every system, pooled over folds and seeds."""
    shown = [system for system in systems(run.config) if run.of(system)]
    columns = min(3, max(1, len(shown)))
    rows = -(-len(shown) // columns) or 1
    figure = figure_of(4.2 * columns, 4.2 * rows)
    if not shown:
        return _empty(figure)
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, system in zip(every, shown, strict=False):
        _confusion(axes, run.confusion(system), run.config.classes)
        axes.set_title(f"{system.label}\n{run.corpus.label}", fontsize=10)
    for axes in every[len(shown) :]:
        axes.remove()
    return figure


def training(run: Evaluations) -> Figure:
    """Losses and accuracies of the main system's three trainings, masked accuracy per codebook."""
    found = run.histories(main_system(run.config))
    stages = [stage for stage in _STAGES if stage in found]
    figure = figure_of(9, 2.7 * max(1, len(stages)))
    if not stages:
        return _empty(figure, "not run, or not recorded")
    for row, stage in zip(figure.subplots(len(stages), 2, squeeze=False), stages, strict=True):
        history = pd.concat([each.assign(job=number) for number, each in enumerate(found[stage])])
        names = [name for name in dict.fromkeys(history["quantity"]) if re.search("loss|accuracy|validation", name)]
        for axes, kind in zip(row, ("loss", "accuracy"), strict=True):
            percent = kind == "accuracy"
            drawn = [name for name in names if ("loss" in name) != percent]
            validated = [name for name in drawn if name.startswith("validation_")]  # UAR and WAR, in percent
            for style, name in zip(cycle(STYLES), drawn, strict=False):
                factor = 100 if percent and name not in validated else 1
                curve(axes, history[history["quantity"] == name], _words(name), style, factor)
            measured = "accuracy, UAR, WAR (%)" if validated else "training accuracy (%)"
            axes.set(xlabel="update", ylabel=measured if percent else "loss (nats)")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        row[0].set_title(f"{_STAGES[stage]}; n={len(found[stage])} jobs", fontsize=9, loc="left")
    label = main_system(run.config).label
    figure.suptitle(
        f"{label}, {run.corpus.label}; mean over folds and seeds, shaded from smallest to largest", fontsize=9
    )
    return figure


def clusters(run: Evaluations) -> Figure:
    """What the codebooks of the main run share with emotion, gender and speaker, and how evenly they are used."""
    main = run.clusters[run.clusters["variant"] == "main"]
    figure = figure_of(11, 3.2)
    if main.empty:
        return _empty(figure)
    means = main.groupby(["statistic", "size", "layer"])["value"].mean()
    panels = {
        "nmi_emotion": "NMI with emotion",
        "nmi_gender": "NMI with gender",
        "nmi_speaker": "NMI with speaker",
        "perplexity": "perplexity (% of size)",
    }
    sizes = sorted(main["size"].unique())
    for axes, (statistic, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for style, size in zip(cycle(STYLES), sizes, strict=False):
            values = means[statistic, size].sort_index()
            shares = 100 * values / size if statistic == "perplexity" else values
            look = {"color": style.color, "marker": style.marker, "linestyle": style.line, "markersize": 4}
            axes.plot(values.index, shares, label=f"{size} centroids", **look)
        axes.set(xlabel="layer", title=title, xticks=sorted(main["layer"].unique()))
        axes.title.set_fontsize(9)
        axes.set_ylim(0, 105 if statistic == "perplexity" else None)
        axes.margins(y=0.1)
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    jobs = len(main[["fold", "seed"]].drop_duplicates())
    figure.suptitle(f"{run.corpus.label}, training frames; means over n={jobs} folds × seeds", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(sizes))
    return figure


def jobs(run: Evaluations) -> Figure:
    """Time and memory of every job behind the results, per stage, as recorded."""
    records = defaultdict(list)
    for record in run.lineage.records:
        records[record.stage].append(record)
    figure = figure_of(11, 1.4 + 0.32 * max(3, len(records)))
    if not records:
        return _empty(figure, "not recorded")
    stages = sorted(records, key=lambda stage: -sum(record.seconds for record in records[stage]))
    panels: dict[str, Callable[[Record], float | None]] = {
        "time of a job (s)": lambda record: record.seconds,
        "peak memory (GB)": lambda record: record.peak_memory_mb / 1024,
        "peak GPU memory (GB)": lambda record: (record.peak_gpu_memory_mb or 0) / 1024 or None,
    }
    for axes, (label, of) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for row, stage in enumerate(stages):
            values = [value for record in records[stage] if (value := of(record)) is not None]
            if values:
                axes.plot(values, [row] * len(values), "o", color="0.45", markerfacecolor="none", markersize=5)
                axes.plot(np.median(values), row, "|", color=BLUE, markersize=14, markeredgewidth=2)
        axes.set(xlabel=label, ylim=(len(stages) - 0.5, -0.5))
        if label.startswith("time"):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        elif not axes.get_lines():
            axes.set(xticks=[])
            axes.text(0.5, 0.5, "none on a GPU", transform=axes.transAxes, ha="center", fontsize=8)
        else:
            axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3)
    hours = {stage: sum(record.seconds for record in records[stage]) / 3600 for stage in stages}
    labels = [f"{stage}, n={len(records[stage])}, {_hours(hours[stage])}" for stage in stages]
    figure.axes[0].set_yticks(range(len(stages)), labels, fontsize=8)
    devices = ", ".join(sorted({record.device for record in run.lineage.records}))
    figure.suptitle(f"{devices}; rings: jobs; line: their median; in all {_hours(sum(hours.values()))}", fontsize=9)
    return figure


def embeddings(run: Evaluations) -> Figure:
    """Held-out utterances of one fold on two principal components, before and after."""
    figure = figure_of(9, 4.6)
    found = run.embeddings()
    if found is None:
        return _empty(figure)
    points, header = found
    panels = figure.subplots(1, len(header["explained"]), squeeze=False)[0]
    for axes, (encoder, shares) in zip(panels, sorted(header["explained"].items(), reverse=True), strict=True):
        own = points[points["encoder"] == encoder]
        for style, emotion in zip(cycle(STYLES), run.config.classes, strict=False):
            of_class = own[own["emotion"] == emotion]
            for gender, fill in (("female", "none"), ("male", style.color)):
                members = of_class[of_class["gender"] == gender]
                axes.plot(
                    members["x"],
                    members["y"],
                    style.marker,
                    color=style.color,
                    markerfacecolor=fill,
                    markersize=4,
                    label=f"{emotion}, {gender}",
                    alpha=0.8,
                )
        axes.set(
            title=f"{encoder}, n={len(own)}",
            xlabel=f"component 1 ({100 * shares[0]:.0f} % of the variance)",
            ylabel=f"component 2 ({100 * shares[1]:.0f} %)",
        )
    figure.suptitle(
        f"{run.corpus.label}, held-out utterances of fold {header['fold']}, seed {header['seed']}", fontsize=9
    )
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(run.config.classes), fontsize=8)
    return figure


def utterances(run: Evaluations) -> Figure:
    """Some utterances: spectrogram, pseudo-labels of every codebook, and scores of the classes."""
    found = run.examples()
    if found is None:
        return _empty(figure_of(6, 3))
    examples, header = found
    figure = figure_of(11, 2.0 * len(examples))
    # By hand: what the solver of layouts makes of figures in figures varies in its last digits from run to run.
    figure.set_layout_engine("none")
    parts = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]
    for part, example in zip(parts, examples.itertuples(index=False), strict=True):
        _example(part, example, header["sizes"], header["classes"])
    return figure


def _example(part: SubFigure, example: Any, sizes: list[int], classes: list[str]) -> None:
    heights = [4, *([0.7] * len(sizes))]
    grid = part.add_gridspec(
        *(len(heights), 2), width_ratios=[5, 1], height_ratios=heights, hspace=0.15, wspace=0.15,
        left=0.05, right=0.98, top=0.87, bottom=0.18,
    )  # fmt: skip
    frames = len(example.labels[0])
    seconds = (0.0, FRAME_SECONDS * frames)
    look: dict[str, Any] = {"aspect": "auto", "interpolation": "none"}
    axes = part.add_subplot(grid[0, 0])
    image = np.reshape(example.spectrogram, (frames, -1)).T
    axes.imshow(image, origin="lower", cmap="Greys", extent=(*seconds, 0, 8), **look)
    axes.set(ylabel="kHz", xticks=[])
    axes.set_title(f"{example.id}: {example.emotion}", fontsize=9, loc="left")
    for row, (size, labels) in enumerate(zip(sizes, example.labels, strict=True), start=1):
        stream = part.add_subplot(grid[row, 0])
        stream.imshow(_stripes(np.asarray(labels))[None], extent=(*seconds, 0, 1), **look)
        stream.set(yticks=[0.5], yticklabels=[str(size)])
        stream.tick_params(labelsize=8, bottom=row == len(sizes), labelbottom=row == len(sizes))
    stream.set_xlabel("s", fontsize=8)
    bars = part.add_subplot(grid[:, 1])
    colours = [BLUE if name == example.emotion else "0.75" for name in classes]
    bars.barh(range(len(classes)), np.multiply(100, example.scores), color=colours, edgecolor="black")
    bars.set_yticks(range(len(classes)), classes, fontsize=8)
    bars.set(xlim=(0, 100))
    bars.tick_params(labelsize=8)
    bars.set_xlabel("score (%)", fontsize=8)
    bars.invert_yaxis()


PLOTS = (table4, scores, folds, confusions, training, clusters, jobs, embeddings, utterances)
"""In the order of the report."""


def svg(figure: Figure) -> str:
    """The figure as text; equal figures give equal texts."""
    import matplotlib

    stream = io.StringIO()
    # Without these two, every file would carry random identifiers and the time.
    with matplotlib.rc_context({"svg.hashsalt": "gmp-atl"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def figure_of(width: float, height: float) -> Figure:
    """Of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _empty(figure: Figure, text: str = "not run") -> Figure:
    figure.text(0.5, 0.5, text, ha="center")
    return figure


def _by_fold(run: Evaluations, system: System) -> dict[str, list[np.ndarray]]:
    """Confusion matrices per fold, one of each seed."""
    found: dict[str, list[np.ndarray]] = {}
    for result in run.of(system):
        found.setdefault(str(result.fold), []).append(result.matrix)
    return found


def _by_session(run: Evaluations, system: System) -> dict[str, list[np.ndarray]]:
    """Confusion matrices per session, one of each seed; a session's folds are put together."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for result in run.of(system):
        for session, part in result.predictions.groupby("session"):
            matrix = matrix_of(part, len(run.config.classes))
            key = (str(session), result.seed)
            found[key] = found[key] + matrix if key in found else matrix
    sessions: dict[str, list[np.ndarray]] = {}
    for (session, _), matrix in found.items():
        sessions.setdefault(session, []).append(matrix)
    return sessions


def _utterances(parts: Iterable[dict[str, list[np.ndarray]]], name: str) -> int:
    """Of a fold or session, as one seed tests them."""
    return max(int(np.mean([matrix.sum() for matrix in part[name]])) for part in parts if name in part)


def _bars(
    axes: Axes,
    number: int,
    count: int,
    names: Sequence[str],
    matrices: dict[str, list[np.ndarray]],
    measure: str,
    label: str,
) -> None:
    """Bars of the one system among `count`, one for each name."""
    width = 0.8 / count
    present = [place for place, name in enumerate(names) if name in matrices]
    values = [float(np.mean([MEASURES[measure](m) for m in matrices[names[place]]])) for place in present]
    intervals = [sampling_interval(matrices[names[place]], measure) for place in present]
    errors = [
        [max(0.0, value - interval.low) for value, interval in zip(values, intervals, strict=True)],
        [max(0.0, interval.high - value) for value, interval in zip(values, intervals, strict=True)],
    ]
    style = STYLES[number % len(STYLES)]
    axes.bar(
        [place + (number - (count - 1) / 2) * width for place in present],
        values,
        width,
        yerr=errors,
        label=label,
        color="white" if number % 2 else style.color,
        edgecolor=style.color if number % 2 else "black",
        hatch=style.hatch,
        error_kw={"elinewidth": 1, "capsize": 2},
    )


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


def curve(axes: Axes, values: pd.DataFrame, label: str, style: Style, scale: float) -> None:
    """Draw mean and range over jobs (columns `update`, `job` and `value`), neighbouring updates together if many."""
    step = max(1, -(-(int(values["update"].max()) + 1) // _POINTS))
    binned = values.assign(bin=values["update"] // step).groupby(["bin", "job"])["value"].mean().unstack() * scale
    updates = binned.index.to_numpy() * step + (step - 1) / 2
    axes.plot(updates, binned.mean(axis="columns"), color=style.color, linestyle=style.line, label=label)
    axes.fill_between(updates, binned.min(axis="columns"), binned.max(axis="columns"), color=style.color, alpha=0.2)


def _words(quantity: str) -> str:
    """`masked_accuracy_64` as a reader would say it."""
    codebook = re.fullmatch(r"masked_(?:loss|accuracy)_(\d+)", quantity)
    return f"masked frames, {codebook[1]} centroids" if codebook else quantity.replace("_", " ")


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{3600 * hours:.0f} s" if hours < 1 / 60 else f"{60 * hours:.1f} min"


def _stripes(labels: np.ndarray) -> np.ndarray:
    """A colour per frame, (frames, 3), in which most centroids differ also in grey.

    Numbers of centroids mean nothing: each goes to a place on the scale that is far from those of its neighbours.
    """
    from matplotlib import colormaps

    places = (labels.astype(float) * 0.6180339887498949) % 1.0  # of the golden ratio: spread evenly for any size
    return np.asarray(colormaps["viridis"](places))[:, :3]
