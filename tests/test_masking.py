"""Span masks: of the share that HuBERT masks, never on padding, never none, and drawn from their generator alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from gmp_atl.masking import span_mask


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def share(probability: float, length: int, frames: int, draws: int) -> float:
    """Of masked frames, over many clips of the same length."""
    return span_mask(torch.full((draws,), frames), probability, length, generator()).float().mean().item()


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    probability=st.floats(0.01, 1.0),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**62),
)
@example(lengths=[1], probability=0.8, length=10, seed=0)
@example(lengths=[1, 10, 11, 120], probability=0.01, length=10, seed=0)
def test_every_clip_has_a_masked_frame_and_no_padding_is_masked(lengths, probability, length, seed):
    mask = span_mask(torch.tensor(lengths), probability, length, generator(seed))
    assert mask.shape == (len(lengths), max(lengths))
    for row, frames in zip(mask, lengths, strict=True):
        assert row[:frames].any()
        assert not row[frames:].any()


@given(frames=st.integers(2, 20), excess=st.integers(0, 10), probability=st.floats(0.01, 1.0), spans=st.integers(1, 3))
def test_a_clip_no_longer_than_a_span_keeps_one_frame(frames, excess, probability, spans):
    mask = span_mask(torch.tensor([frames]), probability, frames + excess, generator(), min_spans=spans)
    assert mask.sum() == frames - 1


@given(frames=st.integers(2, 200), length=st.integers(2, 20), seed=st.integers(0, 1000))
def test_masked_stretches_are_at_least_a_span_long(frames, length, seed):
    mask = span_mask(torch.tensor([frames]), 0.5, length, generator(seed))[0].int()
    edges = torch.diff(mask, prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    stretches = (edges == -1).nonzero() - (edges == 1).nonzero()
    assert stretches.min() >= min(length, frames - 1)


def test_hubert_masks_57_percent_of_the_frames():
    assert share(0.80, 10, frames=500, draws=400) == pytest.approx(0.57, abs=0.01)


@pytest.mark.parametrize(
    ("probability", "length", "frames"),
    [(0.80, 10, 500), (0.80, 10, 60), (0.06, 15, 500), (0.3, 5, 100), (0.05, 10, 28)],
)
def test_the_masked_share_is_that_of_transformers(probability, length, frames):
    """Where the clip is longer than the span; transformers rounds the number of spans once per call."""
    np.random.seed(0)  # noqa: NPY002  transformers draws from the global generator
    theirs = [_compute_mask_indices((1, frames), probability, length, min_masks=1).mean() for _ in range(1500)]
    assert share(probability, length, frames, draws=1500) == pytest.approx(np.mean(theirs), abs=0.01)


def test_only_the_given_generator_is_drawn_from():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    span_mask(torch.tensor([50, 7]), 0.8, 10, generator())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


def test_equal_generators_give_equal_masks_and_other_seeds_others():
    lengths = torch.tensor([300, 200])
    first, again, other = (span_mask(lengths, 0.8, 10, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=6), at=st.integers(1, 5))
def test_masks_do_not_depend_on_how_clips_are_grouped(lengths, at):
    """So that accumulating gradients over small groups trains on the same masks as one large batch."""
    together = span_mask(torch.tensor(lengths), 0.8, 10, generator())
    grouped = generator()
    parts = [span_mask(torch.tensor(part), 0.8, 10, grouped) for part in (lengths[:at], lengths[at:]) if part]
    apart = [row for part in parts for row in part]
    for whole, row, frames in zip(together, apart, lengths, strict=True):
        assert torch.equal(whole[:frames], row[:frames])


def test_min_spans_gives_the_share_of_p_tapt() -> None:
    """0.06 x 15 with two spans at least, as transformers' min_masks: 13 % of clips with IEMOCAP's median and mean."""
    generator = torch.Generator().manual_seed(0)
    seconds = torch.exp(torch.randn(4000, generator=generator) * 0.69 + 1.275).clamp(0.6, 10)
    lengths = (50 * seconds).long()
    two = span_mask(lengths, 0.06, 15, generator, min_spans=2)
    one = span_mask(lengths, 0.06, 15, generator)
    assert two.sum() / lengths.sum() == pytest.approx(0.13, abs=0.01)
    assert one.sum() < two.sum()
