"""Frame-level gender-augmented multi-scale pseudo-labels, GMPs: k-means over one layer (paper, Sec. 3.1).

This stage imports no torch: the wheels of faiss and torch are built on different CUDA and OpenMP runtimes.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from gmp_atl.config import ClusteringConfig, ClusteringSlice
from gmp_atl.errors import UserError
from gmp_atl.folds import everything, training_split
from gmp_atl.formats import LAYER_FEATURES, PSEUDO_LABELS, Output, atomic, read_features
from gmp_atl.randomness import derive

log = logging.getLogger(__name__)

COMFORTABLE = 39
"""Frames per centroid below which FAISS warns that a codebook is fitted on too little."""


def clustering(
    *,
    config: ClusteringSlice,
    utterances: Path,
    layer_features: Path,
    fold: int,
    seed: int,
    size: int,
    centroids: Output,
    pseudo_labels: Output,
    gpus: int = 0,
) -> None:
    """Fit a codebook of `size` centroids on the fold's training frames and label each of them.

    Raises:
        LeakageError: the features hold or were fitted on a held-out utterance.
        UserError: fewer frames than centroids; no GPU where one was given.
    """
    if gpus and faiss.get_num_gpus() == 0:
        raise UserError("This job was given a GPU, but FAISS sees none; see nvidia-smi, or run with the cpu profile.")
    split = training_split(utterances, config.folds, fold)
    fitted = everything(utterances) if config.clustering.fit_on == "all" else split
    fitted.refuse_leaks(_ids(layer_features), layer_features)
    clips, header = read_features(LAYER_FEATURES, layer_features, set(fitted.ids))
    split.refuse_leaks(header["fitted_on"], layer_features)
    frames = np.concatenate([clips[utterance] for utterance in fitted.ids]).astype(np.float32)
    _check_amount(len(frames), size, layer_features)
    layer, settings = header["layer"], config.clustering
    start = derive(seed, fold, f"clustering/{layer}/{size}")
    codebook = _fit(frames, size, settings, start, gpus)
    labels, statistics = _assign(codebook, frames, gpus)
    header = {"layer": layer, "size": size, "fitted_on": sorted({*header["fitted_on"], *fitted.ids})}
    _save_centroids(codebook, centroids, {**header, "statistics": statistics})
    log.info("layer %d, %d centroids: %s", layer, size, statistics)
    ends = np.cumsum([len(clips[utterance]) for utterance in fitted.ids])
    per_clip = dict(zip(fitted.ids, np.split(labels, ends[:-1]), strict=True))
    rows = {"id": split.ids, "labels": [per_clip[utterance] for utterance in split.ids]}
    PSEUDO_LABELS.write(pseudo_labels, pa.table(rows, schema=PSEUDO_LABELS.schema), **header)


def _ids(layer_features: Path) -> list[str]:
    ids: list[str] = LAYER_FEATURES.read(layer_features, columns=["id"])[0]["id"].to_pylist()
    return ids


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


def _fit(frames: np.ndarray, size: int, settings: ClusteringConfig, seed: int, gpus: int) -> np.ndarray:
    """Centroids, (size, dimensions), from every frame: FAISS's default would subsample to 256 per centroid."""
    if settings.algorithm == "mini_batch":
        from sklearn.cluster import MiniBatchKMeans

        model = MiniBatchKMeans(
            size, batch_size=10_000, max_iter=settings.iterations, n_init=1, random_state=seed % 2**32
        )
        fitted: np.ndarray = model.fit(frames).cluster_centers_.astype(np.float32)
        return fitted
    kmeans = faiss.Kmeans(
        frames.shape[1],
        size,
        niter=settings.iterations,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(frames),
        gpu=gpus > 0,
    )
    kmeans.train(frames)
    return np.asarray(kmeans.centroids)


def _assign(codebook: np.ndarray, frames: np.ndarray, gpus: int) -> tuple[np.ndarray, dict[str, float]]:
    """Nearest centroid of each frame, and how the codebook is used."""
    index: faiss.Index = faiss.IndexFlatL2(codebook.shape[1])
    if gpus:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(np.ascontiguousarray(codebook))
    distances, nearest = index.search(frames, 1)
    occupancy = np.bincount(nearest[:, 0], minlength=len(codebook))
    shares = occupancy[occupancy > 0] / len(frames)
    statistics = {
        "inertia_per_frame": float(distances.mean(dtype=np.float64)),
        "frames_per_centroid": len(frames) / len(codebook),
        "empty_clusters": int((occupancy == 0).sum()),
        "smallest_cluster": int(occupancy.min()),
        "largest_cluster": int(occupancy.max()),
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
    }
    return nearest[:, 0].astype(np.uint16), statistics


def _save_centroids(codebook: np.ndarray, path: Path, metadata: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        save_file({"centroids": codebook}, temporary, {"gmp_atl": json.dumps(metadata, sort_keys=True)})
