"""Models in files: folders of `config.json` and `model.safetensors`, as transformers reads and writes them.

Nothing is pickled. What a stage writes tells in its metadata, in the header of the safetensors file, which encoder
training started from and which utterances it was fitted on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmp_atl.architecture import MODEL_TYPES, Architecture
from gmp_atl.encoder import Encoder, Regularisation
from gmp_atl.errors import UserError
from gmp_atl.files import atomic, write_text
from gmp_atl.formats import KEY, check_tensors, tensor_metadata


def digest(encoder: Encoder) -> str:
    """SHA-256 of all weights, independent of the file that they came in."""
    found = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def save(encoder: Encoder, folder: Path, /, **metadata: Any) -> None:
    """Write `config.json` and `model.safetensors`; metadata is kept inside the latter."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors", **metadata)
    write_text(folder / "config.json", json.dumps(encoder.architecture.to_config(), indent=2, sort_keys=True) + "\n")


def load(folder: Path, regularisation: Regularisation | None = None) -> tuple[Encoder, dict[str, Any]]:
    """An encoder that `save` wrote, or any Hugging Face HuBERT in safetensors, and its metadata.

    Raises:
        UserError: a file is missing or damaged, or the weights are not those of the config.
    """
    encoder = load_architecture(folder, regularisation)
    weights = folder / "model.safetensors"
    tensors, metadata = load_tensors(weights)
    load_weights(encoder, tensors, weights)
    return encoder, metadata


def load_fitted(folder: Path, regularisation: Regularisation | None = None) -> tuple[Encoder, dict[str, Any]]:
    """As `load`, but only an encoder that tells what it was fitted on. Raises as `load` and `origin` do."""
    encoder, metadata = load(folder, regularisation)
    return encoder, origin(metadata, folder / "model.safetensors")


def load_architecture(folder: Path, regularisation: Regularisation | None = None) -> Encoder:
    """The network that `config.json` in `folder` describes, its weights yet to be loaded."""
    architecture = Architecture.read(folder)
    try:
        with _NoDraws():
            return Encoder(architecture, regularisation)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{folder / 'config.json'}: its sizes make no HuBERT ({error}).") from None


class _NoDraws(TorchFunctionMode):
    """Skips drawing initial weights, which for HuBERT base takes as long as reading them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.uniform_:
            return args[0]
        drawn = func in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)
        return None if drawn else func(*args, **(kwargs or {}))


def load_weights(encoder: Encoder, tensors: dict[str, Tensor], source: Path) -> None:
    """Give an encoder the tensors of any HuBERT checkpoint, whatever head it was saved with; float32 is not copied."""
    expected = encoder.state_dict()
    renamed = {_canonical(name): tensor for name, tensor in tensors.items()}
    missing = sorted(set(expected) - set(renamed))
    misshapen = [name for name in expected if name in renamed and expected[name].shape != renamed[name].shape]
    if missing or misshapen:
        raise UserError(
            f"{source} does not fit its config.json: missing {missing[:3] or 'nothing'}, of another shape "
            f"{misshapen[:3] or 'nothing'} ({len(missing)} and {len(misshapen)} in all)."
        )
    encoder.load_state_dict({name: renamed[name].float() for name in expected}, assign=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, /, **metadata: Any) -> None:
    """Write a safetensors file atomically, with a JSON object of metadata in its header."""
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", **tensor_metadata(_arrays(tensors), metadata)})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the header in one order, since safetensors takes another in each process: equal runs, equal files."""
    with path.open("rb+") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # offsets count from the end of the header, which must stay where it is
        stream.seek(8)
        stream.write(text.ljust(size))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file; foreign files have no metadata.

    Raises:
        UserError: the file is missing or damaged.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; expected safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        own = tensors if header and KEY in header else {}  # numpy lacks some types that others use
        return tensors, check_tensors(header, _arrays(own), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}).") from None


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def origin(metadata: dict[str, Any], source: Path) -> dict[str, Any]:
    """The metadata of an encoder or head that a stage wrote: `encoder`, its name, and `fitted_on`, ids.

    Raises:
        UserError: another program wrote it, so that nobody knows what it was fitted on.
    """
    ids = metadata.get("fitted_on")
    told = isinstance(metadata.get("encoder"), str) and isinstance(ids, list)
    if not told or not all(isinstance(each, str) for each in ids or []):
        raise UserError(
            f"{source} does not say which utterances it was fitted on; it should be a stage's own output. Delete it "
            "and run snakemake again; to start from other weights, set encoder.source: directory and encoder.path."
        )
    return metadata


def _canonical(name: str) -> str:
    """Parameter name as in a bare HubertModel of today's torch."""
    for prefix in MODEL_TYPES:
        name = name.removeprefix(f"{prefix}.")
    name = name.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
    return name.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")
