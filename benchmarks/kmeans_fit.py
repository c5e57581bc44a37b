"""Fitting a codebook: ours, against fairseq's `learn_kmeans.py`, which is scikit-learn's MiniBatchKMeans.

    python benchmarks/kmeans_fit.py [SIZE ...]                      # of frames of which no axis stands out
    python benchmarks/kmeans_fit.py [SIZE ...] --speech FOLDER      # of recordings

fairseq's settings: k-means++, max_iter 100, batches of 10,000, tol 0, max_no_improvement 100, n_init 20,
reassignment_ratio 0. Both are judged by the mean squared distance of 20,000 frames that were not fitted on. Each fit is
timed once, since scikit-learn's takes too long for repeats, after a small one to warm up. With 4096 centroids,
scikit-learn's 20 starts are extrapolated: its time is that of a fit with STARTS_MEASURED of them, whose inertia is
told, plus the others at what one adds to fits that end after a pass over the frames.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sides
import workload

FRAMES = {64: 100_000, 512: 100_000, 4096: 200_000}
STARTS, STARTS_MEASURED = 20, 2
HELD_OUT = 20_000
WARM_UP = 10_000
ITERATIONS = 20
"""Of ours: clustering.iterations."""


def options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description="k-means beside fairseq's way.")
    parser.add_argument("sizes", nargs="*", type=int, default=list(FRAMES), help="centroids (default: all)")
    parser.add_argument("--speech", type=Path, metavar="FOLDER", help="of recordings, at least 75 minutes")
    return parser.parse_args(sides.arguments())


def prepare(folder: Path) -> None:
    """Frames in an order of chance, float16."""
    random, count = np.random.default_rng(1), max(FRAMES.values()) + HELD_OUT
    speech = options().speech
    found = random.permutation(workload.speech(speech)) if speech else workload.clustered(count, random)
    if len(found) < count:
        raise SystemExit(f"{speech} has {len(found):,} frames, fewer than the {count:,} that are needed.")
    np.save(folder / "frames.npy", found[:count].astype(np.float16))


def frames(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """To fit on, and held out."""
    both = np.load(folder / "frames.npy", mmap_mode="r")[: FRAMES[size] + HELD_OUT].astype(np.float32)
    return both[:-HELD_OUT], both[-HELD_OUT:]


def fairseq(folder: Path, size: int) -> tuple[float, np.ndarray]:
    """Seconds and centroids of the peer's way."""
    from sklearn.cluster import MiniBatchKMeans

    def fit(fitted: np.ndarray, starts: int, passes: int = 100) -> tuple[float, np.ndarray]:
        model = MiniBatchKMeans(
            size,
            init="k-means++",
            max_iter=passes,
            batch_size=10_000,
            tol=0.0,
            max_no_improvement=100,
            n_init=starts,
            reassignment_ratio=0.0,
            random_state=0,
        )
        began = time.perf_counter()
        model.fit(fitted)
        return time.perf_counter() - began, model.cluster_centers_.astype(np.float32)

    fitted, _ = frames(folder, size)
    fit(fitted[:WARM_UP], 1)
    if size < 4096:
        return fit(fitted, STARTS)
    one, several = (fit(fitted, starts, passes=1)[0] for starts in (1, 1 + STARTS_MEASURED))
    per_start = max(0.0, several - one) / STARTS_MEASURED
    seconds, centroids = fit(fitted, STARTS_MEASURED)
    return seconds + (STARTS - STARTS_MEASURED) * per_start, centroids


def ours(folder: Path, size: int) -> tuple[float, np.ndarray]:
    """Seconds and centroids of the stage's way, its last pass for labels included."""
    from gmp_atl import kmeans

    def fit(fitted: np.ndarray) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        initial = kmeans.initial_centroids([fitted], len(fitted), size, np.random.default_rng(0))
        centroids, _ = kmeans.lloyd([fitted], initial, ITERATIONS)
        return time.perf_counter() - began, centroids

    fitted, _ = frames(folder, size)
    fit(fitted[:WARM_UP])
    return fit(fitted)


SIDES = {"fairseq": fairseq, "clustering": ours}


def inertia(folder: Path, size: int, centroids: np.ndarray) -> float:
    """Mean squared distance of held-out frames."""
    from gmp_atl import kmeans

    _, held_out = frames(folder, size)
    return kmeans.assign([held_out], centroids).inertia / len(held_out)


def main(sizes: list[int]) -> None:
    """Print one line per codebook."""
    print(sides.machine())
    print(
        "\n| Centroids | Frames | fairseq, s | clustering, s | times as fast | goal | held-out inertia, ours / theirs |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        sides.run(__file__, "prepare", folder)
        for size in sizes:
            found = {name: json.loads(sides.run(__file__, name, f"{folder}/{size}")) for name in SIDES}
            theirs, own = found["fairseq"], found["clustering"]
            ratio = f"{theirs['seconds'] / own['seconds']:.1f} | 20 | {own['inertia'] / theirs['inertia']:.4f}"
            print(
                f"| {size} | {FRAMES[size]:,} | {theirs['seconds']:.1f} | {own['seconds']:.1f} | {ratio} |", flush=True
            )


def side(name: str, path: Path) -> None:
    """What `main` starts anew: for `prepare` with a folder, for the others with the folder and the size."""
    if name == "prepare":
        prepare(path)
        return
    folder, size = path.parent, int(path.name)
    seconds, centroids = SIDES[name](folder, size)
    print(json.dumps({"seconds": seconds, "inertia": inertia(folder, size, centroids)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        side(sys.argv[2], Path(sys.argv[3]))
    else:
        main(options().sizes)
