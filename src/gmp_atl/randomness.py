"""Explicit seeds: every random draw is a function of (seed, fold, stage, step) and of nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, fold: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed of its own for each combination."""
    text = f"{seed}/{fold}/{purpose}/{step}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class Key:
    """Names a training run and derives its random streams."""

    seed: int
    fold: int
    stage: str

    def derive(self, purpose: str, step: int = 0) -> int:
        """A 63-bit seed for one purpose at one step."""
        return derive(self.seed, self.fold, f"{self.stage}/{purpose}", step)

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """A CPU generator seeded by `derive`."""
        import torch

        return torch.Generator().manual_seed(self.derive(purpose, step))
