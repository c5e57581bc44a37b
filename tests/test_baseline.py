"""The classical reference is fitted on the training folds only, and learns what can be learned there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gmp_atl.config import BaselineSlice, FoldsConfig
from gmp_atl.errors import UserError
from gmp_atl.formats import FUNCTIONALS, PREDICTIONS, UTTERANCES
from gmp_atl.stages.baseline import baseline
from gmp_atl.stages.functionals import functionals

CLASSES = ["angry", "happy", "sad"]
CONFIG = BaselineSlice(classes=CLASSES, folds=FoldsConfig(by="speaker", held_out=[["s1", "s2"], ["s3"]]))
DIMENSIONS = 6


class Corpus:
    """Three speakers with ten clips per class; each class has its own mean, a standard deviation apart."""

    def __init__(self, folder: Path):
        self.folder = folder
        random = np.random.default_rng(0)
        self.ids = [
            f"{speaker}-{emotion}-{n}" for speaker in ("s1", "s2", "s3") for emotion in CLASSES for n in range(10)
        ]
        means = np.eye(len(CLASSES), DIMENSIONS) * 4
        classes = [CLASSES.index(name.split("-")[1]) for name in self.ids]
        self.values = means[classes] + random.normal(size=(len(self.ids), DIMENSIONS))
        self.emotions = [CLASSES[index] for index in classes]

    def run(self, fold: int, lacking: str | None = None) -> dict[str, dict]:
        """Predictions of a fold by id, once the tables are written as they now are."""
        names = [name.split("-") for name in self.ids]
        UTTERANCES.write(
            self.folder / "utterances.parquet",
            pa.table(
                {
                    "id": self.ids,
                    "path": self.ids,
                    "speaker": [speaker for speaker, *_ in names],
                    "gender": ["female"] * len(names),
                    "session": [""] * len(names),
                    "emotion": self.emotions,
                    "n_samples": pa.array([16_000] * len(names), pa.int64()),
                    "text_type": [""] * len(names),
                    "sha256": self.ids,
                }
            ),
            corpus="made",
            complete=False,
            audio="a1b2",
        )
        rows = {name: list(map(float, row)) for name, row in zip(self.ids, self.values, strict=True) if name != lacking}
        kind = FUNCTIONALS.schema.field("values").type
        table = pa.table({"id": list(rows), "values": pa.array(rows.values(), kind)})
        FUNCTIONALS.write(self.folder / "functionals.parquet", table, features="made")
        output = self.folder / "predictions.parquet"
        baseline(
            config=CONFIG,
            functionals=self.folder / "functionals.parquet",
            utterances=self.folder / "utterances.parquet",
            fold=fold,
            output=output,
        )
        table, self.header = PREDICTIONS.read(output)
        return {row["id"]: row for row in table.to_pylist()}


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path)


def test_folds_are_disjoint_and_together_the_corpus(corpus):
    first, second = corpus.run(1), corpus.run(2)
    assert {row["speaker"] for row in first.values()} == {"s1", "s2"}
    assert {row["speaker"] for row in second.values()} == {"s3"}
    assert sorted([*first, *second]) == sorted(corpus.ids)


def test_learns_what_is_separable(corpus):
    rows = corpus.run(1).values()
    right = np.mean([row["prediction"] == row["label"] for row in rows])
    assert right > 0.9


def test_two_classes_are_enough(corpus):
    corpus.emotions = ["angry" if emotion == "angry" else "sad" for emotion in corpus.emotions]
    rows = corpus.run(2).values()
    assert np.mean([row["prediction"] == row["label"] for row in rows]) > 0.9
    assert all(sum(row["scores"]) == pytest.approx(1, abs=1e-5) for row in rows)


def test_scores_sum_to_one_and_name_the_prediction(corpus):
    for row in corpus.run(2).values():
        assert sum(row["scores"]) == pytest.approx(1, abs=1e-5)
        assert CLASSES[int(np.argmax(row["scores"]))] == row["prediction"]


def test_the_header_says_whose_predictions_they_are(corpus):
    corpus.run(2)
    expected = {"model": "egemaps-svm", "variant": "main", "layer": None, "loss": None, "fold": 2, "seed": 0}
    assert expected.items() <= corpus.header.items()
    assert (corpus.header["corpus"], corpus.header["complete"], corpus.header["encoder"]) == ("made", False, "made")


def test_held_out_clips_change_nothing_but_their_own_prediction(corpus):
    """Neither their labels nor their functionals reach the scaler, the imputer or the machine."""
    before = corpus.run(1)
    held_out = [n for n, name in enumerate(corpus.ids) if name in before]
    for n in held_out:
        corpus.emotions[n] = "sad"
    corpus.values[held_out[1:]] = 1e3
    after = corpus.run(1)
    untouched = corpus.ids[held_out[0]]
    assert after[untouched]["scores"] == before[untouched]["scores"]


def test_clips_too_short_for_functionals_are_imputed(corpus):
    corpus.values[[0, 45, 70]] = np.nan
    scores = np.array([row["scores"] for fold in (1, 2) for row in corpus.run(fold).values()])
    assert np.isfinite(scores).all()


def test_a_class_that_training_lacks_scores_zero(corpus):
    """Fold 2 trains on s1 and s2, which are then never happy."""
    for n, name in enumerate(corpus.ids):
        if name.startswith(("s1-happy", "s2-happy")):
            corpus.emotions[n] = "angry"
    for row in corpus.run(2).values():
        assert row["scores"][CLASSES.index("happy")] == 0
        assert sum(row["scores"]) == pytest.approx(1, abs=1e-5)


def test_missing_functionals_are_named(corpus):
    with pytest.raises(UserError, match=r"functionals\.parquet lacks 1 utterances, such as s3-sad-9"):
        corpus.run(1, lacking="s3-sad-9")


def test_without_opensmile_the_user_learns_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "opensmile", None)
    with pytest.raises(UserError, match=r"make opensmile.*tables\.baseline: none"):
        functionals(utterances=tmp_path / "u.parquet", audio_root=tmp_path, output=tmp_path / "f.parquet")


def test_functionals_of_made_clips(tmp_path):
    pytest.importorskip("opensmile", reason="openSMILE is optional (research licence): make opensmile")
    soundfile = pytest.importorskip("soundfile")
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(16_000) / 16_000)
    lengths = {"long": 16_000, "short": 640}
    rows = {
        "id": list(lengths),
        "path": [f"{name}.wav" for name in lengths],
        **{column: ["x"] * 2 for column in ("speaker", "gender", "session", "emotion", "text_type", "sha256")},
        "n_samples": pa.array(lengths.values(), pa.int64()),
    }
    for name, length in lengths.items():
        soundfile.write(tmp_path / f"{name}.wav", tone[:length], 16_000)
    table = pa.table({name: rows[name] for name in UTTERANCES.schema.names})
    UTTERANCES.write(tmp_path / "u.parquet", table, corpus="made", complete=True, audio="a1b2")
    output = tmp_path / "f.parquet"
    with pytest.warns(UserWarning, match="too short"):
        functionals(utterances=tmp_path / "u.parquet", audio_root=tmp_path, output=output)
    table, header = FUNCTIONALS.read(output)
    long, short = np.array(table["values"].to_pylist())
    assert len(long) == 88
    assert "eGeMAPSv02" in header["features"]
    assert long[0] == pytest.approx(12 * np.log2(220 / 27.5), abs=0.1), "mean pitch, semitones above 27.5 Hz"
    assert np.isnan(short).all()
