"""Frame-level gender-augmented multi-scale pseudo-labels, GMPs: k-means over one layer (paper, Sec. 3.1).

This stage imports no torch: the wheels of faiss and torch are built on different CUDA and OpenMP runtimes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from gmp_atl import codebooks, kmeans
from gmp_atl.codebooks import Codebook, Origin
from gmp_atl.config import ClusteringConfig, ClusteringSlice
from gmp_atl.errors import UserError
from gmp_atl.files import Output
from gmp_atl.folds import everything, training_split
from gmp_atl.formats import LAYER_FEATURES, PSEUDO_LABELS, stream_features
from gmp_atl.kmeans import Assignment
from gmp_atl.randomness import derive

log = logging.getLogger(__name__)

COMFORTABLE = 39
"""Frames per centroid below which FAISS warns that a codebook is fitted on too little."""
_MEMORY = 4 * 2**30
"""Bytes of frames in float32 that are held; more are read anew at every pass. A fold of IEMOCAP takes 3.1 GB."""
_CLIPS_AT_ONCE = 4096
"""Clips whose labels are written at once."""


def clustering(
    *,
    config: ClusteringSlice,
    utterances: Path,
    layer_features: Path,
    fold: int,
    seed: int,
    layer: int,
    size: int,
    centroids: Output,
    pseudo_labels: Output,
    gpus: int = 0,
) -> None:
    """Fit a codebook of `size` centroids on the fold's training frames and label each of them.

    Raises:
        LeakageError: the features hold or were fitted on a held-out utterance.
        UserError: features of another layer; fewer frames than centroids; no GPU where one was given.
    """
    if gpus:
        _check_gpu()
    split = training_split(utterances, config.folds, fold)
    fitted = everything(utterances) if config.clustering.fit_on == "all" else split
    frames = _Frames(layer_features, fitted.ids)
    fitted.refuse_leaks(frames.ids, layer_features)
    split.refuse_leaks(frames.header["fitted_on"], layer_features)
    if frames.header["layer"] != layer:
        raise UserError(
            f"{layer_features} holds layer {frames.header['layer']}, but layer {layer} is expected; delete it and run "
            "snakemake again."
        )
    _check_amount(frames.count, size, layer_features)
    start = derive(seed, fold, f"clustering/{layer}/{size}")
    codebook, assignment = _fit(frames, size, config.clustering, start, gpus)
    origin = Origin(
        layer=layer,
        size=size,
        encoder=frames.header["encoder"],
        fitted_on=sorted({*frames.header["fitted_on"], *fitted.ids}),
        statistics=_statistics(assignment, size),
    )
    codebooks.save(Codebook(codebook, origin), centroids)
    log.info("layer %d, %d centroids: %s", layer, size, origin.statistics)
    labels = frames.per_clip(assignment.labels)
    with PSEUDO_LABELS.writer(pseudo_labels, **origin.model_dump(exclude={"statistics"})) as append:
        for first in range(0, len(split.ids), _CLIPS_AT_ONCE):
            ids = split.ids[first : first + _CLIPS_AT_ONCE]
            rows = {"id": ids, "labels": [labels[utterance] for utterance in ids]}
            append(pa.RecordBatch.from_pydict(rows, schema=PSEUDO_LABELS.schema))


class _Frames:
    """Frames of the wanted clips of a LAYER_FEATURES file, in its order, read from the file at every iteration."""

    def __init__(self, path: Path, wanted: list[str]) -> None:
        table, self.header = LAYER_FEATURES.read(path, columns=["id", "n_frames"])
        self.ids: list[str] = table["id"].to_pylist()
        known = set(wanted)
        lengths = zip(self.ids, table["n_frames"].to_pylist(), strict=True)
        self.lengths = {utterance: length for utterance, length in lengths if utterance in known}
        self.count = sum(self.lengths.values())
        self._path, self._wanted = path, wanted

    def __iter__(self) -> Iterator[np.ndarray]:
        for clips in stream_features(LAYER_FEATURES, self._path, self._wanted):
            yield from clips.values()

    def per_clip(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Values of all frames, cut into clips."""
        return dict(zip(self.lengths, np.split(values, np.cumsum([*self.lengths.values()])[:-1]), strict=True))


def _check_gpu() -> None:
    import faiss

    if faiss.get_num_gpus() == 0:
        raise UserError("This job was given a GPU, but FAISS sees none; see nvidia-smi, or run with the cpu profile.")


def _check_amount(n_frames: int, size: int, source: Path) -> None:
    if n_frames < size:
        raise UserError(
            f"{source} has {n_frames} training frames, fewer than the {size} centroids of clustering.sizes; take a "
            "smaller codebook, or more speech."
        )
    if n_frames < COMFORTABLE * size:
        log.warning(
            "%d training frames for %d centroids are %.1f per centroid, fewer than the %d that a reliable codebook "
            "needs. Consider a smaller one in clustering.sizes.",
            *(n_frames, size, n_frames / size, COMFORTABLE),
        )


def _fit(frames: _Frames, size: int, settings: ClusteringConfig, seed: int, gpus: int) -> tuple[np.ndarray, Assignment]:
    """Centroids, (size, dimensions), from every frame, and the labels of the frames."""
    random = np.random.default_rng(seed)
    limit = _MEMORY // (4 * frames.header["dimensions"])
    source: Iterable[np.ndarray] = frames
    if frames.count <= limit:
        source = [kmeans.sample(frames, frames.count, frames.count, random)]
    if settings.algorithm == "lloyd":
        initial = kmeans.initial_centroids(source, frames.count, size, random)
        return kmeans.lloyd(source, initial, settings.iterations, gpus)
    from sklearn.cluster import MiniBatchKMeans

    if frames.count > limit:
        log.warning("scikit-learn needs its frames in memory: %d of %d are drawn at random.", limit, frames.count)
    drawn = source[0] if isinstance(source, list) else kmeans.sample(frames, frames.count, limit, random)
    model = MiniBatchKMeans(size, batch_size=10_000, max_iter=settings.iterations, n_init=1, random_state=seed % 2**32)
    codebook = model.fit(drawn).cluster_centers_.astype(np.float32)
    return codebook, kmeans.assign(source, codebook, gpus)


def _statistics(assignment: Assignment, size: int) -> dict[str, int | float]:
    """How the codebook is used."""
    n_frames = len(assignment.labels)
    occupancy = np.bincount(assignment.labels, minlength=size)
    shares = occupancy[occupancy > 0] / n_frames
    return {
        "inertia_per_frame": assignment.inertia / n_frames,
        "frames_per_centroid": n_frames / size,
        "empty_clusters": int((occupancy == 0).sum()),
        "smallest_cluster": int(occupancy.min()),
        "largest_cluster": int(occupancy.max()),
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
    }
