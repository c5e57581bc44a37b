"""The pre-trained HuBERT, wherever it comes from, in the one form that every later stage reads."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import torch
from torch import Tensor

from gmp_atl import model_files
from gmp_atl.config import PACKAGED_ENCODER, EncoderConfig, EncoderSlice
from gmp_atl.encoder import Encoder, from_scratch
from gmp_atl.errors import LeakageError, UserError
from gmp_atl.files import Output, sha256

log = logging.getLogger(__name__)


def pretrained(*, config: EncoderSlice, output: Output) -> None:
    """Write `config.json` and `model.safetensors` of the encoder that the config names.

    Raises:
        LeakageError: the source says which utterances it was fitted on, as encoders within a run do.
        UserError: the source is missing, damaged, not a HuBERT, or not the pinned file.
    """
    settings = config.encoder
    if settings.source == "scratch":
        scratch = settings.scratch
        encoder = from_scratch(scratch)
        description = f"random HuBERT, {scratch.layers} x {scratch.hidden_size}, seed {scratch.seed}"
    elif settings.source == "packaged":
        encoder, description = _from_folder(PACKAGED_ENCODER, settings), f"{PACKAGED_ENCODER.name} of gmp-atl"
    elif settings.source == "directory":
        assert settings.path is not None  # the config has checked
        encoder, description = _from_folder(settings.path, settings), settings.path.name
    else:
        encoder = _from_folder(_download(settings), settings)
        description = f"{settings.name}@{str(settings.revision)[:8]}"
    identity = (
        f"{description}, sha256 {model_files.digest(encoder)[:12]}" + ", normalised audio" * settings.normalise_audio
    )
    model_files.save(encoder, output, encoder=identity, fitted_on=[])
    log.info("pre-trained encoder: %s", identity)


def _from_folder(folder: Path, settings: EncoderConfig) -> Encoder:
    weights, archive = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not weights.exists() and archive.exists():
        return _from_archive(folder, archive, settings)
    if settings.sha256 and weights.exists():
        _check_digest(weights, settings.sha256)
    encoder, metadata = model_files.load(folder)
    if ids := metadata.get("fitted_on"):
        raise LeakageError(
            f"{folder} was fitted on {len(ids)} utterances ({ids[0]} among them), which as the pre-trained encoder it "
            "would bring into every fold. Name one that was pre-trained on other speech; `snakemake pretrain` puts its "
            "own in results/<name>/encoder."
        )
    return encoder


def _from_archive(folder: Path, archive: Path, settings: EncoderConfig) -> Encoder:
    """Convert a PyTorch archive, which may hold code: only a pinned file, only its tensors."""
    if settings.sha256 is None:
        raise UserError(
            f"{folder} has no model.safetensors, only {archive.name}. Convert it to safetensors, or pin the file "
            f"by encoder.sha256: {sha256(archive)} if you trust it."
        )
    _check_digest(archive, settings.sha256)
    try:
        tensors: dict[str, Tensor] = torch.load(archive, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):  # torch advises to run what the file holds
        raise UserError(f"{archive} is damaged, or holds more than tensors; it is not a HuBERT's weights.") from None
    encoder = model_files.load_architecture(folder)
    model_files.load_weights(encoder, tensors, archive)
    return encoder


def _download(settings: EncoderConfig) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download

    assert settings.name is not None  # the config has checked
    names = ["config.json", "model.safetensors"]
    try:
        folder = Path(snapshot_download(settings.name, revision=settings.revision, allow_patterns=names))
        if not (folder / "model.safetensors").exists():
            names = ["config.json", "pytorch_model.bin"]
            folder = Path(snapshot_download(settings.name, revision=settings.revision, allow_patterns=names))
    except (HTTPError, OSError, ValueError) as error:  # the hub's own errors are among the second
        raise UserError(
            f"encoder {settings.name} at revision {settings.revision} cannot be fetched from the hub ({error}). On a "
            "machine without network, fetch it elsewhere and set encoder.source: directory and encoder.path."
        ) from None
    return folder


def _check_digest(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise UserError(f"{path} has sha256 {found}, but encoder.sha256 pins {expected}; fetch the file again.")
