"""GPU leases between real processes, over made-up pools of devices."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gmp_atl import leases
from gmp_atl.errors import NOTICE, UserError
from gmp_atl.leases import take_gpu

HOLDER = """
import os, sys, time
from pathlib import Path
from gmp_atl import leases
leases.LOCKS = Path(sys.argv[2], "locks")
leases.take_gpu(timeout=60)
assert not {"torch", "faiss"} & set(sys.modules)
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
work = sys.argv[1]
if work == "forever":
    time.sleep(600)
# Two holders of one device would collide on its file.
busy = os.path.join(sys.argv[2], sys.argv[3] + os.environ["CUDA_VISIBLE_DEVICES"])
os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
time.sleep(float(work))
os.unlink(busy)
"""


def holder(folder: Path, pool: str, work: str, *, allocation: str = "", share: int = 1) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    # TMPDIR may differ between the jobs of a run.
    environment |= {"TMPDIR": str(folder / "elsewhere"), "CUDA_VISIBLE_DEVICES": pool}
    environment["GMP_ATL_JOBS_PER_GPU"] = str(share)
    if allocation:
        environment["SLURM_JOB_ID"] = allocation
    command = [sys.executable, "-c", HOLDER, work, str(folder), f"job{allocation}-"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def _outside_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LOCKS", tmp_path / "locks")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_no_device_is_held_twice(tmp_path: Path) -> None:
    processes = [holder(tmp_path, "0,1,GPU-3f", "0.2") for _ in range(12)]
    outcomes = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, code in outcomes] == [0] * 12, [errors for (_, errors), _ in outcomes]
    assert {out.strip() for (out, _), _ in outcomes} == {"0", "1", "GPU-3f"}


def test_jobs_that_share_devices_take_one_each_before_any_is_shared(tmp_path: Path) -> None:
    processes: list[subprocess.Popen[str]] = []
    for _ in range(4):
        processes.append(holder(tmp_path, "0,1", "forever", share=2))
        assert processes[-1].stdout is not None
    devices = [process.stdout.readline().strip() for process in processes if process.stdout]
    waiting = holder(tmp_path, "0,1", "0", share=2)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=1.5)
    assert sorted(devices) == ["0", "0", "1", "1"]
    processes[0].kill()
    assert waiting.communicate(timeout=30)[0].strip() == devices[0]
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_holder_frees_its_device(tmp_path: Path, how: signal.Signals) -> None:
    first = holder(tmp_path, "7", "forever")
    assert first.stdout is not None
    assert first.stdout.readline().strip() == "7"
    second = holder(tmp_path, "7", "0")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1.5)
    first.send_signal(how)
    first.communicate()
    assert second.communicate(timeout=30)[0].strip() == "7"
    assert second.returncode == 0


def test_waiting_is_told_and_ends_with_a_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = holder(tmp_path, "0", "forever")
    assert first.stdout is not None
    first.stdout.readline()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(leases, "_REMIND_SECONDS", 1.0)
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match=r"No GPU of 0 became free within 3 s.*--resources gpu=1"):
        take_gpu(timeout=3)
    told = [record for record in caplog.records if record.getMessage() == "waiting for one of the GPUs 0"]
    assert len(told) >= 2, "at once, and again"
    assert {record.levelno for record in told} == {NOTICE}
    first.kill()
    first.communicate()


@pytest.mark.parametrize("pool", ["", "-1"])
def test_no_device_is_an_error(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", pool)
    with pytest.raises(UserError, match="workflow/profiles/cpu"):
        take_gpu()


@pytest.mark.parametrize(("listed", "taken"), [("echo GPU-1; echo GPU-2", "GPU-1"), ("exit 9", None)])
def test_devices_that_are_not_named_are_those_of_nvidia_smi(
    listed: str, taken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{listed}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # Set first, so that it is taken back after the test: a lease changes the environment for good.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(leases, "_held", [])
    if taken is None:
        with pytest.raises(UserError, match="workflow/profiles/cpu"):
            take_gpu(timeout=0)
    else:
        take_gpu(timeout=0)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
        for descriptor in leases._held:
            os.close(descriptor)


@pytest.mark.parametrize("pool", ["2", "", None])
def test_a_slurm_job_with_one_device_or_none_leases_nothing(
    pool: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    if pool is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", pool)
    take_gpu(timeout=0)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == pool
    assert not list(tmp_path.iterdir())


def test_jobs_of_one_allocation_share_its_devices_out(tmp_path: Path) -> None:
    """Two allocations on one host, each with devices 0 and 1 of its own, and four jobs in each."""
    first, second = ([holder(tmp_path, "0,1", "0.2", allocation=job) for _ in range(4)] for job in ("17", "18"))
    for processes in (first, second):
        outcomes = [(process.communicate(timeout=60), process.returncode) for process in processes]
        assert [code for _, code in outcomes] == [0] * 4, [errors for (_, errors), _ in outcomes]
        assert {out.strip() for (out, _), _ in outcomes} <= {"0", "1"}
    assert {folder.name for folder in tmp_path.glob("locks*")} == {"locks-slurm17", "locks-slurm18"}


def test_a_full_allocation_holds_up_no_other(tmp_path: Path) -> None:
    holders = [holder(tmp_path, "0,1", "forever", allocation="17") for _ in range(2)]
    assert {process.stdout.readline().strip() for process in holders if process.stdout} == {"0", "1"}
    other = holder(tmp_path, "0,1", "0", allocation="18")
    assert other.communicate(timeout=30)[0].strip() == "0"
    for process in holders:
        process.kill()
        process.communicate()
