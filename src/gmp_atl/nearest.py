"""The nearest centroid of each frame, exactly: by bounds in few dimensions on a CPU, by FAISS on a GPU.

Speech and its centroids vary along few axes. Be p and q the coordinates of a frame and of a centroid along some of the
centroids' principal axes, and r and s the lengths of what these leave out. The product of the two is at most p·q + rs
(Cauchy and Schwarz), so that they are at least as far apart as (p, r) and (q, s) are. One matrix product in these few
dimensions gives the bounds for all centroids. Those whose bound is below the distance to the first of them are looked
at in full; where centroids are many, along more axes before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from scipy import linalg
from threadpoolctl import ThreadpoolController

_PART = 512
"""Frames that a thread takes at once: their bounds for 4096 centroids take 8 MB."""
_FEW = 256
"""Among fewer centroids all are looked at in full: to read the frames takes as long."""
_AXES = (48, 96, 192)
"""Along how many axes bounds are taken: along more where too many frames are left with many centroids."""
_HALVED = 1024
"""Of more centroids half of the axes are enough at first; of fewer the product takes less than what it would save."""
_MANY = 1 / 16
"""Of the centroids; a frame that is left with more is compared with all."""
_TOO_MANY = 1 / 4
"""Of the frames."""
_UNDECIDED = -1
_MARGIN = 1e-4
"""Relative to the largest products, by which bounds give way: many times the rounding of float32."""

Found = tuple[np.ndarray, np.ndarray]
"""Squared distance and number of the nearest centroid of each frame, (frames,) each."""


class Search(Protocol):
    """Among the centroids that it was last prepared for."""

    def prepare(self, centroids: np.ndarray) -> None:
        """Take these: float32, (size, dimensions)."""

    def nearest(self, block: np.ndarray) -> Found:
        """Of each frame: float16 or float32, (frames, dimensions)."""


@contextmanager
def search(dimensions: int, gpus: int) -> Iterator[Search]:
    """On the first GPU, or on as many threads as BLAS has; each multiplies for itself meanwhile.

    What is found on a CPU does not depend on the number of threads, to the last bit.
    """
    if gpus:
        yield _OnGpu(dimensions)
        return
    blas = ThreadpoolController().select(user_api="blas")
    threads = max(library["num_threads"] for library in blas.info())
    with blas.limit(limits=1), ThreadPoolExecutor(threads) as pool:
        yield _OnCpu(pool, dimensions)


class _OnGpu:
    """FAISS's exhaustive search."""

    def __init__(self, dimensions: int) -> None:
        import faiss

        self._resources = faiss.StandardGpuResources()  # the index does not keep it alive
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, faiss.IndexFlatL2(dimensions))

    def prepare(self, centroids: np.ndarray) -> None:
        self._index.reset()
        self._index.add(centroids)

    def nearest(self, block: np.ndarray) -> Found:
        distances, labels = self._index.search(block.astype(np.float32, copy=False), 1)
        return distances[:, 0], labels[:, 0]


class _OnCpu:
    """By bounds where there are many centroids and few axes are enough, and in full otherwise."""

    def __init__(self, pool: Executor, dimensions: int) -> None:
        self._pool = pool
        self._counts = [count for count in _AXES if count <= dimensions // 2]
        self._axes: np.ndarray | None = None

    def prepare(self, centroids: np.ndarray) -> None:
        self._centroids = centroids
        self._in_full = _InFull(centroids)
        self._by_bounds = self._bounded()

    def nearest(self, block: np.ndarray) -> Found:
        while self._by_bounds and self._undecided(self._by_bounds, block) > _TOO_MANY:
            del self._counts[0]
            self._by_bounds = self._bounded()
        if not self._by_bounds:
            return self._all(self._in_full, block)
        distances, labels = self._all(self._by_bounds, block)
        rest = np.flatnonzero(labels == _UNDECIDED)
        if len(rest):
            distances[rest], labels[rest] = self._all(self._in_full, block[rest])
        return distances, labels

    def _bounded(self) -> _ByBounds | None:
        """Along as many of the first centroids' axes as have not been too few."""
        if len(self._centroids) < _FEW or not self._counts:
            return None
        if self._axes is None:
            self._axes = _principal_axes(self._centroids, self._counts[-1])
        return _ByBounds(self._centroids, self._axes[:, : self._counts[0]])

    @staticmethod
    def _undecided(search: _ByBounds, block: np.ndarray) -> float:
        """Share of a sample."""
        _, labels = search(block[:: -(-len(block) // _PART)])
        return float(np.mean(labels == _UNDECIDED))

    def _all(self, search: Callable[[np.ndarray], Found], block: np.ndarray) -> Found:
        found = self._pool.map(search, np.split(block, range(_PART, len(block), _PART)))
        distances, labels = (np.concatenate(each) for each in zip(*found, strict=True))
        return distances, labels


class _InFull:
    """The nearest of all centroids, by a product with each."""

    def __init__(self, centroids: np.ndarray) -> None:
        self._columns = _columns(-2 * centroids, _products(centroids, centroids))

    def __call__(self, frames: np.ndarray) -> Found:
        frames = widened(frames)
        scores = frames @ self._columns[:-1]
        scores += self._columns[-1]
        labels = scores.argmin(axis=1)
        distances = scores[np.arange(len(frames)), labels] + _products(frames, frames)
        return np.maximum(distances, 0), labels


class _ByBounds:
    """The nearest centroid, by a product with those whose distance may be less than that to the first.

    Frames and centroids are taken from the centroids' mean. Scores stand for distances: half of the squared distance,
    less half of the frame's squared norm.
    """

    def __init__(self, centroids: np.ndarray, axes: np.ndarray) -> None:
        self._mean = centroids.mean(axis=0)
        self._centroids = centroids - self._mean
        self._axes = np.ascontiguousarray(axes)
        self._first = axes.shape[1] // 2 if len(centroids) > _HALVED else axes.shape[1]
        norms = _products(self._centroids, self._centroids)
        self._halves, self._longest = norms / 2, np.sqrt(norms.max())
        along = self._centroids @ self._axes
        self._finer = _points(along, norms)
        self._columns = _columns(-_points(along[:, : self._first], norms), self._halves)

    def __call__(self, frames: np.ndarray) -> Found:
        """A frame that is left with many centroids has the label `_UNDECIDED`."""
        frames = widened(frames) - self._mean
        norms = _products(frames, frames)
        along = frames @ self._axes
        bounds = np.column_stack([_points(along[:, : self._first], norms), np.ones_like(norms)]) @ self._columns
        labels = bounds.argmin(axis=1)
        scores = self._scores(frames, self._centroids, labels)
        limits = scores + _MARGIN * self._longest * (np.sqrt(norms) + self._longest)
        left = bounds <= limits[:, None]
        left[np.arange(len(frames)), labels] = False
        rows, others = np.divmod(np.flatnonzero(left), left.shape[1])
        many = np.bincount(rows, minlength=len(frames)) > _MANY * len(self._centroids)
        labels[many] = _UNDECIDED
        near = ~many[rows]
        rows, others = rows[near], others[near]
        if self._first < along.shape[1]:
            near = self._scores(_points(along, norms)[rows], self._finer, others) <= limits[rows]
            rows, others = rows[near], others[near]
        found = self._scores(frames[rows], self._centroids, others)
        closer = np.flatnonzero(found < scores[rows])
        closer = closer[np.argsort(-found[closer], kind="stable")]  # a frame's closest is written last
        scores[rows[closer]], labels[rows[closer]] = found[closer], others[closer]
        return np.maximum(norms + 2 * scores, 0), labels

    def _scores(self, frames: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Of each frame with the centroid of its label, both in full or both as points."""
        return self._halves[labels] - _products(frames, centroids[labels])


def _principal_axes(vectors: np.ndarray, count: int) -> np.ndarray:
    """The first, (dimensions, count) in float32."""
    centred = vectors - vectors.mean(axis=0)
    last = vectors.shape[1] - 1
    _, axes = linalg.eigh(centred.T @ centred, subset_by_index=[last - count + 1, last])
    return axes[:, ::-1]


def _points(along: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Coordinates along axes, and the length of the rest, rather too long than too short."""
    rest = np.maximum(norms - _products(along, along), 0) + _MARGIN / 10 * norms
    return np.column_stack([along, np.sqrt(rest)])


def _columns(vectors: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Vectors, (size, dimensions), and the number that each adds to its products, as columns: (dimensions + 1, size).

    After a multiple of 1024 there are 16 more, infinitely far: else rows of products would lie in the same sets of the
    processor's cache.
    """
    size, dimensions = vectors.shape
    columns = np.zeros((dimensions + 1, size + 16 * (size % 1024 == 0)), np.float32)
    columns[:-1, :size], columns[-1] = vectors.T, np.inf
    columns[-1, :size] = added
    return columns


def _products(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each row of the one with that of the other."""
    return np.einsum("fd,fd->f", some, others)


def widened(frames: np.ndarray) -> np.ndarray:
    """Finite float16 as float32, exactly, and faster than by numpy's cast.

    The bits are moved to where float32 has them; its exponents count from -127, those of float16 from -15.
    """
    if frames.dtype == np.float32:
        return frames
    bits = frames.view(np.int16).astype(np.int32) << 13
    bits &= ~0x70000000  # copies of the sign
    return bits.view(np.float32) * np.float32(2**112)
