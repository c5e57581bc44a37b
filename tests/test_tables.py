"""Tables and figures from made evaluation files whose figures are known by hand."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from scipy import stats

from gmp_atl import config as configs
from gmp_atl import paper, rendering
from gmp_atl.config import Config
from gmp_atl.errors import UserError
from gmp_atl.files import sha256
from gmp_atl.formats import CLUSTER_STATISTICS, CORPUS_SUMMARY, PREDICTIONS
from gmp_atl.stages.figures import figures
from gmp_atl.stages.tables import tables

ROOT = Path(__file__).parents[1]
CLASSES = ["angry", "happy", "neutral", "sad"]
AUDIO = "fedcba9876543210" * 4
ENCODER = "made encoder, sha256 0123456789ab"


def config(**changes: Any) -> Config:
    """Two folds by session, two seeds."""
    settings = {
        "name": "made",
        "seeds": [0, 1],
        "corpus": {"reader": "iemocap", "root": "."},
        "classes": CLASSES,
        "folds": {"by": "session", "held_out": [["Ses01"], ["Ses02"]]},
        "encoder": {"source": "scratch"},
        "tables": {"layers": [-1, -3]},
    }
    return configs.parse({**settings, **changes})


PAPERS: dict[str, Any] = {
    "folds": {"by": "session", "held_out": [[f"Ses{number:02}"] for number in range(1, 6)]},
    "encoder": {"source": "hub", "name": "facebook/hubert-base-ls960", "revision": "d" * 40},
}
"""What the paper has, but for the corpus."""


class Run:
    """The evaluation folder of a run, filled by hand, and the tables and figures made of it."""

    def __init__(self, folder: Path, settings: Config | None = None):
        self.evaluations, self.output = folder / "evaluations", folder / "tables"
        self.config = settings or config()
        self.numbers = itertools.count()
        self.write_corpus()

    def write_corpus(self, corpus: str = "iemocap", complete: bool = True, excluded: dict[str, int] | None = None):
        rows = [(emotion, session, "female") for emotion in self.config.classes for session in ("Ses01", "Ses02")]
        columns = dict(zip(("emotion", "session", "gender"), zip(*rows, strict=True), strict=True))
        sizes = {"utterances": pa.array([30] * len(rows)), "n_samples": pa.array([30 * 32_000] * len(rows))}
        CORPUS_SUMMARY.write(
            self.evaluations / "corpus.parquet",
            pa.table(columns | sizes),
            corpus=corpus,
            complete=complete,
            audio=AUDIO,
            classes=self.config.classes,
            excluded=excluded or {},
        )

    def predict(
        self,
        fold: int,
        seed: int,
        recalls: list[int],
        *,
        sizes: list[int] | None = None,
        ids: str = "Ses{fold:02}-{n}",
        folder: str | None = None,
        **header: Any,
    ) -> Path:
        """Predictions in which `recalls[i]` clips of class i are right; the others are taken for the next class."""
        classes = self.config.classes
        sizes = sizes or [10] * len(classes)
        pairs = [
            (classes[label], classes[label if n < recalls[label] else (label + 1) % len(classes)])
            for label in range(len(classes))
            for n in range(sizes[label])
        ]
        labels, predictions = zip(*pairs, strict=True)
        scores = [np.eye(len(classes), dtype=np.float32)[classes.index(name)].tolist() for name in predictions]
        path = self.evaluations / (folder or f"some/{next(self.numbers)}") / "predictions.parquet"
        metadata = {
            "model": "gmp-atl",
            "variant": "main",
            "layer": -3,
            "loss": "ams",
            "classes": classes,
            "corpus": "iemocap",
            "complete": True,
            "encoder": ENCODER,
            "selection": "last",
            "fit_on": "training",
        }
        columns = {
            "id": [ids.format(fold=fold, n=n) for n in range(len(pairs))],
            "speaker": ["someone"] * len(pairs),
            "gender": ["female"] * len(pairs),
            "session": [f"Ses{fold:02}"] * len(pairs),
            "label": list(labels),
            "prediction": list(predictions),
            "scores": scores,
        }
        table = pa.table(columns, schema=PREDICTIONS.schema)
        PREDICTIONS.write(path, table, fold=fold, seed=seed, **{**metadata, **header})
        return path

    def tables(self) -> dict[str, str]:
        tables(config=self.config, evaluations=self.evaluations, output=self.output)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(self.output.iterdir())}

    def table(self, name: str) -> pd.DataFrame:
        self.tables()
        return pd.read_csv(self.output / f"{name}.csv", comment="#", keep_default_na=True)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("labels", "told"),
    [(["bored"], "label 'bored' is not one of angry, happy, neutral, sad."), ([], "holds no prediction; delete it")],
)
def test_predictions_that_cannot_be_counted_are_refused(run, labels, told):
    path = run.predict(1, 0, [10] * 4)
    table, metadata = PREDICTIONS.read(path)
    del metadata["format"], metadata["version"]
    table = table.slice(0, len(labels)).set_column(4, "label", pa.array(labels, pa.string()))
    PREDICTIONS.write(path, table.cast(PREDICTIONS.schema), **metadata)
    with pytest.raises(UserError, match=rf"^{path}:? {told}"):
        run.tables()


def fill(run: Run, **header: Any) -> None:
    """The main row: recalls of 70 and 80 % in the folds, one point more with seed 1 in the first class."""
    for fold, seed in itertools.product((1, 2), (0, 1)):
        right = 7 if fold == 1 else 8
        run.predict(fold, seed, [right + seed, right, right, right], **header)


def test_the_papers_figures_agree_with_each_other():
    assert sum(row.utterances for row in paper.TABLE_1.values()) == paper.TABLE_1_TOTAL.utterances == 5531
    assert sum(row.minutes for row in paper.TABLE_1.values()) == paper.TABLE_1_TOTAL.minutes
    assert paper.TABLE_3[True, "ams"] == paper.TABLE_4[paper.LAYER] == paper.GMP_ATL


def test_figures_are_averaged_over_folds_and_seeds(run):
    """Fold 1: 70, 72.5; fold 2: 80, 82.5. Means of folds 71.25, 81.25; of seeds 75, 77.5."""
    fill(run)
    row = run.table("table3").iloc[3]
    assert (row["gmps"], row["loss"], row["folds_seeds"]) == ("yes", "AMS", "4/4")
    assert (row["uar"], row["uar_std_folds"], row["uar_std_seeds"]) == (76.25, 7.0711, 1.7678)
    assert "76.2 ±7.1 ±1.8" in run.tables()["table3.md"]


def test_folds_weigh_alike_whatever_their_size(run):
    """WAR: 10 of 40 and 99 of 100 are right; pooled it would be 77.9, the paper's mean over folds is 62.0."""
    run.predict(1, 0, [10, 0, 0, 0])
    run.predict(2, 0, [97, 1, 1, 0], sizes=[97, 1, 1, 1])
    row = run.table("table3").iloc[3]
    assert row["war"] == 62.0
    assert row["uar"] == 50.0


def test_a_class_that_a_fold_lacks_does_not_lower_its_uar(run):
    run.predict(1, 0, [5, 5, 0, 0], sizes=[5, 10, 0, 0])
    assert run.table("table3").iloc[3]["uar"] == 75.0


def test_rows_that_were_not_run_are_kept(run):
    fill(run)
    files = run.tables()
    assert run.table("table3")["folds_seeds"].tolist() == ["not run"] * 3 + ["4/4"]
    fourth = run.table("table4")
    assert fourth["gmp_layer"].tolist() == [-1, -2, -3, -4, -5, -6, -7, -8]
    assert (fourth["folds_seeds"] == "not run").sum() == 7
    assert fourth["uar_paper"].notna().all()
    assert files["table3.md"].count("not run") == 3 * 3
    assert files["table3.tex"].count("not run") == 3 * 3


def test_nothing_evaluated_yet_still_gives_tables(run):
    files = run.tables()
    assert {f"table{number}.md" for number in (1, 2, 3, 4)} <= files.keys()
    assert "nothing evaluated" in files["table3.md"]


def test_what_is_missing_is_counted(run):
    run.predict(1, 0, [7, 7, 7, 7])
    assert run.table("table3")["folds_seeds"].iloc[3] == "1/4"
    single = Run(run.evaluations.parent / "single", config(seeds=[5]))
    single.predict(2, 5, [7, 7, 7, 7])
    assert single.table("table4")["folds_seeds"].iloc[2] == "1/2"
    assert "±n/a" in single.tables()["table4.md"], "one fold and one seed have no spread"


def test_table_2_holds_the_published_rows_and_this_runs(run):
    fill(run)
    run.predict(1, 0, [6, 6, 6, 6], model="egemaps-svm", layer=None, loss=None, encoder="made functionals")
    rows = run.table("table2")
    assert rows["source"].value_counts().to_dict() == {"paper's report": 14, "this run": 2, "paper": 1}
    assert rows.loc[rows["source"] == "this run", "uar"].tolist() == [76.25, 60.0]
    assert rows["model"].iloc[-1] == "eGeMAPS + SVM"
    assert rows["folds_seeds"].iloc[-1] == "1/2", "the reference knows no seeds"
    assert "MIXED" not in "".join(run.tables().values()), "the reference has no encoder"


def test_without_the_baseline_its_row_is_gone(tmp_path):
    run = Run(tmp_path, config(tables={"baseline": "none"}))
    run.predict(1, 0, [6, 6, 6, 6], model="egemaps-svm", layer=None, loss=None)
    assert "eGeMAPS" not in "".join(run.tables().values())


def test_table_1_counts_beside_the_papers(run):
    first = run.table("table1").set_index("class")
    assert first.loc["happy"].tolist() == [60, 2.0, 1636, 126]
    assert first.loc["Total"].tolist() == [240, 8.0, 5531, 419]


def test_other_classes_have_no_papers_column(tmp_path):
    run = Run(tmp_path, config(classes=["calm", "sad"]))
    run.write_corpus(corpus="ravdess")
    assert run.table("table1").columns.tolist() == ["class", "utterances", "minutes"]


def test_effects_are_paired_like_scipys(run):
    scores = {("ce", None): (6, 7), ("ce", -3): (7, 9), ("ams", None): (6, 8), ("ams", -3): (8, 9)}
    for (loss, layer), folds in scores.items():
        for fold, seed in itertools.product((1, 2), (0, 1)):
            right = [folds[fold - 1]] * 4
            right[0] += seed if layer else 0
            run.predict(fold, seed, right, loss=loss, layer=layer)
    effects = run.table("effects").set_index(["effect_of", "measure"])
    row = effects.loc["GMPs, with CE", "UAR"]
    low, high = stats.ttest_rel([71.25, 91.25], [60, 70]).confidence_interval(0.95)
    assert (row["this_run"], row["folds_n"]) == (pytest.approx(16.25, abs=0.051), 2)
    assert (row["folds_low"], row["folds_high"]) == pytest.approx((low, high), abs=0.051)
    low, high = stats.ttest_rel([80, 82.5], [65, 65]).confidence_interval(0.95)
    assert (row["seeds_low"], row["seeds_high"], row["seeds_n"]) == pytest.approx((low, high, 2), abs=0.051)
    published = {name: effects.loc[name]["paper"].tolist() for name in effects.index.levels[0]}
    assert published == {
        "GMPs, with CE": [2.2, 2.6],
        "GMPs, with AMS": [2.2, 2.4],
        "AMS, without GMPs": [1.8, 1.8],
        "AMS, with GMPs": [1.8, 1.6],
    }


def test_an_effect_needs_both_rows(run):
    fill(run)
    assert run.table("effects")["this_run"].isna().all()


def test_folds_sessions_and_confusions_are_kept_apart(run):
    fill(run)
    folds = run.table("per_fold")
    main = folds[(folds["layer"] == -3) & (folds["loss"] == "ams")]
    assert main[["fold", "seed", "uar"]].to_numpy().tolist() == [[1, 0, 70], [1, 1, 72.5], [2, 0, 80], [2, 1, 82.5]]
    sessions = run.table("per_session").query("layer == -3 and loss == 'ams'").set_index("session")
    assert sessions["uar"].to_dict() == {"Ses01": 71.25, "Ses02": 81.25}
    confusion = run.table("confusion").query("layer == -3 and loss == 'ams'").set_index(["label", "prediction"])
    assert confusion["count"].sum() == 160
    assert confusion.loc[("angry", "angry"), "count"] == 7 + 8 + 8 + 9
    assert confusion.loc[("happy", "neutral"), "percent_of_label"] == 25.0
    assert "75.0" in run.tables()["confusion.md"]


def test_ablations_stand_beside_main(tmp_path):
    ablations = {
        "frozen": {"multitask": {"encoder": "frozen"}},
        "transductive": {"clustering": {"fit_on": "all"}},
        "again-frozen": {"multitask": {"encoder": "frozen"}},
    }
    run = Run(tmp_path, config(ablations=ablations))
    fill(run)
    for fold in (1, 2):
        run.predict(fold, 0, [6, 6, 6, 6], variant="frozen")
        run.predict(fold, 0, [9, 9, 9, 9], variant="transductive", fit_on="all")
    rows = run.table("ablations").query("measure == 'UAR'").set_index("variant")
    assert rows["value"].tolist() == [76.25, 60.0, 90.0, 60.0]
    assert rows["minus_main"].tolist()[1:] == [-15.0, 15.0, -15.0]
    assert "TRANSDUCTIVE" in rows.loc["transductive", "k_means_fitted_on"]
    assert "TRANSDUCTIVE" not in run.tables()["table3.md"]


def test_clusters_that_the_config_asks_for_are_averaged(run):
    rows = [("main", fold, 0, -3, 64, "nmi_emotion", 0.01 * fold) for fold in (1, 2)]
    others = (("foreign", 1, 0), ("main", 9, 0), ("main", 1, 9))  # variant, fold and seed
    rows += [(*other, -3, 64, "nmi_emotion", 1.0) for other in others]
    columns = dict(zip(CLUSTER_STATISTICS.schema.names, zip(*rows, strict=True), strict=True))
    table = pa.table(columns, schema=CLUSTER_STATISTICS.schema)
    CLUSTER_STATISTICS.write(run.evaluations / "deep/cluster_statistics.parquet", table)
    row = run.table("clusters").iloc[0]
    assert (row["layer"], row["size"], row["fits"], row["nmi_emotion"]) == (-3, 64, 2, 0.015)


def test_clusters_of_an_ablation_that_shares_those_of_main_are_not_read(run):
    """They are of an earlier config, in which it did not."""
    run.config = config(ablations={"other": {"finetuning": {"margin": 0.3}}})
    rows = [(variant, 1, 0, -3, 64, "nmi_emotion", value) for variant, value in (("main", 0.5), ("other", 0.9))]
    columns = dict(zip(CLUSTER_STATISTICS.schema.names, zip(*rows, strict=True), strict=True))
    CLUSTER_STATISTICS.write(
        run.evaluations / "cluster_statistics.parquet", pa.table(columns, schema=CLUSTER_STATISTICS.schema)
    )
    assert run.table("clusters")["nmi_emotion"].tolist() == [0.5]


def test_every_table_says_what_it_comes_from(run):
    run.write_corpus(excluded={"label fru": 3, "label xxx": 4})
    fill(run)
    for name, text in run.tables().items():
        for part in (
            "240 utterances; 7 excluded",
            "audio sha256 fedcba987654",
            "Code: not recorded",
            "UNRECORDED: 4 evaluations",
            ENCODER,
            "Seeds: 0, 1; 2 folds by session",
            "last epoch",
            configs.identity(run.config),
        ):
            assert part in text, name


@pytest.mark.parametrize(
    ("header", "words"),
    [({"selection": "oracle"}, "ORACLE: epoch chosen on the test fold"), ({"fit_on": "all"}, "TRANSDUCTIVE")],
)
def test_figures_that_saw_the_test_fold_are_labelled(run, header, words):
    fill(run, **header)
    assert all(words in text for text in run.tables().values())


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"encoder": "another"}, f"MIXED encoder: another | {ENCODER}"),
        ({"selection": "oracle"}, "MIXED selection: ORACLE"),
        ({"corpus": "emodb"}, "MIXED corpus: emodb | iemocap"),
        ({"complete": False}, "MIXED corpus: iemocap | iemocap (PARTIAL)"),
        ({"fit_on": "all"}, "MIXED k-means fitted on: TRANSDUCTIVE"),
    ],
)
def test_mixtures_are_named(run, header, words):
    fill(run)
    run.predict(1, 0, [1, 1, 1, 1], layer=-1, **header)
    assert all(words in text for name, text in run.tables().items() if not name.endswith(".tex"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, False), ({"unread": 1}, False), ({"classes": ["angry"]}, True), ({"finetuning": {"epochs": 15}}, True)],
    ids=["equal", "more than is read", "others", "fewer"],
)
def test_settings_that_a_job_had_are_held_against_the_configs(run, changes, told):
    path = run.predict(1, 0, [5, 5, 5, 5])
    record = {
        "stage": "evaluation",
        "job": {},
        "code": "c0de",
        "commit": None,
        "modified": False,
        "packages": {},
        "device": "CPU",
        "inputs": {},
        "seconds": 1.0,
        "peak_memory_mb": 1,
        "peak_gpu_memory_mb": None,
        "config": configs.slice_for(run.config, "evaluation") | changes,
        "outputs": {"predictions": sha256(path)},
    }
    (run.evaluations / "provenance").mkdir()
    (run.evaluations / "provenance/evaluation.json").write_text(json.dumps(record))
    assert ("OTHER SETTINGS than this config's: evaluation (1 job)" in run.tables()["table3.md"]) == told


def test_another_corpus_is_not_compared_with_the_paper(run):
    run.write_corpus(corpus="emodb")
    fill(run, corpus="emodb")
    assert "**NOT COMPARABLE: the published figures are on the complete IEMOCAP" in run.tables()["table2.md"]
    assert r"\textbf{NOT COMPARABLE" in run.tables()["table3.tex"]
    third = run.table("table3")
    assert third["uar_diff"].isna().all()
    assert third["uar_paper"].notna().all()


def test_a_manifest_is_not_the_papers_corpus_whatever_its_name(run):
    run.config = config(corpus={"reader": "manifest", "root": "iemocap.csv"})
    fill(run)
    assert "NOT COMPARABLE" in run.tables()["table2.md"]


def test_two_classes_are_not_compared_with_the_papers_four(tmp_path):
    run = Run(tmp_path, config(classes=["angry", "sad"]))
    fill(run)
    assert "NOT COMPARABLE" in run.tables()["table2.md"]


def test_a_partial_corpus_says_so_everywhere(run):
    run.write_corpus(complete=False)
    fill(run, complete=False)
    assert all("PARTIAL corpus" in text for text in run.tables().values())
    assert "NOT COMPARABLE" in run.tables()["table2.csv"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folds": {"by": "session", "held_out": [["Ses01", "Ses02"], ["Ses03"]]}}, "2 folds by session"),
        ({"folds": {"by": "speaker", "held_out": [["a"], ["b"], ["c"]]}}, "3 folds by speaker"),
        ({"encoder": {"source": "packaged"}}, "another encoder"),
        ({"encoder": {**PAPERS["encoder"], "name": "microsoft/wavlm-base-plus"}}, "another encoder"),
        # The name is that of config.yaml, the folder's contents anything.
        ({"encoder": {**PAPERS["encoder"], "source": "directory", "path": "."}}, "another encoder"),
    ],
)
def test_another_protocol_is_not_compared_with_the_paper(tmp_path, changes, words):
    run = Run(tmp_path, config(**PAPERS | changes))
    for fold, seed in itertools.product(range(1, 1 + len(run.config.folds.held_out)), (0, 1)):
        run.predict(fold, seed, [7, 7, 7, 7])
    text = run.tables()["table2.md"]
    assert text.count("NOT COMPARABLE") == 1
    assert words in text
    assert run.table("table4")["uar_diff"].isna().all()


def test_the_papers_protocol_is_compared_with_the_paper(tmp_path):
    run = Run(tmp_path, config(**PAPERS))
    for fold, seed in itertools.product(range(1, 6), (0, 1)):
        run.predict(fold, seed, [7 + seed, 7, 7, 7 + fold % 2])
    row = run.table("table3").iloc[3]
    assert (row["uar"], row["uar_paper"], row["uar_diff"]) == (72.75, 82.0, -9.25)


@pytest.mark.parametrize(
    "encoder",
    [PAPERS["encoder"], {"source": "directory", "path": ".", "sha256": paper.ENCODER_SHA256}],
    ids=["hub", "folder"],
)
def test_the_papers_protocol_carries_no_warning(tmp_path, encoder):
    run = Run(tmp_path, config(**PAPERS | {"encoder": encoder}))
    fill(run)
    text = "".join(run.tables().values())
    assert not re.search("NOT COMPARABLE|PARTIAL|MIXED|ORACLE|TRANSDUCTIVE", text)


def test_the_config_pins_the_papers_encoder():
    encoder = configs.parse(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))).encoder
    assert (encoder.name, encoder.sha256) == (paper.ENCODER, paper.ENCODER_SHA256)


def test_two_files_with_one_claim_are_both_named(run):
    paths = [run.predict(1, 0, [5, 5, 5, 5]), run.predict(1, 0, [6, 6, 6, 6])]
    with pytest.raises(UserError) as caught:
        run.tables()
    assert all(str(path) in str(caught.value) for path in paths)


def test_folds_that_share_an_utterance_are_refused(run):
    run.predict(1, 0, [5, 5, 5, 5])
    run.predict(2, 0, [5, 5, 5, 5], ids="Ses01-{n}")
    with pytest.raises(UserError, match=r"Ses01-0 was tested in fold 1 and in fold 2.*seed 0"):
        run.tables()


def test_predictions_of_other_classes_are_refused(run):
    path = run.predict(1, 0, [5, 5, 5, 5], classes=["angry", "sad"])
    with pytest.raises(UserError, match=re.escape(str(path))):
        run.tables()


def test_a_missing_summary_is_named(run):
    (run.evaluations / "corpus.parquet").unlink()
    with pytest.raises(UserError, match=r"corpus\.parquet is missing"):
        run.tables()


@pytest.mark.parametrize("header", [{"layer": -2}, {"variant": "old"}, {"loss": "aam"}, {"model": "other"}])
def test_what_the_config_does_not_ask_for_is_ignored(run, caplog, header):
    fill(run)
    expected = run.tables()
    foreign = run.predict(1, 0, [0, 0, 0, 0], **header)
    assert run.tables() == expected
    assert str(foreign) in caplog.text


@pytest.mark.parametrize(("fold", "seed"), [(3, 0), (1, 9)])
def test_other_folds_and_seeds_are_ignored(run, fold, seed):
    fill(run)
    expected = run.tables()
    run.predict(fold, seed, [0, 0, 0, 0])
    assert run.tables() == expected


def test_only_the_tables_asked_for_are_made(tmp_path):
    run = Run(tmp_path, config(tables={"numbers": [2]}))
    names = run.tables().keys()
    assert {"table2.csv", "table2.md", "table2.tex"} <= names
    assert not [name for name in names if name.startswith(("table1", "table3", "table4"))]


def test_tables_of_an_earlier_config_are_not_left_among_those_of_this_one(tmp_path):
    run = Run(tmp_path, config(ablations={"frozen": {"multitask": {"encoder": "frozen"}}}))
    (run.output.parent / "tables").mkdir()
    (run.output / "probes.csv").touch()  # of another rule
    assert {"ablations.csv", "table4.tex"} <= run.tables().keys()
    run.config = config(tables={"numbers": [1, 2, 3]})
    left = {name.partition(".")[0] for name in run.tables()}
    assert "probes" in left
    assert not left & {"ablations", "table4"}


def test_table_1_alone_asks_for_no_system(tmp_path):
    run = Run(tmp_path, config(tables={"numbers": [1]}))
    run.predict(fold=1, seed=0, recalls=[10, 10, 10, 10])
    written = run.tables()
    assert "| Total " in written["table1.md"]
    for name in ("per_fold", "per_session"):
        assert [line for line in written[f"{name}.md"].splitlines() if "|" in line] == ["| no rows |", "| :------ |"]


def test_a_table_without_rows_says_so():
    table = rendering.Table("nothing", "Of nothing", [], footer=["as it was"])
    assert table.csv() == "# Of nothing\n# as it was\n"
    assert "| no rows |" in table.markdown()
    assert "<thead><tr><th>no rows</th></tr></thead>" in table.html()
    assert "\\begin{tabular}{l}\n\\toprule\nno rows" in table.latex()


def test_equal_evaluations_give_equal_bytes_wherever_they_lie(tmp_path):
    made = []
    for place, order in (("here", (1, 2)), ("there", (2, 1))):
        run = Run(tmp_path / place)
        for fold, seed in itertools.product(order, (1, 0)):
            run.predict(fold, seed, [fold, 5, 5 + seed, 5])
        figures(config=run.config, evaluations=run.evaluations, output=run.output)
        made.append(run.tables())
    assert made[0] == made[1]
    assert {"table4.svg", "confusions.svg"} <= made[0].keys()
    assert not any(str(tmp_path) in text for text in made[0].values())


def test_latex_is_well_formed(tmp_path):
    classes = ["r&b", "50_%", "{odd}", r"a\b#$"]
    run = Run(tmp_path, config(classes=classes))
    run.write_corpus(corpus="my_corpus & more")
    run.predict(1, 0, [5, 5, 5, 5], encoder="a_b^c~d", corpus="my_corpus & more")
    for name in ("table1.tex", "table2.tex", "table3.tex", "table4.tex"):
        text = run.tables()[name]
        body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        bare = re.sub(r"\\[\\&%$#_{}]", "", body)
        depths = list(itertools.accumulate({"{": 1, "}": -1}.get(character, 0) for character in bare))
        assert depths[-1] == 0, name
        assert min(depths) >= 0, name
        assert not re.search(r"[%#_^~]", re.sub(r"\\text(?:ascii\w+|backslash)\{\}", "", bare)), name
        assert bare.count("$") % 2 == 0, name
        assert text.isascii(), name
        rows = re.search(r"\\toprule\n(.*)\\bottomrule", body, re.DOTALL).group(1).splitlines()
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", body).group(1))
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows if row != r"\midrule"} == {columns}, name


def test_markdown_columns_are_aligned(run):
    fill(run)
    for name, text in run.tables().items():
        if name.endswith(".md"):
            widths = {len(line) for line in text.splitlines() if line.startswith("|")}
            assert len(widths) == 1, name


def test_names_that_a_format_would_cut_are_whole(tmp_path):
    classes = ["angry", "a|b", "neutral", "sad"]
    run = Run(tmp_path, config(classes=classes, folds={"by": "session", "held_out": [["S#1"], ["Ses02"]]}))
    run.predict(1, 0, [5, 5, 5, 5])
    assert r"as a\|b" in run.tables()["confusion.md"]
    assert "S#1" in run.table("per_fold")["held_out"].tolist()


def test_csv_holds_numbers(tmp_path):
    run = Run(tmp_path, config(**PAPERS))
    for fold, seed in itertools.product(range(1, 6), (0, 1)):
        run.predict(fold, seed, [7, 7, 7, 7])
    table = run.table("table3")
    for column in ("uar_paper", "uar", "uar_std_folds", "uar_std_seeds", "uar_diff", "war"):
        assert table[column].dtype == float
        assert table[column].notna().any()


def test_tables_are_shown_in_the_terminal(run, capsys):
    fill(run)
    run.tables()
    rendering.show(run.output)
    shown = capsys.readouterr().out
    assert all(f"Table {number}" in shown for number in (1, 2, 3, 4))
    assert "GEmo-CLAP" in shown


BLOCKER = """
import sys

ABSENT = {"torch", "torchaudio", "faiss", "transformers", "sklearn", "soundfile", "safetensors"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not in the environment of the tables")

sys.meta_path.insert(0, Blocker())
import json
from pathlib import Path
from gmp_atl.config import Config
from gmp_atl.stages.figures import figures
from gmp_atl.stages.tables import tables
config, evaluations, output = sys.argv[1:]
for stage in (tables, figures):
    stage(config=Config.model_validate(json.loads(config)), evaluations=Path(evaluations), output=Path(output))
"""


def test_tables_need_neither_torch_nor_faiss(run):
    fill(run)
    arguments = [run.config.model_dump_json(), run.evaluations, run.output]
    done = subprocess.run([sys.executable, "-c", BLOCKER, *arguments], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert (run.output / "table4.svg").exists()
    assert (run.output / "table4.md").exists()
