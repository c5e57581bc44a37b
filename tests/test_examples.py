"""What the report shows of single utterances agrees with scikit-learn, with the stages, and with what is known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import soundfile
import torch
from conftest import Inputs, Stages, Upstream
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.decomposition import PCA

from gmp_atl import model_files
from gmp_atl.errors import LeakageError, UserError
from gmp_atl.formats import EMBEDDINGS, EXAMPLES, PREDICTIONS, UTTERANCES
from gmp_atl.frames import n_frames
from gmp_atl.stages.examples import FLOOR, examples, principal_plane, spectrogram

finite = st.floats(-100, 100, width=32)


@given(st.integers(1, 12).flatmap(lambda n: arrays(np.float32, (n, 5), elements=finite)))
def test_the_plane_is_that_of_scikit_learn_but_for_signs(points: np.ndarray) -> None:
    found, shares = principal_plane(points)
    assert found.shape == (len(points), 2)
    assert all(0 <= share <= 1 + 1e-9 for share in shares)
    if len(points) > 1 and points.astype(float).var(axis=0).sum() > 1e-6:
        reference = PCA(2, svd_solver="full").fit(points.astype(np.float64))
        assert shares == pytest.approx(reference.explained_variance_ratio_, abs=1e-6)
        # Distances do not depend on signs, and hardly on the order of components of equal variance.
        if shares[0] - shares[1] > 1e-3:
            wanted = reference.transform(points.astype(np.float64))
            assert np.abs(found[:, 0]) == pytest.approx(np.abs(wanted[:, 0]), abs=1e-3)


@given(arrays(np.float32, (7, 4), elements=finite))
def test_the_plane_has_one_sign(points: np.ndarray) -> None:
    for column in principal_plane(points)[0].T:
        assert column[np.abs(column).argmax()] >= 0


@pytest.mark.parametrize("frequency", [40 * n for n in (5, 50, 150)])
def test_a_tone_is_where_it_belongs(frequency: int) -> None:
    samples = np.sin(2 * np.pi * frequency * np.arange(16_000) / 16_000).astype(np.float32)
    found = spectrogram(samples)
    assert found.shape == (n_frames(16_000), 201)
    assert (found.argmax(axis=1) == frequency // 40).all()
    assert found.max() == 0
    assert found.min() >= FLOOR
    assert (found == spectrogram(1000 * samples)).all()


class Made:
    """The stage on the made corpus, whose audio is noise of the right lengths."""

    def __init__(self, stages: Stages, upstream: Upstream) -> None:
        self.stages, self.upstream = stages, upstream
        self.rows = {row["id"]: row for row in UTTERANCES.read(stages.inputs.utterances)[0].to_pylist()}
        self.audio = stages.folder / "audio"
        self.audio.mkdir()
        random = np.random.default_rng(0)
        for row in self.rows.values():
            soundfile.write(self.audio / row["path"], 0.1 * random.normal(size=row["n_samples"]), 16_000)
        self.model = stages.finetuning()
        self.predictions = stages.evaluation(self.model)
        self.embeddings, self.examples = stages.folder / "embeddings.parquet", stages.folder / "examples.parquet"

    def run(self, **others: Any) -> None:
        inputs: dict[str, Any] = {
            "config": self.stages.config("examples"),
            "utterances": self.stages.inputs.utterances,
            "audio_root": self.audio,
            "local_features": self.stages.inputs.local_features,
            "pretrained": self.stages.inputs.encoder,
            "multitask": self.upstream.multitask.folder,
            "centroids": [book.centroids for book in self.upstream.codebooks],
            "model": self.model.folder,
            "predictions": self.predictions,
            "fit_on": "training",
            "fold": 1,
            "seed": 0,
            "embeddings": self.embeddings,
            "output": self.examples,
        }
        examples(**{**inputs, **others})


@pytest.fixture
def made(stages: Stages, upstream: Upstream) -> Made:
    return Made(stages, upstream)


def hidden(folder: Path, local: np.ndarray, layer: int) -> np.ndarray:
    """Of one clip alone, (frames, width)."""
    encoder = model_files.load(folder)[0].eval()
    with torch.inference_mode():
        states = encoder(torch.from_numpy(local.astype(np.float32))[None], torch.tensor([len(local)]), layer)
    return states[0].numpy()


def test_embeddings_are_means_over_frames_of_held_out_utterances(made: Made, inputs: Inputs) -> None:
    made.run()
    table, header = EMBEDDINGS.read(made.embeddings)
    rows = table.to_pylist()
    held_out = inputs.ids("S1")
    for kind, folder in (("pre-trained", inputs.encoder), ("fine-tuned", made.model.folder)):
        own = [row for row in rows if row["encoder"] == kind]
        assert [row["id"] for row in own] == held_out
        assert all(row["emotion"] == made.rows[row["id"]]["emotion"] for row in own)
        means = np.stack([hidden(folder, inputs.frames[name], -1).mean(axis=0) for name in held_out])
        expected, shares = principal_plane(means)
        assert [[row["x"], row["y"]] for row in own] == pytest.approx(expected, abs=1e-4)
        assert header["explained"][kind] == pytest.approx(shares, abs=1e-4)


def test_examples_have_the_labels_and_scores_of_their_stages(made: Made, inputs: Inputs) -> None:
    made.run()
    table, header = EXAMPLES.read(made.examples)
    assert (header["layer"], header["sizes"]) == (-3, [4, 8])
    scores = {row["id"]: row["scores"] for row in PREDICTIONS.read(made.predictions)[0].to_pylist()}
    for row in table.to_pylist():
        assert row["id"] in inputs.ids("S1")
        assert row["scores"] == scores[row["id"]]
        frames = hidden(made.upstream.multitask.folder, inputs.frames[row["id"]], -3).astype(np.float16)
        assert len(row["spectrogram"]) == 201 * len(frames)
        for labels, book in zip(row["labels"], made.upstream.codebooks, strict=True):
            centroids = model_files.load_tensors(book.centroids)[0]["centroids"].numpy()
            index = faiss.IndexFlatL2(centroids.shape[1])
            index.add(centroids)
            assert labels == index.search(frames.astype(np.float32), 1)[1][:, 0].tolist()


def test_the_utterance_of_median_length_stands_for_its_class(made: Made, inputs: Inputs) -> None:
    made.run()
    rows = EXAMPLES.read(made.examples)[0].to_pylist()
    assert [row["emotion"] for row in rows] == ["angry", "sad"]
    for row in rows:
        lengths = sorted(
            made.rows[name]["n_samples"] for name in inputs.ids("S1") if made.rows[name]["emotion"] == row["emotion"]
        )
        assert made.rows[row["id"]]["n_samples"] == lengths[(len(lengths) - 1) // 2]


def test_the_same_job_gives_the_same_bytes(made: Made) -> None:
    made.run()
    first = made.embeddings.read_bytes(), made.examples.read_bytes()
    made.run()
    assert (made.embeddings.read_bytes(), made.examples.read_bytes()) == first


def test_models_and_codebooks_of_another_fold_are_refused(made: Made) -> None:
    with pytest.raises(LeakageError):
        made.run(fold=2)
    model = made.stages.finetuning(fold=2).folder
    with pytest.raises(LeakageError, match=re.escape(str(model))):
        made.run(model=model)
    other = made.stages.multitask(fold=2)
    with pytest.raises(LeakageError):
        made.run(multitask=other.folder)
    features = made.stages.layer_features(other.folder, -3, fold=2)
    book = made.stages.clustering(features, 4, fold=2)
    with pytest.raises(LeakageError):
        made.run(centroids=[book.centroids])


def test_codebooks_that_may_be_fitted_on_all_frames_are_taken_and_others_refused(made: Made) -> None:
    changes = {"clustering.fit_on": "all"}
    book = made.stages.clustering(made.stages.layer_features(made.upstream.multitask.folder, -3, changes), 4, changes)
    with pytest.raises(LeakageError):
        made.run(centroids=[book.centroids])
    made.run(centroids=[book.centroids], fit_on="all")
    assert EXAMPLES.read(made.examples)[1]["sizes"] == [4]


def test_a_clip_that_has_changed_is_named(made: Made) -> None:
    made.run()
    path = made.audio / EXAMPLES.read(made.examples)[0]["id"][0].as_py()
    soundfile.write(path.with_suffix(".wav"), np.zeros(8000) + 0.1 * np.arange(8000) % 1, 16_000)
    with pytest.raises(UserError, match=rf"{path.name}.*8000 samples.*--forcerun corpus"):
        made.run()


def test_predictions_of_other_utterances_are_refused(made: Made) -> None:
    other = made.stages.evaluation(made.stages.finetuning(fold=2), fold=2)
    with pytest.raises(UserError, match="lacks S1"):
        made.run(predictions=other)


def test_codebooks_of_several_layers_and_another_encoder_are_refused(made: Made, tmp_path: Path) -> None:
    other = made.stages.clustering(made.stages.layer_features(made.upstream.multitask.folder, -1), 4)
    with pytest.raises(UserError, match="several layers"):
        made.run(centroids=[made.upstream.codebooks[0].centroids, other.centroids])
    encoder, metadata = model_files.load(made.stages.inputs.encoder)
    model_files.save(encoder, tmp_path / "foreign", **{**metadata, "encoder": "another HuBERT"})
    with pytest.raises(UserError, match="is built on another HuBERT, but the model on tiny"):
        made.run(pretrained=tmp_path / "foreign")


def test_something_else_than_a_codebook_is_refused(made: Made) -> None:
    with pytest.raises(UserError, match="not a codebook"):
        made.run(centroids=[made.model.folder / "head.safetensors"])
