"""Codebooks of k-means, and the pseudo-labels that they give: what stage 2 writes and later stages read.

Without torch, as k-means is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gmp_atl.errors import UserError
from gmp_atl.files import atomic
from gmp_atl.folds import Split
from gmp_atl.formats import PSEUDO_LABELS, check_tensors, tensor_metadata


class Origin(BaseModel):
    """What a codebook is of."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    layer: int
    size: int
    encoder: str
    """The pre-trained HuBERT behind the frames."""
    fitted_on: list[str]
    """Ids of the utterances that the codebook, or what made its frames, was fitted on."""
    statistics: dict[str, int | float]
    """How the centroids are used, by the names of CLUSTER_STATISTICS."""


@dataclass(frozen=True)
class Codebook:
    """Centroids, (size, dimensions) in float32, and what they are of."""

    centroids: np.ndarray
    origin: Origin


def save(codebook: Codebook, path: Path) -> None:
    """Write a safetensors file."""
    tensors = {"centroids": codebook.centroids}
    with atomic(path) as temporary:
        save_file(tensors, temporary, tensor_metadata(tensors, codebook.origin.model_dump()))


def load(path: Path) -> Codebook:
    """Read what `save` has written.

    Raises:
        UserError: the file is missing, damaged, or no codebook.
    """
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = check_tensors(file.metadata(), tensors, path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable codebook ({error}); delete it and run snakemake again.") from None
    try:
        return Codebook(tensors["centroids"], Origin.model_validate(metadata))
    except (KeyError, ValidationError):
        raise UserError(f"{path} is not a codebook of this project; delete it and run snakemake again.") from None


def read_labels(
    paths: Sequence[Path],
    split: Split,
    lengths: Sequence[int],
    *,
    layer: int,
    sizes: Sequence[int],
    encoder: str,
    transductive: bool,
) -> dict[int, np.ndarray]:
    """Pseudo-labels of the clips of a split by the size of their codebook, one PSEUDO_LABELS file each.

    Args:
        lengths: frames of each clip.
        layer: that was clustered.
        sizes: of the codebooks that may occur.
        encoder: the pre-trained HuBERT that they are built on.
        transductive: whether codebooks may be fitted on utterances that are none of the split.

    Returns:
        Labels of all clips, one after another, int64.

    Raises:
        LeakageError: labels of, or fitted on, a held-out utterance.
        UserError: a codebook of another layer, size or encoder, or a clip with another number of labels.
    """
    found: dict[int, np.ndarray] = {}
    for path in paths:
        table, header = PSEUDO_LABELS.read(path)
        ids = table["id"].to_pylist()
        split.refuse_leaks(ids, path)
        if not transductive:
            split.refuse_leaks(header["fitted_on"], path)
        _check(path, "layer", header["layer"], [layer])
        _check(path, "size", header["size"], sizes)
        _check(path, "encoder", header["encoder"], [encoder])
        labels = dict(zip(ids, (each.values.to_numpy() for each in table["labels"].combine_chunks()), strict=True))
        for utterance, frames in zip(split.ids, lengths, strict=True):
            if utterance not in labels or len(labels[utterance]) != frames:
                raise UserError(
                    f"{path} has {len(labels.get(utterance, []))} labels for {utterance}, which has {frames} frames; "
                    "delete it and run snakemake again."
                )
        found[header["size"]] = np.concatenate([labels[utterance] for utterance in split.ids]).astype(np.int64)
    return found


def _check(path: Path, what: str, found: int | str, expected: Sequence[int | str]) -> None:
    if found not in expected:
        raise UserError(
            f"{path} holds pseudo-labels of {what} {found}, but {what} {' or '.join(map(str, expected))} is expected; "
            "delete it and run snakemake again."
        )
