"""Ten seeds in a row in one results folder: nothing piles up but what they make. Takes a quarter of an hour."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_workflow import TINY, prepared

from gmp_atl import provenance

pytestmark = pytest.mark.heavy

SEEDS = range(1, 11)
STAGES = {
    "retraining": {**TINY["retraining"], "updates": 2},
    "compute": {**TINY["compute"], "checkpoint_minutes": 10.0},
}


@dataclass(frozen=True)
class Run:
    """What one call of Snakemake and its jobs took."""

    memory: int
    """Largest resident memory of Snakemake's own process, bytes."""
    files: int
    """Most open files of it at once."""
    jobs: dict[str, int]
    """Largest memory of a job, MB, by stage."""
    disk: dict[str, int]
    """Bytes of all files, in results and in Snakemake's own folder."""
    left: list[Path]
    """Files that should be gone: features of layers, checkpoints, partial files."""


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def soak(folder: Path, seed: int) -> Run:
    settings: dict[str, Any] = {**TINY, **STAGES, "seeds": [seed]}
    started, memory, files = time.time(), 0, 0
    call = prepared(folder, config=settings)
    with subprocess.Popen(**call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory, files = max(memory, watched.memory_info().rss), max(files, watched.num_fds())
            except psutil.Error:
                break
            time.sleep(0.5)
        _, told = process.communicate()
    assert process.returncode == 0, told[-3000:]
    results = folder / "results" / "tiny"
    jobs: dict[str, int] = {}
    for path in (results / "evaluations" / "provenance").rglob("*.json"):
        if path.stat().st_mtime >= started:
            record = provenance.Record.model_validate_json(path.read_bytes())
            jobs[record.stage] = max(jobs.get(record.stage, 0), record.peak_memory_mb)
    kinds = ("layer_features/**/*.parquet", "**/checkpoint*", "**/*.part")
    left = [path for kind in kinds for path in results.glob(kind)]
    return Run(memory, files, jobs, {"results": size(results), "snakemake": size(folder / ".snakemake")}, left)


def test_ten_seeds_in_a_row_take_no_more_than_the_second(tmp_path: Path) -> None:
    """The first makes what all share; from the second on, every seed adds as much as the one before."""
    runs = []
    for seed in SEEDS:
        runs.append(soak(tmp_path, seed))
        run = runs[-1]
        print(
            f"seed {seed}: {run.memory / 2**20:.0f} MB, {run.files} files, {run.disk}, jobs {max(run.jobs.values())} MB"
        )
        assert run.left == []
    second, last = runs[1], runs[-1]
    assert last.memory < 1.1 * second.memory
    assert last.files <= second.files + 2
    assert last.jobs.keys() == second.jobs.keys()
    assert all(last.jobs[stage] < 1.1 * most + 20 for stage, most in second.jobs.items())
    for folder in ("results", "snakemake"):
        added = [after.disk[folder] - before.disk[folder] for before, after in pairwise(runs[1:])]
        assert max(added) < 1.1 * min(added) + 50_000, folder
