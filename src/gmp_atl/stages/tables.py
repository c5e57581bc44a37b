"""The last stage: the paper's Tables 1 to 4 with a run's own figures beside the published ones, and more.

UAR and WAR are in percent, taken per fold and then averaged over the folds, as the paper does
(Sec. 4.1.2); "±folds" is the sample standard deviation of the folds (means over seeds), "±seeds" that of
the seeds (means over folds). Nothing here is dated, and equal evaluations give equal files.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd

from gmp_atl import paper
from gmp_atl.claims import claims
from gmp_atl.config import Config
from gmp_atl.evaluations import (
    CLUSTERED_ON,
    MEASURES,
    SAMPLES_PER_MINUTE,
    SELECTIONS,
    Evaluations,
    load,
    matrix_of,
    origin,
)
from gmp_atl.files import Output, write_text
from gmp_atl.rendering import Cell, Table
from gmp_atl.statistics import Difference, Evidence, Interval, Summary, paired_difference, summarise
from gmp_atl.systems import (
    BASELINE,
    LOSSES,
    System,
    ablation_system,
    main_system,
    seeds,
    systems,
    table_3_systems,
)

ALONE = "Each interval holds by itself: of twenty, one misses by chance. The table of claims corrects for that."
NOT_RUN = "not run"
NONE = "n/a"
DONE = "Folds × seeds"
PLUS_MINUS = "±folds is the standard deviation over folds, ±seeds that over seeds of the mean over folds."

Row = Mapping[str, str | Cell]


def tables(*, config: Config, evaluations: Path, output: Output) -> None:
    """Write every table that the config asks for into the folder `output`.

    Args:
        config: The whole config.
        evaluations: Folder with `corpus.parquet` and, below it, the predictions and cluster statistics.
        output: Gets `table1` ... `table4`, as far as asked for, as .csv, .md, .html and .tex; without .tex
            `claims`, `effects`, `per_fold`, `per_session`, `provenance`, `confusion` (long, and a matrix of the main
            row), `ablations` where the config has some, and `clusters` where there are cluster statistics.

    Raises:
        UserError: as `evaluations.load` does.
    """
    run = load(config, evaluations)
    papers = {1: _table_1, 2: _table_2, 3: _table_3, 4: _table_4}
    for number, paper_table in papers.items():
        if number in config.tables.numbers:
            _write(paper_table(run), output, "csv", "md", "html", "tex")
        else:
            _remove(f"table{number}", output)
    for table in (_claims(run), _effects(run), _per_fold(run), _per_session(run), _provenance(run)):
        _write(table, output, "csv", "md", "html")
    _write(_confusion_counts(run), output, "csv")
    _write(_confusion_matrix(run), output, "md", "html")
    if config.ablations:
        _write(_ablations(run), output, "csv", "md", "html")
    else:
        _remove("ablations", output)
    if not run.clusters.empty:
        _write(_clusters(run), output, "csv", "md", "html")
    else:
        _remove("clusters", output)


def _write(table: Table, output: Path, *suffixes: str) -> None:
    renderings = {"csv": table.csv, "md": table.markdown, "html": table.html, "tex": table.latex}
    for suffix in suffixes:
        write_text(output / f"{table.name}.{suffix}", renderings[suffix]())


def _remove(name: str, output: Path) -> None:
    """A table that an earlier config asked for would be taken for one of this run."""
    for path in output.glob(f"{name}.*"):
        path.unlink()


def _table_1(run: Evaluations) -> Table:
    of_paper = set(run.config.classes) == set(paper.TABLE_1)
    counts = run.corpus.counts.groupby("emotion")[["utterances", "n_samples"]].sum()
    counts = counts.reindex(run.config.classes, fill_value=0)

    def row(name: str, utterances: int, samples: int, published: paper.ClassSize) -> Row:
        own = {"Class": name, "Utterances": str(utterances), "Minutes": _number(samples / SAMPLES_PER_MINUTE)}
        theirs = {"Utterances (paper)": str(published.utterances), "Minutes (paper)": str(published.minutes)}
        return own | theirs if of_paper else own

    total, nothing = counts.sum(), paper.ClassSize(0, 0)
    rows = [
        row(str(emotion), size["utterances"], size["n_samples"], paper.TABLE_1.get(str(emotion), nothing))
        for emotion, size in counts.iterrows()
    ]
    rows.append(row("Total", total["utterances"], total["n_samples"], paper.TABLE_1_TOTAL))
    caption = f"Table 1: Details of the dataset ({run.corpus.name})"
    note = ["The paper's columns are of IEMOCAP."] if of_paper else []
    return Table("table1", caption, rows, _partial(run), [*note, *origin(run)])


def _table_2(run: Evaluations) -> Table:
    def published(name: str, modalities: str, score: paper.Score, source: str) -> Row:
        figures = {measure: _published(measure, score.of(measure)) for measure in MEASURES}
        return {"Model": name, "Modalities": modalities, **figures, "Source": source, DONE: "published"}

    def own(name: str, system: System) -> Row:
        figures = {measure: _spread(measure, run, system) for measure in MEASURES}
        return {
            "Model": name,
            "Modalities": "A",
            **figures,
            "Source": "this run",
            DONE: _evaluated(run, system),
        }

    rows = [
        published(f"{system.name} [{system.reference}]", system.modalities, system.score, "paper's report")
        for system in paper.TABLE_2
    ]
    rows.append(published("GMP-ATL", "A", paper.GMP_ATL, "paper"))
    rows.append(own(f"GMP-ATL, layer {run.config.tables.layer}, AMS", main_system(run.config)))
    if run.config.tables.baseline == "egemaps":
        rows.append(own(BASELINE.label, BASELINE))
    footer = [
        "A: audio, T: text; numbers in brackets are the paper's references. Published figures are on IEMOCAP.",
        f"This run: mean ±folds ±seeds; {PLUS_MINUS}",
        *origin(run),
    ]
    return Table("table2", "Table 2: Comparison with published systems", rows, _not_comparable(run), footer)


def _table_3(run: Evaluations) -> Table:
    rows = [
        {
            "GMPs": "yes" if gmps else "no",
            "Loss": LOSSES[loss],
            "Layer (paper)": str(paper.LAYER),
            "GMP layer": str(system.layer) if gmps else "none",
            "Head layer": str(run.config.head.layer),
            **_beside_paper(run, system, paper.TABLE_3[gmps, loss]),
        }
        for (gmps, loss), system in table_3_systems(run.config).items()
    ]
    footer = [
        "The paper prints one layer on all four rows; a row without GMPs has only the layer that the head reads.",
        f"This run: mean ±folds ±seeds; {PLUS_MINUS} Diff.: this run minus the paper.",
        *origin(run),
    ]
    return Table("table3", "Table 3: The effect of GMPs and AMS loss", rows, _not_comparable(run), footer)


def _table_4(run: Evaluations) -> Table:
    layers = sorted({*paper.TABLE_4, *run.config.tables.layers}, reverse=True)
    unpublished = paper.Score(None, None)
    rows = [
        {
            "GMP layer": str(layer),
            **_beside_paper(run, System(layer=layer, loss="ams"), paper.TABLE_4.get(layer, unpublished)),
        }
        for layer in layers
    ]
    footer = [
        f"GMPs and AMS loss. This run: mean ±folds ±seeds; {PLUS_MINUS} Diff.: this run minus the paper.",
        *origin(run),
    ]
    return Table("table4", "Table 4: The effect of the layer of the GMPs", rows, _not_comparable(run), footer)


def _claims(run: Evaluations) -> Table:
    rows: list[Row] = [
        {
            "Claim": claim.label,
            "Comparison": comparison.label,
            "Paper": _signed(comparison.published),
            "Margin": _signed(claim.margin),
            **_evidence(comparison.evidence),
            "Comparison is": comparison.verdict.value,
            "Claim is": claim.verdict.value,
        }
        for claim in claims(run)
        for comparison in claim.comparisons
    ]
    footer = [
        f"Verdicts are about this run on {run.corpus.name}; the column Paper is the paper's evidence, on IEMOCAP.",
        "Points of UAR: mean over folds of paired differences (means over seeds), or less the published mean.",
        "Intervals: t over n folds, simultaneous for the comparisons of a claim: each of k has 1 - 0.05/k.",
        "A comparison is supported if its whole interval is above the margin, not supported if it is below.",
        "A claim is supported if all its comparisons are, not supported if one is not; else one cannot tell yet.",
        "Seeds: per fold, that would decide if effect and variances stay; none: folds differ too much for any number.",
        *origin(run),
    ]
    return Table("claims", "Claims of the paper, and what this run says of them", rows, _not_comparable(run), footer)


def _evidence(found: Evidence | None) -> dict[str, str | Cell]:
    seeds_ = found.seeds if found else None
    text = NONE if seeds_ is None else "none" if math.isinf(seeds_) else str(seeds_)
    return {
        "This run": _change(found.mean if found else None),
        "Interval over folds": _interval("folds", found.interval if found else None),
        "Seeds": Cell(text, {"seeds_needed": "inf" if text == "none" else text}),
    }


def _effects(run: Evaluations) -> Table:
    """Differences between the rows of Table 3: the paper's claim, and the one that a reproduction can check."""
    rows: list[Row] = []
    for name, treated, reference in (
        ("GMPs, with CE", (True, "ce"), (False, "ce")),
        ("GMPs, with AMS", (True, "ams"), (False, "ams")),
        ("AMS, without GMPs", (False, "ams"), (False, "ce")),
        ("AMS, with GMPs", (True, "ams"), (True, "ce")),
    ):
        known = table_3_systems(run.config)
        for measure in MEASURES:
            published = paper.TABLE_3[treated].minus(paper.TABLE_3[reference], measure)
            own = _paired(run, known[treated], known[reference], measure)
            rows.append({"Effect of": name, "Measure": measure, "Paper": _signed(published), **_difference(own)})
    footer = [
        "Differences in points, from the folds and seeds that both rows have.",
        "95 % t intervals of paired differences: over folds (means over seeds), over seeds (means over all folds).",
        "Folds share training data, so that the interval over folds is approximate.",
        ALONE,
        *origin(run),
    ]
    return Table("effects", "Effects: differences between the rows of Table 3", rows, _not_comparable(run), footer)


def _ablations(run: Evaluations) -> Table:
    rows: list[Row] = []
    for loss, name in product(run.config.tables.ablation_losses, ("main", *run.config.ablations)):
        main, system = (ablation_system(run.config, each, loss) for each in ("main", name))
        headers = [result.header for result in run.of(system)]
        for measure in MEASURES:
            own = None if name == "main" else _paired(run, system, main, measure)
            rows.append(
                {
                    "Variant": name,
                    "Loss": LOSSES[loss],
                    "Changes": json.dumps(run.config.ablations[name]).replace('"', "") if name != "main" else "none",
                    "Measure": measure,
                    "Value ±folds ±seeds": _spread("value", run, system, measure),
                    **_difference(own, "Minus main"),
                    "Tested epoch": _words(SELECTIONS, {header["selection"] for header in headers}),
                    "k-means fitted on": _words(CLUSTERED_ON, {header["fit_on"] for header in headers}),
                    DONE: _evaluated(run, system),
                }
            )
    footer = [
        f"GMPs of layer {run.config.tables.layer}, under other settings than main's. {PLUS_MINUS}",
        "Differences from main with the same loss in points, with 95 % t intervals as in the table of effects.",
        ALONE,
        *origin(run),
    ]
    return Table("ablations", "Ablations", rows, _partial(run), footer)


def _per_fold(run: Evaluations) -> Table:
    rows: list[Row] = []
    for system in systems(run.config):
        grids = {measure: run.grid(system, measure) for measure in MEASURES}
        sizes = {(result.fold, result.seed): len(result.predictions) for result in run.of(system)}
        rows += [
            {
                "System": _system(system),
                "Fold": str(fold),
                "Held out": " ".join(group),
                "Seed": str(seed),
                "Utterances": str(sizes.get((fold, seed), NOT_RUN)),
                **{measure: _figure(grid.loc[fold, seed]) for measure, grid in grids.items()},
            }
            for fold, group in enumerate(run.config.folds.held_out, start=1)
            for seed in seeds(run.config, system)
        ]
    return Table("per_fold", "UAR and WAR of every fold and seed", rows, _partial(run), origin(run))


def _per_session(run: Evaluations) -> Table:
    n = len(run.config.classes)
    rows: list[Row] = []
    for system in systems(run.config):
        pieces = [result.predictions.assign(seed=result.seed) for result in run.of(system)]
        predictions = pd.concat(pieces) if pieces else pd.DataFrame(columns=["session", "seed"])
        for session in sorted(run.corpus.counts["session"].unique()):
            here = predictions[predictions["session"] == session]
            matrices = [matrix_of(part, n) for _, part in here.groupby("seed")]
            means = {
                measure: _figure(fmean(map(compute, matrices)) if matrices else None)
                for measure, compute in MEASURES.items()
            }
            counts = {
                "Utterances": str(here["id"].nunique()) if matrices else NOT_RUN,
                "Seeds": f"{len(matrices)}/{len(seeds(run.config, system))}",
            }
            rows.append({"System": _system(system), "Session": session, **counts, **means})
    footer = ["Means over seeds; UAR over the classes that the session has.", *origin(run)]
    return Table("per_session", "UAR and WAR of every session", rows, _partial(run), footer)


def _provenance(run: Evaluations) -> Table:
    jobs = Counter(
        (record.stage, record.code, (record.commit or NONE)[:12], "yes" if record.modified else "no", record.device)
        for record in run.lineage.records
    )
    headings = ("Stage", "Code", "Commit", "Modified", "Device")
    rows: list[Row] = [
        {**dict(zip(headings, key, strict=True)), "Jobs": str(count)} for key, count in sorted(jobs.items())
    ]
    nothing: list[Row] = [{**dict.fromkeys(headings, NOT_RUN), "Jobs": "0"}]
    return Table("provenance", "Jobs behind the results, as recorded", rows or nothing, _partial(run), origin(run))


def _confusion_counts(run: Evaluations) -> Table:
    rows: list[Row] = []
    for system in systems(run.config):
        matrix = run.confusion(system)
        for label, counts in zip(run.config.classes, matrix, strict=True):
            for prediction, count in zip(run.config.classes, counts, strict=True):
                share = _number(100 * count / counts.sum()) if counts.any() else NONE
                rows.append(
                    {
                        "System": _system(system),
                        "Label": label,
                        "Prediction": prediction,
                        "Count": str(count),
                        "Percent of label": share,
                        DONE: _evaluated(run, system),
                    }
                )
    return Table("confusion", "Confusions, pooled over folds and seeds", rows, _partial(run), origin(run))


def _confusion_matrix(run: Evaluations) -> Table:
    main = main_system(run.config)
    rows: list[Row] = []
    for label, counts in zip(run.config.classes, run.confusion(main), strict=True):
        shares = counts / counts.sum() if counts.any() else np.full(len(counts), np.nan)
        cells = {f"as {name}": _number(100 * share) for name, share in zip(run.config.classes, shares, strict=True)}
        rows.append({"Label": label, **cells, "Predictions": str(counts.sum())})
    footer = ["Rows are labels, in percent of the label, pooled over folds and seeds.", *origin(run)]
    caption = f"Confusions of {main.label} ({DONE.lower()}: {_evaluated(run, main)})"
    return Table("confusion", caption, rows, _partial(run), footer)


def _clusters(run: Evaluations) -> Table:
    frame = run.clusters
    place = ["variant", "layer", "size"]
    means = frame.pivot_table(index=place, columns="statistic", values="value", aggfunc="mean")
    fits = frame.groupby(place).apply(lambda part: len(part[["fold", "seed"]].drop_duplicates()))
    rows = [
        {"Variant": variant, "Layer": str(layer), "Size": str(size), "Fits": str(fits[variant, layer, size])}
        | {str(name): f"{value:.4g}" if np.isfinite(value) else NONE for name, value in statistics.items()}
        for (variant, layer, size), statistics in means.sort_index(ascending=[True, False, True]).iterrows()
    ]
    notes = {
        "homogeneity": "the share of an attribute's entropy that labels tell",
        "nmi": "by the mean of both entropies, at most below 1, and lower with more centroids: it compares layers",
    }
    told = [f"{name}: {note}." for name, note in notes.items() if any(each.startswith(name) for each in means.columns)]
    footer = ["Means over folds and seeds (fits).", *told, *origin(run)]
    return Table("clusters", "Clusters behind the GMPs", rows, _partial(run), footer)


def _beside_paper(run: Evaluations, system: System, published: paper.Score) -> dict[str, str | Cell]:
    cells: dict[str, str | Cell] = {}
    for measure in MEASURES:
        theirs, ours = published.of(measure), summarise(run.grid(system, measure)).mean
        difference = None
        if not run.unlike_paper and run.covers(system) and theirs is not None and ours is not None:
            difference = ours - theirs
        cells[f"{measure} (paper)"] = _number(theirs)
        cells[f"{measure} ±folds ±seeds"] = _spread(measure, run, system)
        cells[f"{measure} diff."] = _change(difference)
    return cells | {DONE: _evaluated(run, system)}


def _spread(name: str, run: Evaluations, system: System, measure: str | None = None) -> Cell:
    summary: Summary = summarise(run.grid(system, measure or name))
    figures = summary.mean, summary.std_folds, summary.std_seeds
    text = NOT_RUN if summary.mean is None else " ±".join(map(_number, figures))
    columns = (f"{name.lower()}{suffix}" for suffix in ("", "_std_folds", "_std_seeds"))
    return Cell(text, dict(zip(columns, map(_exact, figures), strict=True)))


def _published(measure: str, figure: float | None) -> Cell:
    """A figure of the paper in a column that also holds spreads."""
    column = measure.lower()
    return Cell(
        _number(figure) if figure is not None else "-",
        {column: _number(figure), f"{column}_std_folds": NONE, f"{column}_std_seeds": NONE},
    )


def _paired(run: Evaluations, treated: System, reference: System, measure: str) -> Difference | None:
    return paired_difference(run.grid(treated, measure), run.grid(reference, measure))


def _difference(difference: Difference | None, heading: str = "This run") -> dict[str, str | Cell]:
    return {
        heading: _change(difference.mean if difference else None),
        "95 % over folds": _interval("folds", difference.over_folds if difference else None),
        "95 % over seeds": _interval("seeds", difference.over_seeds if difference else None),
    }


def _interval(over: str, interval: Interval | None) -> Cell:
    text = f"[{interval.low:+.2f}, {interval.high:+.2f}] n={interval.n}" if interval else NONE
    low, high = (interval.low, interval.high) if interval else (None, None)
    n = str(interval.n) if interval else NONE
    return Cell(text, {f"{over}_low": _exact(low), f"{over}_high": _exact(high), f"{over}_n": n})


def _system(system: System) -> Cell:
    layer, loss = (NONE if part is None else str(part) for part in (system.layer, system.loss))
    return Cell(system.label, {"model": system.model, "variant": system.variant, "layer": layer, "loss": loss})


def _evaluated(run: Evaluations, system: System) -> str:
    done = len(run.of(system))
    total = len(run.config.folds.held_out) * len(seeds(run.config, system))
    return f"{done}/{total}" if done else NOT_RUN


def _words(vocabulary: Mapping[str, str], values: set[str]) -> str:
    return " | ".join(sorted(vocabulary.get(value, str(value)) for value in values)) or NOT_RUN


def _partial(run: Evaluations) -> list[str]:
    return [] if run.corpus.complete else [f"PARTIAL corpus: {run.corpus.name} lacks part of its full release."]


def _not_comparable(run: Evaluations) -> list[str]:
    if not run.unlike_paper:
        return _partial(run)
    return [*_partial(run), f"NOT COMPARABLE: the published figures are {', '.join(run.unlike_paper)}."]


def _number(value: float | None) -> str:
    return NONE if value is None or np.isnan(value) else f"{value:z.1f}"


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+z.1f}"


def _exact(value: float | None) -> str:
    """Of a figure of this run in the CSV, to be computed with."""
    return NONE if value is None or np.isnan(value) else f"{value:z.4f}"


def _figure(value: float | None) -> Cell:
    return Cell(_number(value), _exact(value))


def _change(value: float | None) -> Cell:
    return Cell(_signed(value), _exact(value))
