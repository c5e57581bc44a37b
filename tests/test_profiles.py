"""The profiles: each entry is explained, the DAG can be planned with each, and SLURM's sizes fit the rules."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROFILES = sorted((ROOT / "workflow" / "profiles").glob("*/config.yaml"))
SLURM = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.parent.name)
def test_every_entry_is_explained(profile: Path) -> None:
    """By a comment above it, or above the block of lines that it stands in."""
    explained = False
    for line in profile.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            explained = False
        elif line.lstrip().startswith("#"):
            explained = True
        elif not line.startswith(" "):
            assert explained, line


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.parent.name)
def test_the_demo_can_be_planned(tmp_path: Path, profile: Path) -> None:
    shutil.copy(ROOT / "config.yaml", tmp_path)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--dry-run"]
    command += ["--workflow-profile", str(profile.parent)]
    command += [] if profile.parent.name == "slurm" else ["--cores", "2"]
    command += ["--configfile", str(ROOT / "presets" / "demo.yaml")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    gpus = set(re.findall(r"--gpus (\d)", run.stdout + run.stderr))
    assert gpus == {"0" if profile.parent.name == "cpu" else "1"}


def resources_of_gpu_rules() -> dict[str, dict[str, int]]:
    """mem_mb and runtime that the rules themselves ask for."""
    found = {}
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        for name, body in re.findall(r"^rule (\w+):\n(.*?)(?=^\S|\Z)", path.read_text(), re.MULTILINE | re.DOTALL):
            if "gpu=1," in body:
                found[name] = {key: int(value) for key, value in re.findall(r"(mem_mb|runtime)=([\d_]+)", body)}
    return found


@pytest.mark.parametrize(("rule", "asked"), resources_of_gpu_rules().items())
def test_slurm_gives_a_gpu_rule_what_it_asks_for_and_more_at_each_try(rule: str, asked: dict[str, int]) -> None:
    assert asked.keys() == {"mem_mb", "runtime"}
    given: Any = SLURM["set-resources"][rule]
    for name, least in asked.items():
        tries = [eval(given[name], {"min": min, "attempt": attempt}) for attempt in (1, 2, 3)]
        assert least <= tries[0] < tries[1] <= tries[2]
