"""An encoder from random weights: masked prediction of clusters of unlabelled speech (Hsu et al. 2021, Sec. II).

The loss is that of stage 3, and so is the loop; but the convolutions are trained too, and so see waveforms.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gmp_atl import codebooks, devices, model_files
from gmp_atl.audio import DECODERS, recording
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import PretrainingSlice
from gmp_atl.encoder import Encoder, from_scratch
from gmp_atl.files import AudioRoot, Output
from gmp_atl.folds import everything
from gmp_atl.formats import MFCC
from gmp_atl.frames import HOP, n_frames
from gmp_atl.masked_prediction import MaskedPredictor, masked_prediction
from gmp_atl.masking import span_mask
from gmp_atl.randomness import Key
from gmp_atl.training import Terms, Trainer, fingerprint, regularisation

LAST = "last"
"""Folder of the encoder after the last update; those before are named by the number of updates."""


def pretraining(
    *,
    config: PretrainingSlice,
    utterances: Path,
    audio_root: AudioRoot,
    pseudo_labels: list[Path],
    seed: int,
    output: Output,
    history: Output,
    checkpoint: Output,
    previous: Path | None = None,
    gpus: int = 0,
) -> None:
    """Run the last iteration of the config, and write encoders to `output`/<updates>, from 0, and `output`/last.

    Args:
        utterances: Of the unlabelled speech.
        previous: Encoder of the iteration before, None for the first.
        pseudo_labels: One file per codebook.

    Raises:
        UserError: pseudo-labels that do not match the clips frame by frame, or of another layer, codebook or encoder.
    """
    device = devices.resolve(gpus)
    settings = config.pretraining
    number, iteration = len(settings.iterations), settings.iterations[-1]
    split = everything(utterances)
    encoder, clustered = _start(config, previous)
    lengths = [n_frames(samples) for samples in split.utterances["n_samples"].to_pylist()]
    found = codebooks.read_labels(
        pseudo_labels,
        split,
        lengths,
        layer=iteration.layer,
        sizes=iteration.sizes,
        encoder=clustered,
        transductive=False,
    )
    # A clip has one row of samples more than frames.
    rows = {size: np.insert(of_frames, np.cumsum(lengths), 0) for size, of_frames in found.items()}
    labels = {size: torch.from_numpy(of_rows).to(device) for size, of_rows in rows.items()}
    key = Key(seed, 0, f"pretraining/{number}")
    torch.manual_seed(key.derive("weights"))
    model = MaskedPredictor(encoder, settings.projection, list(labels), settings.codebook_head)

    def objective(batch: Batch, generator: torch.Generator) -> Terms:
        # As many frames of each as the shortest has, so that no convolution sees padding.
        frames = int(batch.lengths.min()) - 1
        samples = mixed(batch.local[:, : frames + 1].flatten(1), settings.mixing, generator)
        lengths = torch.full((len(samples),), frames)
        spans = settings.mask
        mask = span_mask(lengths, spans.probability, spans.length, generator, min_spans=spans.min_spans)
        targets = {size: of_rows[batch.rows[:, :frames]] for size, of_rows in labels.items()}
        local = encoder.feature_extractor.together(samples, torch.full_like(samples[:, 0], samples.shape[1]))
        return masked_prediction(model, local, lengths, mask, targets, 0.0)

    def keep(folder: Path) -> None:
        name = f"HuBERT {len(encoder.encoder.layers)} x {encoder.architecture.hidden_size}"
        identity = f"{name}, iteration {number}, update {folder.name}, sha256 {model_files.digest(encoder)[:12]}"
        # Under its ids another corpus would not know its recordings, nor one of them at another speed.
        heard = sorted({*split.column("sha256")})
        model_files.save(encoder, folder, encoder=identity, fitted_on=split.ids, heard=heard)

    # Outside the output, which Snakemake removes when a job is stopped, while training goes on from its checkpoint.
    kept = checkpoint.with_suffix(".kept")
    inputs = [utterances, *pseudo_labels, *([previous / "model.safetensors"] if previous else [])]
    trainer = Trainer(
        model,
        objective,
        _waveforms(split.utterances, audio_root),
        config=iteration.optimisation,
        compute=config.compute,
        key=key,
        device=device,
        checkpoint=checkpoint,
        fingerprint=fingerprint("pretraining", config, key, inputs),
        updates=iteration.updates,
        after={update: partial(keep, kept / str(update)) for update in settings.probes},
    )
    keep(output / "0")
    trainer.run()
    for update in settings.probes:
        shutil.copytree(kept / str(update), output / str(update), dirs_exist_ok=True)
    keep(output / LAST)
    trainer.finish(history)
    shutil.rmtree(kept, ignore_errors=True)


def _start(config: PretrainingSlice, previous: Path | None) -> tuple[Encoder, str]:
    """The encoder to be trained, convolutions included, and the identity of the one whose frames were clustered."""
    iteration = config.pretraining.iterations[-1]
    perturbed = regularisation(iteration.optimisation)
    encoder, clustered = from_scratch(config.encoder.scratch, perturbed), MFCC
    if previous is not None:
        found, origin = model_files.load_fitted(previous, perturbed)
        if iteration.layer < 0:
            clustered = origin["encoder"]
        if iteration.start == "previous":
            encoder = found
    encoder.feature_extractor.requires_grad_(True)
    return encoder, clustered


def _waveforms(table: pa.Table, root: Path) -> Clips:
    """Samples, in rows of as many as lie between two frames: n + 1 rows for n frames."""

    def rows(number: int) -> np.ndarray:
        samples = recording(root, table, number)
        found = np.zeros((n_frames(len(samples)) + 1) * HOP, np.float16)
        found[: len(samples)] = samples[: len(found)]
        return found.reshape(-1, HOP)

    with ThreadPoolExecutor(DECODERS) as pool:
        return Clips(table["id"].to_pylist(), list(pool.map(rows, range(len(table)))))


def mixed(samples: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Clips, a share of which is heard with another one of the batch, over a stretch of up to half of it.

    As WavLM's utterance mixing (Chen et al. 2022, Sec. III-B), the other one being up to 5 dB louder or 20 dB quieter.

    Args:
        samples: (batch, samples).
    """
    count, length = samples.shape
    if share == 0 or count == 1:
        return samples
    chance, where, how_long, decibels = torch.rand(4, count, generator=generator)
    stretch = 0.5 * how_long * length
    first = where * (length - stretch)
    power = (chance < share) * 10 ** ((25 * decibels - 20) / 20)
    shift = int(torch.randint(1, count, (), generator=generator))
    first, stretch, power = (devices.send(each[:, None], samples.device) for each in (first, stretch, power))
    position = torch.arange(length, device=samples.device)
    other = samples.roll(shift, dims=0)
    power = power * (samples.square().mean(1) / other.square().mean(1).clamp(min=1e-8)).sqrt()[:, None]
    return samples + power * other * ((position >= first) & (position < first + stretch))
