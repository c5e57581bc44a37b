"""Every rule in its own Conda environment gives the tables that .venv gives: `make test-conda`."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from channel import make_channel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEPT = ROOT / ".testbeds" / "conda" / "envs"
"""Environments stay here between runs; Snakemake makes one anew when its file has changed."""
NEEDED = 20e9
"""Bytes for all of them, and for pip's temporary files."""
DAG = runpy.run_path(str(ROOT / "tests" / "test_workflow.py"))
CONFIG: dict[str, Any] = DAG["overlaid"]({"tables": {"layers": [-3], "baseline": "egemaps"}})
ENVIRONMENTS = sorted(path.stem for path in (ROOT / "envs").iterdir())


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with the stand-in for conda and no .venv, whose `python` fails: a rule must bring its own."""
    folder = tmp_path_factory.mktemp("conda")
    base = folder / "base"
    command = [sys.executable, str(HERE / "conda.py"), str(base)]
    executable(base / "bin" / "conda", f'exec {shlex.join(command)} "$@"')
    shutil.copy(HERE / "activate", base / "bin" / "activate")
    executable(folder / "leak" / "python", "echo 'a rule runs python outside of its environment' >&2; exit 1")
    make_channel(base / "channels" / "conda-forge")
    return os.pathsep.join([str(folder / "leak"), str(base / "bin"), "/usr/bin", "/bin"])


def snakemake(folder: Path, path: str, *arguments: str) -> str:
    """Run with this PATH; returns what Snakemake said."""
    prepared = DAG["prepared"](folder, *arguments, config=CONFIG)
    environment = {name: value for name, value in prepared["env"].items() if name != "PYTHONPATH"}
    run = subprocess.run(
        **{**prepared, "env": {**environment, "PATH": path}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


@pytest.fixture(scope="module")
def environments(path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All of envs/*.yaml, made on the first run, by name."""
    KEPT.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(KEPT).free
    if not list(KEPT.glob("*.env_setup_done")) and free < NEEDED:
        pytest.fail(f"{KEPT} has {free / 1e9:.0f} GB free, and the environments need {NEEDED / 1e9:.0f} GB")
    options = ["--sdm", "conda", "--conda-prefix", str(KEPT)]
    folder = tmp_path_factory.mktemp("creation")
    snakemake(folder, path, *options, "--conda-create-envs-only")
    listed = snakemake(folder, path, *options, "--list-conda-envs")
    found = dict(re.findall(r"envs/(\w+)\.yaml\s+(\S+)", listed))
    return {name: KEPT / Path(location).name for name, location in found.items()}


def test_every_environment_is_made(environments: dict[str, Path]) -> None:
    assert sorted(environments) == ENVIRONMENTS


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment_holds_its_pins_and_nothing_else(environments: dict[str, Path], name: str) -> None:
    pins = re.findall(r"- ([a-z0-9-]+==\S+)", (ROOT / "envs" / f"{name}.yaml").read_text(encoding="utf-8"))
    command = [str(environments[name] / "bin" / "python"), "-m", "pip", "list", "--format", "freeze"]
    listed = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.lower().replace("_", "-").split()
    )
    assert sorted(pin for pin in listed if not pin.startswith("pip==")) == sorted(pins)


@pytest.fixture(scope="module")
def inside(path: str, environments: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run in the environments, and what Snakemake said."""
    folder = tmp_path_factory.mktemp("inside")
    return folder, snakemake(folder, path, "--sdm", "conda", "--conda-prefix", str(KEPT))


def test_every_job_activates_an_environment(inside: tuple[Path, str], environments: dict[str, Path]) -> None:
    _, said = inside
    activated = Counter(re.findall(r"Activating conda environment: (\S+)", said))
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE))
    assert {Path(location).name for location in activated} == {location.name for location in environments.values()}
    assert sum(activated.values()) == int(jobs["total"]) - int(jobs["all"])


def test_tables_are_those_of_a_run_without_conda(
    inside: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("without")
    snakemake(folder, f"{Path(sys.executable).parent}:/usr/bin:/bin")
    tables = {path.name: path.read_text() for path in (folder / "results/tiny/tables").glob("*.csv")}
    assert {"table1.csv", "table2.csv", "table3.csv", "table4.csv"} <= tables.keys()
    assert {path.name: path.read_text() for path in (inside[0] / "results/tiny/tables").glob("*.csv")} == tables
