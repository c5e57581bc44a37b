"""k-means against references, and in any division of the frames."""

from __future__ import annotations

from itertools import chain, pairwise

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, kmeans_plusplus

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
    assert again.inertia == pytest.approx(assignment.inertia, rel=1e-6)


@given(sizes=st.lists(st.integers(0, 30), max_size=8), half=st.booleans())
def test_blocks_are_full_but_the_last_however_the_frames_come(sizes, half):
    """So that matrix products round alike: the property above may hold by luck for other blocks.

    Each is looked at while the next has been read already.
    """
    frames = np.arange(2 * sum(sizes)).reshape(-1, 2).astype("f2" if half else "f4")
    chunks = np.split(frames, np.cumsum(sizes[:-1]).astype(int))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "_BLOCK", 10)
        found = [block.copy() for block, _ in pairwise(chain(kmeans._blocks(chunks), [None]))]
    assert [len(block) for block in found[:-1]] == [10] * (len(found) - 1)
    assert all(0 < len(block) <= 10 for block in found)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 2)), *found]), frames)


def test_frames_of_several_precisions_are_not_rounded_to_that_of_the_first():
    with pytest.raises(TypeError, match="float32"):
        kmeans.assign([np.ones((3, 2), np.float16), np.ones((3, 2), np.float32)], np.ones((1, 2)))


def test_an_empty_cluster_takes_half_of_the_largest():
    """Three of the four centroids start far away; each frame ends in a cluster of its own quarter."""
    corners = np.array([[0, 0], [0, 9], [9, 0], [9, 9]], np.float32)
    frames = np.repeat(corners, 10, axis=0) + blobs(40, seed=0, dimensions=2) / 100
    initial = np.array([[4, 5], [1e4, 0], [0, 1e4], [1e4, 1e4]], np.float32)
    centroids, assignment = kmeans.lloyd([frames], initial, 50)
    assert sorted(np.bincount(assignment.labels, minlength=4)) == [10] * 4
    np.testing.assert_allclose(sorted(map(tuple, np.round(centroids))), sorted(map(tuple, corners)), atol=1)


def test_each_empty_cluster_takes_half_of_what_is_then_the_largest():
    """As in FAISS: both go on from the centroid, the one times 1 ± 1/1024 by dimension, the other times 1 ∓ 1/1024.

    Of 9 and 4 frames three far centroids take 4 of the 9, 2 of the 5 that are left, and 2 of the 4 in the other.
    """
    nine, four = np.array([4, 8, 2], np.float32), np.array([-4, 16, 0], np.float32)
    frames = np.repeat([four, nine], [4, 9], axis=0)
    far = np.full((3, 3), 1e4, np.float32) + np.eye(3, dtype=np.float32)
    found, assignment = kmeans.lloyd([frames], np.vstack([four, nine, far]), 1)
    more, less = 1 + np.array([1, -1, 1]) / 1024, 1 - np.array([1, -1, 1]) / 1024
    expected = [four * less, nine * less * less, nine * more, nine * less * more, four * more]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(assignment.labels) == 13


def test_one_pass_tells_labels_and_squared_distances_of_centroids_that_stay():
    frames = np.array([[0, 0], [3, 4], [10, 0]], np.float32)
    found = kmeans.assign([frames], np.array([[10, 1], [0, 0]], np.float32))
    assert found.labels.tolist() == [1, 1, 0]
    assert found.labels.dtype == np.uint16
    assert found.inertia == 0 + 25 + 1
    unmoved, _ = kmeans.lloyd([frames], np.eye(2), 0)
    assert unmoved.dtype == np.float32
    assert unmoved.tolist() == [[1, 0], [0, 1]]


def test_a_job_with_a_gpu_searches_there(monkeypatch):
    """On the first device that it sees, and with resources that live as long as the search."""
    moved, resources = [], object()
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: resources, raising=False)

    def move(*arguments):
        moved.append(arguments[:2])
        return arguments[2]

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", move, raising=False)
    frames = blobs(50, seed=0)
    kmeans.lloyd([frames], frames[:2], 3, gpus=1)
    kmeans.assign([frames], frames[:2], gpus=1)
    assert moved == [(resources, 0)] * 2
    kmeans.lloyd([frames], frames[:2], 3)
    kmeans.assign([frames], frames[:2])
    assert len(moved) == 2


def test_iterations_are_told_to_the_progress_display(monkeypatch):
    made = []

    class Meter:
        def __init__(self, *arguments):
            made.append([*arguments, 0])

        def advance(self):
            made[-1][-1] += 1

    monkeypatch.setattr(kmeans, "Meter", Meter)
    frames = blobs(400, seed=2)
    kmeans.lloyd([frames], frames[:3], 4)
    assert made == [["iteration", 4, 4]]


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


class Draws(np.random.RandomState):
    """The draws of a generator, under the names that scikit-learn calls."""

    def __init__(self, generator):
        super().__init__(0)
        self.generator = generator

    def choice(self, count, p):
        return int(self.generator.integers(count))

    def uniform(self, size):
        return self.generator.random(size)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 40])
def test_initial_centroids_are_those_of_scikit_learn_for_equal_draws(size):
    frames = blobs(1000, seed=size)
    found = kmeans.initial_centroids([frames], 1000, size, np.random.default_rng(5))
    expected, _ = kmeans_plusplus(frames, size, random_state=Draws(np.random.default_rng(5)))
    np.testing.assert_array_equal(found, expected)


def test_initial_centroids_of_frames_that_are_all_the_same():
    """Every distance is 0, and a draw falls behind the last frame or on the first: no error, and that frame."""
    found = kmeans.initial_centroids([np.ones((10, 2), np.float32)], 10, 3, np.random.default_rng(0))
    assert found.tolist() == [[1, 1]] * 3


@pytest.mark.parametrize(("size", "among"), [(1, 20), (2, 32), (4, 64), (5, 80), (20, 80), (21, 21), (40, 40)])
def test_initial_centroids_are_chosen_among_16_frames_each_within_bounds(monkeypatch, size, among):
    """Here at most 80 and at least a quarter of that; more centroids than a quarter are random frames, not chosen."""
    monkeypatch.setattr(kmeans, "_SEEDING", 80)
    asked, sample = [], kmeans.sample

    def noted(frames, n_frames, count, random):
        asked.append((n_frames, count))
        return sample(frames, n_frames, count, random)

    monkeypatch.setattr(kmeans, "sample", noted)
    frames = blobs(100, seed=0)
    found = kmeans.initial_centroids([frames], 100, size, np.random.default_rng(3))
    assert asked == [(100, among)]
    assert len(found) == size
    in_order = np.array_equal(found, sample([frames], 100, size, np.random.default_rng(3)))
    assert in_order == (size > 20)


@given(size=st.integers(1, 70), seed=st.integers(0, 50), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_a_sample_is_of_different_frames_in_their_order(size, seed, cuts):
    frames = np.arange(120, dtype="f2").reshape(60, 2)
    found = kmeans.sample(np.split(frames, sorted(cuts)), 60, size, np.random.default_rng(seed))
    assert found.dtype == np.float32
    assert len(found) == min(size, 60)
    assert (np.diff(found[:, 0]) > 0).all()
    assert {tuple(each) for each in found} <= {tuple(each) for each in frames.astype("f4")}


def test_every_frame_is_as_likely_in_a_sample():
    frames, random = np.arange(20, dtype="f4")[:, None], np.random.default_rng(0)
    drawn = np.concatenate([kmeans.sample([frames], 20, 5, random) for _ in range(2000)]).astype(int)
    assert np.bincount(drawn.ravel(), minlength=20) == pytest.approx(np.full(20, 500), abs=100)


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
