"""Mel-frequency cepstral coefficients: what is clustered before there is an encoder (Hsu et al. 2021, Sec. IV-B)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

from gmp_atl.audio import DECODERS, recording
from gmp_atl.files import AudioRoot, Output
from gmp_atl.formats import LAYER_FEATURES, MFCC, UTTERANCES, append_features
from gmp_atl.frames import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, n_frames
from gmp_atl.progress import Meter

_COEFFICIENTS = 13
_CLIPS_AT_ONCE = 1000
"""Clips that are held."""


def mfcc(*, utterances: Path, audio_root: AudioRoot, output: Output) -> None:
    """Write 13 coefficients with first and second differences for every frame of HuBERT: 25 ms, 50 per second.

    As HuBERT's first iteration has them, but at half of its rate, so that no label needs to be skipped.
    """
    table, _ = UTTERANCES.read(utterances)
    meter = Meter("clip", len(table))
    header = {"dimensions": 3 * _COEFFICIENTS, "layer": 0, "encoder": MFCC, "fitted_on": []}
    # One thread of torch's in each, which would have a team of its own otherwise.
    threads = ThreadPoolExecutor(DECODERS, initializer=torch.set_num_threads, initargs=(1,))
    with LAYER_FEATURES.writer(output, **header) as append, threads as pool:
        for first in range(0, len(table), _CLIPS_AT_ONCE):
            rows = range(first, min(first + _CLIPS_AT_ONCE, len(table)))
            frames = list(pool.map(lambda row: _coefficients(recording(audio_root, table, row)), rows))
            append_features(append, table["id"][rows.start : rows.stop].to_pylist(), frames)
            meter.advance(len(rows))


def _coefficients(samples: np.ndarray) -> np.ndarray:
    """(frames, 39) of a clip, (samples,) at 16 kHz."""
    found = kaldi.mfcc(
        torch.from_numpy(samples)[None] * 2**15,  # Kaldi's range; only the first coefficient knows of it
        sample_frequency=SAMPLE_RATE,
        frame_length=1000 * RECEPTIVE_FIELD / SAMPLE_RATE,
        frame_shift=1000 * HOP / SAMPLE_RATE,
        num_ceps=_COEFFICIENTS,
        use_energy=False,
    )
    change = compute_deltas(found.T)
    stacked: np.ndarray = torch.cat([found.T, change, compute_deltas(change)]).T.numpy()
    assert len(stacked) == n_frames(len(samples))
    return stacked
