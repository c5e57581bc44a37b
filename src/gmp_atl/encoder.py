"""HuBERT in two halves: the convolutions, run once per clip, and the transformer, run in every stage.

HuBERT base normalises over *time* in its first convolution, so zero padding changes every frame of a clip.
The convolutions therefore run once per clip, as if it were alone, and their output is cached ("local features"); only
the transformer sees batches, with an attention mask. Then the features of a clip do not depend on its batch.

Parameter names and `config.json` are those of transformers' `HubertModel`, which loads what `model_files.save` writes.
Architecture: Hsu et al., "HuBERT", TASLP 2021, Sec. II and Table I.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl import devices
from gmp_atl.architecture import Architecture
from gmp_atl.config import ScratchEncoderConfig
from gmp_atl.convolutions import Convolutions
from gmp_atl.errors import UserError
from gmp_atl.frames import CONV_KERNELS
from gmp_atl.graphs import LayerGraphs
from gmp_atl.linear import Linear
from gmp_atl.packing import Packing, Padding
from gmp_atl.positions import PositionEmbedding


@dataclass(frozen=True)
class Regularisation:
    """Random perturbations of the transformer in training; evaluation has none of them."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    layerdrop: float = 0.0


class Encoder(nn.Module):
    """HuBERT. Layers are counted from the end, as in the paper: -1 is the last of the transformer."""

    def __init__(self, architecture: Architecture, regularisation: Regularisation | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.feature_extractor = Convolutions(architecture)
        self.feature_projection = FeatureProjection(architecture)
        self.masked_spec_embed = nn.Parameter(torch.empty(architecture.hidden_size).uniform_())
        self.encoder = Transformer(architecture)
        self.regularisation = regularisation or Regularisation()
        self.feature_extractor.requires_grad_(False)

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the weights to `dtype`, for inference alone; for the convolutions see `arrange`."""
        self.feature_extractor.arrange(dtype)
        self.encoder.pos_conv_embed.arrange()
        for parameter in self.of_transformer():
            parameter.data = parameter.data.to(dtype)

    def of_transformer(self) -> Iterator[nn.Parameter]:
        """All parameters but those of the convolutions."""
        yield self.masked_spec_embed
        yield from self.feature_projection.parameters()
        yield from self.encoder.parameters()

    def local_features(self, audio: Tensor) -> Tensor:
        """Output of the convolutions for one unpadded clip: (samples,) at 16 kHz to (frames, conv_dim[-1])."""
        features: Tensor = self.feature_extractor(audio)
        return features

    def forward(self, local: Tensor, lengths: Tensor, layer: int = -1, mask: Tensor | None = None) -> Tensor:
        """Hidden states of one layer; see `hidden_states`."""
        return self.hidden_states(local, lengths, [layer], mask)[layer]

    def hidden_states(
        self, local: Tensor, lengths: Tensor, layers: Sequence[int], mask: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Hidden states of several layers in one pass, which ends at the deepest of them, in the dtype of the weights.

        Args:
            local: local features, (batch, frames, conv_dim[-1]), padded with anything.
            lengths: valid frames per clip, (batch,), on the CPU.
            layers: counted from the end, -1 to -number of layers.
            mask: frames replaced by the mask embedding, (batch, frames) of bool.

        Returns:
            One (batch, frames, hidden_size) per layer; what stands at padded frames has no meaning.
        """
        valid = devices.send(torch.arange(local.shape[1]) < lengths[:, None], local.device)
        regularisation = self.regularisation if self.training else Regularisation()
        held = self.masked_spec_embed.dtype
        # Weights that are held in bfloat16 need no cast, and autocast would normalise layers in float32.
        with nullcontext() if held is torch.float32 else torch.autocast(local.device.type, enabled=False):
            hidden = self.feature_projection(local.to(held).masked_fill(~valid[..., None], 0.0))
            hidden = drop(hidden, regularisation.dropout)
            if mask is not None:
                hidden = torch.where(mask[..., None], self.masked_spec_embed.to(hidden.dtype), hidden)
            # The position embedding is a convolution: what stands in the padding would reach valid frames.
            hidden = hidden.masked_fill(~valid[..., None], 0.0)
            return self.encoder(hidden, self._padding(valid, lengths, held), self.depths(layers), regularisation)

    def replay(self, device: torch.device) -> LayerGraphs:
        """Train the layers by CUDA graphs from now on, on weights rounded to bfloat16, which stay where they are.

        Returns:
            What holds the gradients of the layers' parameters, which get none themselves.
        """
        self.encoder.graphs = LayerGraphs(self.encoder.layers)
        self.encoder.fuses = not self.encoder.pre_norm and devices.builds_kernels(device)
        return self.encoder.graphs

    def _padding(self, valid: Tensor, lengths: Tensor, held: torch.dtype) -> Padding:
        """None where no clip is padded, which lets the fastest kernels run."""
        if self.encoder.graphs and self.training:
            return Packing.rounded(lengths, valid.device)
        if int(lengths.min()) == valid.shape[1]:
            return None
        return Packing.of(lengths, valid.device) if self.packs(valid.device, held) else valid[:, None, None, :]

    def packs(self, device: torch.device, held: torch.dtype) -> bool:
        """Whether padding is left out of all layers, and not of attention alone."""
        if self.architecture.num_buckets is not None:
            return False
        if device.type == "cpu":
            return not self.training  # training gains nothing by it there
        width = self.architecture.hidden_size // self.architecture.num_attention_heads
        takes = width % 8 == 0 and width <= 256  # FlashAttention does
        return held is not torch.float32 and takes and devices.attends_to_packed(device)

    def depths(self, layers: Collection[int]) -> dict[int, int]:
        """How many transformer layers must run for each layer asked for."""
        count = self.architecture.num_hidden_layers
        absent = [layer for layer in layers if not -count <= layer <= -1]
        if absent:
            raise UserError(f"Layer {absent[0]} is asked for, but this HuBERT has layers -1 to -{count}.")
        return {layer: count + 1 + layer for layer in layers}


class FeatureProjection(nn.Module):
    """Layer normalisation and projection of the local features to the transformer's width."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.conv_dim[-1]
        self.layer_norm = (
            nn.LayerNorm(width, eps=architecture.layer_norm_eps) if architecture.feat_proj_layer_norm else nn.Identity()
        )
        self.projection = Linear(width, architecture.hidden_size)

    def forward(self, local: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.layer_norm(local))
        return projected


class Transformer(nn.Module):
    """Convolutional position embedding and the layers; post-norm in base, pre-norm in large."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.pre_norm = architecture.do_stable_layer_norm
        self.pos_conv_embed = PositionEmbedding(architecture)
        self.layer_norm = nn.LayerNorm(architecture.hidden_size, eps=architecture.layer_norm_eps)
        self.layers = nn.ModuleList(
            TransformerLayer(architecture, first=depth == 0) for depth in range(architecture.num_hidden_layers)
        )
        self.graphs: LayerGraphs | None = None
        """Of the layers in training, if it is to replay them."""
        self.fuses = False
        """Whether it also is to use the kernels of `fused`."""

    def forward(
        self, hidden: Tensor, padding: Padding, depths: dict[int, int], regularisation: Regularisation
    ) -> dict[int, Tensor]:
        hidden = hidden + self.pos_conv_embed(hidden)
        if not self.pre_norm:
            hidden = self.layer_norm(hidden)
        hidden = drop(hidden, regularisation.dropout)
        first: TransformerLayer = self.layers[0]  # type: ignore[assignment]
        positions = first.attention.positions(hidden.shape[1])
        if isinstance(padding, Packing):
            hidden = padding.pack(hidden)
        last = max(depths.values())

        def run(hidden: Tensor, padding: Padding) -> dict[int, Tensor]:
            return self._states(hidden, padding, positions, regularisation, last)

        if self.graphs and self.training and isinstance(padding, Packing) and len(depths) == 1:
            states = {last: self.graphs(hidden, padding, last, lambda *packed: run(*packed)[last])}
        else:
            states = run(hidden, padding)
        if self.pre_norm and len(self.layers) in states:
            states[len(self.layers)] = self.layer_norm(states[len(self.layers)])
        found = {layer: states[depth] for layer, depth in depths.items()}
        if isinstance(padding, Packing):
            return {layer: padding.unpack(state) for layer, state in found.items()}
        return found

    def _states(
        self, hidden: Tensor, padding: Padding, positions: Tensor | None, regularisation: Regularisation, last: int
    ) -> dict[int, Tensor]:
        """Of each depth from 1 to `last`."""
        states = {}
        for depth, layer in enumerate(self.layers[:last], start=1):
            if self.fuses and self.training and isinstance(padding, Packing):
                hidden = layer.fused(hidden, padding, regularisation)  # type: ignore[operator]
            elif not (self.training and torch.rand(()).item() < regularisation.layerdrop):
                hidden = layer(hidden, padding, positions, regularisation)
            states[depth] = hidden
        return states


class Attention(nn.Module):
    """Multi-head self-attention over the valid frames.

    WavLM's adds a bias of the relative positions, which is learned per bucket and head in the first layer and gated in
    each by the frame that attends (Chen et al. 2022, Eq. 3 to 6).
    """

    def __init__(self, architecture: Architecture, *, first: bool) -> None:
        """Args: first: whether this is the first layer, which has the positions for all."""
        super().__init__()
        self.buckets, self.farthest = architecture.num_buckets, architecture.max_bucket_distance
        width = architecture.hidden_size
        self.heads = architecture.num_attention_heads
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)
        if self.buckets is not None and self.farthest is not None:
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.heads, 1, 1))
            self.gru_rel_pos_linear = nn.Linear(width // self.heads, 8)
            if first:
                self.rel_attn_embed = nn.Embedding(self.buckets, self.heads)

    def positions(self, frames: int) -> Tensor | None:
        """Bias of each relative position before the gate, (heads, frames, frames); None where there is none."""
        if self.buckets is None or self.farthest is None:
            return None
        order = torch.arange(frames, device=self.rel_attn_embed.weight.device)
        distance = order[None, :] - order[:, None]
        half = self.buckets // 2  # for frames before, and as many for those behind
        exact = half // 2  # one bucket per distance, wider ones beyond
        scale = (half - exact) / math.log(self.farthest / exact)
        wider = exact + (scale * torch.log(distance.abs().clamp(min=1) / exact)).long()
        bucket = torch.where(distance.abs() < exact, distance.abs(), wider.clamp(max=half - 1))
        embedded: Tensor = self.rel_attn_embed(bucket + half * (distance > 0))
        return embedded.permute(2, 0, 1)

    def _bias(self, hidden: Tensor, attend: Tensor | None, positions: Tensor) -> Tensor:
        """Gated positions, (batch, heads, frames, frames), with minus infinity where nothing is attended to."""
        of_heads = hidden.reshape(*hidden.shape[:2], self.heads, -1).transpose(1, 2)
        gates: Tensor = self.gru_rel_pos_linear(of_heads)
        update, reset = gates.unflatten(-1, (2, 4)).sum(-1).sigmoid().split(1, dim=-1)  # type: ignore[no-untyped-call]
        gated = (update * (reset * self.gru_rel_pos_const - 1.0) + 2.0) * positions
        return gated if attend is None else gated.masked_fill(~attend, -math.inf)

    def forward(self, hidden: Tensor, padding: Padding, positions: Tensor | None, dropout: float) -> Tensor:
        query, key, value = (torch.unflatten(each, -1, (self.heads, -1)) for each in self._projected(hidden))
        if isinstance(padding, Packing):
            packed: Tensor = self.out_proj(padding.attention(query, key, value, dropout).flatten(1))
            return packed
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mask = padding if positions is None else self._bias(hidden, padding, positions).to(query.dtype)
        if dropout and query.device.type == "cpu":
            mixed = _attended(query, key, mask, dropout) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _projected(self, hidden: Tensor) -> Iterable[Tensor]:
        if hidden.device.type == "cpu":
            return [projection(hidden) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        return F.linear(hidden, *self.stacked()).chunk(3, dim=-1)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Weight and bias that give queries, keys and values at once: on a GPU three small products take longer."""
        projections = self.q_proj, self.k_proj, self.v_proj
        return torch.cat([each.weight for each in projections]), torch.cat([each.bias for each in projections])


def _attended(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention weights, (batch, heads, frames, frames), with dropout: torch has no fused kernel for that on a CPU."""
    scores = query / math.sqrt(query.shape[-1]) @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return drop(scores.softmax(-1).to(query.dtype), dropout)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.intermediate_dense = Linear(architecture.hidden_size, architecture.intermediate_size, gelu=True)
        self.output_dense = Linear(architecture.intermediate_size, architecture.hidden_size)

    def forward(self, hidden: Tensor, dropout: float) -> Tensor:
        inner = drop(self.intermediate_dense(hidden), dropout)
        return drop(self.output_dense(inner), dropout)


class TransformerLayer(nn.Module):
    """Attention and feed-forward network, each with a residual connection and layer normalisation."""

    def __init__(self, architecture: Architecture, *, first: bool) -> None:
        super().__init__()
        width, eps = architecture.hidden_size, architecture.layer_norm_eps
        self.pre_norm = architecture.do_stable_layer_norm
        self.attention = Attention(architecture, first=first)
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(architecture)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self, hidden: Tensor, padding: Padding, positions: Tensor | None, regularisation: Regularisation
    ) -> Tensor:
        dropout, attention_dropout = regularisation.dropout, regularisation.attention_dropout
        if self.pre_norm:
            mixed = self.attention(self.layer_norm(hidden), padding, positions, attention_dropout)
            hidden = hidden + drop(mixed, dropout)
            return hidden + self.feed_forward(self.final_layer_norm(hidden), dropout)
        mixed = self.attention(hidden, padding, positions, attention_dropout)
        hidden = self.layer_norm(hidden + drop(mixed, dropout))
        out: Tensor = self.final_layer_norm(hidden + self.feed_forward(hidden, dropout))
        return out

    def fused(self, hidden: Tensor, packing: Packing, regularisation: Regularisation) -> Tensor:
        """The same of packed frames in training, on a GPU, with normalisation behind; dropout draws other numbers."""
        from gmp_atl import fused  # needs Triton, which torch brings along for GPUs only

        dropout, feed_forward = regularisation.dropout, self.feed_forward
        projected = fused.projected(hidden, *self.attention.stacked()).view(len(hidden), 3, self.attention.heads, -1)
        query, key, value = projected.unbind(1)
        mixed = packing.attention(query, key, value, regularisation.attention_dropout).flatten(1)
        hidden = fused.added(hidden, mixed, self.attention.out_proj, self.layer_norm, dropout)
        inner = fused.activated(hidden, feed_forward.intermediate_dense, dropout)
        return fused.added(hidden, inner, feed_forward.output_dense, self.final_layer_norm, dropout)


def drop(hidden: Tensor, probability: float) -> Tensor:
    """Dropout, for a probability below one, which is rounded to 1/65,536 on a CPU.

    There torch draws a number for each element, one after another; here one decides on four (benchmarks/operations.py).
    """
    if probability == 0:
        return hidden
    if hidden.device.type != "cpu":
        return F.dropout(hidden, probability)
    threshold = min(round(65_536 * probability), 65_535)
    numbers = torch.empty(-(-hidden.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = numbers[: hidden.numel()].view(hidden.shape) >= threshold - 32_768
    return hidden * kept.to(hidden.dtype).mul_(65_536 / (65_536 - threshold))


def from_scratch(config: ScratchEncoderConfig, regularisation: Regularisation | None = None) -> Encoder:
    """A HuBERT with seeded random weights; equal seeds, equal weights. Linear layers are as in transformers."""
    architecture = Architecture(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feed_forward,
        conv_dim=(config.conv_channels,) * len(CONV_KERNELS),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.seed)
        encoder = Encoder(architecture, regularisation)
        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for number, layer in enumerate(encoder.feature_extractor.conv_layers):
            weight: Tensor = layer.conv.weight  # type: ignore[union-attr,assignment]
            nn.init.kaiming_normal_(weight)
            if number > 0:
                # GELU leaves every channel with about the same positive mean. Filters that sum to zero take it off;
                # else it grows from layer to layer until clips differ by 3 % of their features' power only.
                weight.sub_(weight.mean(dim=(1, 2), keepdim=True))
    return encoder
