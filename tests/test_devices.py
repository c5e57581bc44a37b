"""A job runs where Snakemake placed it, and never falls back in silence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gmp_atl import devices
from gmp_atl.errors import NO_GPUS, UserError


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """That torch sees a GPU, and was built as its wheels are."""
    properties = SimpleNamespace(name="Some GPU", total_memory=2**34)
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "get_device_name": "Some GPU",
        "get_device_capability": capability,
        "get_device_properties": properties,
        "get_arch_list": ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def test_a_job_without_a_gpu_runs_on_the_cpu_even_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    assert devices.resolve(0) == torch.device("cpu")
    assert devices.resolve(1) == torch.device("cuda")


@pytest.mark.parametrize(("capability", "usable"), [((7, 0), False), ((7, 5), True), ((8, 9), True), ((12, 0), True)])
def test_a_gpu_that_torch_has_no_kernels_for_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], usable: bool
) -> None:
    pretend(monkeypatch, capability)
    assert devices.described(0) == ("Some GPU (16 GiB)" if usable else "Some GPU (16 GiB, too old)")
    if usable:
        assert devices.resolve(1) == torch.device("cuda")
    else:
        with pytest.raises(UserError, match=r"Some GPU is older than .*compute capability 7\.5.*workflow/profiles/cpu"):
            devices.resolve(1)


def test_a_gpu_that_torch_does_not_find_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"torch finds no usable CUDA device.*workflow/profiles/cpu"):
        devices.resolve(1)
    with pytest.raises(UserError, match=r"or leave --gpus out"):
        devices.resolve(1, NO_GPUS)


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [(True, True, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    cpu = torch.device("cpu")
    assert devices.dtype("auto", cpu) == expected
    assert [devices.dtype(precision, cpu) for precision in ("bfloat16", "float32")] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("available", "capability", "expected"),
    [(True, (9, 0), True), (True, (8, 0), True), (True, (7, 5), False), (False, (9, 0), False)],
)
def test_packed_clips_are_for_gpus_that_have_flash_attention(
    monkeypatch: pytest.MonkeyPatch, available: bool, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert devices.attends_to_packed(torch.device("cuda")) is expected
    assert not devices.attends_to_packed(torch.device("cpu"))
