"""What each layer of a frozen encoder tells of emotion: pooled over the frames, and an SVM under the corpus's folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from gmp_atl import devices, model_files
from gmp_atl.classical import support_vector_machine
from gmp_atl.clips import Clips, passes
from gmp_atl.config import ComputeConfig, ProbeSlice
from gmp_atl.encoder import Encoder
from gmp_atl.errors import LeakageError
from gmp_atl.files import Output
from gmp_atl.folds import everything, held_out_split, training_split
from gmp_atl.formats import PROBES, UTTERANCES
from gmp_atl.metrics import confusion_of_names, uar, war

CONVOLUTIONS = 0
"""Stands for the layer before the transformer's first."""


def probe(
    *, config: ProbeSlice, utterances: Path, local_features: Path, encoder: Path, output: Output, gpus: int = 0
) -> None:
    """Write UAR and WAR of every layer and fold; an utterance is the mean and the deviation of its frames.

    Raises:
        LeakageError: the encoder has been trained on recordings of this corpus, at whatever speed.
    """
    device = devices.resolve(gpus)
    model, origin = model_files.load_fitted(encoder)
    split = everything(utterances)
    heard = {*origin["fitted_on"], *origin.get("heard", [])}
    known = [name for name, digest in zip(split.ids, split.column("sha256"), strict=True) if {name, digest} & heard]
    if known:
        raise LeakageError(f"{encoder} was trained on {len(known)} of the utterances, such as {known[0]}.")
    clips = Clips.read(local_features, split, encoder=origin["encoder"])
    model = model.to(device).eval()
    model.cast(devices.dtype(config.compute.precision, device))
    pooled = _pooled(model, clips, config.compute, device)
    rows = []
    for fold in range(1, len(config.folds.held_out) + 1):
        training = training_split(utterances, config.folds, fold)
        test = held_out_split(utterances, config.folds, fold)
        for layer, features in pooled.items():
            machine = support_vector_machine()
            machine.fit([features[each] for each in training.ids], training.column("emotion"))
            found = machine.predict([features[each] for each in test.ids])
            matrix = confusion_of_names(test.column("emotion"), found.tolist(), config.classes)
            rows.append({"layer": layer, "fold": fold, "uar": uar(matrix), "war": war(matrix)})
    corpus = UTTERANCES.open(utterances).header["corpus"]
    table = pa.Table.from_pylist(rows, schema=PROBES.schema)
    PROBES.write(output, table, corpus=corpus, encoder=origin["encoder"], utterances=len(split.ids))


@torch.inference_mode()
def _pooled(
    model: Encoder, clips: Clips, compute: ComputeConfig, device: torch.device
) -> dict[int, dict[str, np.ndarray]]:
    """Per layer and clip: mean and standard deviation over the frames, (2 x dimensions,)."""
    layers = range(-1, -len(model.encoder.layers) - 1, -1)
    found: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in (CONVOLUTIONS, *layers)}
    for batch in passes(clips, compute.batch_seconds, device):
        states = {CONVOLUTIONS: batch.local} | model.hidden_states(batch.local, batch.lengths, layers)
        for layer, hidden in states.items():
            for index, frames in batch.unpadded(hidden.float()):
                moments = torch.cat([frames.mean(0), frames.std(0, correction=0)])
                found[layer][clips.ids[index]] = moments.cpu().numpy()
    return found
