"""One GPU per local job: Snakemake counts GPUs but does not say which, so jobs take a lock on one.

A lease is a flock on a file per device, and per job that may share it, in a folder of this host. Files are named by the
devices' UUIDs as far as nvidia-smi tells them: jobs may number one device differently. The kernel gives a lease up with
the process, however that ends, so none outlives its holder. A SLURM job that was given one device has nothing
to choose; several in one allocation (salloc, with Snakemake inside) are shared out like those of a workstation.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from gmp_atl.errors import CPU_PROFILE, NOTICE, UserError

log = logging.getLogger(__name__)

LOCKS = Path(f"/tmp/gmp-atl-gpu-locks-{os.getuid()}-{socket.gethostname()}")
"""Not in TMPDIR, which may be another for each job, nor on a disk that hosts share."""
JOBS_PER_GPU = int(os.environ.get("GMP_ATL_JOBS_PER_GPU", "1"))
"""compute.jobs_per_gpu; by the environment, as `training.CHECKPOINT_MINUTES`."""
_POLL_SECONDS = 0.5
_REMIND_SECONDS = 60.0
_held: list[int] = []
"""Descriptors of the locks that this process holds."""


class _Card(NamedTuple):
    """A GPU as nvidia-smi names it."""

    model: str
    uuid: str


def take_gpu(timeout: float = 3600.0, otherwise: str = CPU_PROFILE) -> None:
    """Wait for a GPU that holds no job, or not too many, and make it the only one visible until this process ends.

    Call it before torch or faiss is imported. Under SLURM with one visible device, or with none named, it does nothing:
    if that leaves the job without a GPU, `devices.resolve` says so.

    Args:
        timeout: In seconds.
        otherwise: How to do without a GPU, for the messages.

    Raises:
        UserError: there is no GPU, or none became free in time.
    """
    folder, devices = LOCKS, _visible()
    if allocation := os.environ.get("SLURM_JOB_ID"):
        if devices is None or len(devices) < 2:
            return
        # Each allocation may count its devices from 0.
        folder = LOCKS.with_name(f"{LOCKS.name}-slurm{allocation}")
    cards = _of_nvidia_smi()
    if devices is None:
        devices = [card.uuid for card in cards]
    if not devices:
        raise UserError(
            "A GPU was asked for, but CUDA_VISIBLE_DEVICES is empty or nvidia-smi lists none. Look at these, or "
            f"{otherwise}."
        )
    folder.mkdir(mode=0o700, exist_ok=True)
    started = reminded = time.monotonic()
    names = {device: _identity(device, cards).replace(os.sep, "_") for device in devices}
    places = [  # first, one on each
        (folder / f"{names[device]}.{place}.lock", device) for place in range(JOBS_PER_GPU) for device in devices
    ]
    while not any(_try(lock, device) for lock, device in places):
        now = time.monotonic()
        if now - started > timeout:
            raise UserError(
                f"No GPU of {', '.join(devices)} became free within {timeout:.0f} s: other gmp-atl jobs hold them "
                f"(locks in {folder}). Start fewer jobs at once (snakemake --resources gpu={len(places)}), or "
                f"{otherwise}."
            )
        if now - reminded > _REMIND_SECONDS or reminded == started:
            reminded = now
            log.log(NOTICE, "waiting for one of the GPUs %s", ", ".join(devices))
        time.sleep(_POLL_SECONDS)


def _visible() -> list[str] | None:
    """Entries of CUDA_VISIBLE_DEVICES, if it is set; as CUDA has it, the first that is -1 or empty ends them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return list(takewhile(lambda device: device not in ("", "-1"), map(str.strip, visible.split(","))))


def _of_nvidia_smi() -> list[_Card]:
    """Every GPU of this host, in the order of the bus; none where nvidia-smi does not run."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [_Card(*found) for found in re.findall(r"^GPU \d+: (.*) \(UUID: (GPU-.+)\)$", listed.stdout, re.MULTILINE)]


def _identity(device: str, cards: Sequence[_Card]) -> str:
    """The UUID of an entry of CUDA_VISIBLE_DEVICES, a number or a UUID's beginning; the entry if that is not known."""
    if device.isdecimal():
        # CUDA numbers the fastest first, unless told to go by the bus: then, or if all are alike, both count the same.
        by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({card.model for card in cards}) == 1
        found = list(cards[int(device) :][:1]) if by_bus else []
    else:
        found = [card for card in cards if card.uuid.startswith(device)]
    return found[0].uuid if len(found) == 1 else device


def _try(lock: Path, device: str) -> bool:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    _held.append(descriptor)
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    log.info("holding GPU %s", device)
    return True
