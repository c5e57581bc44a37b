"""Training step of the utterance head's BiLSTM: clips reversed one by one, against packed sequences.

    python benchmarks/bilstm.py

Both give the same states (tests/test_heads.py); packed sequences have no fast kernel on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gmp_atl.heads import BiLSTM

BATCH, FRAMES, WIDTH, HIDDEN = 32, 200, 768, 256


def milliseconds(step: Callable[[], torch.Tensor], repeats: int = 3) -> float:
    """Median of a forward and backward pass, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step().backward()  # type: ignore[no-untyped-call]
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    """Print both times and their ratio."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(BATCH, FRAMES, WIDTH, generator=generator)
    lengths = torch.randint(FRAMES // 2, FRAMES + 1, (BATCH,), generator=generator)
    lengths[0] = FRAMES
    packed = nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=True)
    ours = BiLSTM(WIDTH, HIDDEN, 1)

    def packed_step() -> torch.Tensor:
        sequence = pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
        states: torch.Tensor = pad_packed_sequence(packed(sequence)[0], batch_first=True)[0]
        return states.sum()

    theirs, own = milliseconds(packed_step), milliseconds(lambda: ours(frames, lengths).sum())
    print(
        f"{BATCH} clips of up to {FRAMES} frames x {WIDTH}, hidden {HIDDEN}, {torch.get_num_threads()} threads, float32"
    )
    print(f"packed {theirs:.0f} ms, reversed {own:.0f} ms: {theirs / own:.1f} times as fast")


if __name__ == "__main__":
    main()
