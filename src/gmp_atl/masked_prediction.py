"""Masked prediction of pseudo-labels: model and loss of whatever trains by it (paper, Sec. 3.2, Fig. 1 b)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl.devices import send
from gmp_atl.encoder import Encoder
from gmp_atl.heads import CodebookHeads
from gmp_atl.training import Terms

_MULTIPLE = 512
"""A GPU is given a multiple of so many frames, some of which do not count: to prepare a product of a new size takes the
CPU longer than the product takes."""


class MaskedPredictor(nn.Module):
    """Encoder and one head per codebook."""

    def __init__(self, encoder: Encoder, projection: int, sizes: list[int], kind: str) -> None:
        """Args: projection: width within the heads; kind: linear or cosine, as `CodebookHeads` has them."""
        super().__init__()
        self.encoder = encoder
        self.heads = CodebookHeads(encoder.architecture.hidden_size, projection, sizes, kind)

    def forward(self, local: Tensor, lengths: Tensor, mask: Tensor, chosen: Tensor) -> dict[int, Tensor]:
        """Logits per codebook, (chosen frames, size); the frames chosen are counted through the batch, row by row."""
        hidden = self.encoder(local, lengths, mask=mask)
        return self.heads(hidden.flatten(0, 1)[chosen])


def masked_prediction(
    model: MaskedPredictor,
    local: Tensor,
    lengths: Tensor,
    mask: Tensor,
    targets: dict[int, Tensor],
    unmasked_weight: float,
) -> Terms:
    """Cross-entropy over the masked frames, summed over codebooks; optionally also over unmasked ones.

    Args:
        local: local features, (batch, frames, dimensions).
        lengths: valid frames per clip, (batch,), on the CPU.
        mask: (batch, frames) of bool, on the CPU, never true on padding.
        targets: per codebook the pseudo-label of every frame, (batch, frames), on the device; any on padding.
        unmasked_weight: of unmasked frames in loss and, if above zero, in the count, as in fairseq.
    """
    device = local.device
    candidates = torch.arange(mask.shape[1]) < lengths[:, None] if unmasked_weight > 0 else mask
    positions = candidates.flatten().nonzero()[:, 0]  # here, since a GPU would have to be waited for
    masked = mask.flatten()[positions]
    count, n_masked = len(positions), int(mask.sum())
    weights = torch.where(masked, 1.0, unmasked_weight)
    if device.type == "cuda":
        more = torch.arange(-count % _MULTIPLE) % mask.numel()
        positions = torch.cat([positions, more])
        masked, weights = (F.pad(each, (0, len(more))) for each in (masked, weights))
    chosen, is_masked, weight = (send(each, device) for each in (positions, masked, weights))
    logits = model(local, lengths, send(mask, device), chosen)
    loss = torch.zeros((), device=device)
    quantities = {}
    for size, predicted in logits.items():
        target = targets[size].flatten()[chosen]
        each = F.cross_entropy(predicted.float(), target, reduction="none")
        loss = loss + (each * weight).sum()
        correct = (predicted.argmax(1) == target) & is_masked
        quantities[f"masked_loss_{size}"] = ((each * is_masked).sum(), n_masked)
        quantities[f"masked_accuracy_{size}"] = (correct.sum(), n_masked)
    return Terms(loss, count, quantities)
