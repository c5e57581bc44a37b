"""Batches: every clip once, little padding, a budget that holds, and crops that are slices."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmp_atl import clips as clips_module
from gmp_atl import formats
from gmp_atl.audio import AudioError
from gmp_atl.clips import Clips, Crop, collate, epoch_batches, random_crops, whole, within_budget
from gmp_atl.config import FoldsConfig
from gmp_atl.errors import UserError
from gmp_atl.folds import everything, training_split
from gmp_atl.formats import LAYER_FEATURES, append_features, feature_rows, read_features, stream_features
from gmp_atl.frames import FRAME_SECONDS

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 80), min_size=1, max_size=40)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips_of(lengths: list[int]) -> Clips:
    """Clips whose values say where they are from: (clip, frame)."""
    frames = [np.stack([np.full(n, clip), np.arange(n)], axis=1).astype(np.float16) for clip, n in enumerate(lengths)]
    return Clips([f"clip{number}" for number in range(len(lengths))], frames)


# Convolutions as a GPU computes them, here on the CPU.


@pytest.mark.parametrize("seconds", [0.1, 0.6, 100.0])
def test_local_features_of_many_clips_are_those_of_each_alone(tiny_encoder, monkeypatch, seconds):
    monkeypatch.setattr(clips_module, "_SECONDS_TOGETHER", seconds)
    random = np.random.default_rng(0)
    waves = [torch.from_numpy(random.normal(0, 0.1, n).astype(np.float32)) for n in (4000, 400, 9000, 4001, 8700)]
    with torch.inference_mode():
        found, finite = clips_module._together(tiny_encoder, waves, CPU)
        alone = [tiny_encoder.local_features(wave) for wave in waves]
    assert finite == [True] * len(waves)
    for one, other in zip(found, alone, strict=True):
        assert one.dtype is torch.float16
        torch.testing.assert_close(one.float(), other, atol=1e-3, rtol=1e-3)


def test_a_clip_longer_than_a_group_is_computed_in_stretches(tiny_encoder, monkeypatch):
    """What it takes of a GPU's memory is not to grow with a recording."""
    together, seconds = tiny_encoder.feature_extractor.together, []

    def watch(audio, lengths):
        seconds.append(audio.numel() / 16_000)
        return together(audio, lengths)

    monkeypatch.setattr(clips_module, "_SECONDS_TOGETHER", 0.5)
    monkeypatch.setattr(tiny_encoder.feature_extractor, "together", watch)
    with torch.inference_mode():
        found, _ = clips_module._together(tiny_encoder, [torch.ones(n) for n in (4000, 32_000, 4000)], CPU)
    assert list(map(len, found)) == [12, 99, 12]
    assert 0 < max(seconds) <= 0.52


def test_a_clip_whose_features_float16_cannot_hold_is_named(tiny_encoder):
    sources = [Path("a.wav"), Path("b.wav"), Path("c.wav")]
    waves = [np.full(8000, value, np.float32) for value in (0.1, np.inf, 0.1)]
    with torch.inference_mode():
        _, finite = clips_module._together(tiny_encoder, [torch.from_numpy(wave) for wave in waves], CPU)
    assert finite == [True, False, True]
    with pytest.raises(AudioError, match=r"b\.wav.*float16"):
        clips_module.local_features(tiny_encoder, waves, sources, normalise=False)


# Epochs.


@given(count=st.integers(1, 900), size=st.integers(1, 64), seed=st.integers(0, 9))
def test_an_epoch_has_every_clip_once_in_batches_of_one_size(count, size, seed):
    lengths = np.random.default_rng(seed).integers(1, 500, count)
    batches = epoch_batches(lengths, size, generator(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert len(batches) == math.ceil(count / size)
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= size
    # What is missing from the last pool is shared out among its batches, which are 25 at least where there are others.
    assert max(sizes) - min(sizes) <= max(1, math.ceil(size / 25))


def test_epochs_differ_by_their_generator_alone():
    lengths = np.arange(200)
    first, again, other = (epoch_batches(lengths, 8, generator(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def padding_share(batches: list[list[int]], lengths: np.ndarray, budget: float) -> float:
    """Of the frames that go through the transformer in crops of at most 10 s."""
    crops = [Crop(index, 0, int(min(length, 500))) for index, length in enumerate(lengths)]
    groups = [group for batch in batches for group in within_budget([crops[index] for index in batch], budget, CPU)]
    padded = sum(max(crop.length for crop in group) * len(group) for group in groups)
    return 1 - sum(crop.length for crop in crops) / padded


def test_batches_of_similar_length_waste_little_on_padding():
    """Durations as IEMOCAP's: median 3.58 s, mean 4.55 s, from 0.585 s to 34.1 s, in a fold of 4400 clips."""
    sigma = math.sqrt(2 * math.log(4.55 / 3.58))
    seconds = np.random.default_rng(0).lognormal(math.log(3.58), sigma, 4400)
    lengths = (seconds * 50).clip(28, 1706).astype(int)
    random_batches = [batch.tolist() for batch in torch.randperm(len(lengths), generator=generator()).split(64)]
    assert padding_share(epoch_batches(lengths, 64, generator()), lengths, budget=320.0) <= 0.03
    # Clips of any lengths are padded by half in one pass, and by little in passes of similar ones.
    assert padding_share(random_batches, lengths, budget=320.0) <= 0.07
    assert np.mean([1 - lengths[batch].clip(max=500).mean() / lengths[batch].max() for batch in random_batches]) > 0.5


def test_batches_of_similar_length_still_meet_other_clips_in_every_epoch():
    """Were all clips sorted together, a batch would be the same in every epoch."""
    lengths = np.random.default_rng(0).integers(28, 1706, 4400)
    partners = [
        next(set(batch) for batch in epoch_batches(lengths, 64, generator(epoch)) if 0 in batch) for epoch in range(20)
    ]
    assert len(set.union(*partners)) > 100


# Budget.


@given(lengths=LENGTHS, frames=st.integers(1, 300))
def test_a_budget_holds_and_loses_no_crop(lengths, frames):
    crops = [Crop(index, 0, length) for index, length in enumerate(lengths)]
    groups = list(within_budget(crops, frames * FRAME_SECONDS, CPU))
    assert sorted((crop for group in groups for crop in group), key=lambda crop: crop.index) == crops
    for group in groups:
        assert len(group) == 1 or max(crop.length for crop in group) * len(group) <= frames


def test_what_fits_stays_together():
    crops = [Crop(index, 0, 10) for index in range(12)]
    assert [len(group) for group in within_budget(crops, 40 * FRAME_SECONDS, CPU)] == [4, 4, 4]
    assert [len(group) for group in within_budget(crops, 1e9, CPU)] == [12]


# Crops.


@given(lengths=LENGTHS, frames=st.integers(1, 90), seed=st.integers(0, 99))
def test_a_crop_lies_within_its_clip_and_is_as_long_as_it_may_be(lengths, frames, seed):
    crops = random_crops(clips_of(lengths), range(len(lengths)), (frames + 0.5) * FRAME_SECONDS, generator(seed))
    for crop, length in zip(crops, lengths, strict=True):
        assert crop.length == min(length, frames)
        assert 0 <= crop.start <= length - crop.length


def test_ten_seconds_are_500_frames_and_every_start_occurs():
    clips = clips_of([503])
    crops = [random_crops(clips, [0], 10.0, generator(seed))[0] for seed in range(60)]
    assert {crop.length for crop in crops} == {500}
    assert {crop.start for crop in crops} == {0, 1, 2, 3}


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_a_batch_holds_slices_and_zeros(lengths, seed):
    clips = clips_of(lengths)
    crops = random_crops(clips, range(len(lengths)), 20 * FRAME_SECONDS, generator(seed))
    batch = collate(clips, crops)
    assert batch.local.dtype == torch.float32
    for local, rows, crop in zip(batch.local, batch.rows, crops, strict=True):
        assert local[: crop.length, 0].eq(crop.index).all()
        assert local[: crop.length, 1].tolist() == list(range(crop.start, crop.start + crop.length))
        assert torch.equal(local[: crop.length], clips.frames[rows[: crop.length]].float())
        assert not local[crop.length :].any()
        assert rows[crop.length :].eq(-1).all()


def test_testing_sees_whole_clips():
    assert [(crop.start, crop.length) for crop in whole(clips_of([3, 2000]))] == [(0, 3), (0, 2000)]


# Files.

FOLDS = FoldsConfig(by="session", held_out=[["S1"], ["S2"], ["S3"]])


def test_clips_of_a_split_are_read_in_its_order_and_no_others(inputs):
    split = training_split(inputs.utterances, FOLDS, 2)
    clips = Clips.read(inputs.local_features, split, encoder="tiny random HuBERT")
    assert clips.ids == inputs.ids("S1", "S3")
    assert all(np.array_equal(clips.local[row], inputs.frames[name]) for row, name in enumerate(clips.ids))
    assert clips.lengths.tolist() == [len(inputs.frames[name]) for name in clips.ids]


@pytest.mark.parametrize(
    "reading", [Clips.read, lambda *given, **named: next(Clips.stream(*given, **named))], ids=["read", "stream"]
)
def test_features_of_another_encoder_are_refused(inputs, reading):
    with pytest.raises(UserError, match="features of tiny random HuBERT, but the model is built on another"):
        reading(inputs.local_features, everything(inputs.utterances), encoder="another")


def test_a_clip_without_features_is_named(inputs, tmp_path, write_utterances):
    row = {"id": "S1_new", "speaker": "S1f", "session": "S1"}
    with pytest.raises(UserError, match="lacks 1 clips, S1_new among them"):
        Clips.read(
            inputs.local_features,
            everything(write_utterances(tmp_path / "utterances.parquet", [row])),
            encoder="tiny random HuBERT",
        )


def test_features_of_a_row_group_are_read_without_copies(tmp_path):
    """One clip lies behind the other, as in the column, whichever are asked for."""
    frames = [np.random.default_rng(n).normal(size=(n, 4)).astype(np.float16) for n in (3, 0, 5, 2)]
    with LAYER_FEATURES.writer(tmp_path / "f", dimensions=4, layer=-1, encoder="", fitted_on=[]) as append:
        append(feature_rows(["a", "b", "c", "d"], frames))
    [clips] = stream_features(LAYER_FEATURES, tmp_path / "f", {"a", "c", "d"})
    assert list(clips) == ["a", "c", "d"]
    for found, expected in zip(clips.values(), (frames[0], frames[2], frames[3]), strict=True):
        np.testing.assert_array_equal(found, expected)
    starts = [clip.ctypes.data for clip in clips.values()]
    assert np.diff(starts).tolist() == [frames[0].nbytes, frames[2].nbytes]


def test_clips_too_large_for_one_row_group_are_parted_and_none_is_lost(tmp_path, monkeypatch):
    """A column of bytes holds less than 2 GiB, which a few dozen hours would pass."""
    frames = [np.full((length, 4), length, np.float16) for length in (3, 0, 20, 5, 2, 4)]
    ids = [f"clip{number}" for number in range(len(frames))]
    monkeypatch.setattr(formats, "_LARGEST_GROUP", 8 * 8)
    groups = []
    append_features(groups.append, ids, frames)
    assert [group["id"].to_pylist() for group in groups] == [
        ["clip0", "clip1"],
        ["clip2"],
        ["clip3", "clip4"],
        ["clip5"],
    ]
    with LAYER_FEATURES.writer(tmp_path / "f", dimensions=4, layer=-1, encoder="", fitted_on=[]) as append:
        append_features(append, ids, frames)
        append_features(append, [], [])
    found = read_features(LAYER_FEATURES, tmp_path / "f", ids)[0]
    for utterance, expected in zip(ids, frames, strict=True):
        np.testing.assert_array_equal(found[utterance], expected)
