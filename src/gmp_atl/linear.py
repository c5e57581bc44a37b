"""Linear layers, on a CPU by oneDNN where nothing is trained.

For float32 torch asks MKL, and applies GELU in a pass of its own; oneDNN does both at once, faster on an AMD EPYC
(benchmarks/operations.py). torch offers that only to what it compiles, and compiling for each length of a batch would
take longer than it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """torch's, followed by GELU where that is asked for."""

    def __init__(self, inputs: int, outputs: int, *, gelu: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=self.gelu)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """(..., inputs) to (..., outputs), by a contiguous weight of (outputs, inputs), and GELU of that if asked for."""
    if _by_onednn(x, weight):
        attribute = "gelu" if gelu else "none"
        products: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], "none")
        return products
    products = F.linear(x, weight, bias)
    return F.gelu(products) if gelu else products


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether these need no gradient, no cast and no graph, on a processor for which torch has the kernels."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.onnx.is_in_onnx_export() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):  # nowhere else has it been tried
        return False
    if x.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return x.dtype is weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
