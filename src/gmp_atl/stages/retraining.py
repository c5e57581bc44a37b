"""Stage 3: HuBERT predicts the pseudo-labels of masked frames (paper, Sec. 3.2, Fig. 1 b)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl import devices
from gmp_atl import encoder as encoders
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import RetrainingConfig, RetrainingSlice
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.folds import Split, training_split
from gmp_atl.formats import PSEUDO_LABELS, Output
from gmp_atl.heads import CodebookHeads
from gmp_atl.masking import span_mask
from gmp_atl.randomness import Key
from gmp_atl.training import Terms, Trainer, fingerprint, regularisation


class MaskedPredictor(nn.Module):
    """Encoder and one head per codebook."""

    def __init__(self, encoder: Encoder, config: RetrainingConfig, sizes: list[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = CodebookHeads(encoder.architecture.hidden_size, config.projection, sizes, config.codebook_head)

    def forward(self, batch: Batch, mask: Tensor, chosen: Tensor) -> dict[int, Tensor]:
        """Logits per codebook at the chosen frames, in row-major order: (chosen frames, size)."""
        hidden = self.encoder(batch.local, batch.lengths, mask=mask)
        return self.heads(hidden[chosen])


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
    backbone, origin = encoders.load_fitted(encoder, regularisation(settings.optimisation))
    split.refuse_leaks(origin["fitted_on"], encoder)
    clips = Clips.read(local_features, split, encoder=origin["encoder"])
    transductive = config.clustering.fit_on == "all"
    labels = {}
    for path in pseudo_labels:
        size, labels_of_clips = _read_labels(path, split, clips, transductive=transductive)
        _check_codebook(path, layer, config.clustering.sizes, origin["encoder"])
        labels[size] = labels_of_clips
    key = Key(seed, fold, "retraining")
    torch.manual_seed(key.derive("weights"))
    model = MaskedPredictor(backbone, settings, list(labels))

    def objective(batch: Batch, generator: torch.Generator) -> Terms:
        spans = settings.mask
        mask = span_mask(batch.lengths, spans.probability, spans.length, generator, min_spans=spans.min_spans)
        return masked_prediction(model, batch, mask, labels, settings.unmasked_weight)

    trainer = Trainer(
        model,
        objective,
        clips,
        config=settings.optimisation,
        compute=config.compute,
        key=key,
        device=device,
        checkpoint=checkpoint,
        fingerprint=fingerprint("retraining", config, key, [utterances, encoder / "model.safetensors", *pseudo_labels]),
        updates=settings.updates,
    )
    trainer.run()
    encoders.save(backbone, output, encoder=origin["encoder"], fitted_on=sorted({*origin["fitted_on"], *split.ids}))
    trainer.finish(history)


def masked_prediction(
    model: MaskedPredictor,
    batch: Batch,
    mask: Tensor,
    labels: dict[int, list[np.ndarray]],
    unmasked_weight: float,
) -> Terms:
    """Cross-entropy over the masked frames, summed over codebooks; optionally also over unmasked ones.

    Args:
        mask: (batch, frames) of bool, on the CPU, never true on padding.
        labels: per codebook, the pseudo-labels of each whole clip; a crop takes its stretch of them.
        unmasked_weight: of unmasked frames in loss and, if above zero, in the count, as in fairseq.
    """
    valid = torch.arange(mask.shape[1]) < batch.lengths[:, None]
    chosen = valid if unmasked_weight > 0 else mask
    device = batch.local.device
    logits = model(batch, mask.to(device), chosen.to(device))
    is_masked = mask[chosen].to(device)
    n_masked = int(mask.sum())
    loss = torch.zeros((), device=device)
    quantities = {}
    for size, predicted in logits.items():
        target = _targets(labels[size], batch, chosen).to(device)
        each = F.cross_entropy(predicted.float(), target, reduction="none")
        loss = loss + (each * torch.where(is_masked, 1.0, unmasked_weight)).sum()
        correct = (predicted.argmax(1) == target) & is_masked
        quantities[f"masked_loss_{size}"] = ((each * is_masked).sum(), n_masked)
        quantities[f"masked_accuracy_{size}"] = (correct.sum(), n_masked)
    return Terms(loss, int(chosen.sum()), quantities)


def _targets(labels: list[np.ndarray], batch: Batch, chosen: Tensor) -> Tensor:
    """Pseudo-labels of the chosen frames, (chosen frames,) of int64."""
    padded = torch.zeros(chosen.shape, dtype=torch.long)
    for row, index, start, length in zip(padded, batch.indices, batch.starts, batch.lengths.tolist(), strict=True):
        row[:length] = torch.from_numpy(labels[index][start : start + length].astype(np.int64))
    return padded[chosen]


def _check_codebook(path: Path, layer: int, sizes: list[int], encoder: str) -> None:
    """Refuse pseudo-labels that this job did not ask for."""
    header = PSEUDO_LABELS.open(path)[1]
    for what, found, expected in (
        ("layer", header["layer"], [layer]),
        ("size", header["size"], sizes),
        ("encoder", header["encoder"], [encoder]),
    ):
        if found not in expected:
            raise UserError(
                f"{path} holds pseudo-labels of {what} {found}, but {what} {' or '.join(map(str, expected))} is "
                "expected; delete it and run snakemake again."
            )


def _read_labels(path: Path, split: Split, clips: Clips, *, transductive: bool) -> tuple[int, list[np.ndarray]]:
    """Size of a codebook, and the labels of each clip; refuses held-out utterances, and labels that do not align."""
    table, metadata = PSEUDO_LABELS.read(path)
    ids = table["id"].to_pylist()
    split.refuse_leaks(ids, path)
    if not transductive:
        split.refuse_leaks(metadata["fitted_on"], path)
    found = dict(zip(ids, (labels.values.to_numpy() for labels in table["labels"].combine_chunks()), strict=True))
    for utterance, frames in zip(clips.ids, clips.lengths.tolist(), strict=True):
        if utterance not in found or len(found[utterance]) != frames:
            raise UserError(
                f"{path} has {len(found.get(utterance, []))} labels for {utterance}, which has {frames} frames; delete "
                "it and run snakemake again."
            )
    return metadata["size"], [found[utterance] for utterance in clips.ids]
