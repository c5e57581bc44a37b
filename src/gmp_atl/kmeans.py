"""k-means over more frames than memory holds: exact Lloyd, each pass reading the frames block by block.

Frames come as an iterable of arrays, (any number, dimensions), all of float16 or all of float32, that is iterated anew
at every pass: a list of one array, or a reader of a file. They are cut into blocks of a fixed number of frames, so
that the result depends on the frames and their order alone, not on how they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from scipy import sparse

from gmp_atl.nearest import Search, search, widened
from gmp_atl.progress import Meter

_BLOCK = 32_768
"""Frames that are looked at together: 50 MB at 768 dimensions in float16."""
_SEEDING = 16_384
"""Frames, at most, among which initial centroids are chosen: their distances to each other take 1 GiB."""


@dataclass(frozen=True)
class Assignment:
    """The nearest centroid of each frame."""

    labels: np.ndarray
    """(frames,), uint16."""
    inertia: float
    """Sum of the squared distances."""


def lloyd(
    frames: Iterable[np.ndarray], initial: np.ndarray, iterations: int, gpus: int = 0
) -> tuple[np.ndarray, Assignment]:
    """Lloyd's algorithm from `initial`, (size, dimensions), over every frame.

    It ends after `iterations` updates of the centroids, or when an update has moved no frame to another centroid.
    Either way the last assignment is that to the centroids returned, so that no further pass is needed for labels.
    An empty cluster takes half of the largest one: both continue from its centroid, moved apart by a thousandth, as
    in FAISS, which chooses the cluster at random.

    On a CPU equal inputs give equal bytes, with any number of threads.

    Returns:
        Centroids, float32, (size, dimensions), and the assignment of the frames in their order.
    """
    centroids, before = np.ascontiguousarray(initial, dtype=np.float32), None
    sums, meter = np.zeros(centroids.shape), Meter("iteration", iterations)
    with search(centroids.shape[1], gpus) as among:
        for _ in range(iterations):
            assignment = _pass(frames, among, centroids, before, sums)
            if before is not None and np.array_equal(before, assignment.labels):
                return centroids, assignment
            before = assignment.labels
            centroids = _means(sums, np.bincount(before, minlength=len(centroids)))
            meter.advance()
        return centroids, _pass(frames, among, centroids)


def assign(frames: Iterable[np.ndarray], centroids: np.ndarray, gpus: int = 0) -> Assignment:
    """Each frame's nearest centroid, in one pass."""
    return lloyd(frames, centroids, iterations=0, gpus=gpus)[1]


def initial_centroids(
    frames: Iterable[np.ndarray], n_frames: int, size: int, random: np.random.Generator
) -> np.ndarray:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007) on a random sample of the frames.

    The sample is of 16 frames a centroid, of 4,096 at least and 16,384 at most, or of all where there are fewer. The
    best of 2 + ln(size) draws becomes the next centroid, as in scikit-learn. More than 4,096 centroids start from
    random frames, as in FAISS: the largest sample has fewer than four for each.
    """
    if 4 * size > _SEEDING:
        return sample(frames, n_frames, size, random)
    chosen_from = sample(frames, n_frames, min(max(16 * size, _SEEDING // 4), _SEEDING), random)
    norms = np.einsum("ij,ij->i", chosen_from, chosen_from)
    distances = chosen_from @ chosen_from.T
    distances *= -2
    distances += norms
    distances += norms[:, None]
    np.maximum(distances, 0, out=distances)
    chosen = [int(random.integers(len(chosen_from)))]
    closest = distances[chosen[0]]
    for _ in range(size - 1):
        cumulated = np.cumsum(closest, dtype=np.float64)
        draws = np.searchsorted(cumulated, random.random(2 + int(math.log(size))) * cumulated[-1])
        candidates = np.minimum(draws, len(closest) - 1)
        closer = np.minimum(closest, distances[candidates])
        best = int(closer.sum(axis=1).argmin())
        chosen.append(int(candidates[best]))
        closest = closer[best]
    return chosen_from[chosen]


def sample(frames: Iterable[np.ndarray], n_frames: int, size: int, random: np.random.Generator) -> np.ndarray:
    """`size` different frames, or all if there are fewer, in their order: float32, (size, dimensions)."""
    chosen = np.arange(n_frames)
    if size < n_frames:
        chosen = np.sort(random.choice(n_frames, size, replace=False, shuffle=False))
    found, first = np.empty((0, 0), np.float32), 0
    for chunk in frames:
        if not first:
            found = np.empty((len(chosen), chunk.shape[1]), np.float32)
        here = slice(*np.searchsorted(chosen, (first, first + len(chunk))))
        found[here] = chunk[chosen[here] - first]
        first += len(chunk)
    return found


def _pass(
    frames: Iterable[np.ndarray],
    among: Search,
    centroids: np.ndarray,
    before: np.ndarray | None = None,
    sums: np.ndarray | None = None,
) -> Assignment:
    """Assign every frame; `sums` of the clusters, (size, dimensions), are brought from the labels `before` to these."""
    among.prepare(centroids)
    inertia, labels, first = 0.0, [], 0
    for block in _ahead(_blocks(frames)):
        distances, nearest = among.nearest(block)
        inertia += distances.sum(dtype=np.float64)
        if sums is not None:
            _move(sums, block, None if before is None else before[first : first + len(block)], nearest)
        labels.append(nearest.astype(np.uint16))
        first += len(block)
    return Assignment(np.concatenate(labels), float(inertia))


def _move(sums: np.ndarray, block: np.ndarray, left: np.ndarray | None, joined: np.ndarray) -> None:
    """Add the frames of a block to the sums of the clusters joined, and take them from those left (None: from none).

    Only frames that move are looked at. In float64, so that what has come and gone leaves nothing behind.
    """
    moved, entries, signs = np.arange(len(joined)), joined[:, None], [1.0]
    if left is not None:
        moved = np.flatnonzero(left != joined)
        entries, signs = np.stack([joined[moved], left[moved]], axis=1), [1.0, -1.0]
    at_once = max(2048, 8 * len(sums))  # few enough to stay in cache, many beside the sums that each product makes
    for start in range(0, len(moved), at_once):
        frames, clusters = moved[start : start + at_once], entries[start : start + at_once]
        # One column per frame, with ones in the rows of its clusters.
        ones, ends = np.tile(signs, len(frames)), np.arange(len(frames) + 1) * len(signs)
        one_hot = sparse.csc_array((ones, clusters.ravel(), ends), shape=(len(sums), len(frames)))
        sums += one_hot @ widened(block[frames]).astype(np.float64)


def _blocks(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames, `_BLOCK` at a time; a block is overwritten when the next but one is asked for."""
    buffers: Iterator[np.ndarray] | None = None
    held, count = [], 0
    for chunk in frames:
        buffers = buffers or cycle(np.empty((2, _BLOCK, chunk.shape[1]), chunk.dtype))
        while len(chunk):
            part, chunk = np.split(chunk, [_BLOCK - count])
            held.append(part)
            count += len(part)
            if count == _BLOCK:
                yield _joined(held, buffers)
                held, count = [], 0
    if held and buffers:
        yield _joined(held, buffers)


def _ahead(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks; while one is searched, the next is read."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = reader.submit(next, blocks, None)
            yield block


def _joined(parts: list[np.ndarray], buffers: Iterator[np.ndarray]) -> np.ndarray:
    """A single part is not copied. Into memory of old: to be given new memory can take as long as reading."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts, out=next(buffers)[: sum(map(len, parts))], casting="no")


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Centroids of the clusters, an empty one taking half of the largest."""
    centroids = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    left, apart = counts.copy(), 1 + np.resize([1, -1], sums.shape[1]).astype(np.float32) / 1024
    for empty in np.flatnonzero(counts == 0):
        largest = int(left.argmax())
        centroids[empty], centroids[largest] = centroids[largest] * apart, centroids[largest] * (2 - apart)
        left[empty] = left[largest] // 2
        left[largest] -= left[empty]
    return centroids
