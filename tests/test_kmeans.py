"""k-means against references, and in any division of the frames."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from gmp_atl import kmeans


def blobs(n_frames: int, seed: int, dimensions: int = 5, centres: int = 6) -> np.ndarray:
    """Clusters that overlap."""
    random = np.random.default_rng(seed)
    means = 2 * random.normal(size=(centres, dimensions))
    return (means[random.integers(centres, size=n_frames)] + random.normal(size=(n_frames, dimensions))).astype("f4")


@pytest.mark.parametrize("iterations", [1, 4, 100])
@pytest.mark.parametrize("size", [2, 9])
def test_centroids_are_those_of_faiss_and_scikit_learn(size, iterations):
    frames = blobs(2000, seed=size)
    initial = frames[:size]
    centroids, assignment = kmeans.lloyd([frames], initial, iterations)
    reference = faiss.Kmeans(5, size, niter=iterations, max_points_per_centroid=len(frames))
    reference.train(frames, init_centroids=initial)
    np.testing.assert_allclose(centroids, reference.centroids, atol=1e-4)
    other = KMeans(size, init=initial, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(frames)
    if iterations == 100:
        np.testing.assert_array_equal(assignment.labels, other.labels_)
        np.testing.assert_allclose(centroids, other.cluster_centers_, atol=1e-4)
        assert assignment.inertia == pytest.approx(other.inertia_, rel=1e-4)


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(0, 300), max_size=8),
    block=st.integers(1, 400),
    half=st.booleans(),
    seed=st.integers(0, 50),
)
def test_no_division_of_the_frames_changes_a_byte(cuts, block, half, seed):
    """Read from a file in chunks of float16, or held as one array: blocks are the same."""
    frames = blobs(300, seed).astype("f2")
    chunks = np.split(frames if half else frames.astype("f4"), sorted(cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "_BLOCK", block)
        results = []
        for source in ([frames.astype("f4")], chunks):
            initial = kmeans.initial_centroids(source, 300, 4, np.random.default_rng(seed))
            results.append(kmeans.lloyd(source, initial, 5))
    (one, labels), (other, other_labels) = results
    assert one.tobytes() == other.tobytes()
    assert labels.labels.tobytes() == other_labels.labels.tobytes()
    assert labels.inertia == other_labels.inertia


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_no_size_of_the_blocks_changes_the_clusters(block, monkeypatch):
    frames = blobs(500, seed=1)
    expected, assignment = kmeans.lloyd([frames], frames[:6], 30)
    monkeypatch.setattr(kmeans, "_BLOCK", block)
    found, again = kmeans.lloyd([frames], frames[:6], 30)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(again.labels, assignment.labels)


def test_an_empty_cluster_takes_half_of_the_largest():
    """Three of the four centroids start far away; each frame ends in a cluster of its own quarter."""
    corners = np.array([[0, 0], [0, 9], [9, 0], [9, 9]], np.float32)
    frames = np.repeat(corners, 10, axis=0) + blobs(40, seed=0, dimensions=2) / 100
    initial = np.array([[4, 5], [1e4, 0], [0, 1e4], [1e4, 1e4]], np.float32)
    centroids, assignment = kmeans.lloyd([frames], initial, 50)
    assert sorted(np.bincount(assignment.labels, minlength=4)) == [10] * 4
    np.testing.assert_allclose(sorted(map(tuple, np.round(centroids))), sorted(map(tuple, corners)), atol=1)


def test_iterations_end_when_nothing_moves():
    frames, passes = blobs(400, seed=2), []

    class Counted:
        def __iter__(self):
            passes.append(1)
            return iter([frames])

    expected, _ = kmeans.lloyd([frames], frames[:3], 1000)
    centroids, assignment = kmeans.lloyd(Counted(), expected, 1000)
    assert len(passes) == 2, "one to assign, one to see that the means stand still"
    np.testing.assert_array_equal(centroids, expected)
    assert assignment.inertia == kmeans.assign([frames], centroids).inertia


@given(size=st.integers(1, 60), seed=st.integers(0, 50), cut=st.integers(0, 50))
def test_initial_centroids_are_different_frames(size, seed, cut):
    frames = np.random.default_rng(seed).normal(size=(60, 3)).astype("f4")
    found = kmeans.initial_centroids(np.split(frames, [cut]), 60, size, np.random.default_rng(seed))
    assert len(np.unique(found, axis=0)) == size
    assert {tuple(each) for each in found} <= {tuple(each) for each in frames}


def test_clusters_that_lie_apart_are_all_found():
    """Of 30 centroids drawn at random about a third would start in a cluster that has one already."""
    random = np.random.default_rng(0)
    truth = random.integers(30, size=6000)
    frames = (20 * random.normal(size=(30, 8)))[truth].astype("f4") + random.normal(size=(6000, 8)).astype("f4")
    initial = kmeans.initial_centroids([frames], 6000, 30, random)
    _, assignment = kmeans.lloyd([frames], initial, 20)
    assert assignment.inertia / 6000 == pytest.approx(8, rel=0.05)


def test_sums_of_clusters_are_kept_by_the_frames_that_move():
    """As if they were added up anew in each iteration, within rounding."""
    frames = blobs(3000, seed=3, dimensions=20, centres=40)
    centroids = frames[:50]
    for _ in range(12):
        labels = ((frames[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
        centroids = np.stack([frames[labels == n].mean(axis=0, dtype=float) for n in range(50)]).astype("f4")
    found, _ = kmeans.lloyd([frames], frames[:50], 12)
    np.testing.assert_allclose(found, centroids, atol=1e-5)
