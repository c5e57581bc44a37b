"""Labels of three codebooks for every frame: the last pass of `clustering`, against fairseq's `dump_km_label.py`.

    python benchmarks/labels.py            # of frames of which no axis stands out: the worst case
    python benchmarks/labels.py FOLDER     # of recordings

fairseq's way runs once per codebook: utterance by utterance in NumPy, distances of all centroids, one line of text.
Ours is the last pass of a fit, in blocks, and writes a PSEUDO_LABELS file per codebook. The stage holds up to 4 GiB of
frames, those of a fold of IEMOCAP, from the beginning of its fit, so that to read them is no part of it. More than that
are read again at every pass, which is the second row. The codebooks of recordings are fitted to their frames
(`workload.speech`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import sides
import workload

SIZES = (64, 512, 4096)
SECONDS = 4000.0
"""Of speech at most: 200,000 frames."""
ITERATIONS = 5
"""Of the fits to recordings, which are not timed."""


def prepare(folder: Path) -> None:
    """Frames, as one array for fairseq and as one Parquet file, and codebooks."""
    from gmp_atl import kmeans
    from gmp_atl.formats import LAYER_FEATURES, feature_rows

    random = np.random.default_rng(1)
    ends = np.cumsum((workload.clip_seconds(SECONDS) * 50).astype(int))
    if sides.arguments():
        frames = workload.speech(Path(sides.arguments()[0]))[: ends[-1]]
        ends = ends[ends <= len(frames)]
        frames = frames[: ends[-1]]
        starts = (kmeans.initial_centroids([frames], len(frames), size, random) for size in SIZES)
        codebooks = [kmeans.lloyd([frames], start, ITERATIONS)[0] for start in starts]
    else:
        frames = workload.clustered(int(ends[-1]), random).astype(np.float16)
        codebooks = [workload.clustered(size, random) for size in SIZES]
    np.save(folder / "frames.npy", frames.astype(np.float32))
    np.save(folder / "lengths.npy", np.diff(ends, prepend=0))
    clips = np.split(frames, ends[:-1])
    header = {"dimensions": workload.DIMENSIONS, "layer": -3, "encoder": "random", "fitted_on": []}
    with LAYER_FEATURES.writer(folder / "frames.parquet", **header) as append:
        for first in range(0, len(clips), 100):
            some = clips[first : first + 100]
            append(feature_rows([f"clip{first + n:05d}" for n in range(len(some))], some))
    for size, codebook in zip(SIZES, codebooks, strict=True):
        np.save(folder / f"codebook{size}.npy", codebook)


def fairseq(folder: Path) -> sides.Work:
    """The peer's way."""
    lengths = np.load(folder / "lengths.npy")

    def label(size: int) -> None:
        centroids = np.load(folder / f"codebook{size}.npy").T
        norms = (centroids**2).sum(0, keepdims=True)
        frames = np.load(folder / "frames.npy", mmap_mode="r")
        with (folder / f"{size}.km").open("w", encoding="utf-8") as stream:
            for end, length in zip(np.cumsum(lengths), lengths, strict=True):
                x = frames[end - length : end]
                distances = (x**2).sum(1, keepdims=True) - 2 * np.matmul(x, centroids) + norms
                stream.write(" ".join(map(str, distances.argmin(axis=1).tolist())) + "\n")

    def work() -> float:
        for size in SIZES:
            label(size)
        return float(lengths.sum())

    return work


def ours(folder: Path, *, held: bool) -> sides.Work:
    """A pass per codebook, over frames that are held since the fit, or read from the file again."""
    import pyarrow as pa

    from gmp_atl import kmeans
    from gmp_atl.formats import LAYER_FEATURES, PSEUDO_LABELS, stream_features

    path = folder / "frames.parquet"
    table, _ = LAYER_FEATURES.read(path, columns=["id", "n_frames"])
    ids, lengths = table["id"].to_pylist(), table["n_frames"].to_numpy()
    count = int(lengths.sum())

    def read() -> Iterator[np.ndarray]:
        for clips in stream_features(LAYER_FEATURES, path, ids):
            yield from clips.values()

    frames = [kmeans.sample(read(), count, count, np.random.default_rng(0))] if held else []

    def label(size: int) -> None:
        labels = kmeans.assign(frames or read(), np.load(folder / f"codebook{size}.npy")).labels
        rows = {"id": ids, "labels": np.split(labels, np.cumsum(lengths)[:-1])}
        header = {"layer": -3, "size": size, "encoder": "random", "fitted_on": []}
        with PSEUDO_LABELS.writer(folder / f"{size}.parquet", **header) as append:
            append(pa.RecordBatch.from_pydict(rows, schema=PSEUDO_LABELS.schema))

    def work() -> float:
        for size in SIZES:
            label(size)
        return float(count)

    return work


def agreement(folder: Path) -> None:
    """Print the share of equal labels."""
    from gmp_atl.formats import PSEUDO_LABELS

    for size in SIZES:
        table, _ = PSEUDO_LABELS.read(folder / f"{size}.parquet")
        found = np.concatenate([each.as_py() for each in table["labels"]])
        theirs = np.array((folder / f"{size}.km").read_text(encoding="utf-8").split(), dtype=int)
        print(f"{size} centroids: {np.mean(found == theirs):.4%} of the labels are equal")


SIDES: dict[str, sides.Side] = {
    "fairseq": fairseq,
    "clustering": partial(ours, held=True),
    "clustering, frames read again": partial(ours, held=False),
}
COMPARISONS = [
    sides.Comparison("labels, three codebooks", "clustering", "fairseq", 5),
    sides.Comparison("labels, frames read again", "clustering, frames read again", "fairseq", 5),
]

if __name__ == "__main__":
    if len(sides.arguments()) > 1:
        raise SystemExit(f"One folder of recordings at most: {' '.join(sys.argv)}")
    sides.main(__file__, "Frames", SIDES, COMPARISONS, prepare, agreement)
