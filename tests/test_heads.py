"""Heads against loops over single clips and against the formulas as they are written down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gmp_atl.config import HeadConfig
from gmp_atl.heads import CodebookHeads, CosineCodebook, CosineLinearP, UtteranceHead

CONFIG = HeadConfig(lstm_hidden=5, projection=7)
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def utterance_head(config: HeadConfig = CONFIG, *, cosine: bool = False) -> UtteranceHead:
    torch.manual_seed(0)
    return UtteranceHead(6, config, {"emotion": 4, "gender": 2}, cosine=cosine)


def padded(lengths: list[int], padding: float) -> tuple[Tensor, list[Tensor]]:
    clips = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=padding), clips


@settings(max_examples=40)
@given(lengths=LENGTHS, layers=st.integers(1, 2), cosine=st.booleans())
def test_bilstm_and_mean_are_those_of_each_clip_alone(lengths, layers, cosine):
    """Of torch's own bidirectional LSTM, which takes no padding when it is given one clip."""
    head = utterance_head(HeadConfig(lstm_hidden=5, lstm_layers=layers, projection=7), cosine=cosine)
    reference = torch.nn.LSTM(6, 5, layers, batch_first=True, bidirectional=True)
    reference.load_state_dict(
        {
            f"{name.removesuffix('_l0')}_l{layer}{suffix}": tensor
            for direction, suffix in ((head.lstm.ahead, ""), (head.lstm.back, "_reverse"))
            for layer, lstm in enumerate(direction)
            for name, tensor in lstm.state_dict().items()
        }
    )
    hidden, clips = padded(lengths, padding=1e9)
    together = head(hidden, torch.tensor(lengths))
    for row, clip in enumerate(clips):
        pooled = reference(clip[None])[0][0].mean(dim=0)
        for task, projection in head.tasks.items():
            torch.testing.assert_close(together[task][row], projection(pooled), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", [-3.0, 1e30, float("inf"), float("nan")])
def test_padding_does_not_reach_the_logits(padding):
    lengths, head = [9, 2, 5], utterance_head()
    found, expected = (head(padded(lengths, value)[0], torch.tensor(lengths))["emotion"] for value in (padding, 0.0))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("padding", [-3.0, 1e30])
def test_padding_does_not_reach_the_gradients(padding):
    """Whatever is finite, as the encoder's padded frames are (tests/test_encoder.py)."""

    def gradients(value: float) -> list[Tensor]:
        head = utterance_head()
        hidden = padded([9, 2, 5], value)[0].requires_grad_()
        head(hidden, torch.tensor([9, 2, 5]))["emotion"].square().sum().backward()
        return [hidden.grad, *(parameter.grad for parameter in head.parameters() if parameter.grad is not None)]

    for found, expected in zip(gradients(padding), gradients(0.0), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_under_autocast_the_head_computes_in_float32(cosine):
    head, lengths = utterance_head(cosine=cosine), torch.tensor([9, 2, 5])
    hidden = padded([9, 2, 5], 0.0)[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden, lengths)["emotion"]
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(hidden.float(), lengths)["emotion"])


def test_the_projection_has_two_linear_layers_with_a_rectifier_between_them():
    projection = utterance_head().tasks["emotion"]
    reference = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 4))
    reference.load_state_dict(dict(zip(reference.state_dict(), projection.state_dict().values(), strict=True)))
    x = torch.randn(20, 10)
    torch.testing.assert_close(projection(x), reference(x))


# Cosines of AM-Softmax.


@given(scale=st.floats(1e-3, 1e3), width=st.integers(1, 16), seed=st.integers(0, 100))
def test_cosines_are_cosines_whatever_the_scale(scale, width, seed):
    torch.manual_seed(seed)
    head = CosineLinearP(8, width, 4)
    x = torch.randn(10, 8)
    projected = torch.relu(head.hidden(x))
    expected = F.cosine_similarity(projected[:, None], head.output.weight[None], dim=-1)
    with torch.no_grad():
        head.output.weight *= scale
    cosines = head(x)
    torch.testing.assert_close(cosines, expected, atol=1e-6, rtol=0)
    assert cosines.abs().max() <= 1 + 1e-6


def test_a_clip_whose_projection_is_all_zero_has_cosines_and_gradients_of_zero():
    """The rectifier may leave nothing; dividing by its norm must not make a NaN."""
    head = CosineLinearP(8, 5, 4)
    torch.nn.init.constant_(head.hidden.bias, -1e3)
    cosines = head(torch.randn(3, 8))
    cosines.sum().backward()
    assert not cosines.any()
    assert not head.hidden.weight.grad.any()


# Codebooks.


@given(size=st.integers(1, 30), frames=st.integers(1, 20), seed=st.integers(0, 100))
def test_the_cosine_codebook_is_the_comparison_with_each_codeword(size, frames, seed):
    """As fairseq and transformers write it, with codewords and frames repeated against each other."""
    torch.manual_seed(seed)
    head, x = CosineCodebook(6, 5, size), torch.randn(frames, 6)
    naive = F.cosine_similarity(head.projection(x)[:, None, :], head.codewords[None, :, :], dim=-1) / 0.1
    torch.testing.assert_close(head(x), naive, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_each_codebook_has_a_head_of_its_own_size_that_no_other_shares(kind):
    heads = CodebookHeads(6, 5, [4, 8, 16], kind)
    logits = heads(torch.randn(3, 6))
    assert {size: each.shape for size, each in logits.items()} == {4: (3, 4), 8: (3, 8), 16: (3, 16)}
    logits[8].sum().backward()
    touched = {name.split(".")[1] for name, p in heads.named_parameters() if p.grad is not None}
    assert touched == {"8"}
