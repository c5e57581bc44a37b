"""AM-Softmax (paper, Eqs. 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def am_softmax(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Loss of each clip: cross-entropy of scaled cosines with the margin taken off the true class.

    Args:
        cosines: cos(theta) of Eq. 3, (batch, classes); testing uses these, without margin.
        labels: (batch,) of int64.
        scale: s of Eq. 2.
        margin: m of Eq. 2; 0 leaves plain scaled-cosine cross-entropy.

    Returns:
        (batch,) in float32.
    """
    with torch.autocast(cosines.device.type, enabled=False):
        shifted = cosines.float() - margin * F.one_hot(labels, cosines.shape[1])
        return F.cross_entropy(scale * shifted, labels, reduction="none")
