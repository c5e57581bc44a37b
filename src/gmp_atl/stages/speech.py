"""Speech without labels, as an encoder is pre-trained on it: every clip of a manifest, at every speed."""

from __future__ import annotations

import hashlib
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from gmp_atl import audio
from gmp_atl.corpora.manifest import unlabelled
from gmp_atl.errors import NOTICE, UserError
from gmp_atl.files import AudioRoot, Output, write_bytes
from gmp_atl.formats import EXCLUDED, UTTERANCES
from gmp_atl.frames import SAMPLE_RATE

log = logging.getLogger(__name__)


def speech(
    *, manifest: AudioRoot, speeds: list[float], audio_root: Output, utterances: Output, excluded: Output
) -> None:
    """Write mono FLAC at 16 kHz below `audio_root`, its utterance table, and which clips were left out and why.

    The labels of the table are empty. What is written has 16 bits: -98 dB, far below the noise of recordings.

    Args:
        manifest: CSV or Parquet file; its column `path` is read.
        speeds: At which each clip is written; its pitch changes with its tempo.

    Raises:
        UserError: the manifest cannot be read, or none of its clips can be used.
    """
    paths = unlabelled(manifest)
    rows: list[dict[str, str | int]] = []
    reasons: dict[str, str] = {}
    digest = hashlib.sha256()
    with ThreadPoolExecutor(audio.DECODERS) as pool:
        made = pool.map(lambda clip: _make(manifest.parent / paths[clip], clip, speeds, audio_root), paths)
        for clip, found in zip(paths, made, strict=True):
            if isinstance(found, str):
                log.warning("%s: excluded: %s", clip, found)
                reasons[clip] = found
                continue
            for row in found:
                digest.update(f"{row['id']} {row['sha256']}\n".encode())
                rows.append(row)
    if not rows:
        raise UserError(f"{manifest} names no clip that can be used: {next(iter(reasons.values()), 'it has no rows')}.")
    table = pa.Table.from_pylist(rows, schema=UTTERANCES.schema)
    UTTERANCES.write(utterances, table, corpus=manifest.stem, complete=True, audio=digest.hexdigest())
    EXCLUDED.write(excluded, pa.table([list(reasons), list(reasons.values())], schema=EXCLUDED.schema))
    seconds = sum(table["n_samples"].to_pylist()) / SAMPLE_RATE
    log.log(NOTICE, "%d clips, %.0f min; %d clips of the manifest excluded", len(rows), seconds / 60, len(reasons))


def _make(path: Path, clip: str, speeds: list[float], audio_root: Path) -> list[dict[str, str | int]] | str:
    """Write a clip at every speed; its rows of the table, or what is the matter with it."""
    try:
        samples, recorded = audio.load(path), audio.inspect(path).sha256
    except audio.AudioError as error:
        return error.problem
    empty = dict.fromkeys(("speaker", "gender", "session", "emotion", "text_type"), "")
    found: list[dict[str, str | int]] = []
    for speed in speeds:
        changed, id = audio.at_speed(samples, speed), f"{speed:g}/{clip}"
        if len(changed) < audio.MIN_SAMPLES:
            return f"{audio.TOO_SHORT} at speed {speed:g}"
        write_bytes(audio_root / f"{id}.flac", _flac(changed))
        found.append({"id": id, "path": f"{id}.flac", **empty, "n_samples": len(changed), "sha256": recorded})
    return found


def _flac(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples.clip(-1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()
