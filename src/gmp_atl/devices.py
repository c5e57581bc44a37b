"""Which device a job computes on, and in which precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gmp_atl.errors import CPU_PROFILE, UserError

log = logging.getLogger(__name__)


def resolve(gpus: int, otherwise: str = CPU_PROFILE) -> torch.device:
    """The device for a job that was given `gpus` GPUs.

    Args:
        gpus: As Snakemake or a user has it.
        otherwise: How to do without a GPU, for the message.

    Raises:
        UserError: a GPU was given but none is usable; a silent CPU run would take weeks.
    """
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "A GPU was asked for, but torch finds no usable CUDA device here. Look at nvidia-smi and "
            f"CUDA_VISIBLE_DEVICES, or {otherwise}."
        )
    if not _has_kernels(torch.cuda.current_device()):
        raise UserError(
            f"{torch.cuda.get_device_name()} is older than the GPUs that this torch has kernels for: NVIDIA's since "
            f"Turing (compute capability 7.5). Take another GPU, or {otherwise}."
        )
    # By default cuDNN rounds what convolutions and LSTMs multiply to 10 bits; float32 is to be float32.
    torch.backends.cudnn.allow_tf32 = False
    # cuDNN's attention plans anew for every shape of a batch, which takes longer than many an update.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda")


def indices() -> range:
    """Of the GPUs that torch sees."""
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def described(index: int) -> str:
    """A GPU's model and memory, and whether it is too old to be of use."""
    properties = torch.cuda.get_device_properties(index)
    old = "" if _has_kernels(index) else ", too old"
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB{old})"


def _has_kernels(index: int) -> bool:
    """Whether the torch that is installed can compute on a device."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor >= min(int(each[3:]) for each in torch.cuda.get_arch_list() if each.startswith("sm_"))


def dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of matrix products; `auto` is bfloat16 where the device multiplies it natively."""
    if precision == "auto":
        on_gpu = device.type == "cuda"
        native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_multiplies_bfloat16()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(device: torch.device, compute: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `compute`; weights that layers hold, and losses, stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute is torch.bfloat16)


def attends_to_packed(device: torch.device) -> bool:
    """Whether torch has FlashAttention there, for half precision: NVIDIA's GPUs since Ampere."""
    available = device.type == "cuda" and torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def builds_kernels(device: torch.device) -> bool:
    """Whether Triton, which comes with torch for GPUs, can build the kernels of `fused`."""
    try:
        from gmp_atl import fused

        place: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        x, linear, norm = torch.zeros(1, 8, **place), torch.nn.Linear(8, 8, **place), torch.nn.LayerNorm(8, **place)
        fused.added(x, fused.activated(x, linear, 0.5), linear, norm, 0.5).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # those of Triton and of its compilers have no class in common
        log.warning(
            "Training uses torch's kernels and takes longer, since Triton cannot build others (%s). It needs a C "
            "compiler, such as gcc, and Python's header files.",
            str(error).strip().partition("\n")[0],
        )
        return False
    return True


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; to a GPU from pinned memory, so that nothing waits for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def fetch(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy values to the CPU; the function returned waits for that copy, not for later work."""
    if values.device.type != "cuda":
        return values.tolist
    received = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    received.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def ask() -> list[float]:
        arrived.synchronize()
        return received.tolist()

    return ask


def _cpu_multiplies_bfloat16() -> bool:
    """By AMX tiles (Intel since Sapphire Rapids) or by AVX-512 (AMD since Zen 4), faster than float32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
