"""Output of HuBERT's convolutions for every clip: computed once, shared by every fold, seed and stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from gmp_atl import clips, devices, model_files
from gmp_atl.audio import DECODERS, recording
from gmp_atl.config import LocalFeaturesSlice
from gmp_atl.encoder import Encoder
from gmp_atl.files import AudioRoot, Output
from gmp_atl.formats import LOCAL_FEATURES, UTTERANCES, append_features
from gmp_atl.frames import SAMPLE_RATE
from gmp_atl.progress import Meter

log = logging.getLogger(__name__)
_ROW_GROUP_BYTES = 32 * 2**20
"""From here on features are written: what stages that stream them hold at once."""
_CLIPS_AT_ONCE = 64
"""Clips whose convolutions are computed while as many are decoded."""


def local_features(
    *,
    config: LocalFeaturesSlice,
    utterances: Path,
    audio_root: AudioRoot,
    encoder: Path,
    output: Output,
    gpus: int = 0,
) -> None:
    """Run the frozen convolutions over every clip, as if it were alone, and store float16.

    Raises:
        UserError: a clip has changed since the corpus was read, or cannot be decoded.
    """
    device = devices.resolve(gpus)
    model, metadata = model_files.load_fitted(encoder)
    model = model.to(device).eval()
    model.feature_extractor.arrange(devices.dtype(config.compute.precision, device))
    table, _ = UTTERANCES.read(utterances)
    width = model.architecture.conv_dim[-1]
    with LOCAL_FEATURES.writer(output, dimensions=width, encoder=metadata["encoder"]) as append:
        ids: list[str] = []
        frames: list[np.ndarray] = []
        for some, features in _features(table, audio_root, model, config.encoder.normalise_audio):
            ids += some
            frames += features
            if sum(each.nbytes for each in frames) >= _ROW_GROUP_BYTES:
                append_features(append, ids, frames)
                ids, frames = [], []
        append_features(append, ids, frames)
    log.info("local features of %d clips", len(table))


def _features(
    table: pa.Table, root: Path, model: Encoder, normalise: bool
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Ids and local features, some clips at a time; the next ones are decoded meanwhile."""
    meter = Meter("clip", len(table))
    with ThreadPoolExecutor(DECODERS) as pool:

        def decode(first: int) -> Iterator[np.ndarray]:
            rows = range(first, min(first + _CLIPS_AT_ONCE, len(table)))
            return pool.map(lambda row: recording(root, table, row), rows)

        ahead = decode(0)
        for first in range(0, len(table), _CLIPS_AT_ONCE):
            waves, ahead = list(ahead), decode(first + _CLIPS_AT_ONCE)
            some = table.slice(first, len(waves))
            paths = [root / path for path in some["path"].to_pylist()]
            yield some["id"].to_pylist(), clips.local_features(model, waves, paths, normalise=normalise)
            meter.advance(len(waves), audio=sum(map(len, waves)) / SAMPLE_RATE)
