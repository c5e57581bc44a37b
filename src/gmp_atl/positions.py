"""The position embedding of the transformer: a grouped convolution, so wide that Fourier transforms are faster."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from gmp_atl.architecture import Architecture


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
