"""What the report shows of single utterances: a map of their embeddings, and some beside their pseudo-labels.

All of one fold's held-out utterances, which its models have not been fitted on; nothing is fitted on them here, and no
table reads what this stage writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.lib.stride_tricks import sliding_window_view

from gmp_atl import classifier, codebooks, devices, kmeans, model_files
from gmp_atl.audio import recording
from gmp_atl.clips import Clips, passes
from gmp_atl.config import ComputeConfig, FinetuningSlice, FitOn
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.files import AudioRoot, Output
from gmp_atl.folds import Split, everything, held_out_split, training_split
from gmp_atl.formats import EMBEDDINGS, EXAMPLES, PREDICTIONS
from gmp_atl.frames import HOP, RECEPTIVE_FIELD

FLOOR = -80
"""dB below a spectrogram's maximum."""


def examples(
    *,
    config: FinetuningSlice,
    utterances: Path,
    audio_root: AudioRoot,
    local_features: Path,
    pretrained: Path,
    multitask: Path,
    centroids: list[Path],
    model: Path,
    predictions: Path,
    fit_on: FitOn,
    fold: int,
    seed: int,
    embeddings: Output,
    output: Output,
    gpus: int = 0,
) -> None:
    """Write EMBEDDINGS of all held-out utterances of a fold, and EXAMPLES of one of each class.

    An utterance's embedding is the mean over its frames of the layer that the head reads; pre-trained and fine-tuned
    ones are each projected on their own two principal components. Of each class, the utterance of median length is
    shown, so that nothing is picked. Its pseudo-labels are the nearest centroids of its stage-1 features.

    Args:
        multitask: encoder of stage 1.
        centroids: codebooks of one layer of it.
        predictions: of `model` on the fold.
        fit_on: the reading clustering.fit_on: with `all`, codebooks are fitted on the utterances too.

    Raises:
        LeakageError: a model, or a codebook that may not be, was fitted on one of the utterances.
        UserError: predictions or codebooks of other utterances, classes or encoders.
    """
    device = devices.resolve(gpus)
    split = held_out_split(utterances, config.folds, fold)
    network, described = classifier.load(model)
    clips = Clips.read(local_features, split, encoder=described.encoder)
    training = training_split(utterances, config.folds, fold)
    training.refuse_leaks(described.fitted_on, model)
    before, after_stage_1 = (_encoder(path, training, described.encoder) for path in (pretrained, multitask))
    rows: dict[str, list[Any]] = {name: [] for name in EMBEDDINGS.schema.names}
    explained = {}
    for kind, encoder in (("pre-trained", before), ("fine-tuned", network.encoder)):
        plane, explained[kind] = principal_plane(_embeddings(encoder, clips, config.head.layer, config.compute, device))
        rows["encoder"] += [kind] * len(clips.ids)
        rows["x"] += plane[:, 0].tolist()
        rows["y"] += plane[:, 1].tolist()
        for name in ("id", "emotion", "gender"):
            rows[name] += split.column(name)
    EMBEDDINGS.write(embeddings, pa.table(rows, schema=EMBEDDINGS.schema), fold=fold, seed=seed, explained=explained)

    chosen = _median_lengths(split, config.classes)
    allowed = everything(utterances) if fit_on == "all" else training
    layer, books = _codebooks(centroids, allowed, described.encoder)
    emotions, local = split.column("emotion"), clips.local
    shown = Clips([clips.ids[index] for index in chosen], [local[index] for index in chosen])
    labels = _pseudo_labels(after_stage_1, shown, layer, books, config.compute, device)
    found = {
        "id": shown.ids,
        "emotion": [emotions[index] for index in chosen],
        "spectrogram": [spectrogram(recording(audio_root, split.utterances, index)).ravel() for index in chosen],
        "labels": labels,
        "scores": _scores(predictions, config.classes, shown.ids),
    }
    EXAMPLES.write(
        output,
        pa.table(found, schema=EXAMPLES.schema),
        fold=fold,
        seed=seed,
        layer=layer,
        sizes=[len(each) for each in books],
        classes=config.classes,
    )


def principal_plane(points: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Coordinates of points (n, dimensions) on their first two principal components, and the variance each explains.

    The sign of a component is such that its coordinate of largest magnitude is positive; (n, 2), in the points' units.
    """
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    scaled = np.zeros((len(points), 2))
    first = (left * lengths)[:, :2]
    extremes = np.take_along_axis(first, np.abs(first).argmax(axis=0)[None], axis=0)
    scaled[:, : first.shape[1]] = first * np.where(extremes < 0, -1, 1)
    total = max(float((lengths**2).sum()), np.finfo(float).tiny)
    shares = [float(length) ** 2 / total for length in [*lengths, 0.0][:2]]
    return scaled, shares


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """Magnitude of 201 frequencies from 0 to 8 kHz in dB below the largest, (frames, frequencies), as whole numbers.

    The windows are the samples that each HuBERT frame is computed from.
    """
    windows = sliding_window_view(samples.astype(np.float64), RECEPTIVE_FIELD)[::HOP]
    magnitude = np.abs(np.fft.rfft(windows * np.hanning(RECEPTIVE_FIELD)))
    decibels = 20 * np.log10(np.maximum(magnitude / magnitude.max(), 10 ** (FLOOR / 20)))
    return np.round(decibels).astype(np.int8)


@torch.inference_mode()
def _embeddings(encoder: Encoder, clips: Clips, layer: int, compute: ComputeConfig, device: torch.device) -> np.ndarray:
    """(clips, hidden size) in float32."""
    encoder.to(device).eval().cast(devices.dtype(compute.precision, device))
    found: list[np.ndarray] = [np.empty(0)] * len(clips.ids)
    for batch in passes(clips, compute.batch_seconds, device):
        hidden = encoder(batch.local, batch.lengths, layer).float()
        for index, states in batch.unpadded(hidden):
            found[index] = states.mean(dim=0).cpu().numpy()
    return np.stack(found)


def _median_lengths(split: Split, classes: Sequence[str]) -> list[int]:
    """Of each class that has some, the position of the utterance of median length; of two, the shorter."""
    lengths, ids = split.column("n_samples"), split.ids
    emotions = split.column("emotion")
    found = []
    for name in classes:
        members = sorted((lengths[n], ids[n], n) for n, emotion in enumerate(emotions) if emotion == name)
        if members:
            found.append(members[(len(members) - 1) // 2][2])
    return found


def _encoder(folder: Path, training: Split, expected: str) -> Encoder:
    """One that is built on the pre-trained encoder `expected`, and fitted on training utterances alone."""
    encoder, origin = model_files.load_fitted(folder)
    training.refuse_leaks(origin["fitted_on"], folder)
    _check(folder, origin["encoder"], expected)
    return encoder


def _codebooks(paths: Sequence[Path], allowed: Split, encoder: str) -> tuple[int, list[np.ndarray]]:
    """Their layer, which is one, and the centroids of each, (size, hidden size)."""
    layers, found = set(), []
    for path in paths:
        codebook = codebooks.load(path)
        allowed.refuse_leaks(codebook.origin.fitted_on, path)
        _check(path, codebook.origin.encoder, encoder)
        layers.add(codebook.origin.layer)
        found.append(codebook.centroids)
    if len(layers) != 1:
        raise UserError(f"{paths[0].parent} has codebooks of several layers; delete them and run snakemake again.")
    return layers.pop(), found


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{path} is built on {found}, but the model on {expected}; delete it and run snakemake again.")


@torch.inference_mode()
def _pseudo_labels(
    encoder: Encoder,
    clips: Clips,
    layer: int,
    books: Sequence[np.ndarray],
    compute: ComputeConfig,
    device: torch.device,
) -> list[list[np.ndarray]]:
    """Of each clip, the nearest centroid of every frame, (frames,) of uint16, per codebook."""
    encoder.to(device).eval().cast(devices.dtype(compute.precision, device))
    found: list[list[np.ndarray]] = [[]] * len(clips.ids)
    for batch in passes(clips, compute.batch_seconds, device):
        hidden = encoder(batch.local, batch.lengths, layer).half().float().cpu()  # as clustered
        for index, states in batch.unpadded(hidden):
            found[index] = [kmeans.assign([states.numpy()], centroids).labels for centroids in books]
    return found


def _scores(predictions: Path, classes: list[str], ids: Sequence[str]) -> list[list[float]]:
    table, header = PREDICTIONS.read(predictions, columns=["id", "scores"])
    scores = dict(zip(table["id"].to_pylist(), table["scores"].to_pylist(), strict=True))
    missing = [utterance for utterance in ids if utterance not in scores]
    if header["classes"] != classes or missing:
        problem = f"lacks {missing[0]}" if missing else f"has the classes {', '.join(header['classes'])}"
        raise UserError(f"{predictions} {problem}; delete it and run snakemake again.")
    return [scores[utterance] for utterance in ids]
