"""Ways of the same work side by side: each in a process of its own, with equal threads, one after another.

A benchmark is a script with a function per side. It takes the folder of inputs and returns what is timed: a function
without arguments that does the work once, and returns how much that was (seconds of audio, frames). What comes before,
such as imports and loading inputs, is not timed. One warm-up, then the median of some repeats; `main` starts the script
anew for each side.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Work = Callable[[], float]
Side = Callable[[Path], Work]
REPEATS = 3


@dataclass(frozen=True)
class Comparison:
    """A row of ratios."""

    work: str
    ours: str
    peer: str
    goal: float
    """Ours should be so many times as fast."""


@dataclass(frozen=True)
class Measured:
    """One side."""

    amount: float
    """Of work, per repeat."""
    seconds: list[float]
    """Of each repeat."""
    mebibytes: float
    """Largest resident set of the process."""

    @property
    def rate(self) -> float:
        """Amount of work per second."""
        return self.amount / statistics.median(self.seconds)


def threads() -> int:
    """Of each side: OMP_NUM_THREADS, or every core."""
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def machine() -> str:
    """Processor, cores, threads of a side, and how busy the machine is."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    amx = "with" if any("amx_bf16" in line for line in lines) else "without"
    load = os.getloadavg()[0]
    return f"{model}, {amx} AMX, {os.cpu_count()} cores, {threads()} threads per side; load before the run {load:.1f}"


def main(
    script: str,
    unit: str,
    sides: Mapping[str, Side],
    comparisons: Sequence[Comparison],
    prepare: Callable[[Path], None],
    report: Callable[[Path], None] | None = None,
) -> None:
    """Measure every side and print tables; `report` looks at what they left in the folder.

    With `side NAME FOLDER` on the command line, as `main` starts it for each side, measure one and print it as JSON.
    """
    if sys.argv[1:2] == ["side"]:
        folder = Path(sys.argv[3])
        if sys.argv[2] == "prepare":
            prepare(folder)
        else:
            print(json.dumps(vars(_measure(sides[sys.argv[2]](folder)))))
        return
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        child(script, "prepare", name)
        found = {}
        print(f"\n| Side | {unit} per second | slowest / fastest repeat | Peak memory, MiB |\n|---|---:|---:|---:|")
        for side in sides:
            each = found[side] = Measured(**json.loads(child(script, side, name)))
            spread = max(each.seconds) / min(each.seconds)
            print(f"| {side} | {each.rate:,.2f} | {spread:.2f} | {each.mebibytes:,.0f} |", flush=True)
        print(
            "\n| Work | Ours against the peer's, times as fast | Goal | Memory, ours / peer's |\n|---|---:|---:|---:|"
        )
        for row in comparisons:
            ours, peer = found[row.ours], found[row.peer]
            memory = ours.mebibytes / peer.mebibytes
            print(f"| {row.work} | {ours.rate / peer.rate:.1f} | {row.goal:g} | {memory:.2f} |", flush=True)
        if report:
            report(Path(name))


def _measure(work: Work) -> Measured:
    work()
    seconds, amount = [], 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        amount = work()
        seconds.append(time.perf_counter() - start)
    return Measured(amount, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def child(script: str, side: str, argument: str) -> str:
    """What the script prints when it is started anew for a side."""
    count = str(threads())
    environment = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    command = [sys.executable, script, "side", side, argument]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
