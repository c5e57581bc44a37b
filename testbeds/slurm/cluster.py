"""A SLURM cluster of one node, for tests: munged, slurmctld and slurmd as children of this process.

Everything lies in one folder: configuration, keys, state, logs, and two GPUs that are private copies of the null
device, so that SLURM counts and assigns them but nothing can compute on them. The daemons die with this process,
however it ends. There is no accounting; slurmctld writes a line for each finished job to `jobcomp.log`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ["munge", "slurmctld", "slurmd", "slurm-client"]
GPUS = 2
CPUS = 8
"""More than there may be: what the jobs wait for is the real ones."""
MEMORY_MB = 64_000

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
# A container has neither systemd nor cgroups of its own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2
GresTypes=gpu
# Memory is sampled, and a job above its limit killed.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
KillWait=30
# Records of all jobs of the tests.
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=24:00:00 State=UP
"""


class Unavailable(Exception):
    """Why there can be no cluster on this machine."""


def install() -> None:
    """Install Debian's packages if they are missing.

    Raises:
        Unavailable: without root, apt-get, or the packages.
    """
    if os.geteuid() != 0:
        raise Unavailable("SLURM's daemons and devices need root")
    if all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"SLURM is not installed, nor is there an apt-get to install {' '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        try:
            subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"apt-get {' '.join(command)} failed: {error.stderr.strip()}") from None


class Cluster:
    """The cluster, from `start` to `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        self.bin = folder / "bin"
        """Comes first in PATH for jobs and those who submit them."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """For SLURM's commands."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {
            **inherited,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
        }

    def start(self) -> None:
        """Write the configuration and start the daemons; returns when the node is idle."""
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir(parents=True)
        # munged wants every folder above its socket to be writable by no one else.
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        gres = []
        for index in range(GPUS):
            device = self.folder / f"gpu{index}"
            os.mknod(device, 0o600 | stat.S_IFCHR, Path("/dev/null").stat().st_rdev)
            gres.append(f"NodeName={self.host} Name=gpu File={device}\n")
        (self.folder / "gres.conf").write_text("".join(gres))
        (self.folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=self.host,
                folder=self.folder,
                controller_port=_free_port(),
                node_port=_free_port(),
                cpus=CPUS,
                memory=MEMORY_MB,
                gpus=GPUS,
            )
        )
        # Snakemake's plugin takes SLURM_CONF from the environment of the srun inside a job.
        srun = self.bin / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        self._start("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in files.items()))
        _wait_until("munged answers", lambda: self._succeeds("munge", "-n", "-S", str(self.folder / "munge.socket")))
        self.start_controller()
        self._start("slurmd", "-D", "-N", self.host)
        _wait_until("the node is idle", lambda: self.run("sinfo", "-h", "-o", "%T").strip() == "idle")

    def start_controller(self) -> None:
        """Start slurmctld, with the state that it had."""
        self._start("slurmctld", "-D")
        _wait_until("slurmctld answers", lambda: self._succeeds("scontrol", "ping"))

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs go on."""
        self._stop("slurmctld")

    def stop(self) -> None:
        """Cancel what runs and stop the daemons."""
        if self._succeeds("scancel", "--state=PENDING", "--me") and self._succeeds("scancel", "--me"):
            _wait_until("jobs have ended", lambda: not self.run("squeue", "-h").strip(), seconds=60)
        for name in reversed(list(self._daemons)):
            self._stop(name)

    def run(self, *command: str) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """SLURM's record of every job, as `scontrol show job` prints it, oldest first."""
        text = self.run("scontrol", "show", "job", "--oneliner")
        records = [dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", line)) for line in text.splitlines() if "JobId=" in line]
        return sorted(records, key=lambda record: int(record["JobId"]))

    def _start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", name, *arguments],  # it dies with this process, however that ends
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests; they stop the daemons
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def _wait_until(what: str, holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.1)
