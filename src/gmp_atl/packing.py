"""Batches without their padding, in which attention keeps each clip to itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from gmp_atl import devices


@dataclass(frozen=True)
class Packing:
    """Clips without their padding, frame after frame."""

    rows: Tensor
    """Of the valid frames, counted through the padded batch, (valid frames,)."""
    starts: Tensor
    """Of each clip among them, and their number, (clips + 1,) of int32; more if rounded."""
    clips: int
    longest: int
    """Frames of the longest clip: the padded batch is (clips, longest, ...)."""
    size: int
    """Frames once packed."""
    bound: int
    """No clip has more frames."""

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> Packing:
        """Args: lengths: valid frames per clip, on the CPU."""
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        return cls._with(lengths, starts, device, int(lengths.sum()), int(lengths.max()))

    @classmethod
    def rounded(cls, lengths: Tensor, device: torch.device) -> Packing:
        """With zeros behind the last clip, as one more clip, so that few sizes occur, each again and again.

        Likewise of few numbers of clips, those added having no frames.
        """
        longest, size = int(lengths.max()), int(lengths.sum())
        step = max(64, 1 << size.bit_length() >> 6)  # 32 sizes up to the next power of two
        rounded = -(-size // step) * step
        starts = torch.full((-(-(len(lengths) + 2) // 64) * 64,), rounded, dtype=torch.int32)
        starts[: len(lengths) + 1] = F.pad(lengths.cumsum(0), (1, 0))
        bound = max(512, 1 << (longest - 1).bit_length(), step)
        return cls._with(lengths, starts, device, rounded, bound)

    @classmethod
    def _with(cls, lengths: Tensor, starts: Tensor, device: torch.device, size: int, bound: int) -> Packing:
        longest = int(lengths.max())
        rows = (torch.arange(longest) < lengths[:, None]).flatten().nonzero()[:, 0]
        return cls(devices.send(rows, device), devices.send(starts, device), len(lengths), longest, size, bound)

    @property
    def kind(self) -> tuple[int, int, int]:
        """Where it is equal, attention runs the same kernels."""
        return self.size, len(self.starts), self.bound

    def pack(self, padded: Tensor) -> Tensor:
        """(clips, frames, ...) to (size, ...)."""
        packed = padded.flatten(0, 1)[self.rows]
        return F.pad(packed, (0, 0) * (packed.ndim - 1) + (0, self.size - len(self.rows)))

    def unpack(self, packed: Tensor) -> Tensor:
        """The reverse, zero where padded."""
        padded = packed.new_zeros(self.clips * self.longest, *packed.shape[1:])
        padded = padded.index_copy(0, self.rows, packed[: len(self.rows)])
        return padded.view(self.clips, self.longest, *packed.shape[1:])

    def attention(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Each clip within itself: (valid frames, heads, width of a head) each, and so the result."""
        if query.device.type == "cpu":
            found = []
            for start, end in pairwise(self.starts.tolist()):
                q, k, v = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
                found.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)[0].transpose(0, 1))
            return torch.cat(found)
        # torch.nn.attention.varlen_attn is this without dropout.
        around = self.starts, self.starts, self.bound, self.bound
        mixed: Tensor = torch.ops.aten._flash_attention_forward(query, key, value, *around, dropout, False, False)[0]
        return mixed


Padding = Tensor | Packing | None
"""How attention ignores padding: a mask of the valid frames, (clips, 1, 1, frames) of bool; packed clips; or None if no
clip is padded."""
