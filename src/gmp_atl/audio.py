"""Reading audio: any file that libsndfile decodes, as mono float32 at HuBERT's 16 kHz.

Decoding needs no torch; only `load`, and only where the rate differs, imports torchaudio to resample.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from gmp_atl.errors import UserError
from gmp_atl.frames import RECEPTIVE_FIELD, SAMPLE_RATE

MIN_SAMPLES = RECEPTIVE_FIELD
"""Receptive field of one HuBERT frame; a shorter clip has no frame."""
TOO_SHORT = "shorter than one HuBERT frame (25 ms)"
"""What is said of such a clip."""

MIN_RATE = 4000
"""Hz; below it there is no speech, and a header that claims 1 Hz would ask for 16000 times the memory."""
MAX_SECONDS = 3600
"""Beyond any utterance: a small compressed file can decode to more than a machine holds."""
_THREADS = os.environ.get("OMP_NUM_THREADS", "")  # as --threads sets it for every library
DECODERS = min(16, int(_THREADS) if _THREADS.isdecimal() else os.cpu_count() or 1) or 1
"""Threads that decode side by side, no more than a job is given; libsndfile runs without the interpreter's lock."""
FULL_SCALE = 0.99
"""From here on a sample counts as clipped: 8-bit audio ends at 127/128."""

_BLOCK = 1 << 20  # samples of all channels read at once, whatever the header claims
_UNKNOWN_LENGTH = 0x7FFFF000  # data sizes from here on are placeholders of programs that wrote to a pipe
_FORMATS = ("WAV", "WAVEX", "FLAC", "AIFF", "OGG", "MP3")
"""Of clips: libsndfile shortens truncated files of all others without a word."""
_CHUNKED = {b"RIFF": ("<", b"data"), b"RIFX": (">", b"data"), b"FORM": (">", b"SSND")}
"""WAV and AIFF: by their first bytes, the byte order and the chunk of samples."""
_LAST_PAGE = 1 << 16  # bytes; a page of Ogg is smaller
_MAX_KERNEL = 1 << 24  # elements of the resampling kernel; 44.1 kHz needs 7e4, coprime rates 1e8 and more


class AudioError(UserError):
    """A clip that cannot be used; `problem` says why without naming the file."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.problem = problem


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a clip holds: its length at 16 kHz, its own channels, and a digest of its samples."""

    n_samples: int
    channels: int
    clipped: float
    """Share of the samples at full scale."""
    sha256: str
    """Of the decoded mono float32 samples, whatever the file format."""


def inspect(path: Path) -> AudioInfo:
    """Decode a clip and describe it; `n_samples` is the length of what `load` returns.

    Raises:
        AudioError: not a regular file, unreadable, of a format whose truncation cannot be told, truncated, empty,
            silent throughout, not finite, longer than an hour, or of an odd rate.
    """
    samples, rate, channels = _decode(path)
    digest = hashlib.sha256(samples.astype("<f4", copy=False).data).hexdigest()
    clipped = float((np.abs(samples) >= FULL_SCALE).mean())
    return AudioInfo(resampled_length(len(samples), rate), channels, clipped, digest)


def load(path: Path) -> np.ndarray:
    """A clip as float32, shape (samples,), at 16 kHz, its channels averaged. Raises as `inspect` does."""
    samples, rate, _ = _decode(path)
    return _at_16_khz(samples, rate)


def recording(root: Path, utterances: pa.Table, row: int) -> np.ndarray:
    """Samples of an utterance of the utterance table, as `load` gives them; `root` is the corpus's folder.

    Raises:
        UserError: the clip has changed since the corpus was read, or cannot be decoded.
    """
    path, expected = root / utterances["path"][row].as_py(), utterances["n_samples"][row].as_py()
    samples = load(path)
    if len(samples) != expected:
        raise UserError(
            f"{path} has {len(samples)} samples at 16 kHz, but had {expected} when the corpus was read. Has it "
            "changed? Rerun with: snakemake --forcerun corpus"
        )
    return samples


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Samples at 16 kHz, played `speed` times (to a hundredth) as fast, tempo and pitch together, again at 16 kHz."""
    return _at_16_khz(samples, round(100 * speed) * (SAMPLE_RATE // 100))


def stream(path: Path, seconds: int) -> Iterator[np.ndarray]:
    """What `load` returns, in pieces of `seconds`, the last up to a second longer: memory does not grow with the file.

    A recording may be of any length, silent, and of any format of libsndfile, even if its truncation cannot be told.
    Raises as `inspect` does otherwise; what only its end shows of a file, after the pieces before.
    """
    held = np.empty(0, np.float32)  # at the file's rate; its first `context` samples are in an earlier piece
    context = 0
    for block, rate, _ in _blocks(path, soundfile.available_formats()):
        held = np.concatenate([held, block])
        # Resampling looks a few samples around. A second on each side is more, and a whole number of samples at 16 kHz.
        while len(held) >= context + (seconds + 1) * rate:
            first = resampled_length(context, rate)
            piece = _at_16_khz(held[: context + (seconds + 1) * rate], rate)
            yield piece[first : first + seconds * SAMPLE_RATE]
            held, context = held[context + (seconds - 1) * rate :], rate
    yield _at_16_khz(held, rate)[resampled_length(context, rate) :]


def resampled_length(n_samples: int, rate: int) -> int:
    """ceil(n_samples * 16000 / rate), in integers."""
    return -(-n_samples * SAMPLE_RATE // rate)


def _decode(path: Path) -> tuple[np.ndarray, int, int]:
    """Mono float32 samples of a clip at the file's own rate; the rate in Hz; the number of channels."""
    found, length = [], 0
    for block, rate, channels in _blocks(path, _FORMATS):
        found.append((block, rate, channels))
        length += len(block)
        if length > MAX_SECONDS * rate:
            raise AudioError(path, f"longer than {MAX_SECONDS} s", "cut it into utterances")
    blocks, rates, counts = zip(*found, strict=True)
    samples = np.concatenate(blocks)
    if samples.min() == samples.max():
        raise AudioError(path, "holds no sound: every sample is the same", "restore it from the corpus")
    return samples, rates[0], counts[0]


def _blocks(path: Path, formats: Collection[str]) -> Iterator[tuple[np.ndarray, int, int]]:
    """As `_decode`, block by block, at least one: what is allocated is what the file holds."""
    if not _is_file(path):
        raise AudioError(path, "not a regular file", "point to an audio file")
    if path.suffix.lower() == ".raw":
        raise AudioError(path, "has no header", "convert it to WAV or FLAC")
    length = 0
    try:
        with soundfile.SoundFile(path) as file:
            _check_header(path, file, formats)
            declared, rate, channels = file.frames, file.samplerate, file.channels
            while len(block := file.read(max(1, _BLOCK // channels), dtype="float32", always_2d=True)):
                length += len(block)
                samples = block.mean(axis=1)
                if not np.isfinite(samples).all():
                    raise AudioError(path, "holds NaN or infinite samples", "restore it from the corpus")
                yield samples, rate, channels
    except soundfile.LibsndfileError as error:
        problem = f"cannot be decoded ({error.error_string.rstrip('.')})"
        raise AudioError(path, problem, "restore it from the corpus, or convert it to WAV or FLAC") from None
    if length < declared or _is_cut(path):
        raise AudioError(path, "truncated: its header declares more audio than it holds", "copy it again")
    if not length:
        raise AudioError(path, "holds no samples", "restore it from the corpus")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _check_header(path: Path, file: soundfile.SoundFile, formats: Collection[str]) -> None:
    if file.format not in formats:
        raise AudioError(path, f"is {file.format}, of which it cannot be told if it is whole", "convert it to WAV")
    rate = file.samplerate
    common = math.gcd(rate, SAMPLE_RATE)
    if rate < MIN_RATE or (SAMPLE_RATE // common) * (rate // common) > _MAX_KERNEL:
        raise AudioError(path, f"has a rate of {rate} Hz", "resample it to a standard rate such as 16000 Hz")


def _is_cut(path: Path) -> bool:
    """Whether a WAV, an AIFF or an Ogg file ends too early, which libsndfile would not mention."""
    with path.open("rb") as stream:
        head = stream.read(12)
        if head[:4] == b"OggS":
            stream.seek(max(0, path.stat().st_size - _LAST_PAGE))
            _, mark, page = stream.read().rpartition(b"OggS")
            whole = len(page) > 22 and len(page) >= 23 + page[22] + sum(page[23 : 23 + page[22]])
            return not (mark and whole and page[1] & 4)  # a stream's last page is marked (RFC 3533, Sec. 6)
        if head[:4] not in _CHUNKED:
            return False
        order, samples = _CHUNKED[head[:4]]
        while len(header := stream.read(8)) == 8:
            name, size = struct.unpack(f"{order}4sI", header)
            if name == samples:
                return size < _UNKNOWN_LENGTH and stream.tell() + size > path.stat().st_size
            stream.seek(size + size % 2, 1)
    return False


def _at_16_khz(samples: np.ndarray, rate: int) -> np.ndarray:
    """Band-limited interpolation, exactly `resampled_length` long.

    torchaudio rounds the length of its output in float32, so that it may come out one short. It pads with zeros
    anyway: another second of them changes no sample, and the cut is then exact.
    """
    if rate == SAMPLE_RATE:
        return samples
    import torch
    from torchaudio.functional import resample

    padded = torch.nn.functional.pad(torch.from_numpy(samples), (0, rate))
    resampled: np.ndarray = resample(padded, rate, SAMPLE_RATE).numpy()
    return resampled[: resampled_length(len(samples), rate)].copy()
