"""Codebooks against brute force: every frame is fitted on, and every label is the nearest centroid's."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from safetensors import safe_open
from safetensors.numpy import save
from sklearn.cluster import MiniBatchKMeans

from gmp_atl import kmeans
from gmp_atl.errors import LeakageError, UserError
from gmp_atl.formats import CLUSTER_STATISTICS, LAYER_FEATURES, PSEUDO_LABELS, feature_rows
from gmp_atl.randomness import derive
from gmp_atl.stages import clustering as clustering_stage
from gmp_atl.stages.cluster_statistics import cluster_statistics

DIMENSIONS = 3
SUBSAMPLE = 256
"""Frames per centroid on which FAISS would fit by default."""


@pytest.fixture
def features(inputs, tmp_path) -> Callable[..., Path]:
    """Writes layer features of fold 1: blobs that overlap, so that k-means has something to decide."""

    def write(frames_per_clip: int) -> Path:
        random = np.random.default_rng(0)
        ids = inputs.ids("S2", "S3")
        random.shuffle(ids)  # the order of the file is not that of the utterances
        centres = random.normal(size=(6, DIMENSIONS)) * 2
        clips = [
            centres[random.integers(6, size=frames_per_clip)] + random.normal(size=(frames_per_clip, DIMENSIONS))
            for _ in ids
        ]
        path = tmp_path / f"{frames_per_clip}.parquet"
        header = {"dimensions": DIMENSIONS, "layer": -3, "encoder": "made", "fitted_on": ["S2_male_sad"]}
        with LAYER_FEATURES.writer(path, **header) as append:
            append(feature_rows(ids[:3], clips[:3]))
            append(feature_rows(ids[3:], clips[3:]))
        return path

    return write


def read_centroids(path: Path) -> tuple[np.ndarray, dict]:
    with safe_open(path, framework="np") as file:
        return file.get_tensor("centroids"), json.loads(file.metadata()["gmp_atl"])


def read_labels(path: Path) -> dict[str, np.ndarray]:
    rows = PSEUDO_LABELS.read(path)[0].to_pylist()
    found = {row["id"]: np.array(row["labels"]) for row in rows}
    assert len(found) == len(rows), "no clip comes twice"
    return found


def read_frames(path: Path) -> dict[str, np.ndarray]:
    """In double precision."""
    table, _ = LAYER_FEATURES.read(path)
    return {
        row["id"]: np.frombuffer(row["frames"], "<f2").reshape(-1, DIMENSIONS).astype(np.float64)
        for row in table.to_pylist()
    }


def distances(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared, (frames, centroids), one difference at a time."""
    return ((frames[:, None] - centroids[None].astype(np.float64)) ** 2).sum(axis=-1)


@pytest.mark.parametrize("algorithm", ["lloyd", "mini_batch"])
@pytest.mark.parametrize("size", [2, 7, 50])
def test_each_frame_has_the_label_of_the_nearest_centroid(stages, features, algorithm, size):
    path = features(100)
    codebook = stages.clustering(path, size, {"clustering.algorithm": algorithm})
    centroids, _ = read_centroids(codebook.centroids)
    assert centroids.shape == (size, DIMENSIONS)
    labels = read_labels(codebook.pseudo_labels)
    assert list(labels) == stages.inputs.ids("S2", "S3")
    for utterance, frames in read_frames(path).items():
        squared = distances(frames, centroids)
        chosen = squared[np.arange(len(frames)), labels[utterance]]
        np.testing.assert_allclose(chosen, squared.min(axis=1), atol=1e-4)


def test_every_frame_is_fitted_on(stages, features):
    """Once k-means stands still each centroid is the mean of all frames that bear its label.

    Fitted on FAISS's default of 256 frames per centroid it would be the mean of a part of them.
    """
    path, size = features(500), 4
    codebook = stages.clustering(path, size, {"clustering.iterations": 200})
    frames, labels = read_frames(path), read_labels(codebook.pseudo_labels)
    every_frame = np.concatenate([frames[utterance] for utterance in labels])
    every_label = np.concatenate(list(labels.values()))
    assert len(every_frame) > 2 * SUBSAMPLE * size
    means = np.stack([every_frame[every_label == label].mean(axis=0) for label in range(size)])
    np.testing.assert_allclose(read_centroids(codebook.centroids)[0], means, atol=1e-4)


def test_statistics_are_those_of_the_labels(stages, features):
    path, size = features(60), 5
    codebook = stages.clustering(path, size)
    centroids, metadata = read_centroids(codebook.centroids)
    labels = np.concatenate(list(read_labels(codebook.pseudo_labels).values()))
    nearest = distances(np.concatenate(list(read_frames(path).values())), centroids).min(axis=1)
    counts = [int((labels == label).sum()) for label in range(size)]
    statistics = metadata["statistics"]
    assert statistics["inertia_per_frame"] == pytest.approx(nearest.mean(), rel=1e-4)
    assert statistics["frames_per_centroid"] == 8 * 60 / 5
    assert (statistics["smallest_cluster"], statistics["largest_cluster"]) == (min(counts), max(counts))
    assert statistics["empty_clusters"] == counts.count(0)
    entropy = -sum(count / 480 * np.log2(count / 480) for count in counts if count)
    assert statistics["perplexity"] == pytest.approx(2**entropy)


def test_more_iterations_and_more_centroids_fit_closer(stages, features):
    path = features(100)

    def inertia(size: int, iterations: int) -> float:
        codebook = stages.clustering(path, size, {"clustering.iterations": iterations})
        return read_centroids(codebook.centroids)[1]["statistics"]["inertia_per_frame"]

    assert inertia(8, 1) > inertia(8, 20) > inertia(64, 20)


@pytest.mark.parametrize("algorithm", ["lloyd", "mini_batch"])
def test_equal_seeds_give_equal_codebooks(stages, features, algorithm):
    path, changes = features(100), {"clustering.algorithm": algorithm}
    first, again, other = (stages.clustering(path, 8, changes, seed=seed) for seed in (1, 1, 2))
    assert first.centroids.read_bytes() == again.centroids.read_bytes()
    assert first.pseudo_labels.read_bytes() == again.pseudo_labels.read_bytes()
    assert not np.array_equal(read_centroids(first.centroids)[0], read_centroids(other.centroids)[0])


@pytest.mark.parametrize("algorithm", ["lloyd", "mini_batch"])
def test_draws_are_a_function_of_seed_fold_layer_and_size(stages, features, algorithm):
    """So that a codebook can be made anew from its frames, in the order of their file, and from nothing else."""
    path = features(1500)  # more frames than a batch of MiniBatchKMeans
    codebook = stages.clustering(path, 8, {"clustering.algorithm": algorithm, "clustering.iterations": 3}, seed=7)
    frames, seed = np.concatenate([*read_frames(path).values()]).astype(np.float32), derive(7, 1, "clustering/-3/8")
    if algorithm == "lloyd":
        start = kmeans.initial_centroids([frames], len(frames), 8, np.random.default_rng(seed))
        expected, _ = kmeans.lloyd([frames], start, 3)
    else:
        model = MiniBatchKMeans(8, batch_size=10_000, max_iter=3, n_init=1, random_state=seed % 2**32)
        expected = model.fit(frames).cluster_centers_
    found, _ = read_centroids(codebook.centroids)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_a_codebook_says_where_it_comes_from(stages, features, caplog):
    with caplog.at_level(logging.INFO):
        codebook = stages.clustering(features(100), 8)
    inertia = read_centroids(codebook.centroids)[1]["statistics"]["inertia_per_frame"]
    assert caplog.messages[0].startswith(f"layer -3, 8 centroids: {{'inertia_per_frame': {inertia}, ")
    _, of_centroids = read_centroids(codebook.centroids)
    _, of_labels = PSEUDO_LABELS.read(codebook.pseudo_labels)
    assert "statistics" not in of_labels
    for metadata in (of_centroids, of_labels):
        assert (metadata["layer"], metadata["size"], metadata["encoder"]) == (-3, 8, "made")
        assert metadata["fitted_on"] == sorted(stages.inputs.ids("S2", "S3"))


def test_the_transductive_reading_fits_on_all_clips_and_labels_those_of_training(stages):
    changes = {"clustering.fit_on": "all"}
    features = stages.layer_features(stages.inputs.encoder, -3, changes)
    codebook = stages.clustering(features, 8, changes)
    metadata = read_centroids(codebook.centroids)[1]
    assert metadata["fitted_on"] == sorted(stages.inputs.frames)
    assert metadata["statistics"]["frames_per_centroid"] == sum(map(len, stages.inputs.frames.values())) / 8
    labels = read_labels(codebook.pseudo_labels)
    assert {each: len(found) for each, found in labels.items()} == {
        each: len(stages.inputs.frames[each]) for each in stages.inputs.ids("S2", "S3")
    }


def test_statistics_of_uneven_clusters(stages, features, monkeypatch):
    """One of a single frame and three of none, which k-means would fill: by hand."""
    labels = np.array([0] * 39 + [2], np.uint16)
    monkeypatch.setattr(kmeans, "lloyd", lambda _, initial, *__: (initial, kmeans.Assignment(labels, 80.0)))
    statistics = read_centroids(stages.clustering(features(5), 5).centroids)[1]["statistics"]
    assert statistics.pop("perplexity") == pytest.approx(40 / 39 ** (39 / 40))
    assert statistics == {
        "inertia_per_frame": 2,
        "frames_per_centroid": 8,
        "empty_clusters": 3,
        "smallest_cluster": 0,
        "largest_cluster": 39,
    }


def test_frames_read_from_the_file_at_every_pass_give_the_bytes_of_frames_in_memory(stages, features, monkeypatch):
    path = features(100)
    held = stages.clustering(path, 8)
    monkeypatch.setattr(clustering_stage, "_MEMORY", 4 * DIMENSIONS * 800 - 1)
    read = stages.clustering(path, 8)
    assert read.centroids.read_bytes() == held.centroids.read_bytes()
    assert read.pseudo_labels.read_bytes() == held.pseudo_labels.read_bytes()


def test_mini_batches_are_drawn_from_what_memory_holds(stages, features, monkeypatch, caplog):
    monkeypatch.setattr(clustering_stage, "_MEMORY", 4 * DIMENSIONS * 500)
    codebook = stages.clustering(features(100), 4, {"clustering.algorithm": "mini_batch"})
    told = "scikit-learn needs its frames in memory: 500 of 800 are drawn at random."
    assert caplog.messages == [told]
    centroids, metadata = read_centroids(codebook.centroids)
    assert metadata["statistics"]["frames_per_centroid"] == 200
    random = np.random.default_rng(derive(0, 1, "clustering/-3/4"))
    frames = np.concatenate([*read_frames(features(100)).values()]).astype(np.float32)
    drawn = frames[np.sort(random.choice(800, 500, replace=False, shuffle=False))]
    model = MiniBatchKMeans(4, n_init=1, batch_size=10_000, random_state=derive(0, 1, "clustering/-3/4") % 2**32)
    iterations = stages.config("clustering").clustering.iterations
    expected = model.set_params(max_iter=iterations).fit(drawn).cluster_centers_
    np.testing.assert_array_equal(centroids, expected.astype(np.float32))


def test_mini_batches_of_all_frames_that_memory_just_holds_are_no_draw(stages, features, monkeypatch, caplog):
    monkeypatch.setattr(clustering_stage, "_MEMORY", 4 * DIMENSIONS * 800)
    stages.clustering(features(100), 4, {"clustering.algorithm": "mini_batch"})
    assert not caplog.messages


@pytest.mark.parametrize("clips_at_once", [1, 3, 8])
def test_labels_written_in_parts_are_whole(stages, features, monkeypatch, clips_at_once):
    path = features(10)
    expected = read_labels(stages.clustering(path, 4).pseudo_labels)
    monkeypatch.setattr(clustering_stage, "_CLIPS_AT_ONCE", clips_at_once)
    found = read_labels(stages.clustering(path, 4).pseudo_labels)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[each], expected[each]) for each in expected)


# Too little speech.


def test_fewer_frames_than_centroids_are_refused(stages, features):
    path = features(5)
    with pytest.raises(UserError) as told:
        stages.clustering(path, 41)
    assert str(told.value) == (
        f"{path} has 40 training frames, fewer than the 41 centroids of clustering.sizes; take a smaller codebook, or "
        "more speech."
    )


def test_features_of_another_layer_are_refused(stages, features):
    path = features(5)
    with pytest.raises(UserError) as told:
        stages.clustering(path, 4, layer=-1)
    assert str(told.value) == (f"{path} holds layer -3, but layer -1 is expected; delete it and run snakemake again.")


def test_a_leak_is_told_with_the_file_that_it_comes_from(stages, features):
    path = features(5)
    with pytest.raises(LeakageError, match=f"^{path} contains or was fitted on 4 held-out utterances of this fold"):
        stages.clustering(path, 4, fold=2)


def test_a_gpu_that_faiss_does_not_see_is_missed_before_anything_is_read(stages, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(UserError) as told:
        stages.clustering(stages.layer_features(stages.inputs.encoder, -3), 4, gpus=1)
    assert str(told.value) == (
        "This job was given a GPU, but FAISS sees none; see nvidia-smi, or run with the cpu profile."
    )


@pytest.mark.parametrize("algorithm", ["lloyd", "mini_batch"])
def test_a_gpu_that_faiss_sees_is_searched_on(stages, features, monkeypatch, algorithm):
    asked, search = [], kmeans.search
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)

    def made(dimensions, gpus):
        asked.append((dimensions, gpus))
        return search(dimensions, 0)

    monkeypatch.setattr(kmeans, "search", made)
    stages.clustering(features(20), 4, {"clustering.algorithm": algorithm}, gpus=1)
    stages.clustering(features(20), 4, {"clustering.algorithm": algorithm})
    assert asked == [(DIMENSIONS, 1), (DIMENSIONS, 0)]


@pytest.mark.parametrize(("size", "warned"), [(10, True), (8, False)])
def test_a_codebook_fitted_on_too_little_is_warned_of(stages, features, caplog, capfd, size, warned):
    """312 frames are 39 for each of 8 centroids; FAISS's own warning would not say what to change."""
    with caplog.at_level(logging.WARNING):
        stages.clustering(features(39), size)
    told = (
        "312 training frames for 10 centroids are 31.2 per centroid, fewer than the 39 that a reliable codebook needs. "
        "Consider a smaller one in clustering.sizes."
    )
    assert caplog.messages == ([told] if warned else [])
    assert "WARNING" not in capfd.readouterr().err


def test_as_many_centroids_as_frames_are_allowed(stages, features):
    codebook = stages.clustering(features(5), 40)
    assert read_centroids(codebook.centroids)[1]["statistics"]["inertia_per_frame"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("stage", ["clustering", "cluster_statistics"])
def test_torch_is_not_imported_beside_faiss_nor_faiss_without_a_gpu(stage):
    code = f"import sys, gmp_atl.stages.{stage}; sys.exit(not {{'torch', 'faiss'}}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("contents", "told"),
    [(b"no tensors", "is not a readable codebook"), (save({"x": np.zeros(1)}), "is not a codebook of this project")],
)
def test_a_file_that_is_no_codebook_is_named(stages, tmp_path, contents, told):
    path = tmp_path / "centroids.safetensors"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=f"^{path} {told}.*delete it and run snakemake again"):
        cluster_statistics(
            config=stages.config("cluster_statistics"),
            utterances=stages.inputs.utterances,
            centroids=[path],
            pseudo_labels=[tmp_path / "labels.parquet"],
            variant="main",
            fold=1,
            seed=0,
            output=tmp_path / "statistics.parquet",
        )


# What the labels share with attributes.


@pytest.fixture
def mutual_information(stages) -> Callable[..., dict[str, float]]:
    """Of labels made by hand: one list of labels per clip of fold 1, from its id."""

    def measure(label: Callable[[str], list[int]]) -> dict[str, float]:
        ids = stages.inputs.ids("S2", "S3")
        codebook = stages.clustering(stages.layer_features(stages.inputs.encoder, -3), 4)
        PSEUDO_LABELS.write(
            codebook.pseudo_labels,
            pa.table({"id": ids, "labels": [label(each) for each in ids]}, schema=PSEUDO_LABELS.schema),
            layer=-3,
            size=4,
            encoder="made",
            fitted_on=ids,
        )
        output = stages.folder / "statistics.parquet"
        cluster_statistics(
            config=stages.config("cluster_statistics"),
            utterances=stages.inputs.utterances,
            centroids=[codebook.centroids],
            pseudo_labels=[codebook.pseudo_labels],
            variant="main",
            fold=1,
            seed=0,
            output=output,
        )
        rows = CLUSTER_STATISTICS.read(output)[0].to_pylist()
        assert {(row["variant"], row["fold"], row["seed"], row["layer"], row["size"]) for row in rows} == {
            ("main", 1, 0, -3, 4)
        }
        return {row["statistic"]: row["value"] for row in rows}

    return measure


def test_labels_that_tell_one_attribute_share_all_with_it(mutual_information):
    """Gender is half of what a speaker is (here 4 speakers, 2 genders): 2 I / (1 + 2 bits) = 2/3."""
    found = mutual_information(lambda utterance: [3, 3] if "_male" in utterance else [1, 1])
    assert found["nmi_gender"] == pytest.approx(1)
    assert [found[f"homogeneity_{each}"] for each in ("gender", "speaker", "emotion")] == pytest.approx([1, 1 / 2, 0])
    assert found["nmi_speaker"] == pytest.approx(2 / 3)
    assert found["nmi_emotion"] == pytest.approx(0, abs=1e-9)


def test_frames_count_not_clips(mutual_information):
    """Labels that alternate within a clip tell nothing, however long the clip is."""
    found = mutual_information(lambda utterance: [0, 1] * (5 if "sad" in utterance else 1))
    assert found["nmi_emotion"] == pytest.approx(0, abs=1e-9)
    found = mutual_information(lambda utterance: [0, 1, 2, 3] if "sad" in utterance else [0, 0, 1, 1])
    # Emotion: 1 bit. Labels: (3, 3, 1, 1)/8, which is 1.811 bits; given the emotion 2 and 1 bit, so I = 0.311.
    assert found["nmi_emotion"] == pytest.approx(2 * 0.31128 / (1 + 1.81128), abs=1e-4)
    assert found["homogeneity_emotion"] == pytest.approx(0.31128, abs=1e-4)
