"""The kernels of a layer in training against torch's operations: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl import devices, fused
from gmp_atl.encoder import Encoder, Regularisation
from gmp_atl.packing import Packing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not devices.builds_kernels(DEVICE), reason="Triton needs a C compiler, and finds none"
)
SIZES = [(37, 24, 40), (5, 48, 1100), (1, 96, 8)]
"""Frames, width, width of the wide layer: of more columns than a program takes, and of fewer."""


class Block(nn.Module):
    """The feed-forward network of a layer."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(width, wide), nn.Linear(wide, width), nn.LayerNorm(width, eps=1e-3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.to(DEVICE)

    def plain(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return out

    def fused(self, x: Tensor, dropout: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        return fused.added(x, fused.activated(x, self.up, dropout[0]), self.down, self.norm, dropout[1])


@pytest.mark.parametrize(("frames", "width", "wide"), SIZES)
def test_without_dropout_results_and_gradients_are_torch_s(frames: int, width: int, wide: int) -> None:
    block, x = Block(width, wide), torch.randn(frames, width, device=DEVICE, requires_grad=True)
    gradient = torch.randn(frames, width, device=DEVICE)
    found, expected = block.fused(x), block.plain(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wanted = [x, *block.parameters()]
    for one, other in zip(*(torch.autograd.grad(y, wanted, gradient) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("frames", "width", "wide"), SIZES)
def test_a_projection_has_the_gradients_of_torch_s(frames: int, width: int, wide: int) -> None:
    block, x = Block(width, wide), torch.randn(frames, width, device=DEVICE, requires_grad=True)
    ways: list[Callable[..., Tensor]] = [fused.projected, F.linear]
    found, expected = (way(x, block.up.weight, block.up.bias) for way in ways)
    assert torch.equal(found, expected)
    wanted, gradient = [x, *block.up.parameters()], torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(y, wanted, gradient) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dropout", [(0.3, 0.0), (0.0, 0.4), (0.3, 0.4)], ids=["wide", "residual", "both"])
def test_the_backward_pass_drops_what_the_forward_pass_did(dropout: tuple[float, float]) -> None:
    """The slope along a random direction is that of finite differences, all draws being equal."""
    block, x = Block(48, 1100), torch.randn(9, 48, device=DEVICE)
    gradient, direction = torch.randn_like(x), torch.randn_like(x)

    def along(step: float) -> Tensor:
        torch.manual_seed(3)
        return (block.fused(x + step * direction, dropout) * gradient).sum()

    start = torch.zeros((), device=DEVICE, requires_grad=True)
    torch.manual_seed(3)
    (slope,) = torch.autograd.grad((block.fused(x + start * direction, dropout) * gradient).sum(), start)
    assert slope.item() == pytest.approx(((along(1e-2) - along(-1e-2)) / 2e-2).item(), rel=5e-3)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_takes_its_share_anew_each_time_and_scales_the_rest(dropout: float) -> None:
    linear = nn.Linear(8, 3000).to(DEVICE)
    x = torch.randn(40, 8, device=DEVICE)
    whole = F.gelu(linear(x))
    torch.manual_seed(0)
    first, second = (fused.activated(x, linear, dropout) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(fused.activated(x, linear, dropout), first)
    dropped = first == 0
    torch.testing.assert_close(first[~dropped], whole[~dropped] / (1 - dropout), atol=1e-4, rtol=1e-4)
    both = (dropped & (second == 0)).float().mean().item()
    assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.01)
    assert both == pytest.approx(dropout**2, abs=0.01)
    for shift in (1, 2, 4, 8):  # neighbours share a draw of the generator
        together = (dropped[:, shift:] & dropped[:, :-shift]).float().mean().item()
        assert together == pytest.approx(dropout**2, abs=0.01)
    assert (dropped[1:] & dropped[:-1]).float().mean().item() == pytest.approx(dropout**2, abs=0.01)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="in float32, which FlashAttention does not take")
def test_a_fused_layer_of_packed_clips_is_the_plain_one(tiny_encoder: Encoder) -> None:
    layer = tiny_encoder.encoder.layers[0]
    packing = Packing.rounded(torch.tensor([30, 11]), DEVICE)
    hidden = torch.randn(packing.size, tiny_encoder.architecture.hidden_size)
    plain, found = layer(hidden, packing, None, Regularisation()), layer.fused(hidden, packing, Regularisation())  # type: ignore[operator]
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def test_without_a_compiler_torch_s_own_kernels_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    assert devices.builds_kernels.__wrapped__(DEVICE)
    monkeypatch.setattr(fused, "activated", fail)
    assert not devices.builds_kernels.__wrapped__(DEVICE)
    assert "Failed to find C compiler" in caplog.text
    assert "such as gcc" in caplog.text
