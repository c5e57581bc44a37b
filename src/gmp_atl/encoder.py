"""HuBERT in two halves: the convolutions, run once per clip, and the transformer, run in every stage.

HuBERT base normalises over *time* in its first convolution, so zero padding changes every frame of a clip.
The convolutions therefore run on single unpadded clips and their output is cached ("local features"); only
the transformer sees batches, with an attention mask. Then the features of a clip do not depend on its batch.

Parameter names and `config.json` are those of transformers' `HubertModel`, which loads what `model_files.save` writes.
Architecture: Hsu et al., "HuBERT", TASLP 2021, Sec. II and Table I.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from gmp_atl import devices
from gmp_atl.config import ScratchEncoderConfig
from gmp_atl.errors import UserError
from gmp_atl.graphs import LayerGraphs
from gmp_atl.linear import Linear, linear

CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
RECEPTIVE_FIELD = 400
"""Samples that one frame sees."""
HOP = 320
"""Samples between two frames: 50 frames per second."""
MFCC = "MFCC"
"""Stands for the encoder of features that were made without one; their layer is 0."""
_STRETCH = 64
"""Frames whose convolutions are computed at once: 4 MB pass from the first to the second in bfloat16."""


Size = Annotated[int, Field(gt=0, le=8192)]  # HuBERT X-Large is 5120 wide where it is widest


def n_frames(n_samples: int) -> int:
    """Frames that the convolutions make of a clip; none for a clip shorter than the receptive field."""
    for kernel, stride in zip(CONV_KERNELS, CONV_STRIDES, strict=True):
        n_samples = (n_samples - kernel) // stride + 1
    return max(0, n_samples)


MODEL_TYPES = {"hubert": "HubertModel", "wav2vec2": "HubertModel", "wavlm": "WavLMModel"}
"""Of `config.json`, and the class of transformers that has the same network."""
_POSITIONS = {"num_buckets", "max_bucket_distance"}
"""Keys that WavLM has and the others have not."""


@dataclass(frozen=True)
class Architecture:
    """The settings of a HuBERT's `config.json` that determine the network."""

    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    conv_dim: tuple[Size, ...]
    conv_bias: bool = False
    feat_extract_norm: str = "group"
    feat_proj_layer_norm: bool = True
    do_stable_layer_norm: bool = False
    num_conv_pos_embeddings: Size = 128
    num_conv_pos_embedding_groups: Size = 16
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    num_buckets: Size | None = None
    """Of relative positions, in WavLM's attention; None elsewhere."""
    max_bucket_distance: Size | None = None
    """In frames, beyond which positions fall into one bucket."""

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> Architecture:
        """Read `config.json` of a HuBERT, of a wav2vec 2.0, whose network is the same, or of a WavLM.

        Raises:
            UserError: another model, other strides, or an option that this encoder does not have.
        """
        kind = config.get("model_type", "hubert")
        if kind not in MODEL_TYPES:
            supported = ", ".join(map(repr, MODEL_TYPES))
            raise UserError(f"{source}: model_type is {kind!r}, but only {supported} are supported.")
        expected = {
            "conv_kernel": list(CONV_KERNELS),
            "conv_stride": list(CONV_STRIDES),
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "conv_pos_batch_norm": False,
            "add_adapter": False,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise UserError(f"{source}: {key} is {config[key]!r}, but only {value!r} is supported.")
        of_kind = [field for field in fields(cls) if kind == "wavlm" or field.name not in _POSITIONS]
        needed = {field.name for field in of_kind if field.default is MISSING or field.name in _POSITIONS}
        absent = sorted(needed - config.keys())
        if absent:
            raise UserError(f"{source} is not the config.json of a HuBERT: {', '.join(absent)} is missing.")
        if not isinstance(config["conv_dim"], list) or len(config["conv_dim"]) != len(CONV_KERNELS):
            raise UserError(f"{source}: conv_dim is {config['conv_dim']!r}, not a list of {len(CONV_KERNELS)} sizes.")
        known = {field.name: config[field.name] for field in of_kind if field.name in config}
        try:
            return TypeAdapter(cls).validate_json(json.dumps(known), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(f"{source}: {where}: {problem['msg']}; expected the config.json of a HuBERT.") from None

    def to_config(self) -> dict[str, Any]:
        """A `config.json` from which `HubertModel.from_pretrained`, or WavLM's, builds the same network."""
        kind = "hubert" if self.num_buckets is None else "wavlm"
        return {
            "architectures": [MODEL_TYPES[kind]],
            "model_type": kind,
            "conv_kernel": list(CONV_KERNELS),
            "conv_stride": list(CONV_STRIDES),
            "num_feat_extract_layers": len(CONV_KERNELS),
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            **{key: value for key, value in asdict(self).items() if value is not None},
            "conv_dim": list(self.conv_dim),
        }


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

    def depths(self, layers: Iterable[int]) -> dict[int, int]:
        """How many transformer layers must run for each layer asked for."""
        count = self.architecture.num_hidden_layers
        absent = [layer for layer in layers if not -count <= layer <= -1]
        if absent:
            raise UserError(f"Layer {absent[0]} is asked for, but this HuBERT has layers -1 to -{count}.")
        return {layer: count + 1 + layer for layer in layers}


@dataclass(frozen=True)
class Packing:
    """Clips without their padding, frame after frame."""

    rows: Tensor
    """Of the valid frames, counted through the padded batch, (valid frames,)."""
    starts: Tensor
    """Of each clip among them, and their number, (clips + 1,) of int32; more if rounded."""
    clips: int
    longest: int
    """Frames of the longest clip: the padded batch is (clips, longest, ...)."""
    size: int
    """Frames once packed."""
    bound: int
    """No clip has more frames."""

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> Packing:
        """Args: lengths: valid frames per clip, on the CPU."""
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        return cls._with(lengths, starts, device, int(lengths.sum()), int(lengths.max()))

    @classmethod
    def rounded(cls, lengths: Tensor, device: torch.device) -> Packing:
        """With zeros behind the last clip, as one more clip, so that few sizes occur, each again and again.

        Likewise of few numbers of clips, those added having no frames.
        """
        longest, size = int(lengths.max()), int(lengths.sum())
        step = max(64, 1 << size.bit_length() >> 6)  # 32 sizes up to the next power of two
        rounded = -(-size // step) * step
        starts = torch.full((-(-(len(lengths) + 2) // 64) * 64,), rounded, dtype=torch.int32)
        starts[: len(lengths) + 1] = F.pad(lengths.cumsum(0), (1, 0))
        bound = max(512, 1 << (longest - 1).bit_length(), step)
        return cls._with(lengths, starts, device, rounded, bound)

    @classmethod
    def _with(cls, lengths: Tensor, starts: Tensor, device: torch.device, size: int, bound: int) -> Packing:
        longest = int(lengths.max())
        rows = (torch.arange(longest) < lengths[:, None]).flatten().nonzero()[:, 0]
        return cls(devices.send(rows, device), devices.send(starts, device), len(lengths), longest, size, bound)

    @property
    def kind(self) -> tuple[int, int, int]:
        """Where it is equal, attention runs the same kernels."""
        return self.size, len(self.starts), self.bound

    def pack(self, padded: Tensor) -> Tensor:
        """(clips, frames, ...) to (size, ...)."""
        packed = padded.flatten(0, 1)[self.rows]
        return F.pad(packed, (0, 0) * (packed.ndim - 1) + (0, self.size - len(self.rows)))

    def unpack(self, packed: Tensor) -> Tensor:
        """The reverse, zero where padded."""
        padded = packed.new_zeros(self.clips * self.longest, *packed.shape[1:])
        padded = padded.index_copy(0, self.rows, packed[: len(self.rows)])
        return padded.view(self.clips, self.longest, *packed.shape[1:])

    def attention(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Each clip within itself: (valid frames, heads, width of a head) each, and so the result."""
        if query.device.type == "cpu":
            found = []
            for start, end in pairwise(self.starts.tolist()):
                q, k, v = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
                found.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)[0].transpose(0, 1))
            return torch.cat(found)
        # torch.nn.attention.varlen_attn is this without dropout.
        around = self.starts, self.starts, self.bound, self.bound
        mixed: Tensor = torch.ops.aten._flash_attention_forward(query, key, value, *around, dropout, False, False)[0]
        return mixed


Padding = Tensor | Packing | None
"""How attention ignores padding: a mask of the valid frames, (clips, 1, 1, frames) of bool; packed clips; or None if no
clip is padded."""


class Convolutions(nn.Module):
    """Seven convolutions from waveform to 50 frames per second, each followed by GELU.

    Activations are laid out as (frames, channels); in float32 each convolution is a matrix product. A clip is computed
    64 frames at a time, so that activations stay in the processor's cache (docs/speed.md). For that, base's
    normalisation over time is folded into the first filters: over the clip, the output of a filter w has mean w·m and
    variance w·C·w, where m and C are mean and covariance of the windows of 10 samples that it sees. After that no frame
    depends on any sample outside its receptive field.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        channels = (1, *architecture.conv_dim)
        self.conv_layers = nn.ModuleList(
            ConvLayer(architecture, channels[i], channels[i + 1], CONV_KERNELS[i], CONV_STRIDES[i], first=i == 0)
            for i in range(len(CONV_KERNELS))
        )

    def together(self, audio: Tensor, lengths: Tensor) -> Tensor:
        """Many clips, layer by layer: for training, and for a GPU, which stretches would leave idle.

        Args:
            audio: (clips, samples), zero where padded.
            lengths: samples of each, (clips,), on the device.

        Returns:
            (clips, frames, channels); frames of the padding have no meaning.
        """
        first: ConvLayer = self.conv_layers[0]  # type: ignore[assignment]
        windows = audio.unfold(1, CONV_KERNELS[0], CONV_STRIDES[0])
        counts = (lengths - CONV_KERNELS[0]) // CONV_STRIDES[0] + 1
        valid = torch.arange(windows.shape[1], device=audio.device) < counts[:, None]
        with torch.autocast(audio.device.type, enabled=False):
            weight, bias = first.filters(windows.masked_fill(~valid[..., None], 0.0), counts)
        hidden = windows @ weight.mT
        hidden = first.activate(hidden if bias is None else hidden + bias.to(hidden.dtype))
        hidden = hidden.to(self.conv_layers[-1].conv.weight.dtype)  # type: ignore[union-attr,arg-type]
        for layer in self.conv_layers[1:]:
            hidden = layer.together(hidden)  # type: ignore[operator]
        return hidden

    def arrange(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on, all but the first layer's products, and lay the filters out for that."""
        for layer in self.conv_layers[1:]:
            layer.to(dtype=dtype)
            weight: nn.Parameter = layer.conv.weight  # type: ignore[union-attr,assignment]
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)

    def forward(self, audio: Tensor) -> Tensor:
        """One clip, (samples,), to (frames, channels)."""
        first: ConvLayer = self.conv_layers[0]  # type: ignore[assignment]
        dtype: torch.dtype = self.conv_layers[-1].conv.weight.dtype  # type: ignore[union-attr,assignment]
        kernel, stride = CONV_KERNELS[0], CONV_STRIDES[0]
        windows = audio.unfold(0, kernel, stride)[None]
        weight, bias = first.filters(windows, torch.tensor([windows.shape[1]], device=audio.device))
        frames, found = n_frames(len(audio)), []
        for start in range(0, frames, _STRETCH):
            end = min(start + _STRETCH, frames)
            samples = audio[start * HOP : (end - 1) * HOP + RECEPTIVE_FIELD]
            products = linear(samples.unfold(0, kernel, stride), weight[0], None if bias is None else bias.flatten())
            hidden = first.activate(products.to(dtype))
            for layer in self.conv_layers[1:]:
                hidden = layer(hidden)
            found.append(hidden)
        return torch.cat(found)


class ConvLayer(nn.Module):
    """Convolution, normalisation (over time in the first layer of base, over channels in large), GELU."""

    def __init__(
        self, architecture: Architecture, channels_in: int, channels_out: int, kernel: int, stride: int, *, first: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels_out, kernel, stride, bias=architecture.conv_bias)
        self.over_channels = architecture.feat_extract_norm == "layer"
        self.layer_norm: nn.Module = nn.Identity()
        if self.over_channels:
            self.layer_norm = nn.LayerNorm(channels_out)
        elif first:
            self.layer_norm = nn.GroupNorm(channels_out, channels_out)

    def filters(self, windows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight, (clips, channels, kernel), and bias, (clips, 1, channels), of the first layer for each clip.

        Args:
            windows: (clips, frames, kernel), zero where padded.
            counts: frames that are not, (clips,).
        """
        weight = self.conv.weight[:, 0].expand(len(windows), -1, -1)
        if self.over_channels:
            return weight, self.conv.bias
        norm: nn.GroupNorm = self.layer_norm  # type: ignore[assignment]
        # A variance as the difference of two sums: in float64, or a quiet clip would lose it. The bias cancels out.
        w, x, n = weight.double(), windows.double(), counts.double()[:, None, None]
        mean = x.sum(dim=1, keepdim=True) / n
        covariance = x.mT @ x / n - mean.mT @ mean
        scale = norm.weight[:, None] / torch.sqrt(((w @ covariance) * w).sum(-1, keepdim=True).clamp(min=0) + norm.eps)
        return (w * scale).to(weight), (norm.bias - (mean @ w.mT) * scale.mT).to(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Any layer but the first: (frames, channels) to about half as many frames."""
        if hidden.dtype is torch.float32:
            width, kernel, stride = hidden.shape[1], self.conv.kernel_size[0], self.conv.stride[0]
            frames = (len(hidden) - kernel) // stride + 1
            # As a matrix product, which is faster in float32; windows are rows that overlap, of which none is copied.
            windows = hidden.as_strided((frames, kernel * width), (stride * width, 1))
            taps = self.conv.weight.transpose(1, 2).flatten(1)
            convolved = linear(windows, taps, self.conv.bias, gelu=not self.over_channels)
            return self.activate(convolved) if self.over_channels else convolved
        image = hidden.T[None, :, None]  # of height one: torch lays out two-dimensional convolutions by channels only
        convolved = F.conv2d(image, self.conv.weight[:, :, None], self.conv.bias, (1, *self.conv.stride))
        return self.activate(convolved[0, :, 0].T)

    def together(self, hidden: Tensor) -> Tensor:
        """The same of many clips, (clips, frames, channels), as one matrix product."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        span = hidden.shape[1] - kernel + 1
        taps = torch.cat([hidden[:, tap : tap + span : stride] for tap in range(kernel)], dim=-1)
        return self.activate(F.linear(taps, self.conv.weight.transpose(1, 2).flatten(1), self.conv.bias))

    def activate(self, hidden: Tensor) -> Tensor:
        """GELU of (..., frames, channels), after the normalisation of large."""
        if self.over_channels:
            hidden = self.layer_norm(hidden)
        return F.gelu(hidden)


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


class PositionEmbedding(nn.Module):
    """Relative positions through a wide grouped convolution."""

    spectra: Tensor | None

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, kernel = architecture.hidden_size, architecture.num_conv_pos_embeddings
        groups = architecture.num_conv_pos_embedding_groups
        self.kernel, self.groups, self.narrow = kernel, groups, width < 16 * groups
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=2 * math.sqrt(1 / (kernel * width)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = weight_norm(conv, name="weight", dim=2)
        self.register_buffer("spectra", None, persistent=False)

    @torch.no_grad()
    def arrange(self) -> None:
        """Transform the filters once for all passes to come, which must not change them."""
        self.spectra = self._spectra().contiguous()

    def forward(self, hidden: Tensor) -> Tensor:
        """(clips, frames, width), and so the result."""
        exported = torch.onnx.is_in_onnx_export()  # which has no complex numbers
        if hidden.device.type != "cpu" and not exported:
            return F.gelu(self._by_products(hidden))
        rows = hidden.transpose(1, 2)
        # A Fourier transform takes a fraction of the time (docs/speed.md). With wide groups, transforming the filters
        # takes most of it, which does not pay for a few clips in training.
        pays = self.narrow or self.spectra is not None or len(rows) > 3
        relative = self._by_fourier(rows) if pays and not exported else self.conv(rows)[..., : hidden.shape[1]]
        return F.gelu(relative).transpose(1, 2)

    def _by_fourier(self, rows: Tensor) -> Tensor:
        """The convolution of blocks as long as the filters, whose results reach into the block before.

        In float32: where groups are narrow, torch 2.11's bfloat16 is not coarse but wrong on CPUs with AMX.
        """
        frames, length = rows.shape[2], self.kernel
        with torch.autocast(rows.device.type, enabled=False):
            blocks = F.pad(rows.float(), (0, -frames % length)).reshape(*rows.shape[:2], -1, length)
            spectra = torch.fft.rfft(blocks, 2 * length).unflatten(1, (self.groups, -1))
            filters = self._spectra() if self.spectra is None or torch.is_grad_enabled() else self.spectra
            products = torch.einsum("bgirf,gfio->bgorf", spectra, filters)
            here, before = torch.fft.irfft(products, 2 * length).flatten(1, 2).split(length, dim=-1)
            # From `length` frames before the first one on; the convolution pads by half of that.
            whole = (F.pad(here, (0, 0, 1, 0)) + F.pad(before, (0, 0, 0, 1))).flatten(2)
            first = length - length // 2
            return (whole[..., first : first + frames] + self.conv.bias.float()[:, None]).to(rows.dtype)

    def _spectra(self) -> Tensor:
        """Of the filters, reversed, and padded to twice their length: (groups, frequencies, channels in, out)."""
        spectra = torch.fft.rfft(self.conv.weight.float(), 2 * self.kernel).conj()
        return spectra.unflatten(0, (self.groups, -1)).permute(0, 3, 2, 1)

    def _by_products(self, hidden: Tensor) -> Tensor:
        """As `_by_fourier`, the transforms being matrix products too, in the dtype of `hidden`: so a GPU is faster."""
        (clips, frames, width), length = hidden.shape, self.kernel
        with torch.autocast(hidden.device.type, enabled=False):
            waves = _waves(length, hidden.device, hidden.dtype)
            cosines, sines = waves[:, :, :length]
            taps = self._taps().to(hidden.dtype)
            real_filters, filters = ((wave @ taps).view(-1, *[width // self.groups] * 2) for wave in (cosines, sines))
            blocks = F.pad(hidden, (0, 0, 0, -frames % length)).reshape(-1, length, width)
            of_blocks = ((wave @ blocks).view(len(blocks), len(real_filters), -1) for wave in (cosines, -sines))
            real, imaginary = (each.transpose(0, 1) for each in of_blocks)
            of_cosines = torch.baddbmm(real @ real_filters, imaginary, filters, alpha=-1).view(len(cosines), -1)
            of_sines = torch.baddbmm(real @ filters, imaginary, real_filters).view(len(sines), -1)
            back = _waves(length, hidden.device, hidden.dtype, back=True).mT
            parts = torch.addmm(back[0] @ of_cosines, back[1], of_sines, alpha=-1)
            parts = parts.view(2, length, self.groups, clips, -1, width // self.groups).permute(0, 3, 4, 1, 2, 5)
            whole = F.pad(parts[0], (0, 0) * 3 + (1, 0)) + F.pad(parts[1], (0, 0) * 3 + (0, 1))
            first = length - length // 2
            return whole.flatten(3).flatten(1, 2)[:, first : first + frames] + self.conv.bias.to(hidden.dtype)

    def _taps(self) -> Tensor:
        """The filters in float32, (frames, groups x channels in x channels out).

        Normalised here: torch's kernel for that takes as long as the transforms.
        """
        norms, weight = (getattr(self.conv.parametrizations.weight, f"original{n}").float() for n in (0, 1))
        taps = weight.unflatten(0, (self.groups, -1)).permute(3, 0, 2, 1).flatten(1)
        return taps * (norms.flatten() / torch.linalg.vector_norm(taps, dim=1))[:, None]


@cache
def _waves(length: int, device: torch.device, dtype: torch.dtype, *, back: bool = False) -> Tensor:
    """Cosines and sines of a Fourier transform, (2, frequencies, 2 x length); `back`: weighted for the way back."""
    with torch.inference_mode(mode=False):  # training uses what an evaluation has made
        frequencies, times = torch.arange(length + 1), torch.arange(2 * length)
        angles = (frequencies[:, None] * times % (2 * length)).double() * (math.pi / length)
        waves = torch.stack([angles.cos(), angles.sin()])
        if back:
            waves *= torch.where(frequencies % length == 0, 1.0, 2.0)[:, None] / (2 * length)
        return waves.to(device, dtype)


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
            if not 4 <= self.buckets < 4 * self.farthest:
                raise ValueError(f"{self.buckets} buckets of positions do not reach {self.farthest} frames")
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
