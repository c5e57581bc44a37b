"""A job runs where Snakemake placed it, and never falls back in silence."""

from __future__ import annotations

import pytest
import torch

from gmp_atl import devices
from gmp_atl.errors import UserError


def test_a_job_without_a_gpu_runs_on_the_cpu_even_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve(0) == torch.device("cpu")
    assert devices.resolve(1) == torch.device("cuda")


def test_a_gpu_that_torch_does_not_find_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"torch finds no usable CUDA device.*workflow/profiles/cpu"):
        devices.resolve(1)
