"""Time of `snakemake -n` for plans of several sizes: the paper's experiment with more and more seeds.

    python benchmarks/dry_run.py

In a temporary folder, with an empty one in place of IEMOCAP's release; medians of three.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = (1, 9, 22)
"""Each adds 285 jobs."""


def plan(folder: Path, seeds: int) -> tuple[int, float]:
    """Jobs, and seconds of a dry run."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--dry-run", "--quiet", "rules", "--cores", "1", "--resources", "gpu=0", "--workflow-profile", "none"]
    command += ["--config", f"seeds={list(range(1, seeds + 1))}"]
    start = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    seconds = time.perf_counter() - start
    [jobs] = set(re.findall(r"^total +(\d+)$", run.stdout + run.stderr, re.MULTILINE))
    return int(jobs), seconds


def main() -> None:
    """Print one line per size."""
    print(f"{os.cpu_count()} cores; load before the run {os.getloadavg()[0]:.1f}")
    print("| Seeds | Jobs | Dry run, s |\n|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "config.yaml", folder)
        (folder / "data/IEMOCAP_full_release").mkdir(parents=True)
        for seeds in SEEDS:
            runs = [plan(folder, seeds) for _ in range(3)]
            print(f"| {seeds} | {runs[0][0]:,} | {statistics.median(each[1] for each in runs):.1f} |", flush=True)


if __name__ == "__main__":
    main()
