"""Scores of any recordings by a fine-tuned model, as `evaluation` gives them for the clips of a corpus."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from gmp_atl import audio, classifier, clips, devices, recordings
from gmp_atl.audio import MIN_SAMPLES, TOO_SHORT, AudioError
from gmp_atl.classifier import Classifier, Description
from gmp_atl.clips import Clips
from gmp_atl.config import ComputeConfig
from gmp_atl.errors import NO_GPUS
from gmp_atl.files import atomic
from gmp_atl.frames import SAMPLE_RATE
from gmp_atl.recordings import Cut, Recording, Scored

log = logging.getLogger(__name__)

_POOL = 4
"""Batches, at most, whose windows are sorted by length together, so that they hold little padding."""


def command(
    model: Path,
    paths: Sequence[Path],
    *,
    layout: str,
    output: Path | None,
    cut: Cut,
    batch_seconds: float,
    gpus: int,
) -> int:
    """Score files and folders and write a row per window and recording to `output`, or to standard output.

    Returns:
        The number of files that could not be scored, each of which has been reported.

    Raises:
        UserError: a path does not exist or has no audio, or `model` is not a fine-tuned model.
    """
    files = recordings.find(paths)
    device = devices.resolve(gpus, NO_GPUS)
    network, description = classifier.load(model)
    network.to(device).encoder.cast(devices.dtype(description.precision, device))
    unusable = 0

    def usable() -> Iterator[Recording]:
        nonlocal unusable
        for result in predict(network, description, files, cut, batch_seconds, device):
            if isinstance(result, AudioError):
                unusable += 1
                log.error("not scored: %s", result)
            else:
                yield result

    if output is None:
        recordings.write(usable(), description.classes, layout, sys.stdout)
    else:
        with atomic(output) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
            recordings.write(usable(), description.classes, layout, stream)
    if unusable:
        log.error("%d of %d files could not be scored", unusable, len(files))
    return unusable


def predict(
    model: Classifier,
    description: Description,
    paths: Iterable[Path],
    cut: Cut,
    batch_seconds: float,
    device: torch.device,
) -> Iterator[Recording | AudioError]:
    """Each file's scores, or why it has none, in the order of `paths`, which are distinct.

    Args:
        batch_seconds: Audio, padding included, that goes through the transformer at once. Neither the length of a
            recording nor the number of files adds to what is held in memory, but for the scores of one recording.
    """
    compute = ComputeConfig(precision=description.precision, batch_seconds=batch_seconds)

    def score(local: list[np.ndarray]) -> np.ndarray:
        together = Clips([str(number) for number in range(len(local))], local)
        return classifier.scores(model, description, together, compute, device)

    scored = _scored(_windows(model, description, paths, cut), score, batch_seconds)
    for path, group in groupby(scored, key=lambda each: each[0]):
        found = [result for _, result in group]
        failures = [result for result in found if isinstance(result, AudioError)]
        yield failures[0] if failures else Recording(path, [each for each in found if isinstance(each, Scored)])


@dataclass(frozen=True)
class _Window:
    start: int
    """In samples, as the length."""
    length: int
    local: np.ndarray


def _windows(
    model: Classifier, description: Description, paths: Iterable[Path], cut: Cut
) -> Iterator[tuple[Path, _Window | AudioError]]:
    """The local features of every window. A file may turn out to be damaged after some of its windows."""
    seconds = math.ceil(cut.size / SAMPLE_RATE)
    for path in paths:
        try:
            for start, samples in recordings.windows(audio.stream(path, seconds), cut):
                if len(samples) < MIN_SAMPLES:
                    raise AudioError(path, TOO_SHORT, "there is nothing to score")
                [local] = clips.local_features(model.encoder, [samples], [path], normalise=description.normalise_audio)
                yield path, _Window(start, len(samples), local)
        except AudioError as error:
            yield path, error
        except OSError as error:
            yield path, AudioError(path, f"cannot be read ({error.strerror})", "check its permissions")


def _scored(
    windows: Iterable[tuple[Path, _Window | AudioError]],
    score: Callable[[list[np.ndarray]], np.ndarray],
    batch_seconds: float,
) -> Iterator[tuple[Path, Scored | AudioError]]:
    """The same with scores in the place of features, of a pool of windows at a time."""
    pool: list[tuple[Path, _Window | AudioError]] = []
    samples = 0
    for path, window in windows:
        pool.append((path, window))
        samples += window.length if isinstance(window, _Window) else 0
        if samples >= _POOL * batch_seconds * SAMPLE_RATE:
            yield from _score(pool, score)
            pool, samples = [], 0
    yield from _score(pool, score)


def _score(
    pool: list[tuple[Path, _Window | AudioError]], score: Callable[[list[np.ndarray]], np.ndarray]
) -> Iterator[tuple[Path, Scored | AudioError]]:
    local = [window.local for _, window in pool if isinstance(window, _Window)]
    scores = iter(score(local) if local else ())
    for path, window in pool:
        if isinstance(window, AudioError):
            yield path, window
        else:
            end = window.start + window.length
            yield path, Scored(window.start / SAMPLE_RATE, end / SAMPLE_RATE, next(scores))
