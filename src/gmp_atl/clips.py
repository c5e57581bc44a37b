"""Local features of many clips in memory, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gmp_atl import devices
from gmp_atl.audio import AudioError
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.folds import Split
from gmp_atl.formats import LOCAL_FEATURES, read_features, stream_features
from gmp_atl.frames import FRAME_SECONDS, HOP, SAMPLE_RATE, n_frames

_ENOUGH = {"cpu": 16.0, "cuda": math.inf}
"""Seconds of audio in a group, by kind of device, with which matrix products run at their full speed. On a GPU another
group costs more than padding."""
_SECONDS_TOGETHER = 160.0
"""Of audio, whose convolutions a GPU computes at once: 0.5 GB pass from the first to the second."""
_POOL = 50
"""Batches, at most, whose clips are sorted by length together: enough to leave little padding, few enough to mix."""


@torch.inference_mode()
def local_features(
    encoder: Encoder, waves: Sequence[np.ndarray], sources: Sequence[Path], *, normalise: bool
) -> list[np.ndarray]:
    """Output of the frozen convolutions for unpadded clips, as every stage reads it.

    Args:
        waves: Mono at 16 kHz, at least `MIN_SAMPLES` each.
        sources: Where they come from, for the message.
        normalise: Zero mean and unit variance first.

    Returns:
        (frames, dimensions) in float16 for each clip.

    Raises:
        AudioError: float16 cannot hold them.
    """
    device = encoder.masked_spec_embed.device
    waveforms = [torch.from_numpy(samples) for samples in waves]
    if normalise:
        waveforms = [(each - each.mean()) / torch.sqrt(each.var(correction=0) + 1e-7) for each in waveforms]
    if device.type == "cpu":
        found = [encoder.local_features(waveform).half() for waveform in waveforms]
        finite = [bool(features.isfinite().all()) for features in found]
    else:
        found, finite = _together(encoder, waveforms, device)
    if not all(finite):
        source = sources[finite.index(False)]
        raise AudioError(source, "local features exceed the range of float16", "the clip is not speech of usual level")
    return [features.numpy() for features in found]


def _together(encoder: Encoder, waveforms: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], list[bool]]:
    """Local features in float16, on the CPU, and whether they are finite; many clips at a time, as a GPU wants them."""
    found: list[Tensor] = [torch.empty(0)] * len(waveforms)
    finite = [True] * len(waveforms)
    crops = [Crop(index, 0, n_frames(len(waveform))) for index, waveform in enumerate(waveforms)]
    for group in within_budget(crops, _SECONDS_TOGETHER, device):
        indices, frames = [crop.index for crop in group], [crop.length for crop in group]
        if frames[0] * FRAME_SECONDS > _SECONDS_TOGETHER:  # it stands alone, and would take any amount of memory
            features = encoder.local_features(devices.send(waveforms[indices[0]], device))[None]
        else:
            padded = nn.utils.rnn.pad_sequence([waveforms[index] for index in indices], batch_first=True)
            lengths = torch.tensor([len(waveforms[index]) for index in indices])
            features = encoder.feature_extractor.together(*(devices.send(each, device) for each in (padded, lengths)))
        valid = [each[:length] for each, length in zip(features.half(), frames, strict=True)]
        are_finite = torch.stack([each.isfinite().all() for each in valid])
        for index, each in zip(indices, torch.split(torch.cat(valid).cpu(), frames), strict=True):
            found[index] = each
        for index, is_finite in zip(indices, are_finite.tolist(), strict=True):
            finite[index] = is_finite
    return found, finite


class Clips:
    """Clips of a split, in the order of its utterances, and their frames one after another in one tensor."""

    def __init__(self, ids: list[str], local: Sequence[np.ndarray]) -> None:
        """Args: local: local features per clip, float16, (frames, dimensions)."""
        self.ids = ids
        self.lengths = np.array([len(frames) for frames in local])
        """Frames per clip, (clips,)."""
        self.first = np.cumsum(self.lengths) - self.lengths
        """Where in `frames` each clip begins, (clips,)."""
        nothing = np.zeros((1, local[0].shape[1]), np.float16)
        self.frames = torch.from_numpy(np.concatenate([*local, nothing]))
        """Of all clips, (frames, dimensions) in float16; the last row is zero, which index -1, of padding, selects."""

    @property
    def local(self) -> list[np.ndarray]:
        """Local features per clip, as given."""
        return np.split(self.frames[:-1].cpu().numpy(), self.first[1:])

    def to(self, device: torch.device) -> Clips:
        """Move the frames to the device, where batches are then put together: 1 GB for a fold of IEMOCAP."""
        self.frames = self.frames.to(device)
        return self

    @classmethod
    def read(cls, path: Path, split: Split, *, encoder: str) -> Clips:
        """The local features of a split, and of nothing else; `encoder` is the one they must come from.

        Raises:
            UserError: an utterance is missing, or the features are those of another encoder.
        """
        _check_encoder(path, encoder)
        found, _ = read_features(LOCAL_FEATURES, path, set(split.ids))
        return cls(split.ids, [found[utterance] for utterance in split.ids])

    @classmethod
    def stream(cls, path: Path, split: Split, *, encoder: str) -> Iterator[Clips]:
        """As `read`, but one row group of the file at a time, in its order: the memory does not grow with the split."""
        _check_encoder(path, encoder)
        for found in stream_features(LOCAL_FEATURES, path, set(split.ids)):
            yield cls(list(found), list(found.values()))


def _check_encoder(path: Path, encoder: str) -> None:
    found = LOCAL_FEATURES.open(path).header["encoder"]
    if found != encoder:
        raise UserError(
            f"{path} holds features of {found}, but the model is built on {encoder}; delete it and run snakemake again."
        )


@dataclass(frozen=True)
class Batch:
    """Clips, possibly cropped, padded to the longest of them."""

    indices: list[int]
    """Positions in the `Clips`."""
    rows: Tensor
    """Positions of the frames in `Clips.frames`, (batch, frames), on the device; -1 where padded."""
    local: Tensor
    """(batch, frames, dimensions) in float32, zero where padded, on the device."""
    lengths: Tensor
    """Valid frames, (batch,), on the CPU."""

    def unpadded(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Position of each clip in the `Clips`, and what (batch, frames, ...) holds of its valid frames."""
        for index, frames, length in zip(self.indices, values, self.lengths.tolist(), strict=True):
            yield index, frames[:length]


@dataclass(frozen=True)
class Crop:
    """A stretch of frames of one clip."""

    index: int
    start: int
    length: int


def collate(clips: Clips, crops: Sequence[Crop]) -> Batch:
    """Pad crops into one batch, on the device that the clips are on."""
    indices = [crop.index for crop in crops]
    lengths = torch.tensor([crop.length for crop in crops])
    first = torch.from_numpy(clips.first[indices]) + torch.tensor([crop.start for crop in crops])
    steps = torch.arange(int(lengths.max()))
    rows = torch.where(steps < lengths[:, None], first[:, None] + steps, -1)
    rows = devices.send(rows, clips.frames.device)
    return Batch(indices, rows, clips.frames[rows].float(), lengths)


def epoch_batches(lengths: np.ndarray, size: int, generator: torch.Generator) -> list[list[int]]:
    """All clips once, in as few batches of at most `size` clips of similar length as there can be, in random order.

    Batches of an epoch are of about the same size. A small last one, in an update of its own, would give its clips many
    times the weight of others; and they would be the longest.
    """
    order = torch.randperm(len(lengths), generator=generator).numpy()
    n_batches = math.ceil(len(order) / size)
    pools = math.ceil(n_batches / _POOL)
    clips_of_pool = size * math.ceil(n_batches / pools)  # equal pools: a small last one would waste most
    batches = []
    for pool in range(0, len(order), clips_of_pool):
        members = order[pool : pool + clips_of_pool]
        members = members[np.argsort(lengths[members], kind="stable")]
        batches += [each.tolist() for each in np.array_split(members, math.ceil(len(members) / size))]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def within_budget(crops: Sequence[Crop], seconds: float, device: torch.device) -> Iterator[list[Crop]]:
    """Split crops into groups that, padded, hold at most `seconds` of audio; longer ones stand alone.

    A group that is large enough for the device takes no crop that would be padded by more than a seventh.
    """
    enough = _ENOUGH[device.type]
    group: list[Crop] = []
    for crop in sorted(crops, key=lambda crop: (crop.length, crop.index), reverse=True):
        longest = group[0].length if group else crop.length
        held = longest * len(group) * FRAME_SECONDS
        if group and (held + longest * FRAME_SECONDS > seconds or (held >= enough and 8 * crop.length < 7 * longest)):
            yield group
            group = []
        group.append(crop)
    if group:
        yield group


def whole(clips: Clips) -> list[Crop]:
    """Every clip, uncropped."""
    return [Crop(index, 0, length) for index, length in enumerate(clips.lengths.tolist())]


def passes(clips: Clips, seconds: float, device: torch.device) -> Iterator[Batch]:
    """All clips, whole, in batches that `within_budget` allows; in any order. The clips are on the device then."""
    clips.to(device)
    for crops in within_budget(whole(clips), seconds, device):
        yield collate(clips, crops)


def random_crops(clips: Clips, indices: Sequence[int], seconds: float, generator: torch.Generator) -> list[Crop]:
    """One crop per clip: at random where the clip is longer than `seconds`, the whole clip otherwise."""
    longest = max(1, round(seconds * SAMPLE_RATE) // HOP)
    crops = []
    for index in indices:
        frames = int(clips.lengths[index])
        length = min(frames, longest)
        start = int(torch.randint(frames - length + 1, (), generator=generator))
        crops.append(Crop(index, start, length))
    return crops
