"""GPU leases between real processes, over made-up pools of devices."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gmp_atl import leases
from gmp_atl.errors import NOTICE, UserError
from gmp_atl.leases import take_gpu

HOLDER = """
import logging, os, sys, time
from pathlib import Path
from gmp_atl import leases
logging.basicConfig(level=logging.INFO, format="%(message)s")
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
    """A process that takes one of the devices of `pool`, prints it, and keeps it for `work` seconds, or forever."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    # TMPDIR may differ between the jobs of a run.
    environment |= {"TMPDIR": str(folder / "elsewhere"), "CUDA_VISIBLE_DEVICES": pool}
    environment["GMP_ATL_JOBS_PER_GPU"] = str(share)
    if allocation:
        environment["SLURM_JOB_ID"] = allocation
    command = [sys.executable, "-c", HOLDER, work, str(folder), f"job{allocation}-"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> str:
    """What a holder tells first, however late: that it waits, or which device it holds."""
    assert process.stderr is not None
    return process.stderr.readline().strip()


@pytest.fixture(autouse=True)
def _outside_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LOCKS", tmp_path / "locks")
    for name in ("SLURM_JOB_ID", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def cards(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A stand-in for nvidia-smi, which fails until it is told cards to list, each as `model UUID`."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "nvidia-smi").write_text(f'#!/bin/sh\ntest "$*" = -L && cat {folder}/listing\n')
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def listed(*names: str) -> None:
        pairs = [name.rsplit(maxsplit=1) for name in names]
        lines = [f"GPU {number}: {model} (UUID: {uuid})\n" for number, (model, uuid) in enumerate(pairs)]
        # As of a card that is shared out by hardware: parts of it, which are no cards.
        (folder / "listing").write_text("".join(lines) + "  MIG 1g.10gb     Device  0: (UUID: MIG-5)\n")

    return listed


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
    assert told(waiting) == "waiting for one of the GPUs 0, 1"
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
    assert told(second) == "waiting for one of the GPUs 7"
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
    with pytest.raises(UserError, match=r"No GPU of 0 became free within 3 s.*--resources gpu=1\), or run on the CPU"):
        take_gpu(timeout=3)
    notices = [record for record in caplog.records if record.getMessage() == "waiting for one of the GPUs 0"]
    assert len(notices) >= 2, "at once, and again"
    assert {record.levelno for record in notices} == {NOTICE}
    first.kill()
    first.communicate()


@pytest.mark.parametrize("pool", ["", "-1"])
def test_no_device_is_an_error(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", pool)
    with pytest.raises(UserError, match="workflow/profiles/cpu"):
        take_gpu()


@pytest.mark.parametrize(
    ("pool", "devices"),
    [(None, None), ("", []), ("-1", []), ("1,-1,0", ["1"]), ("0,,1", ["0"]), (" 2, GPU-3f ", ["2", "GPU-3f"])],
)
def test_devices_are_those_that_cuda_shows(
    pool: str | None, devices: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pool is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", pool)
    assert leases._visible() == devices


@pytest.mark.parametrize("taken", ["GPU-1", None])
def test_devices_that_are_not_named_are_those_of_nvidia_smi(
    taken: str | None, cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Set first, so that it is taken back after the test: a lease changes the environment for good.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(leases, "_held", [])
    if taken is None:
        with pytest.raises(UserError, match="workflow/profiles/cpu"):
            take_gpu(timeout=0)
    else:
        cards("Fast (80 GB) GPU-1", "Slow GPU-2")
        take_gpu(timeout=0)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
        for descriptor in leases._held:
            os.close(descriptor)


def test_a_card_is_held_once_by_whatever_name(tmp_path: Path, cards: Callable[..., None]) -> None:
    cards("Fast GPU-aa", "Fast GPU-bb")
    first = holder(tmp_path, "1", "forever")
    assert first.stdout is not None
    assert first.stdout.readline().strip() == "1"
    # In another container or allocation, the second card may be the only one.
    cards("Fast GPU-bb")
    others = [holder(tmp_path, pool, "0") for pool in ("0", "GPU-bb", "GPU-b")]
    assert [told(other).removeprefix("waiting for one of the GPUs ") for other in others] == ["0", "GPU-bb", "GPU-b"]
    assert [path.name for path in (tmp_path / "locks").iterdir()] == ["GPU-bb.0.lock"]
    first.kill()
    first.communicate()
    outcomes = [(other.communicate(timeout=30)[0].strip(), other.returncode) for other in others]
    assert outcomes == [("0", 0), ("GPU-bb", 0), ("GPU-b", 0)]


@pytest.mark.parametrize(
    ("listed", "order", "name"),
    [
        (["Fast GPU-aa", "Fast GPU-bb"], "", "GPU-bb"),
        (["Fast GPU-aa", "Slow GPU-bb"], "PCI_BUS_ID", "GPU-bb"),
        (["Slow GPU-aa", "Fast GPU-bb"], "", "1"),  # CUDA's first is nvidia-smi's second
        (["Fast GPU-aa"], "", "1"),
    ],
)
def test_a_number_stands_for_a_card_only_where_cuda_counts_as_nvidia_smi(
    listed: list[str], order: str, name: str, cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(*listed)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert leases._identity("1", leases._of_nvidia_smi()) == name


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
