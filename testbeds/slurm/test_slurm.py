"""The workflow on a real SLURM of one node: what its records say of jobs and GPUs, and what faults leave behind."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster as slurm
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "workflow" / "profiles"
PROFILE = yaml.safe_load((PROFILES / "slurm" / "config.yaml").read_text(encoding="utf-8"))
DOCUMENT = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
DAG = runpy.run_path(str(ROOT / "tests" / "test_workflow.py"))
# Every stage but the classical reference; retraining lasts long enough to be cut off.
TINY: dict[str, Any] = DAG["overlaid"](
    {
        "clustering": {"sizes": [8]},
        "retraining": {"updates": 40, "optimisation": {"batch_size": 4, "max_clip_seconds": 1.0}},
        "tables": {"numbers": [1, 2], "layers": [-3], "baseline": "none"},
    }
)
GPU_RULES = (
    *("local_features", "multitask", "layer_features", "clustering", "retraining", "finetuning"),
    *("evaluation", "examples"),
)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """A cluster that is up; it goes down with the tests, also when they are interrupted."""
    try:
        slurm.install()
    except slurm.Unavailable as reason:
        pytest.skip(str(reason))
    made = slurm.Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    # As Ctrl-C does: an error that runs through the fixtures.
    before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        made.start()
        yield made
    finally:
        made.stop()
        signal.signal(signal.SIGTERM, before)


class Run:
    """A folder of the small experiment, and Snakemake in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.results = folder, folder / "results" / "tiny"
        self.stand_in = folder / "stand-in"
        (self.stand_in / "faults").mkdir(parents=True)
        shutil.copy(ROOT / "config.yaml", folder)
        (folder / "overlay.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
        # `python` of the rules, and Snakemake's, are those of these tests.
        path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        self.environment = {**environment, "PATH": path}

    def with_stand_in(self) -> Run:
        """Jobs' `python` is bin/python, which computes on the CPU."""
        self.environment |= {
            "PATH": f"{Path(__file__).parent / 'bin'}{os.pathsep}{self.environment['PATH']}",
            "REAL_PYTHON": sys.executable,
            "STAND_IN": str(self.stand_in),
        }
        return self

    def fault(self, stage: str, fold: int, kind: str) -> None:
        """Have a job suffer a fault that bin/python knows."""
        (self.stand_in / "faults" / f"{stage}-fold{fold}").write_text(kind, encoding="utf-8")

    def take_over(self, other: Run, *, without: list[str]) -> None:
        """Copy the results of a finished run, but for some."""
        for name in (".snakemake", "results"):
            shutil.copytree(other.folder / name, self.folder / name)
        for name in without:
            for path in self.results.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self, profile: str, *arguments: str) -> subprocess.Popen[str]:
        """Start Snakemake; its output goes to a file."""
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
        command += ["--workflow-profile", str(PROFILES / profile), *arguments, "--configfile", "overlay.yaml"]
        if profile == "slurm":
            command += ["--slurm-init-seconds-before-status-checks", "6"]
        with (self.folder / "output.txt").open("w", encoding="utf-8") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=subprocess.STDOUT, text=True
            )

    def finish(self, process: subprocess.Popen[str], seconds: float = 3600) -> int:
        """Exit code of Snakemake; one that hangs is killed and fails the test."""
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"Snakemake hangs:\n{self.output}")

    @property
    def output(self) -> str:
        """What the last Snakemake printed."""
        return (self.folder / "output.txt").read_text(encoding="utf-8")

    def tables(self) -> dict[str, bytes]:
        """Content of each CSV."""
        return {path.name: path.read_bytes() for path in (self.results / "tables").glob("*.csv")}

    def leftovers(self) -> list[Path]:
        """Files of jobs that did not end well."""
        return [*self.results.rglob("*.part"), *self.results.rglob("checkpoint.safetensors")]


@pytest.fixture
def run(cluster: slurm.Cluster, tmp_path: Path) -> Run:
    return Run(tmp_path, cluster.environment)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same experiment without SLURM, finished."""
    made = Run(tmp_path_factory.mktemp("local"), dict(os.environ))
    code = made.finish(made.start("cpu", "--cores", "2"))
    assert code == 0, made.output
    return made


def wait_until(holds: Callable[[], object], process: subprocess.Popen[str] | None, run: Run) -> None:
    """Wait for something that Snakemake or SLURM brings about."""
    end = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < end, run.output
        assert process is None or process.poll() is None, run.output
        time.sleep(0.2)


def tries(cluster: slurm.Cluster, run: Run) -> dict[str, list[dict[str, str]]]:
    """SLURM's records of a run's jobs, by rule and wildcards, each with its tries in order."""
    found: dict[str, list[dict[str, str]]] = {}
    for record in cluster.jobs():
        if record["WorkDir"] == str(run.folder):
            found.setdefault(record["Comment"].removeprefix("rule_").replace("_wildcards", ""), []).append(record)
    return found


def test_a_job_whose_gpu_is_unusable_fails_loudly(cluster: slurm.Cluster, run: Run, local: Run) -> None:
    """Without bin/python: the null device that SLURM assigns is not CUDA's."""
    run.take_over(local, without=["local_features.parquet"])
    target = "results/tiny/local_features.parquet"
    assert run.finish(run.start("slurm", "--retries", "0", target)) != 0
    assert "FAILED local_features" in run.output
    assert "torch finds no usable CUDA device here" in run.output
    assert not (run.folder / target).exists()
    [[record]] = tries(cluster, run).values()
    assert (record["JobState"], record["TresPerJob"]) == ("FAILED", "gres:gpu:1")


def test_the_run_survives_its_jobs_faults_and_gives_the_tables_of_a_local_one(
    cluster: slurm.Cluster, run: Run, local: Run
) -> None:
    """In one run from audio to tables: a time limit in one fold, three other faults in the second."""
    run.with_stand_in()
    run.fault("retraining", 1, "slow")
    run.fault("layer_features", 2, "cancel")
    run.fault("clustering", 2, "fail")
    run.fault("finetuning", 2, "memory")
    # The profile's sizes, but those of two rules within reach of a test.
    sizes = {rule: dict(resources) for rule, resources in PROFILE["set-resources"].items()}
    sizes["retraining"]["runtime"] = "2 * attempt - 1"
    sizes["finetuning"]["mem_mb"] = "2000 * attempt"
    changed = [f"{rule}:{name}={size}" for rule, each in sizes.items() for name, size in each.items()]
    code = run.finish(run.start("slurm", "--set-resources", *changed))
    assert code == 0, run.output
    assert run.tables() == local.tables()
    assert run.tables()
    assert not run.leftovers()

    found = tries(cluster, run)
    ended = {job: [each["JobState"] for each in records] for job, records in found.items()}
    assert ended.pop("layer_features_main_2_1") == ["CANCELLED", "COMPLETED"]
    assert ended.pop("clustering_main_2_1_-3_8") == ["FAILED", "COMPLETED"]
    # Without cgroups SLURM kills the step, not the job, which fails then; its log has the reason.
    assert ended.pop("finetuning_main_-3_ams_2_1") == ["FAILED", "COMPLETED"]
    assert "Exceeded job memory limit" in Path(found["finetuning_main_-3_ams_2_1"][0]["StdErr"]).read_text()
    for fold in (1, 2):
        *cut_off, last = ended.pop(f"retraining_main_{fold}_1_-3")
        # On a busy machine a try may end before its first update, and an undisturbed job may need longer, too.
        assert last == "COMPLETED"
        assert set(cut_off) <= {"TIMEOUT"}
        assert cut_off or fold == 2
    assert set(map(tuple, ended.values())) == {("COMPLETED",)}
    log = (run.results / "logs/retraining/main/fold1/seed1/layer-3.log").read_text(encoding="utf-8")
    assert re.search(r"retraining goes on from update [1-9]\d* of 40", log)
    first, second = (each["TimeLimit"] for each in found["retraining_main_1_1_-3"][:2])
    assert (first, second) == ("00:01:00", "00:03:00")

    rules = {re.match(r"[a-z_]+?(?=_main|_\d|$)", job)[0] for job in found}  # type: ignore[index]
    assert rules == {*GPU_RULES, "synthesis", "corpus", "cluster_statistics"}
    devices = [line.split() for line in (run.stand_in / "devices").read_text(encoding="utf-8").splitlines()]
    given = {record["JobId"]: record.get("TresPerJob") for records in found.values() for record in records}
    gpu_jobs = {record["JobId"] for job, each in found.items() for record in each if job.startswith(GPU_RULES)}
    assert {job for job, tres in given.items() if tres} == gpu_jobs
    assert {given[job] for job in gpu_jobs} == {"gres:gpu:1"}
    assert {job for job, _ in devices} == gpu_jobs
    assert {device for _, device in devices} == {"0", "1"}


def test_snakemake_is_killed_and_slurmctld_restarted(cluster: slurm.Cluster, run: Run, local: Run) -> None:
    """On the last part of the DAG, with the commands that docs/slurm.md tells users to type."""
    [scancel] = re.findall(r"^    (squeue --me .*scancel)$", DOCUMENT, re.MULTILINE)
    run.take_over(local, without=["finetuning", "evaluations/main", "tables", "figures"])
    run.with_stand_in()
    for fold in (1, 2):
        run.fault("finetuning", fold, "hang")
    killed = run.start("slurm")
    devices = run.stand_in / "devices"
    wait_until(lambda: devices.exists() and len(devices.read_text().splitlines()) == 2, killed, run)
    killed.kill()
    killed.wait()
    assert {each["JobState"] for records in tries(cluster, run).values() for each in records} == {"RUNNING"}

    assert run.finish(run.start("slurm")) != 0
    assert "--unlock" in run.output
    subprocess.run(["bash", "-euo", "pipefail", "-c", scancel], env=run.environment, check=True)
    wait_until(lambda: not cluster.run("squeue", "-h").strip(), None, run)
    assert run.finish(run.start("slurm", "--unlock")) == 0, run.output

    again = run.start("slurm")
    wait_until(lambda: len(devices.read_text().splitlines()) == 4, again, run)
    cluster.stop_controller()
    time.sleep(3)
    cluster.start_controller()
    assert run.finish(again) == 0, run.output
    assert run.tables() == local.tables()
    assert not run.leftovers()
    found = tries(cluster, run)
    states = {job: [each["JobState"] for each in records] for job, records in found.items()}
    assert states.pop("examples") == ["COMPLETED"]
    assert states == {
        f"{rule}_main_-3_ams_{fold}_1": ["CANCELLED", "COMPLETED"] if rule == "finetuning" else ["COMPLETED"]
        for rule in ("finetuning", "evaluation")
        for fold in (1, 2)
    }
