"""Recordings to be scored: which files, cut into which windows, and their scores as a table, CSV or JSON.

Everything here runs without torch, and streams: neither a long recording nor a large folder is ever held as a whole.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import soundfile

from gmp_atl.audio import MIN_SAMPLES
from gmp_atl.corpora.base import files
from gmp_atl.errors import UserError
from gmp_atl.frames import FRAME_SECONDS, SAMPLE_RATE

_NO_AUDIO = {"mat4", "mat5", "raw", "wavex"}  # formats without a suffix of their own, or without a header
_OTHER_SUFFIXES = {"aif", "aifc", "oga", "opus", "snd", "sph"}
SUFFIXES = frozenset(
    f".{name}" for name in {each.lower() for each in soundfile.available_formats()} - _NO_AUDIO | _OTHER_SUFFIXES
)
"""Of the files that a folder is searched for: those of libsndfile's formats, in small letters."""


@dataclass(frozen=True)
class Cut:
    """Windows of `size` samples, one every `hop` samples, at 16 kHz."""

    size: int
    hop: int

    @classmethod
    def of_seconds(cls, window: float, hop: float | None) -> Cut:
        """Windows that follow one another, or begin every `hop` seconds.

        Raises:
            UserError: a window without a frame, or windows with gaps between them.
        """
        hop = window if hop is None else hop
        if not (math.isfinite(window) and window * SAMPLE_RATE >= MIN_SAMPLES):
            raise UserError(f"--window is {window:g} s, but must be at least {MIN_SAMPLES / SAMPLE_RATE:g} s.")
        if not FRAME_SECONDS <= hop <= window:
            raise UserError(f"--hop is {hop:g} s, but must be from {FRAME_SECONDS:g} s to the window's {window:g} s.")
        return cls(round(window * SAMPLE_RATE), round(hop * SAMPLE_RATE))


@dataclass(frozen=True)
class Scored:
    """Scores of a stretch of a recording."""

    start: float
    """Seconds from the beginning."""
    end: float
    scores: np.ndarray
    """One per class, summing to one."""


@dataclass(frozen=True)
class Recording:
    """A file and the scores of its windows, in the order of time; of one window, if it is no longer than that."""

    path: Path
    windows: list[Scored]

    @property
    def whole(self) -> Scored:
        """The mean of the windows' scores."""
        return Scored(0.0, self.windows[-1].end, np.mean([window.scores for window in self.windows], axis=0))


def find(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, and the audio files below folders, as `corpora.base.files` finds them; each once.

    Raises:
        UserError: a path does not exist, or a folder cannot be read, or has no file with a suffix of libsndfile's
            formats.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist.")
        if path.is_dir():
            below = files(path, SUFFIXES)
            if not below:
                raise UserError(f"{path} holds no audio file ({', '.join(sorted(SUFFIXES))}); name the files.")
            found |= dict.fromkeys(below)
        else:
            found[path] = None
    return list(found)


def windows(pieces: Iterable[np.ndarray], cut: Cut) -> Iterator[tuple[int, np.ndarray]]:
    """First sample and samples of every window of a recording that comes in pieces.

    The last window is moved back, to end with the recording, so that all are of the same size. A recording that is no
    longer than a window is one window.
    """
    held, start, following = np.empty(0, np.float32), 0, 0  # `held` begins at sample `start` of the recording
    for piece in pieces:
        held = np.concatenate([held, piece])
        while following + cut.size < start + len(held):
            held, start = held[following - start :], following
            yield start, held[: cut.size]
            following += cut.hop
    yield max(start, start + len(held) - cut.size), held[-cut.size :]


def write(recordings: Iterable[Recording], classes: Sequence[str], layout: str, stream: TextIO) -> None:
    """Write rows as recordings come: one for each window, where there are several, and one for the whole.

    Args:
        layout: table, csv or json.
    """
    rows = (row for recording in recordings for row in _rows(recording, classes))
    _LAYOUTS[layout](rows, classes, stream)


def _rows(recording: Recording, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    name = str(recording.path).encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
    parts = [("window", window) for window in recording.windows] if len(recording.windows) > 1 else []
    for part, stretch in [*parts, ("whole", recording.whole)]:
        yield {
            "file": name,
            "part": part,
            "start": round(stretch.start, 3),
            "end": round(stretch.end, 3),
            "prediction": classes[int(stretch.scores.argmax())],
            "scores": {each: round(float(score), 6) for each, score in zip(classes, stretch.scores, strict=True)},
        }


def _table(rows: Iterable[dict[str, Any]], classes: Sequence[str], stream: TextIO) -> None:
    """Columns of a width that is known before the rows are; the name of the file, which may be long, comes last."""
    widths = [max(6, len(name)) for name in classes]
    widest = max(len("prediction"), *widths)
    heads = "  ".join(name.rjust(width) for name, width in zip(classes, widths, strict=True))
    stream.write(f"{'start':>9}  {'end':>9}  {'part':6}  {'prediction':{widest}}  {heads}  file\n")
    for row in rows:
        scores = "  ".join(f"{score:{width}.3f}" for score, width in zip(row["scores"].values(), widths, strict=True))
        stream.write(
            f"{row['start']:9.2f}  {row['end']:9.2f}  {row['part']:6}  {row['prediction']:{widest}}  {scores}  "
            f"{row['file']}\n"
        )


def _csv(rows: Iterable[dict[str, Any]], classes: Sequence[str], stream: TextIO) -> None:
    plain = ["file", "part", "start", "end", "prediction"]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*plain, *(f"score_{name}" for name in classes)])
    for row in rows:
        writer.writerow([*(row[name] for name in plain), *row["scores"].values()])


def _json(rows: Iterable[dict[str, Any]], _: Sequence[str], stream: TextIO) -> None:
    """One array, one row a line. Every row names the classes."""
    before = "[\n"
    for row in rows:
        stream.write(before + json.dumps(row, ensure_ascii=False))
        before = ",\n"
    stream.write("\n]\n" if before == ",\n" else "[]\n")


_LAYOUTS: dict[str, Callable[[Iterable[dict[str, Any]], Sequence[str], TextIO], None]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
}
