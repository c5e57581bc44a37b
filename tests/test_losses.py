"""AM-Softmax against numbers worked out by hand and against the losses that it must reduce to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gmp_atl.config import HeadConfig
from gmp_atl.heads import UtteranceHead
from gmp_atl.losses import am_softmax

COSINES = st.lists(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


def test_a_case_by_hand():
    """s = 10, m = 0.2: the logits are 10 (0.5 - 0.2) = 3 and 10 x 0.1 = 1; for the other label 5 and -1."""
    cosines = torch.tensor([[0.5, 0.1], [0.5, 0.1]])
    loss = am_softmax(cosines, torch.tensor([0, 1]), scale=10.0, margin=0.2)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(6))], rel=1e-6)


def test_the_loss_of_zero_cosines_is_the_logarithm_of_1_plus_3_e_to_the_6():
    loss = am_softmax(torch.zeros(4, 4), torch.arange(4), scale=30.0, margin=0.2)
    assert loss.tolist() == pytest.approx([math.log(1 + 3 * math.exp(6))] * 4, rel=1e-6)


def test_training_begins_near_that_loss():
    """Random weights give cosines near zero; were they not normalised, or not scaled, the loss would be elsewhere."""
    torch.manual_seed(0)
    head = UtteranceHead(32, HeadConfig(), {"emotion": 4}, cosine=True)
    cosines = head(torch.randn(64, 20, 32), torch.full((64,), 20))["emotion"]
    loss = am_softmax(cosines, torch.arange(64) % 4, scale=30.0, margin=0.2).mean().item()
    assert loss == pytest.approx(math.log(1 + 3 * math.exp(6)), abs=2)


@given(COSINES, st.floats(0.5, 60))
def test_without_margin_it_is_cross_entropy_of_scaled_cosines(cosines, scale):
    cosines = torch.tensor(cosines)
    labels = torch.arange(len(cosines)) % 4
    expected = F.cross_entropy(scale * cosines, labels, reduction="none")
    torch.testing.assert_close(am_softmax(cosines, labels, scale, 0.0), expected)


@given(COSINES, st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_a_wider_margin_never_lowers_the_loss(cosines, margin, more):
    cosines = torch.tensor(cosines)
    labels = torch.arange(len(cosines)) % 4
    narrow, wide = (am_softmax(cosines, labels, 30.0, each) for each in (margin, margin + more))
    assert (wide >= narrow).all()
    assert (wide > narrow)[wide > 1e-3].all()  # below that both are rounded to nothing


def test_the_margin_is_taken_off_the_true_class_alone():
    cosines = torch.zeros(1, 3, requires_grad=True)
    am_softmax(cosines, torch.tensor([1]), scale=1.0, margin=100.0).backward()
    torch.testing.assert_close(cosines.grad, torch.tensor([[0.5, -1.0, 0.5]]))


def test_under_autocast_the_loss_is_computed_in_float32():
    """In bfloat16 30 (0.7 - 0.2) would be known to 1/16 only."""
    cosines = torch.tensor([[0.7, 0.3, -0.1, 0.2]])
    with torch.autocast("cpu", torch.bfloat16):
        loss = am_softmax(cosines, torch.tensor([0]), 30.0, 0.2)
        of_half = am_softmax(cosines.bfloat16(), torch.tensor([0]), 30.0, 0.2)
    assert loss.dtype == of_half.dtype == torch.float32
    assert torch.equal(loss, am_softmax(cosines, torch.tensor([0]), 30.0, 0.2))
    assert torch.equal(of_half, am_softmax(cosines.bfloat16().float(), torch.tensor([0]), 30.0, 0.2))
