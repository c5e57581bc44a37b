"""Ways of the same work side by side: each in a process of its own, with equal threads, in turn.

A benchmark is a script with a function per side. It takes the folder of inputs and returns what is timed: a function
without arguments that does the work once, and returns how much that was (seconds of audio, frames). What comes before,
such as imports and loading inputs, is not timed. `main` starts the script anew for each side. Sides that are compared
warm up once and then take turns, and the ratio is the median of the turns': on a machine that is not always as fast,
sides that run one after the other would not have met the same machine.
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

import numpy as np
import workload

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

    rates: list[float]
    """Work per second of each repeat, which may be of different amounts."""
    mebibytes: float
    """Largest resident set of the process."""

    @property
    def rate(self) -> float:
        """Amount of work per second."""
        return statistics.median(self.rates)

    def times_as_fast(self, other: Measured) -> list[float]:
        """Ratios of the rates, turn by turn."""
        return sorted((np.array(self.rates) / np.array(other.rates)).tolist())


def threads() -> int:
    """Of each side: OMP_NUM_THREADS, or every core."""
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def arguments() -> list[str]:
    """Of the command line that the benchmark was started with, in the processes of its sides as well."""
    return sys.argv[4 if sys.argv[1:2] == ["side"] else 1 :]


def asked(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those with every argument of the command line in their name."""
    found = [row for row in comparisons if all(word in row.work for word in arguments())]
    if not found:
        raise SystemExit(f"No work is called {' '.join(arguments())}: {', '.join(row.work for row in comparisons)}.")
    return found


def machine() -> str:
    """Processor, cores, threads of a side, and how busy the machine is."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    native, load = workload.bfloat16_by(), os.getloadavg()[0]
    bfloat16 = f"bfloat16 by {native}" if native else "no bfloat16"
    return f"{model}, {bfloat16}, {os.cpu_count()} cores, {threads()} threads per side; load before the run {load:.1f}"


def main(
    script: str,
    unit: str,
    sides: Mapping[str, Side],
    comparisons: Sequence[Comparison],
    prepare: Callable[[Path], None],
    report: Callable[[Path], None] | None = None,
) -> None:
    """Measure every side and print tables; `report` looks at what they left in the folder.

    With `side NAME FOLDER` on the command line, as `main` starts it for each side, measure one.
    """
    if sys.argv[1:2] == ["side"]:
        folder = Path(sys.argv[3])
        if sys.argv[2] == "peak":
            _peak()
        elif sys.argv[2] == "prepare":
            prepare(folder)
        else:
            _measure(sides[sys.argv[2]](folder))
        return
    print(machine())
    print(run(script, "peak", "."), end="")
    with tempfile.TemporaryDirectory() as name:
        run(script, "prepare", name)
        print(f"\n| Side | {unit} per second | fastest / slowest turn | Peak memory, MiB |\n|---|---:|---:|---:|")
        found: dict[str, Measured] = {}
        for peer in dict.fromkeys(row.peer for row in comparisons):
            group = _take_turns(script, name, [peer, *(row.ours for row in comparisons if row.peer == peer)])
            for side, each in group.items():
                spread = max(each.rates) / min(each.rates)
                print(f"| {side} | {each.rate:,.2f} | {spread:.2f} | {each.mebibytes:,.0f} |", flush=True)
            found |= group
        print("\n| Work | Ours, times as fast as the peer's way: median (turns) | Goal | Memory, ours / peer's |")
        print("|---|---:|---:|---:|")
        for row in comparisons:
            ours, peer_s = found[row.ours], found[row.peer]
            ratios = ours.times_as_fast(peer_s)
            turns = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
            print(f"| {row.work} | {turns} | {row.goal:g} | {ours.mebibytes / peer_s.mebibytes:.2f} |", flush=True)
        if report:
            report(Path(name))


def _take_turns(script: str, folder: str, names: Sequence[str]) -> dict[str, Measured]:
    """Each side warms up alone; then all repeat in turn, so that what else the machine does meets each alike."""
    processes = {}
    for name in names:
        processes[name] = _start(script, name, folder)
        _answer(processes[name])
    turns = [{name: _answer(process, "repeat") for name, process in processes.items()} for _ in range(REPEATS)]
    found = {}
    for name, process in processes.items():
        process.communicate()
        mine = [turn[name] for turn in turns]
        found[name] = Measured([each["amount"] / each["seconds"] for each in mine], mine[-1]["mebibytes"])
    return found


def _answer(process: subprocess.Popen[str], request: str = "") -> dict[str, float]:
    assert process.stdin
    assert process.stdout
    if request:
        print(request, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise SystemExit(process.wait() or 1)
    return json.loads(line)


def _peak() -> None:
    """Print what the machine reaches in matrix products alone, by oneDNN, the limit of what follows."""
    import torch

    from gmp_atl.linear import linear

    size = 2048
    for precision in workload.precisions():
        left, right = torch.randn(2, size, size).to(getattr(torch, precision))
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            with torch.inference_mode():
                linear(left, right, None)
            seconds.append(time.perf_counter() - start)
        rate = 2 * size**3 / statistics.median(seconds[2:]) / 1e9
        print(f"Matrix products of {size} x {size} in {precision}: {rate:,.0f} GFLOP/s")


def _measure(work: Work) -> None:
    """Do the work once, and once more for every line of the standard input; each time tell what it took."""
    while True:
        start = time.perf_counter()
        amount = work()
        seconds = time.perf_counter() - start
        mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"amount": amount, "seconds": seconds, "mebibytes": mebibytes}), flush=True)
        if not sys.stdin.readline():
            return


def run(script: str, side: str, argument: str) -> str:
    """What the script prints when it is started anew for a side."""
    process = _start(script, side, argument)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)  # it has said why
    return output


def _start(script: str, side: str, argument: str) -> subprocess.Popen[str]:
    count = str(threads())
    environment = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    command = [sys.executable, script, "side", side, argument, *arguments()]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
