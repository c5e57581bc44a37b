"""Transformer layers in training as CUDA graphs: a GPU is done with their kernels before a CPU has started them.

A graph starts all kernels of a pass, hundreds of them, at once. It is of one number of frames, to which packed clips
are filled up (`Packing.rounded`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gmp_atl.packing import Packing

_BEFORE = 2
"""Passes over as many frames before one is recorded, which takes as long as several."""

Pass = Callable[[Tensor, Packing], Tensor]
"""Of packed frames through the layers, (frames, width)."""


class LayerGraphs:
    """The graphs of one stack of layers, all of whose parameters are trained and stay where they are in memory.

    Graphs run one after another and share their memory. They add the gradients of the parameters, in float32, to
    `gradients`, and leave `Parameter.grad` alone.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        """Args: layers: on the GPU."""
        self._layers = layers
        parameters = list(layers.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        self.total = torch.zeros(sum(sizes), device=parameters[0].device)
        """All gradients, one after another; whoever takes them sets them to zero for the next update."""
        parts = zip(parameters, torch.split(self.total, sizes), strict=True)
        self.gradients = {parameter: part.view_as(parameter) for parameter, part in parts}
        """Of each parameter, where it lies in `total`."""
        self._met: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._memory = torch.empty(0, 0, 0)

    def __call__(self, hidden: Tensor, packing: Packing, depth: int, run: Pass) -> Tensor:
        """What `run` makes of packed frames, (frames, width), in the first `depth` layers, replayed when known."""
        kind = (depth, *packing.kind)
        if kind not in self._graphs:
            self._met[kind] += 1
            if self._met[kind] <= _BEFORE:
                return run(hidden, packing)
            gradients = {each: self.gradients[each] for each in self._layers[:depth].parameters()}
            self._graphs[kind] = _Graph(run, packing, gradients, self._room(hidden), self._pool)
        replayed: Tensor = _Replay.apply(hidden, packing.starts, self._graphs[kind])  # type: ignore[no-untyped-call]
        return replayed

    def _room(self, hidden: Tensor) -> Tensor:
        """For three times as many frames, the same for all graphs but those recorded when it was smaller."""
        frames, width = hidden.shape
        if frames > self._memory.shape[1]:
            self._memory = hidden.new_empty(3, 1 << (frames - 1).bit_length(), width, requires_grad=False)
        return self._memory[:, :frames]


class _Graph:
    """A pass forward and one backward, from and to places in memory that stay the same."""

    def __init__(
        self, run: Pass, packing: Packing, gradients: Mapping[nn.Parameter, Tensor], room: Tensor, pool: Any
    ) -> None:
        """Args: gradients: to add to; room: for frames that come and go, (3, frames, width)."""
        self.hidden, self.found, self.gradient = room
        self.starts = packing.starts.clone()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        came = self.hidden.data.requires_grad_()  # its version counts alone, not with the other frames'
        with torch.cuda.graph(self.forward, pool=pool):
            found = run(came, replace(packing, starts=self.starts))
            self.found.copy_(found.detach())
        with torch.cuda.graph(self.backward, pool=pool):
            of_hidden, *of_parameters = torch.autograd.grad(found, [came, *gradients], self.gradient)
            self.gradient.copy_(of_hidden)
            exact = [torch.empty_like(total) for total in gradients.values()]
            torch._foreach_copy_(exact, of_parameters)
            torch._foreach_add_(list(gradients.values()), exact)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, starts: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        graph.hidden.copy_(hidden)
        graph.starts.copy_(starts)
        graph.forward.replay()
        return graph.found.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        graph: _Graph = ctx.graph
        graph.gradient.copy_(gradients[0])
        graph.backward.replay()
        return graph.gradient.detach(), None, None
