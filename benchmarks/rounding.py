"""What bfloat16 changes in hidden states of real speech, and in the labels that k-means gives them.

    python benchmarks/rounding.py FOLDER    # of audio files, for example EmoDB's wav/

The HuBERT of this package is run in float32 and in bfloat16, from samples to every layer. Codebooks are fitted to the
float32 states of a layer; the labels that change are those of frames that are nearest to another centroid in bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import sides
import workload

from gmp_atl import kmeans, recordings

SIZES = (64, 512)
ITERATIONS = 20
LAYERS = 12
"""Of this package's HuBERT."""


def changed(exact: np.ndarray, rounded: np.ndarray, size: int) -> float:
    """Share of the labels."""
    initial = kmeans.initial_centroids([exact], len(exact), size, np.random.default_rng(0))
    centroids, assignment = kmeans.lloyd([exact], initial, ITERATIONS)
    return float(np.mean(kmeans.assign([rounded], centroids).labels != assignment.labels))


def main(folder: Path) -> None:
    """Print a row per layer."""
    paths = recordings.find([folder])
    exact, rounded = (workload.hidden_states(paths, LAYERS, precision) for precision in ("float32", "bfloat16"))
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
    parser.add_argument("folder", type=Path, help="of audio files")
    main(parser.parse_args().folder)
