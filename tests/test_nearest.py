"""The nearest centroid, by bounds and in full: exact, for any frames and any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController, threadpool_limits

from gmp_atl import nearest


def vectors(count: int, dimensions: int, decay: float, seed: int) -> np.ndarray:
    """Whose standard deviation falls by this factor from axis to axis: 1 where none stands out."""
    return along(np.full(dimensions, decay) ** np.arange(dimensions), count, seed)


def along(deviations: np.ndarray, count: int, seed: int) -> np.ndarray:
    """With these standard deviations along axes that are the same for all."""
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(deviations), len(deviations))))
    return (np.random.default_rng(seed).normal(size=(count, len(deviations))) * deviations @ axes).astype("f4")


def found(frames: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with nearest.search(centroids.shape[1], gpus=0) as search:
        search.prepare(centroids)
        return search.nearest(frames)


def assert_nearest(frames: np.ndarray, centroids: np.ndarray) -> None:
    """In float64, within the rounding of float32 products."""
    distances, labels = found(frames, centroids)
    expected = ((frames[:, None].astype(float) - centroids) ** 2).sum(axis=2)
    rounding = 1e-5 * (1 + (frames.astype(float) ** 2).sum(axis=1) + (centroids.astype(float) ** 2).sum(axis=1).max())
    taken = expected[np.arange(len(frames)), labels]
    assert (taken <= expected.min(axis=1) + rounding).all()
    assert (abs(distances - taken) <= rounding).all()


@given(
    count=st.integers(1, 60),
    size=st.integers(1, 40),
    decay=st.sampled_from([0.3, 0.8, 1.0]),
    apart=st.sampled_from([0.0, 1.0, 30.0]),
    half=st.booleans(),
    many=st.sampled_from([0, 0.1, 0.5]),
    halved=st.sampled_from([1, 100]),
    seed=st.integers(0, 1000),
)
def test_no_centroid_is_nearer_than_the_one_found(count, size, decay, apart, half, many, halved, seed):
    """Few axes, many frames left undecided, centroids that are equal, frames that are centroids, means far from 0."""
    random = np.random.default_rng(seed)
    pool = vectors(50, 12, decay, seed) + np.float32(apart)
    centroids = pool[random.integers(50, size=size)]
    frames = np.concatenate([vectors(count, 12, decay, seed + 1) + np.float32(apart), centroids])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_FEW": 2, "_AXES": (1, 3, 6), "_MANY": many, "_HALVED": halved, "_PART": 7}.items():
            patch.setattr(nearest, name, value)
        assert_nearest(frames.astype("f2") if half else frames, centroids)


@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("size", [600, 1024, 1500])
def test_codebooks_of_a_real_size_are_searched_exactly(size, decay):
    centroids, frames = vectors(size, 192, decay, 1), vectors(200, 192, decay, 2)
    assert_nearest(frames, centroids)


def test_where_few_axes_hold_nearly_all_few_centroids_are_looked_at_in_full(monkeypatch):
    """No frame is left undecided, nor compared with all."""
    monkeypatch.setattr(nearest._InFull, "__call__", lambda *_: pytest.fail("looked at in full"))
    centroids, frames = vectors(600, 192, 0.95, 1), vectors(2000, 192, 0.95, 2)
    distances, _ = found(frames, centroids)
    assert len(distances) == 2000


def test_where_no_axis_stands_out_all_are_looked_at_in_full(monkeypatch):
    """After a look at a sample, with as many axes as are tried, and for good."""
    asked, call = [], nearest._ByBounds.__call__

    def noted(self, frames):
        asked.append((self._axes.shape[1], len(frames)))
        return call(self, frames)

    monkeypatch.setattr(nearest._ByBounds, "__call__", noted)
    monkeypatch.setattr(nearest, "_PART", 100)
    centroids, frames = vectors(600, 256, 1.0, 1), vectors(1000, 256, 1.0, 2)
    with nearest.search(256, gpus=0) as search:
        for _ in range(2):
            search.prepare(centroids)
            search.nearest(frames)
    assert asked == [(48, 100), (96, 100)]


def test_a_frame_of_which_the_axes_tell_nothing_is_compared_with_all():
    centroids, frames = vectors(600, 192, 0.97, 1), vectors(800, 192, 0.97, 2)
    frames[::40] += along(np.where(np.arange(192) < 100, 0, 50), 20, 3)
    with nearest.search(192, gpus=0) as search:
        search.prepare(centroids)
        _, labels = search._by_bounds(frames)
    undecided = np.flatnonzero(labels == nearest._UNDECIDED)
    assert undecided.tolist() == list(range(0, 800, 40))
    assert_nearest(frames, centroids)


@pytest.mark.parametrize("size", [50, 600])
def test_distances_do_not_depend_on_the_number_of_threads(size):
    centroids, frames = vectors(size, 192, 0.95, 1), vectors(3000, 192, 0.95, 2)
    results = []
    for threads in (1, 2, 3):
        with threadpool_limits(threads, user_api="blas"):
            results.append(b"".join(each.tobytes() for each in found(frames, centroids)))
    assert len(set(results)) == 1


def test_blas_has_its_threads_again_after_a_search():
    def threads() -> list[int]:
        return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]

    with threadpool_limits(2, user_api="blas"):
        before = threads()
        with nearest.search(4, gpus=0):
            assert set(threads()) == {1}
        assert threads() == before


def test_every_finite_float16_is_widened_exactly():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    np.testing.assert_array_equal(nearest.widened(finite).view("i4"), finite.astype("f4").view("i4"))
    assert nearest.widened(finite.astype("f4")).dtype == np.float32
