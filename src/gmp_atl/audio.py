"""Reading audio: any file that libsndfile decodes, as mono float32 at HuBERT's 16 kHz.

Decoding needs no torch; only `load`, and only where the rate differs, imports torchaudio to resample.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from gmp_atl.errors import UserError

SAMPLE_RATE = 16_000
MIN_SAMPLES = 400
"""Receptive field of one HuBERT frame; a shorter clip has no frame."""

_BLOCK = 1 << 20  # frames read at once, whatever the header claims
_UNKNOWN_LENGTH = 0x7FFFF000  # data sizes from here on are placeholders of programs that wrote to a pipe
_MAX_KERNEL = 1 << 24  # elements of the resampling kernel; 44.1 kHz needs 7e4, coprime rates 1e8 and more


class AudioError(UserError):
    """A clip that cannot be used; `problem` says why without naming the file."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.problem = problem


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a clip holds: its length at 16 kHz, its own rate (Hz) and channels, and a digest of its samples."""

    n_samples: int
    rate: int
    channels: int
    sha256: str
    """Of the decoded mono float32 samples, whatever the file format."""


def inspect(path: Path) -> AudioInfo:
    """Decode a clip and describe it; `n_samples` is the length of what `load` returns.

    Raises:
        AudioError: not a regular file, unreadable, truncated, empty, not finite, or of an odd rate.
    """
    samples, rate, channels = _decode(path)
    digest = hashlib.sha256(samples.astype("<f4", copy=False).data).hexdigest()
    return AudioInfo(resampled_length(len(samples), rate), rate, channels, digest)


def load(path: Path) -> np.ndarray:
    """A clip as float32, shape (samples,), at 16 kHz, its channels averaged. Raises as `inspect` does."""
    samples, rate, _ = _decode(path)
    return samples if rate == SAMPLE_RATE else _resample(samples, rate)


def resampled_length(n_samples: int, rate: int) -> int:
    """ceil(n_samples * 16000 / rate), in integers."""
    return -(-n_samples * SAMPLE_RATE // rate)


def _decode(path: Path) -> tuple[np.ndarray, int, int]:
    """Mono float32 samples at the file's own rate; the rate in Hz; the number of channels."""
    if not path.is_file():
        raise AudioError(path, "not a regular file", "point to an audio file")
    if path.suffix.lower() == ".raw":
        raise AudioError(path, "has no header", "convert it to WAV or FLAC")
    blocks = []
    try:
        with soundfile.SoundFile(path) as file:
            declared, rate, channels = file.frames, file.samplerate, file.channels
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block)
    except soundfile.LibsndfileError as error:
        problem = f"cannot be decoded ({error.error_string.rstrip('.')})"
        raise AudioError(path, problem, "restore it from the corpus, or convert it to WAV or FLAC") from None
    if sum(map(len, blocks)) < declared or _missing_bytes(path):
        raise AudioError(path, "truncated: its header declares more audio than it holds", "copy it again")
    if not blocks:
        raise AudioError(path, "holds no samples", "restore it from the corpus")
    samples = np.concatenate(blocks).mean(axis=1)
    if not np.isfinite(samples).all():
        raise AudioError(path, "holds NaN or infinite samples", "restore it from the corpus")
    common = math.gcd(rate, SAMPLE_RATE)
    if (SAMPLE_RATE // common) * (rate // common) > _MAX_KERNEL:
        raise AudioError(path, f"has a rate of {rate} Hz", "resample it to a standard rate such as 16000 Hz")
    return samples, rate, channels


def _missing_bytes(path: Path) -> int:
    """Bytes that a WAV's data chunk declares beyond the end of the file, which libsndfile would not mention."""
    with path.open("rb") as stream:
        riff = stream.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            return 0
        while len(header := stream.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"data":
                missing = stream.tell() + size - path.stat().st_size
                return 0 if size >= _UNKNOWN_LENGTH else max(0, missing)
            stream.seek(size + size % 2, 1)
    return 0


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Band-limited interpolation, exactly `resampled_length` long.

    torchaudio rounds the length of its output in float32, so that it may come out one short. It pads with zeros
    anyway: another second of them changes no sample, and the cut is then exact.
    """
    import torch
    from torchaudio.functional import resample

    padded = torch.nn.functional.pad(torch.from_numpy(samples), (0, rate))
    resampled: np.ndarray = resample(padded, rate, SAMPLE_RATE).numpy()
    return resampled[: resampled_length(len(samples), rate)].copy()
