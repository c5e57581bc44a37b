"""Span masks over frames, drawn from an explicit generator and never on padding."""

from __future__ import annotations

import torch
from torch import Tensor


def span_mask(
    lengths: Tensor, probability: float, length: int, generator: torch.Generator, *, min_spans: int = 1
) -> Tensor:
    """Masks as HuBERT draws them (Hsu et al. 2021, Sec. II-C; Baevski et al. 2020, Sec. 3.1).

    Each clip gets probability x frames / length spans (rounded at random), with distinct starts but free to
    overlap: 0.80 x 10 masks 57 % of 500 frames. A clip always has at least one span; a clip that is no longer
    than a span has one alone, a frame shorter than the clip, so that some frame keeps its content (a clip of
    one frame is masked whole). Of a clip up to twice as long, several spans may leave none.

    Args:
        lengths: valid frames per clip, (batch,).
        probability: expected share of span frames, overlaps counted twice.
        length: frames of a span.
        min_spans: spans of a longer clip at least, as far as it has room for different ones.

    Returns:
        (batch, longest clip) of bool, on the CPU.
    """
    mask = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.bool)
    steps, masked = torch.arange(length), []
    for clip, frames in enumerate(lengths.tolist()):
        span = max(1, min(length, frames - 1))
        starts = frames - span + 1
        wanted = probability * frames / length + torch.rand((), generator=generator).item()
        count = 1 if frames <= length else min(max(min_spans, int(wanted)), starts)
        first = torch.randperm(starts, generator=generator)[:count]
        masked.append((first[:, None] + steps[:span]).flatten() + clip * mask.shape[1])
    mask.view(-1)[torch.cat(masked)] = True
    return mask
