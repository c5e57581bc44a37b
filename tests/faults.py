"""A stage in a process of its own, with a fault: what test_faults runs, forked from a process that has all imported."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmp_atl.cli import STAGES
from gmp_atl.code import code_hash

# Before the fork: half of a small job's time, and what would have the collector copy all memory in each job.
for _stage in STAGES:
    code_hash(_stage)
gc.freeze()

PRELOADED = [
    *(f"gmp_atl.stages.{stage}" for stage in ("archive", "baseline", "cluster_statistics", "corpus", "evaluation")),
    *(
        f"gmp_atl.stages.{stage}"
        for stage in ("examples", "figures", "layer_features", "local_features", "multitask", "pretrained")
    ),
    *(f"gmp_atl.stages.{stage}" for stage in ("retraining", "synthesis", "tables", "clustering", "finetuning")),
    *(f"gmp_atl.stages.{stage}" for stage in ("speech", "mfcc", "pretraining", "probe", "probes", "pretrain")),
    *("gmp_atl.cli", "gmp_atl.provenance", "matplotlib.figure", "matplotlib.backends.backend_svg"),
    *("sklearn.impute", "sklearn.pipeline", "sklearn.preprocessing", "sklearn.svm"),
    *("opensmile", "pyarrow.pandas_compat", "pydantic.dataclasses", "faults"),
]
_ON_FILES = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.scandir"}
"""Audit events of Python that come before what they name; writes through pyarrow and safetensors have none."""


@dataclass(frozen=True)
class Fault:
    """What befalls a job; nothing by default."""

    event: int = -1
    """Number of the operation on the job's files before which `signal` comes; -1 is none."""
    signal: int = signal.SIGKILL
    memory: int | None = None
    """Bytes of address space that it may take beyond those at its start."""
    without_temp: bool = False
    """Whether no folder for temporary files can be written."""


def job(arguments: Sequence[str], folder: Path, report: Path, fault: Fault) -> None:
    """Run a stage as `gmp-atl` does; what it says, and what it took, goes to files that begin with `report`."""
    with report.with_suffix(".log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from gmp_atl import cli, training
    from gmp_atl.corpora import synthetic

    training.CHECKPOINT_MINUTES = 0.0  # a checkpoint after each update
    synthetic.EMOTIONS = {label: replace(synthetic.EMOTIONS[label], count=1) for label in ("ang", "sad")}
    if fault.without_temp:
        tempfile._candidate_tempdir_list = lambda: ["/proc"]  # type: ignore[attr-defined]
    events = [0]
    sys.addaudithook(_counter(str(folder), events, fault))
    started = _address_space("VmSize")
    if fault.memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (started + fault.memory,) * 2)
    code = cli.main(arguments)
    cost = {
        "events": events[0],
        "memory": _address_space("VmPeak") - started,
        "compiler": "torch._dynamo" in sys.modules,
    }
    report.with_suffix(".json").write_text(json.dumps(cost))
    sys.exit(code)


def _counter(folder: str, events: list[int], fault: Fault) -> Callable[[str, tuple[Any, ...]], None]:
    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _ON_FILES and str(arguments[0]).startswith(folder):
            if events[0] == fault.event:
                os.kill(os.getpid(), fault.signal)
            events[0] += 1

    return count


def _address_space(name: str) -> int:
    """Bytes; Linux counts VmPeak anew in a process that was forked."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
