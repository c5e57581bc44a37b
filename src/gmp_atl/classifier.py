"""HuBERT with the utterance head: the model of stages 1 and 4, and how it is applied to whole clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gmp_atl import devices, model_files
from gmp_atl.clips import Batch, Clips, passes
from gmp_atl.config import ComputeConfig, HeadConfig, Loss, Positive, Precision, Section, SpecAugmentConfig
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.heads import UtteranceHead
from gmp_atl.masking import span_mask


class Classifier(nn.Module):
    """Encoder, read at one layer, and utterance head."""

    def __init__(self, encoder: Encoder, config: HeadConfig, tasks: Mapping[str, int], *, cosine: bool = False) -> None:
        super().__init__()
        self.encoder, self.layer = encoder, config.layer
        encoder.depths([config.layer])
        self.head = UtteranceHead(encoder.architecture.hidden_size, config, tasks, cosine=cosine)

    def forward(self, batch: Batch, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, or cosines, per task: (batch, classes) in float32."""
        return self.head(self.encoder(batch.local, batch.lengths, self.layer, mask), batch.lengths)


class Description(Section):
    """What a fine-tuned model says of itself in its safetensors files: all that scoring a recording takes."""

    encoder: str
    """Pre-trained HuBERT that it is built on, with the SHA-256 of its weights."""
    fitted_on: list[str]
    """Ids of the utterances."""
    classes: list[str]
    head: HeadConfig
    loss: Loss
    """Whether the head gives logits or cosines."""
    scale: Positive
    """What these are multiplied by before the softmax: 1, or s of Eq. 2."""
    normalise_audio: bool
    precision: Precision
    """In which it was tested."""


def save(model: Classifier, folder: Path, /, **metadata: Any) -> None:
    """Write encoder (Hugging Face style) and `head.safetensors`, each with the metadata."""
    model_files.save(model.encoder, folder, **metadata)
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in model.head.state_dict().items()}
    model_files.save_tensors(head, folder / "head.safetensors", **metadata)


def load_head(model: Classifier, folder: Path, *, strict: bool = True) -> dict[str, Any]:
    """Fill the head from a folder that `save` wrote; not strict: only what both have, in equal shapes.

    Returns:
        The metadata that it was saved with.
    """
    path = folder / "head.safetensors"
    tensors, metadata = model_files.load_tensors(path)
    own = model.head.state_dict()
    fitting = {name: t for name, t in tensors.items() if name in own and own[name].shape == t.shape}
    if strict and not fitting.keys() == own.keys() == tensors.keys():
        raise UserError(f"{path} is not the head that the config describes; delete it and run snakemake again.")
    model.head.load_state_dict(fitting, strict=False)
    return model_files.origin(metadata, path)


def load(folder: Path) -> tuple[Classifier, Description]:
    """A fine-tuned model, in evaluation mode, and what it says of itself.

    Raises:
        UserError: the folder is not that of a fine-tuned model, or a file is damaged.
    """
    expected = "a folder as finetuning writes it is needed, results/<name>/finetuning/.../fold<n>/seed<n>"
    for name in ("config.json", "model.safetensors", "head.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a fine-tuned model: {name} is missing; {expected}.")
    backbone, metadata = model_files.load_fitted(folder)
    try:
        description = Description.model_validate(metadata)
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise UserError(
            f"{folder} is not a fine-tuned model, or one of another version of gmp-atl (metadata of model.safetensors: "
            f"{keys}); {expected}."
        ) from None
    tasks = {"emotion": len(description.classes)}
    model = Classifier(backbone, description.head, tasks, cosine=description.loss == "ams")
    load_head(model, folder)
    return model.eval(), description


def spec_augment(batch: Batch, config: SpecAugmentConfig, generator: torch.Generator) -> Tensor | None:
    """Frames to mask while a classifier is trained, two spans a clip at least, as in transformers; None if off."""
    if config.probability == 0:
        return None
    mask = span_mask(batch.lengths, config.probability, config.length, generator, min_spans=2)
    return devices.send(mask, batch.local.device)


def numbered(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Position of each name among the classes, (names,) of int64."""
    return torch.tensor([classes.index(name) for name in names])


def class_weights(labels: Tensor, classes: list[str], kind: str) -> Tensor:
    """Weight of each class in the loss, with mean one over the clips: all one, or inverse to its frequency.

    Raises:
        UserError: a class has no training clip.
    """
    counts = torch.bincount(labels, minlength=len(classes)).float()
    absent = [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]
    if absent:
        raise UserError(
            f"No training utterance of this fold is {' or '.join(absent)}: change folds.held_out or classes, or, if it "
            "is held_out_training_group, finetuning.selection, which leaves out the group of the next fold."
        )
    return torch.ones_like(counts) if kind == "none" else counts.sum() / (len(classes) * counts)


@torch.inference_mode()
def apply(model: Classifier, clips: Clips, task: str, compute: ComputeConfig, device: torch.device) -> Tensor:
    """Logits, or cosines, of whole clips: (clips, classes) in float32, in the order of `clips`."""
    outputs: dict[int, Tensor] = {}
    with devices.autocast(device, devices.dtype(compute.precision, device)):  # around all: weights are cast once
        for batch in passes(clips, compute.batch_seconds, device):
            outputs.update(zip(batch.indices, model(batch)[task].cpu(), strict=True))
    return torch.stack([outputs[index] for index in range(len(clips.ids))])


def scores(
    model: Classifier, description: Description, clips: Clips, compute: ComputeConfig, device: torch.device
) -> np.ndarray:
    """Scores of whole clips, without margin: (clips, classes) in float32, each row summing to one."""
    outputs = apply(model, clips, "emotion", compute, device)
    probabilities: np.ndarray = (outputs * description.scale).softmax(1).numpy()
    return probabilities
