"""GPU leases between real processes, over made-up pools of devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gmp_atl.errors import UserError
from gmp_atl.leases import take_gpu

HOLDER = """
import os, sys, time
from gmp_atl.leases import take_gpu
take_gpu(timeout=60)
assert not {"torch", "faiss"} & set(sys.modules)
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
work = sys.argv[1]
if work == "forever":
    time.sleep(600)
# Two holders of one device would collide on its file.
busy = os.path.join(sys.argv[2], os.environ["CUDA_VISIBLE_DEVICES"])
os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
time.sleep(float(work))
os.unlink(busy)
"""


def holder(folder: Path, pool: str, work: str) -> subprocess.Popen[str]:
    (folder / "busy").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": pool}
    command = [sys.executable, "-c", HOLDER, work, str(folder / "busy")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_no_device_is_held_twice(tmp_path: Path) -> None:
    processes = [holder(tmp_path, "0,1,GPU-3f", "0.2") for _ in range(12)]
    outcomes = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, code in outcomes] == [0] * 12, [errors for (_, errors), _ in outcomes]
    assert {out.strip() for (out, _), _ in outcomes} == {"0", "1", "GPU-3f"}


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


def test_waiting_ends_with_a_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = holder(tmp_path, "0", "forever")
    assert first.stdout is not None
    first.stdout.readline()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match=r"No GPU of 0 became free within 1 s.*--resources gpu=1"):
        take_gpu(timeout=1)
    first.kill()
    first.communicate()


@pytest.mark.parametrize("pool", ["", "-1"])
def test_no_device_is_an_error(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", pool)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="workflow/profiles/cpu"):
        take_gpu()


def test_slurm_has_assigned_the_device_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    take_gpu(timeout=0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
