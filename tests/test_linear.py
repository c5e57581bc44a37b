"""Linear layers by oneDNN against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gmp_atl.linear import Linear, linear

SIZES = st.integers(1, 70)
SHAPES = st.lists(st.integers(1, 12), min_size=1, max_size=3)


@given(SHAPES, SIZES, SIZES, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_products_are_torchs_in_float64(shape, inputs, outputs, biased, gelu, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, inputs, generator=random)
    weight, bias = torch.randn(outputs, inputs, generator=random), torch.randn(outputs, generator=random)
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    expected = F.gelu(expected) if gelu else expected
    with torch.inference_mode():
        found = linear(x, weight, bias if biased else None, gelu=gelu)
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.inference_mode()
def test_rows_may_overlap():
    rows, weight = torch.randn(101, 8), torch.randn(5, 24)
    windows = rows.as_strided((50, 24), (16, 1))
    torch.testing.assert_close(linear(windows, weight, None), windows.clone() @ weight.T)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_are_left_to_torch(dtype):
    x, layer = torch.randn(3, 6, dtype=dtype), Linear(6, 4).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_are_torchs(gelu):
    layer, x = Linear(6, 4, gelu=gelu), torch.randn(3, 6, requires_grad=True)
    found = torch.autograd.grad(layer(x).sum(), [x, layer.weight, layer.bias])
    products = F.linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad((F.gelu(products) if gelu else products).sum(), [x, layer.weight, layer.bias])
    for each, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(each, reference)


@torch.inference_mode()
@pytest.mark.parametrize("held", [False, True], ids=["under autocast", "held"])
def test_in_bfloat16_only_the_result_is_rounded(held):
    x, layer = torch.randn(64, 96).bfloat16(), Linear(96, 32, gelu=True)
    layer.weight.data, layer.bias.data = layer.weight.bfloat16().float(), layer.bias.bfloat16().float()
    expected = layer(x.float())
    with torch.autocast("cpu", enabled=not held):
        found = (layer.bfloat16() if held else layer)(x)
        whole = layer.float()(x.float())
    assert found.dtype is torch.bfloat16
    assert whole.dtype is (torch.float32 if held else torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, atol=2**-7 * float(expected.abs().max()), rtol=0)
