"""Writing and resuming a checkpoint of HuBERT base in training: ours, against `torch.save` of the same state.

    python benchmarks/checkpoint.py [FOLDER]

FOLDER (default: the working directory) should be on the disk that results go to. The state is that of a run, made
without one: random weights, and Adam's as it begins. Both ways end on the disk (fsync).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gmp_atl.architecture import Architecture
from gmp_atl.clips import Clips
from gmp_atl.config import ComputeConfig, OptimisationConfig
from gmp_atl.encoder import Encoder
from gmp_atl.frames import CONV_KERNELS
from gmp_atl.randomness import Key
from gmp_atl.training import Trainer

BASE = Architecture(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    conv_dim=(512,) * len(CONV_KERNELS),
)
CADENCE_MINUTES = 10
"""The default of compute.checkpoint_minutes."""
UPDATES = 1000
"""In the history that the checkpoint carries."""


def trainer(checkpoint: Path) -> Trainer:
    """A training of HuBERT base before its first update; there are no clips to make one with."""
    torch.manual_seed(0)
    made = Trainer(
        Encoder(BASE),
        lambda *_: NotImplemented,
        Clips(["clip"], [np.zeros((1, 512), np.float16)]),
        config=OptimisationConfig(),
        compute=ComputeConfig(precision="float32"),
        key=Key(0, 1, "benchmark"),
        device=torch.device("cpu"),
        checkpoint=checkpoint,
        fingerprint="benchmark",
        updates=UPDATES,
    )
    made.progress.history = [(update, "loss", 0.0) for update in range(UPDATES)]
    return made


def seconds(action: Callable[[], None], repeats: int = 3) -> float:
    """Median, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(folder: Path) -> None:
    """Print seconds and MB of both ways, and what ours costs at the default cadence."""
    ours, theirs = folder / "checkpoint.safetensors", folder / "checkpoint.pt"
    training = trainer(ours)

    def torch_save() -> None:
        state = {
            "model": training.model.state_dict(),
            "moments": {name: vars(each) for name, each in training.moments.items()},
            "history": training.progress.history,
        }
        with theirs.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def torch_load() -> None:
        state = torch.load(theirs, weights_only=True)
        training.model.load_state_dict(state["model"])
        for name, moments in state["moments"].items():
            for slot, tensor in moments.items():
                getattr(training.moments[name], slot).copy_(tensor)

    written, peer_written = seconds(training._save), seconds(torch_save)
    resumed, peer_resumed = seconds(training._resume), seconds(torch_load)
    sizes = [path.stat().st_size / 1e6 for path in (ours, theirs)]
    count = sum(parameter.numel() for parameter in training.model.parameters()) / 1e6
    print(f"HuBERT base, {count:.0f} M parameters, float32, with Adam's state; {torch.get_num_threads()} threads")
    print(f"{'':14}{'write, s':>10}{'resume, s':>11}{'MB':>8}")
    print(f"{'checkpoint':14}{written:10.2f}{resumed:11.2f}{sizes[0]:8.0f}")
    print(f"{'torch.save':14}{peer_written:10.2f}{peer_resumed:11.2f}{sizes[1]:8.0f}")
    print(f"{'ratio':14}{written / peer_written:10.2f}{resumed / peer_resumed:11.2f}{sizes[0] / sizes[1]:8.2f}")
    share = written / (60 * CADENCE_MINUTES)
    print(f"Written every {CADENCE_MINUTES} minutes: {share:.2%} of the time.")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else ".") as folder:
        main(Path(folder))
