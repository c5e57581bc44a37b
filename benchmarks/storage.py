"""A file of local features with and without compression: size, and processor time of writing and reading.

    python benchmarks/storage.py

The features are those of a random HuBERT with base's convolutions over synthetic speech, in one row group.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from gmp_atl import audio
from gmp_atl.config import ScratchEncoderConfig
from gmp_atl.corpora.synthetic import synthesise
from gmp_atl.encoder import from_scratch
from gmp_atl.formats import LOCAL_FEATURES, Format, feature_rows, read_features

CLIPS = 60


def features(folder: Path) -> dict[str, np.ndarray]:
    """Of some clips of the demo's corpus, float16, (frames, 512)."""
    synthesise(folder)
    encoder = from_scratch(ScratchEncoderConfig(layers=1, conv_channels=512)).eval()
    encoder.feature_extractor.arrange(torch.float32)
    paths = sorted(folder.rglob("Ses*.wav"))[:CLIPS]
    with torch.inference_mode():
        return {path.stem: encoder.local_features(torch.from_numpy(audio.load(path))).half().numpy() for path in paths}


def write(kind: Format, path: Path, clips: dict[str, np.ndarray]) -> None:
    """In one row group."""
    with kind.writer(path, dimensions=512, encoder="random") as append:
        append(feature_rows(list(clips), list(clips.values())))


def seconds(work: Callable[[], object]) -> float:
    """Processor time, the least of three after a warm-up."""
    times = []
    for _ in range(4):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


def main() -> None:
    """Print one line per compression."""
    with tempfile.TemporaryDirectory() as name:
        clips = features(Path(name) / "corpus")
        size = sum(frames.nbytes for frames in clips.values())
        path = Path(name) / "features.parquet"
        print(f"{len(clips)} clips, {size / 1e6:.0f} MB of float16, {torch.get_num_threads()} threads")
        print(
            "| Compression | Share of the size | Written, MB per second | Read, MB per second |\n|---|---:|---:|---:|"
        )
        for compression in ("none", "zstd", "lz4"):
            kind = replace(LOCAL_FEATURES, compression=compression)
            written = seconds(partial(write, kind, path, clips))
            read = seconds(partial(read_features, kind, path, clips))
            share, rates = path.stat().st_size / size, (size / 1e6 / written, size / 1e6 / read)
            print(f"| {compression} | {share:.2f} | {rates[0]:.0f} | {rates[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
