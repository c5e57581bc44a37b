"""Decoding: lengths are known before resampling, and nothing unusable passes."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp_atl import audio

RATES = (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audio") / "clip.wav"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(rate=st.sampled_from(RATES), length=st.integers(2, 3_000), channels=st.integers(1, 3))
def test_inspect_knows_the_length_that_load_returns(clip: Path, rate: int, length: int, channels: int) -> None:
    soundfile.write(clip, noise(length, channels), rate)
    info, samples = audio.inspect(clip), audio.load(clip)
    assert info.channels == channels
    assert samples.shape == (info.n_samples,)
    assert samples.dtype == np.float32


def test_length_is_exact_where_float32_rounds_it(clip: Path) -> None:
    length = 441 * 2_000 + pow(160, -1, 441)  # 16 kHz length: a whole number and 1/441
    samples = noise(length)
    soundfile.write(clip, samples, 44_100, subtype="FLOAT")
    rounded = torchaudio.functional.resample(torch.from_numpy(samples), 44_100, 16_000).numpy()
    exact = audio.load(clip)
    assert len(exact) == audio.inspect(clip).n_samples == -(-length * 160 // 441) == len(rounded) + 1
    np.testing.assert_allclose(exact[:-1], rounded, atol=1e-6)


def test_16_khz_mono_is_left_as_it_is(clip: Path) -> None:
    samples = noise(1_234)
    soundfile.write(clip, samples, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(audio.load(clip), samples)


def test_channels_are_averaged(clip: Path) -> None:
    samples = noise(1_000, 2)
    soundfile.write(clip, samples, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(audio.load(clip), samples.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_a_tone_keeps_its_frequency_and_level(clip: Path, rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(clip, tone, rate, subtype="FLOAT")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(audio.load(clip)[200:-200], expected[200:-200], atol=5e-3)


@pytest.mark.parametrize("suffix", ["flac", "ogg", "aiff"])
def test_other_containers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, noise(4_800), 48_000)
    assert audio.inspect(path).n_samples == len(audio.load(path)) == 1_600


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, noise(100_000), 16_000, subtype="PCM_16")
    cut(path, 60_000)
    with pytest.raises(audio.AudioError) as caught:
        audio.inspect(path)
    assert str(path) in str(caught.value)
    assert suffix == "flac" or "truncated" in caught.value.problem


def test_a_wav_written_to_a_pipe_has_no_length_and_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(1_000), 16_000, subtype="PCM_16")
    data = path.read_bytes()
    start = data.index(b"data") + 4
    path.write_bytes(data[:start] + b"\xff\xff\xff\xff" + data[start + 4 :])
    assert audio.inspect(path).n_samples == 1_000


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(clip: Path, value: float) -> None:
    samples = noise(1_000)
    samples[500] = value
    soundfile.write(clip, samples, 16_000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match="NaN or infinite"):
        audio.load(clip)


def test_no_samples(clip: Path) -> None:
    soundfile.write(clip, noise(0), 16_000)
    with pytest.raises(audio.AudioError, match="no samples"):
        audio.inspect(clip)


@pytest.mark.parametrize(("name", "content"), [("empty.wav", b""), ("text.wav", b"hello"), ("pcm.raw", b"\0" * 640)])
def test_not_audio(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(audio.AudioError, match=name):
        audio.inspect(path)


def test_not_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.wav", Path("/dev/zero")):
        with pytest.raises(audio.AudioError, match="not a regular file"):
            audio.inspect(path)


def test_a_rate_that_cannot_be_resampled_is_refused(clip: Path) -> None:
    soundfile.write(clip, noise(1_000), 44_101)
    with pytest.raises(audio.AudioError, match="44101 Hz"):
        audio.inspect(clip)


@pytest.mark.parametrize("rate", RATES)
def test_a_stream_has_the_samples_of_load_in_pieces(clip: Path, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 7_001)
    soundfile.write(clip, noise(int(3.3 * rate), 2), rate, subtype="FLOAT")
    pieces = list(audio.stream(clip, 1))
    assert [len(piece) for piece in pieces] == [16_000, 16_000, len(audio.load(clip)) - 32_000]
    np.testing.assert_allclose(np.concatenate(pieces), audio.load(clip), atol=1e-6)
    [whole] = audio.stream(clip, 3)
    np.testing.assert_array_equal(whole, audio.load(clip))


def test_a_stream_tells_at_its_end_that_the_file_is_truncated(clip: Path) -> None:
    soundfile.write(clip, noise(100_000), 16_000, subtype="PCM_16")
    cut(clip, 150_000)
    pieces = audio.stream(clip, 1)
    assert len(next(pieces)) == 16_000
    with pytest.raises(audio.AudioError, match="truncated"):
        list(pieces)
