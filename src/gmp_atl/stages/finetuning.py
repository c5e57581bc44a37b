"""Stage 4: HuBERT learns emotion with AM-Softmax or cross-entropy (paper, Sec. 3.3, Fig. 1 c, Eqs. 2 and 3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from gmp_atl import classifier, devices, model_files
from gmp_atl.classifier import Classifier, Description
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import FinetuningSlice, Loss
from gmp_atl.files import Output
from gmp_atl.folds import Split, held_out_split, training_split, without_group
from gmp_atl.losses import am_softmax
from gmp_atl.metrics import confusion, uar, war
from gmp_atl.randomness import Key
from gmp_atl.training import Terms, Trainer, Validation, fingerprint, regularisation, updates_per_epoch


def finetuning(
    *,
    config: FinetuningSlice,
    utterances: Path,
    local_features: Path,
    encoder: Path,
    multitask_head: Path | None,
    loss: Loss,
    fold: int,
    seed: int,
    output: Output,
    history: Output,
    checkpoint: Output,
    gpus: int = 0,
) -> None:
    """Train on the fold's training utterances with `loss`; write encoder and head to `output`.

    Args:
        encoder: of stage 3, or the pre-trained one for the rows without GMPs.
        multitask_head: folder of stage 1, for the reading that its head is taken over.

    Raises:
        LeakageError: encoder or head were fitted on a held-out utterance.
        UserError: features or a head of another encoder, a class that the reading of `finetuning.selection` leaves no
            utterance of, or training that diverges.
    """
    device = devices.resolve(gpus)
    settings = config.finetuning
    whole = training_split(utterances, config.folds, fold)
    split, validation = _validation_split(config, utterances, whole, fold)
    key = Key(seed, fold, f"finetuning/{loss}")
    torch.manual_seed(key.derive("weights"))
    backbone, origin = model_files.load_fitted(encoder, regularisation(settings.optimisation))
    whole.refuse_leaks(origin["fitted_on"], encoder)
    model = Classifier(backbone, config.head, {"emotion": len(config.classes)}, cosine=loss == "ams")
    inputs = [utterances, local_features, encoder / "model.safetensors"]
    if multitask_head is not None:
        taken_over = classifier.load_head(model, multitask_head, strict=False)
        whole.refuse_leaks(taken_over["fitted_on"], multitask_head)
        inputs.append(multitask_head / "head.safetensors")
    labels = classifier.numbered(split.column("emotion"), config.classes)
    weights = classifier.class_weights(labels, config.classes, settings.class_weights).to(device)
    labels = labels.to(device)

    def objective(batch: Batch, generator: torch.Generator) -> Terms:
        outputs = model(batch, classifier.spec_augment(batch, settings.spec_augment, generator))["emotion"]
        emotion = labels[batch.indices]
        if loss == "ams":
            each = am_softmax(outputs, emotion, settings.scale, settings.margin)
        else:
            each = F.cross_entropy(outputs, emotion, reduction="none")
        correct = (outputs.argmax(1) == emotion).sum()
        count = len(batch.indices)
        return Terms((weights[emotion] * each).sum(), count, {"emotion_accuracy": (correct, count)})

    validate = None
    if validation is not None:
        validate = _validator(model, config, local_features, validation, origin["encoder"], device)
    clips = Clips.read(local_features, split, encoder=origin["encoder"])
    trainer = Trainer(
        model,
        objective,
        clips,
        config=settings.optimisation,
        compute=config.compute,
        key=key,
        device=device,
        checkpoint=checkpoint,
        fingerprint=fingerprint("finetuning", config, key, inputs),
        updates=settings.epochs * updates_per_epoch(clips, settings.optimisation),
        validate=validate,
    )
    trainer.run()
    description = Description(
        encoder=origin["encoder"],
        fitted_on=sorted({*origin["fitted_on"], *whole.ids}),
        classes=config.classes,
        head=config.head,
        loss=loss,
        scale=settings.scale if loss == "ams" else 1.0,
        normalise_audio=config.encoder.normalise_audio,
        precision=config.compute.precision,
    )
    classifier.save(model, output, **description.model_dump(mode="json"))
    trainer.finish(history)


def _validation_split(config: FinetuningSlice, utterances: Path, whole: Split, fold: int) -> tuple[Split, Split | None]:
    """What is trained on, and what decides which epoch is kept."""
    selection = config.finetuning.selection
    if selection == "last":
        return whole, None
    if selection == "oracle":
        return whole, held_out_split(utterances, config.folds, fold)
    following = fold % len(config.folds.held_out) + 1
    return without_group(whole, config.folds, following)


def _validator(
    model: Classifier, config: FinetuningSlice, local_features: Path, split: Split, encoder: str, device: torch.device
) -> Validation:
    clips = Clips.read(local_features, split, encoder=encoder)
    labels = classifier.numbered(split.column("emotion"), config.classes).numpy()

    def validate() -> dict[str, float]:
        outputs = classifier.apply(model, clips, "emotion", config.compute, device)
        matrix = confusion(labels, np.asarray(outputs.argmax(1)), len(config.classes))
        return {"uar": uar(matrix), "war": war(matrix)}

    return validate
