"""Figures show what the tables say, tell what was not run, and have the same bytes for the same evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_tables import Run, config, fill

from gmp_atl import plots
from gmp_atl.errors import UserError
from gmp_atl.evaluations import Evaluations, load
from gmp_atl.files import sha256, write_text
from gmp_atl.formats import CLUSTER_STATISTICS, EMBEDDINGS, EXAMPLES, HISTORY
from gmp_atl.plots import PLOTS
from gmp_atl.provenance import Record
from gmp_atl.stages.figures import figures

NAMES = {f"{plot.__name__}.svg" for plot in PLOTS}
UPDATES = 450


def write_record(run: Run, stage: str, name: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    record = Record(
        stage=stage,
        job={"fold": 1, "seed": 0},
        config={},
        code="0" * 12,
        commit=None,
        modified=False,
        packages={"python": "3.11"},
        device="CPU of nobody",
        inputs=inputs,
        outputs=outputs,
        seconds=90.0,
        peak_memory_mb=2048,
        peak_gpu_memory_mb=None,
    )
    write_text(run.evaluations / f"provenance/{stage}/{name}.json", record.model_dump_json())


def write_history(path: Path, factor: float) -> str:
    """Accuracy rises from zero to `factor`, the loss falls."""
    rows = [
        (update, update / 10, quantity, value)
        for update in range(UPDATES)
        for quantity, value in (
            ("masked_accuracy_64", factor * update / (UPDATES - 1)),
            ("loss", 1.0 - update / UPDATES),
            ("learning_rate", 1e-4),
        )
    ]
    columns = dict(zip(HISTORY.schema.names, zip(*rows, strict=True), strict=True))
    HISTORY.write(path, pa.table(columns, schema=HISTORY.schema), stage="retraining")
    return sha256(path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The main row on two folds and seeds, one of them with the records of what is behind it; codebooks, examples."""
    made = Run(tmp_path, config(tables={"layers": [-1, -3]}))
    fill(made)
    for number, path in enumerate(sorted((made.evaluations / "some").rglob("predictions.parquet"))[:2]):
        history = write_history(made.evaluations / f"histories/{number}.parquet", 0.5 + 0.2 * number)
        model = f"model {number}"
        write_record(made, "retraining", str(number), {}, {"output": model, "history": history})
        write_record(made, "evaluation", str(number), {"model": model}, {"predictions": sha256(path)})
    write_history(made.evaluations / "histories/of-another-run.parquet", 100.0)
    rows = [
        ("main", fold, seed, layer, size, name, value * size)
        for fold in (1, 2)
        for seed in (0, 1)
        for layer in (-1, -3)
        for size in (64, 512)
        for name, value in (("nmi_emotion", 1e-4), ("nmi_gender", 2e-4), ("nmi_speaker", 3e-4), ("perplexity", 0.5))
    ]
    columns = dict(zip(CLUSTER_STATISTICS.schema.names, zip(*rows, strict=True), strict=True))
    table = pa.table(columns, schema=CLUSTER_STATISTICS.schema)
    CLUSTER_STATISTICS.write(made.evaluations / "clusters/cluster_statistics.parquet", table)
    points = [
        (f"u{n}", emotion, gender, encoder, float(n), -float(n))
        for encoder in ("pre-trained", "fine-tuned")
        for n, (emotion, gender) in enumerate((e, g) for e in made.config.classes for g in ("female", "male"))
    ]
    columns = dict(zip(EMBEDDINGS.schema.names, zip(*points, strict=True), strict=True))
    explained = {"pre-trained": [0.5, 0.25], "fine-tuned": [0.75, 0.125]}
    table = pa.table(columns, schema=EMBEDDINGS.schema)
    EMBEDDINGS.write(made.evaluations / "examples/embeddings.parquet", table, fold=1, seed=0, explained=explained)
    example = {
        "id": ["u1"],
        "emotion": ["sad"],
        "spectrogram": [[-5] * (201 * 3)],
        "labels": [[[0, 1, 1], [7, 7, 2]]],
        "scores": [[0.1, 0.2, 0.3, 0.4]],
    }
    EXAMPLES.write(
        made.evaluations / "examples/examples.parquet",
        pa.table(example, schema=EXAMPLES.schema),
        fold=1,
        seed=0,
        layer=-3,
        sizes=[64, 512],
        classes=made.config.classes,
    )
    return made


def loaded(run: Run) -> Evaluations:
    return load(run.config, run.evaluations)


def lines(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def drawn(run: Run) -> dict[str, bytes]:
    figures(config=run.config, evaluations=run.evaluations, output=run.output)
    return {path.name: path.read_bytes() for path in run.output.iterdir()}


def words(figure: Any) -> str:
    """All text of a figure."""
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_every_figure_is_svg_without_a_date_and_the_same_again(run: Run) -> None:
    first = drawn(run)
    assert first.keys() == NAMES
    for data in first.values():
        assert ElementTree.fromstring(data).tag.endswith("svg")
        assert b"<dc:date>" not in data
    assert drawn(run) == first


@pytest.mark.parametrize("numbers", [[1], [1, 2, 3, 4]])
def test_figures_of_nothing_are_made_too_and_say_so(tmp_path: Path, numbers: list[int]) -> None:
    empty = Run(tmp_path, config(tables={"numbers": numbers, "baseline": "none"}))
    assert drawn(empty).keys() == NAMES
    for plot in PLOTS:
        assert "not run" in words(plot(loaded(empty))) or "not recorded" in words(plot(loaded(empty)))


def test_scores_are_those_of_the_tables(run: Run) -> None:
    row = run.table("table3").iloc[3]
    for axes, measure in zip(plots.scores(loaded(run)).axes, ("uar", "war"), strict=True):
        folds, interval, mean = lines(axes)
        assert folds[0] == pytest.approx(run.table("per_fold").groupby("fold")[measure].mean(), abs=0.06)
        assert mean[0][0] == pytest.approx(row[measure], abs=0.06)
        assert interval[0][0] <= mean[0][0] <= interval[0][1]


@pytest.mark.parametrize(("panel", "table", "by"), [(0, "per_fold", "fold"), (2, "per_session", "session")])
def test_bars_are_those_of_the_tables(run: Run, panel: int, table: str, by: str) -> None:
    figure = plots.folds(loaded(run))
    rows = run.table(table)
    rows = rows[rows["utterances"].astype(str) != "not run"]
    for axes, measure in zip(figure.axes[panel : panel + 2], ("uar", "war"), strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == pytest.approx(rows.groupby(by)[measure].apply(lambda v: v.astype(float).mean()), abs=0.06)
        assert [label.get_text().split("\n")[1] for label in axes.get_xticklabels()] == ["n=40", "n=40"]


def test_confusions_are_those_of_the_table(run: Run) -> None:
    [axes] = plots.confusions(loaded(run)).axes
    told = run.table("confusion")["percent_of_label"].dropna()
    assert [float(text.get_text()) for text in axes.texts] == pytest.approx(list(told))


def test_curves_are_of_the_trainings_that_records_lead_to(run: Run) -> None:
    """450 updates are drawn as 150 points, each the mean of three; the history of another run is not among them."""
    figure = plots.training(loaded(run))
    loss, accuracy = figure.axes
    [(updates, values)] = lines(accuracy)
    assert updates == [3.0 * n + 1 for n in range(150)]
    assert values[-1] == pytest.approx(100 * 0.6 * (UPDATES - 2) / (UPDATES - 1))
    assert "masked frames, 64 centroids" in words(figure)
    assert "n=2 jobs" in words(figure)
    assert len(lines(loss)) == 1
    assert "learning rate" not in words(figure)


def test_validation_is_drawn_in_percent_as_it_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"loss": 1.0, "emotion_accuracy": 0.7, "validation_uar": 75.0, "validation_war": 60.0}
    rows = [(update, update / 2, name, value) for name, value in kept.items() for update in (0, 1)]
    history = pd.DataFrame(rows, columns=["update", "epoch", "quantity", "value"])
    monkeypatch.setattr(Evaluations, "histories", lambda *_: {"finetuning": [history]})
    _, accuracy = plots.training(loaded(run)).axes
    assert sorted(values[0] for _, values in lines(accuracy)) == pytest.approx([60, 70, 75])
    assert accuracy.get_ylabel() == "accuracy, UAR, WAR (%)"


def test_clusters_are_those_of_the_table(run: Run) -> None:
    figure = plots.clusters(loaded(run))
    table = run.table("clusters")
    for axes, column in zip(figure.axes, ("nmi_emotion", "nmi_gender", "nmi_speaker"), strict=False):
        for (layers, values), size in zip(lines(axes), (64, 512), strict=True):
            told = table[table["size"] == size].set_index("layer")[column]
            assert values == pytest.approx([told[layer] for layer in layers], rel=1e-3)
    assert [y for _, y in lines(figure.axes[3])] == [[50, 50], [50, 50]]


def test_jobs_are_those_of_the_records(run: Run) -> None:
    figure = plots.jobs(loaded(run))
    seconds, memory, gpu = figure.axes
    assert [x for x, _ in lines(seconds)] == [[90.0, 90.0], [90.0], [90.0, 90.0], [90.0]]
    assert {value for x, _ in lines(memory) for value in x} == {2.0}
    assert not gpu.get_lines()
    assert "none on a GPU" in words(figure)
    assert "CPU of nobody" in words(figure)


def test_maps_show_every_utterance_once_each(run: Run) -> None:
    figure = plots.embeddings(loaded(run))
    assert [axes.get_title() for axes in figure.axes] == ["pre-trained, n=8", "fine-tuned, n=8"]
    for axes in figure.axes:
        assert sorted(x for xs, _ in lines(axes) for x in xs) == [float(n) for n in range(8)]
    assert "75 % of the variance" in figure.axes[1].get_xlabel()


def test_an_utterance_stands_above_its_labels_and_scores(run: Run) -> None:
    figure = plots.utterances(loaded(run))
    [part] = figure.subfigs
    sound, coarse, fine, bars = part.axes
    assert sound.get_images()[0].get_array().shape == (201, 3)
    stripes = np.asarray(coarse.get_images()[0].get_array())[0]
    assert (stripes[1] == stripes[2]).all()
    assert (stripes[0] != stripes[1]).any()
    assert [fine.get_yticklabels()[0].get_text()] == ["512"]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([10, 20, 30, 40], abs=1e-4)


def test_examples_of_two_runs_are_refused(run: Run) -> None:
    (run.evaluations / "more").mkdir()
    source = run.evaluations / "examples/embeddings.parquet"
    (run.evaluations / "more/embeddings.parquet").write_bytes(source.read_bytes())
    with pytest.raises(UserError, match="one file of embeddings is expected"):
        drawn(run)


def test_examples_of_an_earlier_config_are_not_shown(run: Run) -> None:
    assert loaded(run).embeddings() is not None
    run.config = config(tables={"numbers": [1, 4], "layers": [-1]})
    assert loaded(run).embeddings() is None
    assert loaded(run).examples() is None


def test_many_systems_each_have_a_row(tmp_path: Path) -> None:
    ablations = {f"margin-{n}": {"finetuning": {"margin": 0.21 + n / 100}} for n in range(12)}
    made = Run(tmp_path, config(ablations=ablations))
    fill(made)
    for name in ablations:
        fill(made, variant=name)
    axes = plots.scores(loaded(made)).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == 13
    assert len(set(labels)) == 13
    assert all(label.endswith("n=4") for label in labels)


def test_more_classes_than_styles_are_all_drawn(tmp_path: Path) -> None:
    names = [f"class{n}" for n in range(8)]
    made = Run(tmp_path, config(classes=names))
    columns = {
        "id": names,
        "emotion": names,
        "gender": ["female"] * 8,
        "encoder": ["fine-tuned"] * 8,
        "x": [1.0] * 8,
        "y": [2.0] * 8,
    }
    table = pa.table(columns, schema=EMBEDDINGS.schema)
    EMBEDDINGS.write(
        made.evaluations / "embeddings.parquet", table, fold=1, seed=0, explained={"fine-tuned": [0.5, 0.2]}
    )
    [axes] = plots.embeddings(loaded(made)).axes
    assert sum(len(xs) for xs, _ in lines(axes)) == 8
