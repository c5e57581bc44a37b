"""Stage 3: HuBERT predicts the pseudo-labels of masked frames (paper, Sec. 3.2, Fig. 1 b)."""

from __future__ import annotations

from pathlib import Path

import torch

from gmp_atl import codebooks, devices, model_files
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import RetrainingSlice
from gmp_atl.files import Output
from gmp_atl.folds import training_split
from gmp_atl.masked_prediction import MaskedPredictor, masked_prediction
from gmp_atl.masking import span_mask
from gmp_atl.randomness import Key
from gmp_atl.training import Terms, Trainer, fingerprint, regularisation


def retraining(
    *,
    config: RetrainingSlice,
    utterances: Path,
    local_features: Path,
    encoder: Path,
    pseudo_labels: list[Path],
    layer: int,
    fold: int,
    seed: int,
    output: Output,
    history: Output,
    checkpoint: Output,
    gpus: int = 0,
) -> None:
    """Train on the fold's training frames and write the encoder to `output`; no utterance label is read.

    Raises:
        LeakageError: an encoder or pseudo-labels that have seen a held-out utterance.
        UserError: pseudo-labels that do not match the clips frame by frame, or of another layer, codebook or encoder.
    """
    device = devices.resolve(gpus)
    settings = config.retraining
    split = training_split(utterances, config.folds, fold)
    backbone, origin = model_files.load_fitted(encoder, regularisation(settings.optimisation))
    split.refuse_leaks(origin["fitted_on"], encoder)
    clips = Clips.read(local_features, split, encoder=origin["encoder"])
    found = codebooks.read_labels(
        pseudo_labels,
        split,
        clips.lengths.tolist(),
        layer=layer,
        sizes=config.clustering.sizes,
        encoder=origin["encoder"],
        transductive=config.clustering.fit_on == "all",
    )
    labels = {size: torch.from_numpy(of_frames).to(device) for size, of_frames in found.items()}
    key = Key(seed, fold, "retraining")
    torch.manual_seed(key.derive("weights"))
    model = MaskedPredictor(backbone, settings.projection, list(labels), settings.codebook_head)

    def objective(batch: Batch, generator: torch.Generator) -> Terms:
        spans = settings.mask
        mask = span_mask(batch.lengths, spans.probability, spans.length, generator, min_spans=spans.min_spans)
        targets = {size: of_frames[batch.rows] for size, of_frames in labels.items()}
        return masked_prediction(model, batch.local, batch.lengths, mask, targets, settings.unmasked_weight)

    inputs = [utterances, local_features, encoder / "model.safetensors", *pseudo_labels]
    trainer = Trainer(
        model,
        objective,
        clips,
        config=settings.optimisation,
        compute=config.compute,
        key=key,
        device=device,
        checkpoint=checkpoint,
        fingerprint=fingerprint("retraining", config, key, inputs),
        updates=settings.updates,
    )
    trainer.run()
    model_files.save(backbone, output, encoder=origin["encoder"], fitted_on=sorted({*origin["fitted_on"], *split.ids}))
    trainer.finish(history)
