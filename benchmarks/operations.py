"""Operations that are computed otherwise than torch or numpy would, beside theirs, on the CPU.

    python benchmarks/operations.py

Those of training forward and backward, those of extraction and evaluation forward. The results are the same, of dropout
in distribution (tests/test_encoder.py, test_linear.py, test_heads.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import sides
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gmp_atl import convolutions, encoder, nearest
from gmp_atl.config import ScratchEncoderConfig
from gmp_atl.heads import BiLSTM

CLIPS, FRAMES, REPEATS = 16, 200, 5
BASE, SMALL = ScratchEncoderConfig(hidden_size=768, feed_forward=3072), ScratchEncoderConfig(hidden_size=192)
"""Widths of HuBERT base and of the HuBERT of this package, both with 16 groups."""


def seconds(operation: Callable[[Tensor], Tensor], of: Tensor) -> float:
    """A forward pass, and a backward one where there are gradients."""
    start = time.perf_counter()
    result = operation(of)
    if result.requires_grad:
        result.sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def compare(name: str, torchs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], of: Tensor) -> None:
    """Print a row: medians of turns, after one to warm up."""
    turns = [(seconds(torchs, of), seconds(ours, of)) for _ in range(1 + REPEATS)][1:]
    theirs, own = (1000 * statistics.median(times) for times in zip(*turns, strict=True))
    ratio = statistics.median(before / after for before, after in turns)
    print(f"| {name} | {theirs:.3g} | {own:.3g} | {ratio:.1f} |", flush=True)


def bilstm() -> None:
    """Clips reversed one by one, against packed sequences, for which torch has no fast kernel on the CPU."""
    lengths = torch.randint(FRAMES // 2, FRAMES + 1, (CLIPS,))
    lengths[0] = FRAMES
    packed, ours = nn.LSTM(768, 256, batch_first=True, bidirectional=True), BiLSTM(768, 256, 1)

    def torchs(frames: Tensor) -> Tensor:
        sequence = pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
        states: Tensor = pad_packed_sequence(packed(sequence)[0], batch_first=True)[0]
        return states

    frames = torch.randn(CLIPS, FRAMES, 768)
    compare("BiLSTM of 2 x 256 over padded clips", torchs, lambda frames: ours(frames, lengths), frames)


def positions(config: ScratchEncoderConfig) -> None:
    """By Fourier transform, against the convolution."""
    embedding = encoder.from_scratch(config).encoder.pos_conv_embed
    hidden = torch.randn(CLIPS, FRAMES, config.hidden_size, requires_grad=True)

    def torchs(hidden: Tensor) -> Tensor:
        return F.gelu(embedding.conv(hidden.mT)[..., :FRAMES])

    compare(f"positions of {config.hidden_size} channels", torchs, embedding, hidden)
    embedding.arrange()
    with torch.inference_mode():
        compare(f"positions of {config.hidden_size} channels, forward", torchs, embedding, hidden)


@torch.inference_mode()
def convolution() -> None:
    """One of the convolutions of base over a clip, as matrix products."""
    layer = convolutions.ConvLayer(encoder.from_scratch(BASE).architecture, 512, 512, kernel=3, stride=2, first=False)
    layer.conv.weight.data = layer.conv.weight.transpose(1, 2).contiguous().transpose(1, 2)  # as arranged
    hidden = torch.randn(4096, 512)
    compare(
        f"convolution of 512 channels, {len(hidden)} frames to {len(layer(hidden))}, forward",
        lambda hidden: F.gelu(layer.conv(hidden.T[None])[0].T),
        layer,
        hidden,
    )


@torch.inference_mode()
def feed_forward() -> None:
    """The larger half of a layer's feed-forward network, by oneDNN, against MKL and GELU after it."""
    layer = encoder.FeedForward(encoder.from_scratch(BASE).architecture).intermediate_dense
    hidden = torch.randn(CLIPS * FRAMES, 768)
    compare(
        f"linear layer of {layer.in_features} to {layer.out_features} with GELU, forward",
        lambda hidden: F.gelu(F.linear(hidden, layer.weight, layer.bias)),
        layer,
        hidden,
    )


def dropout(precision: torch.dtype) -> None:
    """One random number for four elements, against one for each."""
    hidden = torch.randn(CLIPS, FRAMES, 3072, dtype=precision, requires_grad=True)
    name = f"dropout of {hidden.numel() / 1e6:.0f} million elements in {str(precision).removeprefix('torch.')}"
    compare(name, lambda hidden: F.dropout(hidden, 0.1), lambda hidden: encoder.drop(hidden, 0.1), hidden)


def widening() -> None:
    """As many frames as k-means takes at once, against numpy's cast; both in one thread."""
    frames = torch.randn(256, 768).half()
    compare(
        f"{len(frames)} frames of 768 from float16 to float32 (numpy's)",
        lambda frames: torch.from_numpy(frames.numpy().astype(np.float32)),
        lambda frames: torch.from_numpy(nearest.widened(frames.numpy())),
        frames,
    )


def main() -> None:
    """Print all rows."""
    torch.manual_seed(0)
    torch.set_num_threads(sides.threads())
    print(f"{sides.machine()}\n\n{CLIPS} clips of {FRAMES} frames; float32 but where it is said")
    print("| Operation | theirs, ms | ours, ms | times as fast |\n|---|---:|---:|---:|")
    bilstm()
    feed_forward()
    convolution()
    positions(BASE)
    positions(SMALL)
    dropout(torch.float32)
    dropout(torch.bfloat16)
    widening()


if __name__ == "__main__":
    main()
