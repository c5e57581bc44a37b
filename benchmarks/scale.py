"""Memory and time of the stages that read every frame, at IEMOCAP's size and at ten times that.

    python benchmarks/scale.py [FOLDER]

Random features; the fold that is trained on has four fifths of the frames. The encoder is a small one, as memory,
not speed, is asked for; k-means has 64 centroids of 768 dimensions and two iterations. Each part runs in a process of
its own, whose largest resident set is given. FOLDER (default: the system's temporary one) needs 24 GB free.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from gmp_atl.config import ClusteringConfig, ClusteringSlice, ComputeConfig, FoldsConfig, ScratchEncoderConfig
from gmp_atl.formats import LAYER_FEATURES, LOCAL_FEATURES, UTTERANCES, Format, feature_rows

CLIPS, SCALES = 5531, (1, 10)
"""Of IEMOCAP; lengths are drawn around its mean of 227 frames."""
CONFIG = ClusteringSlice(
    folds=FoldsConfig(by="session", held_out=[[f"S{n}"] for n in range(1, 6)]),
    compute=ComputeConfig(precision="float32"),
    clustering=ClusteringConfig(sizes=[64], iterations=2),
)


def lengths(scale: int) -> np.ndarray:
    """Frames per clip."""
    return np.random.default_rng(0).integers(28, 427, CLIPS * scale)


def ids(scale: int) -> list[str]:
    """Sorted by session, as in a corpus."""
    return [f"S{1 + 5 * n // (CLIPS * scale)}_{n}" for n in range(CLIPS * scale)]


def write_utterances(folder: Path, scale: int) -> None:
    """The utterance table."""
    rows = [
        {"id": name, "path": name, "speaker": name[:2], "gender": "female", "session": name[:2]}
        | {"emotion": "sad", "n_samples": 0, "text_type": "", "sha256": ""}
        for name in ids(scale)
    ]
    table = pa.Table.from_pylist(rows, schema=UTTERANCES.schema)
    UTTERANCES.write(folder / "utterances.parquet", table, corpus="random", complete=True, audio="none")


def row_groups(scale: int, dimensions: int, sessions: str) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Clips of random frames, about 32 MiB at a time."""
    pool = np.random.default_rng(1).normal(size=(50_000, dimensions)).astype(np.float16)
    starts = np.random.default_rng(2).integers(0, len(pool) - 427, CLIPS * scale)
    names, clips = [], []
    for name, start, length in zip(ids(scale), starts, lengths(scale), strict=True):
        if name[1] not in sessions:
            continue
        names.append(name)
        clips.append(pool[start : start + length])
        if sum(map(len, clips)) * dimensions * 2 >= 32 * 2**20:
            yield names, clips
            names, clips = [], []
    if names:
        yield names, clips


def write_features(kind: Format, path: Path, scale: int, sessions: str, **metadata: object) -> None:
    """Random features of the clips of some sessions."""
    with kind.writer(path, **metadata) as append:
        for names, clips in row_groups(scale, int(str(metadata["dimensions"])), sessions):
            append(feature_rows(names, clips))


def prepare_extraction(folder: Path, scale: int) -> None:
    """Local features of 512 dimensions, and an encoder of one layer, width 32."""
    from gmp_atl import model_files
    from gmp_atl.encoder import from_scratch

    write_utterances(folder, scale)
    local = folder / "local_features.parquet"
    write_features(LOCAL_FEATURES, local, scale, "12345", dimensions=512, encoder="small")
    small = ScratchEncoderConfig(layers=1, hidden_size=32, heads=2, feed_forward=32, conv_channels=512)
    model_files.save(from_scratch(small), folder / "encoder", encoder="small", fitted_on=[])


def extraction(folder: Path, _: int) -> None:
    """The stage layer_features."""
    from gmp_atl.stages.layer_features import layer_features

    layer_features(
        config=CONFIG,
        utterances=folder / "utterances.parquet",
        local_features=folder / "local_features.parquet",
        encoder=folder / "encoder",
        fold=1,
        layers=[-1],
        outputs=[folder / "layer.parquet"],
    )


def prepare_clustering(folder: Path, scale: int) -> None:
    """Layer features of 768 dimensions of the sessions that fold 1 trains on."""
    write_utterances(folder, scale)
    path = folder / "features.parquet"
    write_features(LAYER_FEATURES, path, scale, "2345", dimensions=768, layer=-3, encoder="small", fitted_on=[])


def clustering(folder: Path, _: int) -> None:
    """The stage clustering, which also writes the labels."""
    from gmp_atl.stages.clustering import clustering as stage

    stage(
        config=CONFIG,
        utterances=folder / "utterances.parquet",
        layer_features=folder / "features.parquet",
        fold=1,
        seed=1,
        layer=-3,
        size=64,
        centroids=folder / "centroids.safetensors",
        pseudo_labels=folder / "labels.parquet",
    )


PARTS: dict[str, Callable[[Path, int], None]] = {
    each.__name__: each for each in (prepare_extraction, extraction, prepare_clustering, clustering)
}


def measured(part: str, folder: Path, scale: int) -> dict[str, float]:
    """Seconds, seconds of processor time and MiB of one part, in a process of its own."""
    command = [sys.executable, __file__, part, str(folder), str(scale)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(run.stdout)
    return figures


def child(part: str, folder: Path, scale: int) -> None:
    """Run one part, and print its figures as JSON."""
    start = time.perf_counter()
    PARTS[part](folder, scale)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "mebibytes": usage.ru_maxrss / 1024,
    }
    print(json.dumps(figures))


def main() -> None:
    """Print one line per part and scale."""
    model = next(
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    )
    print(f"{model}, {os.cpu_count()} cores; load before the run {os.getloadavg()[0]:.1f}")
    print("| Stage | Frames of the fold | Peak memory, MiB | Processor time, s | Time, s |\n|---|---:|---:|---:|---:|")
    for part in ("extraction", "clustering"):
        for scale in SCALES:
            frames = int(lengths(scale)[[not name.startswith("S1") for name in ids(scale)]].sum())
            with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
                measured(f"prepare_{part}", Path(folder), scale)
                found = measured(part, Path(folder), scale)
            figures = f"{found['mebibytes']:,.0f} | {found['cpu']:,.0f} | {found['seconds']:,.0f}"
            print(f"| {part} | {frames:,} | {figures} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
