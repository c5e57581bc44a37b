"""What stands between the matrix products of a transformer layer in training, on a GPU, in four kernels.

torch reads and writes the frames anew for each of GELU, dropout, residual connection and layer normalisation, and adds
up the gradients of biases and of normalisation in kernels of their own. Dropout draws its numbers from a counter
(Philox of seven rounds, Salmon et al. 2011), so that no mask is kept: the backward pass draws them again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 2
"""Frames that a program of a kernel takes at once."""
_TURNS = 4
"""How often a program that adds up gradients does so."""
_COLUMNS = 1024
"""Of the wide layer, that a program takes at once."""


def activated(x: Tensor, linear: nn.Linear, dropout: float) -> Tensor:
    """A linear layer, GELU, dropout: (frames, inputs) to (frames, outputs)."""
    out: Tensor = _Activated.apply(x, linear.weight, linear.bias, _seed(x), dropout)  # type: ignore[no-untyped-call]
    return out


def added(hidden: Tensor, x: Tensor, linear: nn.Linear, norm: nn.LayerNorm, dropout: float) -> Tensor:
    """A linear layer of `x`, dropout, added to `hidden`, layer normalisation: (frames, width)."""
    weights = linear.weight, linear.bias, norm.weight, norm.bias
    out: Tensor = _Added.apply(hidden, x, *weights, norm.eps, _seed(x), dropout)  # type: ignore[no-untyped-call]
    return out


def projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer, (frames, inputs) to (frames, outputs)."""
    out: Tensor = _Projected.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _seed(x: Tensor) -> Tensor:
    """From torch's generator of the device, which stays there: a graph draws it anew at every replay."""
    return torch.randint(2**62, (1,), device=x.device)


@triton.jit  # type: ignore[untyped-decorator]
def _kept(seed, rows, first, width: tl.constexpr, columns: tl.constexpr, threshold):  # type: ignore[no-untyped-def]
    """Whether dropout keeps an element, (rows, columns) from column `first` on; `threshold` of 65,536 are not kept."""
    eights = rows[:, None] * (width // 8) + (first // 8 + tl.arange(0, columns // 8))[None, :]
    one, two, three, four = tl.randint4x(seed, eights, n_rounds=7)
    numbers = tl.join(tl.join(one, two), tl.join(three, four)).to(tl.uint32, bitcast=True)
    numbers = tl.join(numbers & 0xFFFF, numbers >> 16).reshape(rows.shape[0], columns)
    return numbers >= threshold


@triton.jit
def _normal(x):  # type: ignore[no-untyped-def]
    """The standard normal distribution's cumulative function, to 1e-7, and exp(-x^2 / 2).

    By one exponential for both, where erf takes more (Abramowitz and Stegun 1964, 7.1.26).
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * t * series * bell
    return tl.where(x < 0, tail, 1 - tail), bell


@triton.jit  # type: ignore[untyped-decorator]
def _activate(  # type: ignore[no-untyped-def]
    before,
    after,
    seed,
    frames,
    outputs,
    threshold,
    scale,
    width: tl.constexpr,
    height: tl.constexpr,
    columns: tl.constexpr,
):
    rows, first = tl.program_id(0) * height + tl.arange(0, height), tl.program_id(1) * columns
    column = first + tl.arange(0, columns)
    places = rows[:, None] * outputs + column[None, :]
    inside = (rows < frames)[:, None] & (column < outputs)[None, :]
    x = tl.load(before + places, inside, 0.0).to(tl.float32)
    below, _ = _normal(x)
    kept = _kept(tl.load(seed), rows, first, width, columns, threshold)
    tl.store(after + places, tl.where(kept, x * below * scale, 0.0), inside)


@triton.jit  # type: ignore[untyped-decorator]
def _activate_backward(  # type: ignore[no-untyped-def]
    before,
    of_after,
    of_before,
    of_bias,
    seed,
    frames,
    outputs,
    threshold,
    scale,
    width: tl.constexpr,
    height: tl.constexpr,
    columns: tl.constexpr,
    turns: tl.constexpr,
):
    first, program = tl.program_id(0) * columns, tl.program_id(1)
    column = first + tl.arange(0, columns)
    total = tl.zeros((height, columns), tl.float32)
    for turn in range(turns):
        rows = (program * turns + turn) * height + tl.arange(0, height)
        places = rows[:, None] * outputs + column[None, :]
        inside = (rows < frames)[:, None] & (column < outputs)[None, :]
        x = tl.load(before + places, inside, 0.0).to(tl.float32)
        gradient = tl.load(of_after + places, inside, 0.0).to(tl.float32)
        kept = _kept(tl.load(seed), rows, first, width, columns, threshold)
        below, bell = _normal(x)
        gradient = tl.where(kept, gradient * scale, 0.0) * (below + 0.3989422804014327 * x * bell)
        tl.store(of_before + places, gradient, inside)
        total += gradient
    tl.store(of_bias + program * outputs + column, tl.sum(total, axis=0), column < outputs)


@triton.jit
def _normalised(x, inside, outputs, eps):  # type: ignore[no-untyped-def]
    """Rows with mean zero and variance one, and what they were multiplied with."""
    centred = tl.where(inside, x - tl.sum(x, axis=1)[:, None] / outputs, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / outputs + eps)[:, None]
    return centred * inverse, inverse


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    hidden,
    mixed,
    summed,
    out,
    weight,
    bias,
    seed,
    frames,
    outputs,
    eps,
    threshold,
    scale,
    height: tl.constexpr,
    width: tl.constexpr,
):
    rows, column = tl.program_id(0) * height + tl.arange(0, height), tl.arange(0, width)
    places = rows[:, None] * outputs + column[None, :]
    inside = (rows < frames)[:, None] & (column < outputs)[None, :]
    kept = _kept(tl.load(seed), rows, 0, width, width, threshold)
    x = tl.load(hidden + places, inside, 0.0).to(tl.float32)
    x += tl.where(kept, tl.load(mixed + places, inside, 0.0).to(tl.float32) * scale, 0.0)
    rounded = x.to(summed.dtype.element_ty)
    tl.store(summed + places, rounded, inside)
    normalised, _ = _normalised(rounded.to(tl.float32), inside, outputs, eps)
    of_column = column < outputs
    scales, shifts = (
        tl.load(weight + column, of_column).to(tl.float32),
        tl.load(bias + column, of_column).to(tl.float32),
    )
    tl.store(out + places, normalised * scales[None, :] + shifts[None, :], inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_backward(  # type: ignore[no-untyped-def]
    summed,
    of_out,
    of_hidden,
    of_mixed,
    of_weights,
    weight,
    seed,
    frames,
    outputs,
    eps,
    threshold,
    scale,
    height: tl.constexpr,
    width: tl.constexpr,
    turns: tl.constexpr,
):
    program, column = tl.program_id(0), tl.arange(0, width)
    of_column = column < outputs
    weights = tl.load(weight + column, of_column, 0.0).to(tl.float32)[None, :]
    of_weight, of_shift = tl.zeros((height, width), tl.float32), tl.zeros((height, width), tl.float32)
    of_bias = tl.zeros((height, width), tl.float32)
    for turn in range(turns):
        rows = (program * turns + turn) * height + tl.arange(0, height)
        places = rows[:, None] * outputs + column[None, :]
        inside = (rows < frames)[:, None] & of_column[None, :]
        normalised, inverse = _normalised(tl.load(summed + places, inside, 0.0).to(tl.float32), inside, outputs, eps)
        gradient = tl.load(of_out + places, inside, 0.0).to(tl.float32)
        of_weight += gradient * normalised
        of_shift += gradient
        scaled = gradient * weights
        along = tl.sum(scaled * normalised, axis=1)[:, None] / outputs
        of_sum = inverse * (scaled - tl.sum(scaled, axis=1)[:, None] / outputs - normalised * along)
        tl.store(of_hidden + places, of_sum, inside)
        kept = _kept(tl.load(seed), rows, 0, width, width, threshold)
        of_sum = tl.where(kept & inside, of_sum * scale, 0.0)
        tl.store(of_mixed + places, of_sum, inside)
        of_bias += of_sum
    of_weights += 3 * program * outputs + column
    tl.store(of_weights, tl.sum(of_weight, axis=0), of_column)
    tl.store(of_weights + outputs, tl.sum(of_shift, axis=0), of_column)
    tl.store(of_weights + 2 * outputs, tl.sum(of_bias, axis=0), of_column)


def _chance(dropout: float) -> dict[str, Any]:
    threshold = min(round(65_536 * dropout), 65_535)
    return {"threshold": threshold, "scale": 65_536 / (65_536 - threshold)}


def _total(rows: Tensor, like: Tensor) -> Tensor:
    """Of the rows, as a product, which is faster than torch's sum of them: (rows, ...) to (...)."""
    return (rows.new_ones(len(rows)) @ rows.flatten(1)).view(rows.shape[1:]).to(like.dtype)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].T @ x, _total(gradients[0], weight)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, dropout: float) -> Tensor:
        before = F.linear(x, weight, bias)
        after, (frames, outputs) = torch.empty_like(before), before.shape
        ctx.save_for_backward(x, weight, before, seed)
        ctx.sizes = {"width": triton.next_power_of_2(outputs), "height": _ROWS, "columns": _COLUMNS} | _chance(dropout)
        grid = triton.cdiv(frames, _ROWS), triton.cdiv(outputs, _COLUMNS)
        _activate[grid](before, after, seed, frames, outputs, **ctx.sizes)
        return after

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, before, seed = ctx.saved_tensors
        of_before, (frames, outputs) = torch.empty_like(before), before.shape
        grid = triton.cdiv(outputs, _COLUMNS), triton.cdiv(frames, _ROWS * _TURNS)
        of_bias = x.new_empty(grid[1], outputs, dtype=torch.float32)
        _activate_backward[grid](
            before, gradients[0].contiguous(), of_before, of_bias, seed, frames, outputs, turns=_TURNS, **ctx.sizes
        )
        return of_before @ weight, of_before.T @ x, _total(of_bias, weight), None, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, *rest: Any) -> Tensor:
        weight, bias, norm_weight, norm_bias, eps, seed, dropout = rest
        mixed = F.linear(x, weight, bias)
        summed, out, (frames, outputs) = torch.empty_like(mixed), torch.empty_like(mixed), mixed.shape
        ctx.save_for_backward(x, weight, norm_weight, summed, seed)
        ctx.sizes = {"eps": eps, "height": _ROWS, "width": triton.next_power_of_2(outputs)} | _chance(dropout)
        grid = (triton.cdiv(frames, _ROWS),)
        _add[grid](hidden, mixed, summed, out, norm_weight, norm_bias, seed, frames, outputs, **ctx.sizes)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, summed, seed = ctx.saved_tensors
        of_hidden, of_mixed, (frames, outputs) = torch.empty_like(summed), torch.empty_like(summed), summed.shape
        grid = (triton.cdiv(frames, _ROWS * _TURNS),)
        parts = x.new_empty(*grid, 3, outputs, dtype=torch.float32)
        _add_backward[grid](
            summed,
            gradients[0].contiguous(),
            of_hidden,
            of_mixed,
            parts,
            norm_weight,
            seed,
            frames,
            outputs,
            turns=_TURNS,
            **ctx.sizes,
        )
        of_norm_weight, of_norm_bias, of_bias = _total(parts, weight)
        return of_hidden, of_mixed @ weight, of_mixed.T @ x, of_bias, of_norm_weight, of_norm_bias, None, None, None
