"""What stands on top of HuBERT: the utterance head of stages 1 and 4, the codebook heads of stage 3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl.config import HeadConfig

CODEWORD_TEMPERATURE = 0.1
"""Of HuBERT's cosine logits (Hsu et al. 2021, Eq. 3)."""


class LinearP(nn.Module):
    """The paper's linear projection module: Linear, ReLU, Linear (Sec. 3.1)."""

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(F.relu(self.hidden(x)))
        return logits


class CosineLinearP(nn.Module):
    """LinearP whose last layer gives the cosines of Eq. 3, in [-1, 1]: its weights are AM-Softmax's w_j."""

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(F.relu(self.hidden(x)), dim=-1), F.normalize(self.output.weight, dim=-1))


class BiLSTM(nn.Module):
    """Bidirectional LSTM over padded clips in which no valid frame ever sees padding.

    The backward direction runs forward over each clip's own reversal. That equals packed sequences, for which
    torch has no fast kernel on the CPU (benchmarks/operations.py).
    """

    def __init__(self, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [width] + [2 * hidden] * (layers - 1)
        self.ahead = nn.ModuleList(nn.LSTM(each, hidden, batch_first=True) for each in widths)
        self.back = nn.ModuleList(nn.LSTM(each, hidden, batch_first=True) for each in widths)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(batch, frames, width) to (batch, frames, 2 x hidden); padded frames hold anything."""
        reversal = (lengths[:, None] - 1 - torch.arange(x.shape[1])).clamp(min=0).to(x.device)[..., None]
        for ahead, back in zip(self.ahead, self.back, strict=True):
            mirrored = back(torch.take_along_dim(x, reversal, dim=1))[0]
            x = torch.cat([ahead(x)[0], torch.take_along_dim(mirrored, reversal, dim=1)], dim=-1)
        return x


class UtteranceHead(nn.Module):
    """BiLSTM, mean over valid frames, and one projection per task (paper, Fig. 1 a and c)."""

    def __init__(self, width: int, config: HeadConfig, tasks: Mapping[str, int], *, cosine: bool = False) -> None:
        """Args: width of the encoder; tasks: number of classes by name; cosine: for AM-Softmax."""
        super().__init__()
        self.lstm = BiLSTM(width, config.lstm_hidden, config.lstm_layers)
        projection = CosineLinearP if cosine else LinearP
        self.tasks = nn.ModuleDict(
            {task: projection(2 * config.lstm_hidden, config.projection, classes) for task, classes in tasks.items()}
        )

    def forward(self, hidden: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """(batch, frames, width) and valid frames (batch,), on the CPU, to (batch, classes) per task.

        In the precision of its weights: float32 in every stage, another where an exported model is loaded in it.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            states = self.lstm(hidden.to(next(self.lstm.parameters()).dtype), lengths)
            padding = (torch.arange(states.shape[1]) >= lengths[:, None]).to(states.device)
            pooled = states.masked_fill(padding[..., None], 0.0).sum(dim=1) / lengths[:, None].to(states)
            return {task: projection(pooled) for task, projection in self.tasks.items()}


class CosineCodebook(nn.Module):
    """HuBERT's own prediction head: cosine between projected frame and codewords over a temperature."""

    def __init__(self, width: int, projection: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, projection)
        self.codewords = nn.Parameter(torch.randn(size, projection))

    def forward(self, frames: Tensor) -> Tensor:
        # Normalise, then one matrix product: comparing with repeated codewords takes 10 GB at size 4096.
        cosine = F.linear(F.normalize(self.projection(frames), dim=-1), F.normalize(self.codewords, dim=-1))
        return cosine / CODEWORD_TEMPERATURE


class CodebookHeads(nn.Module):
    """One head per codebook over the same frames (paper, Fig. 1 b)."""

    def __init__(self, width: int, projection: int, sizes: list[int], kind: str) -> None:
        super().__init__()
        head = LinearP if kind == "linear" else CosineCodebook
        self.codebooks = nn.ModuleDict({str(size): head(width, projection, size) for size in sizes})

    def forward(self, frames: Tensor) -> dict[int, Tensor]:
        """(frames, width) to logits (frames, size) per codebook."""
        return {int(size): head(frames) for size, head in self.codebooks.items()}
