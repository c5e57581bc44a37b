"""The convolutions that make frames of a waveform, frozen in every stage of the method."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl.architecture import Architecture
from gmp_atl.frames import CONV_KERNELS, CONV_STRIDES, HOP, RECEPTIVE_FIELD, n_frames
from gmp_atl.linear import linear

_STRETCH = 64
"""Frames whose convolutions are computed at once: 4 MB pass from the first to the second in bfloat16."""


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
