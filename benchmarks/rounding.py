"""What bfloat16 changes in hidden states of real speech, and in the labels that k-means gives them.

    python benchmarks/rounding.py FOLDER    # of WAV files, for example EmoDB's wav/

The HuBERT of this package is run in float32 and in bfloat16, from samples to every layer. Codebooks are fitted to the
float32 states of a layer; the labels that change are those of frames that are nearest to another centroid in bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import sides
import torch

from gmp_atl import audio, kmeans
from gmp_atl import encoder as encoders
from gmp_atl.clips import Clips, local_features, passes
from gmp_atl.config import PACKAGED_ENCODER

CPU = torch.device("cpu")
SIZES = (64, 512)
ITERATIONS = 20


@torch.inference_mode()
def hidden_states(paths: list[Path], dtype: torch.dtype) -> dict[int, np.ndarray]:
    """Of all frames, one clip after another, per layer: (frames, dimensions) in float32."""
    encoder = encoders.load(PACKAGED_ENCODER)[0].eval()
    encoder.cast(dtype)
    waves = [audio.load(path) for path in paths]
    clips = Clips([path.stem for path in paths], local_features(encoder, waves, paths, normalise=False))
    layers = range(-1, -1 - encoder.architecture.num_hidden_layers, -1)
    found = {layer: [np.empty(0)] * len(paths) for layer in layers}
    for batch in passes(clips, 320.0, CPU):
        for layer, hidden in encoder.hidden_states(batch.local, batch.lengths, layers).items():
            for row, index, length in zip(hidden.float().numpy(), batch.indices, batch.lengths.tolist(), strict=True):
                found[layer][index] = row[:length]
    return {layer: np.concatenate(of_clips) for layer, of_clips in found.items()}


def changed(exact: np.ndarray, rounded: np.ndarray, size: int) -> float:
    """Share of the labels."""
    initial = kmeans.initial_centroids([exact], len(exact), size, np.random.default_rng(0))
    centroids, assignment = kmeans.lloyd([exact], initial, ITERATIONS)
    return float(np.mean(kmeans.assign([rounded], centroids).labels != assignment.labels))


def main(folder: Path) -> None:
    """Print a row per layer."""
    paths = sorted(folder.glob("*.wav"))
    if not paths:
        raise SystemExit(f"{folder} holds no WAV files.")
    exact, rounded = (hidden_states(paths, dtype) for dtype in (torch.float32, torch.bfloat16))
    print(f"{sides.machine()}\n\n{len(paths)} clips, {len(exact[-1]):,} frames\n")
    print(f"| Layer | smallest cosine | mean cosine | {' | '.join(f'% of {size} labels change' for size in SIZES)} |")
    print("|---" * (3 + len(SIZES)) + "|")
    for layer in exact:
        cosines = np.einsum("fd,fd->f", exact[layer], rounded[layer])
        cosines /= np.linalg.norm(exact[layer], axis=1) * np.linalg.norm(rounded[layer], axis=1)
        shares = " | ".join(f"{100 * changed(exact[layer], rounded[layer], size):.2f}" for size in SIZES)
        print(f"| {layer} | {cosines.min():.5f} | {cosines.mean():.5f} | {shares} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What bfloat16 changes.")
    parser.add_argument("folder", type=Path, help="of WAV files")
    main(parser.parse_args().folder)
