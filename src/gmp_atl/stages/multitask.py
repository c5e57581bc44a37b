"""Stage 1: HuBERT learns emotion and gender together (paper, Sec. 3.1, Fig. 1 a, Eq. 1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from gmp_atl import classifier, devices, model_files
from gmp_atl.classifier import Classifier
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import GENDERS, MultitaskSlice
from gmp_atl.encoder import Regularisation
from gmp_atl.files import Output
from gmp_atl.folds import training_split
from gmp_atl.randomness import Key
from gmp_atl.training import Terms, Trainer, fingerprint, regularisation, updates_per_epoch


def multitask(
    *,
    config: MultitaskSlice,
    utterances: Path,
    local_features: Path,
    encoder: Path,
    fold: int,
    seed: int,
    output: Output,
    history: Output,
    checkpoint: Output,
    gpus: int = 0,
) -> None:
    """Train on the fold's training utterances; write encoder and head to `output`, a folder.

    Raises:
        LeakageError: the encoder was fitted on a held-out utterance.
        UserError: features of another encoder, or training that diverges.
    """
    device = devices.resolve(gpus)
    settings = config.multitask
    split = training_split(utterances, config.folds, fold)
    key = Key(seed, fold, "multitask")
    torch.manual_seed(key.derive("weights"))
    frozen = settings.encoder == "frozen"
    perturbations = Regularisation() if frozen else regularisation(settings.optimisation)
    backbone, origin = model_files.load_fitted(encoder, perturbations)
    split.refuse_leaks(origin["fitted_on"], encoder)
    if frozen:
        backbone.requires_grad_(False)
    model = Classifier(backbone, config.head, {"emotion": len(config.classes), "gender": len(GENDERS)})
    emotions = classifier.numbered(split.column("emotion"), config.classes)
    genders = classifier.numbered(split.column("gender"), GENDERS).to(device)
    weights = classifier.class_weights(emotions, config.classes, settings.class_weights).to(device)
    emotions = emotions.to(device)

    def objective(batch: Batch, generator: torch.Generator) -> Terms:
        logits = model(batch, classifier.spec_augment(batch, settings.spec_augment, generator))
        emotion, gender = emotions[batch.indices], genders[batch.indices]
        emotion_loss = (weights[emotion] * F.cross_entropy(logits["emotion"], emotion, reduction="none")).sum()
        gender_loss = F.cross_entropy(logits["gender"], gender, reduction="sum")
        alpha, count = settings.emotion_weight, len(batch.indices)
        quantities = {
            "emotion_loss": (emotion_loss, count),
            "gender_loss": (gender_loss, count),
            "emotion_accuracy": ((logits["emotion"].argmax(1) == emotion).sum(), count),
            "gender_accuracy": ((logits["gender"].argmax(1) == gender).sum(), count),
        }
        return Terms(alpha * emotion_loss + (1 - alpha) * gender_loss, count, quantities)

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
        fingerprint=fingerprint("multitask", config, key, [utterances, local_features, encoder / "model.safetensors"]),
        updates=settings.epochs * updates_per_epoch(clips, settings.optimisation),
    )
    trainer.run()
    classifier.save(model, output, encoder=origin["encoder"], fitted_on=split.ids)
    trainer.finish(history)
