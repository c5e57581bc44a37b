"""Hidden states of the stage-1 HuBERT over the training utterances: what k-means clusters (paper, Sec. 3.1)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from gmp_atl import devices, model_files
from gmp_atl.clips import Clips, passes
from gmp_atl.config import ClusteringSlice
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.files import Outputs
from gmp_atl.folds import everything, training_split
from gmp_atl.formats import LAYER_FEATURES, Append, append_features
from gmp_atl.frames import FRAME_SECONDS
from gmp_atl.progress import Meter

_States = dict[int, list[np.ndarray]]
"""Per layer and clip: (frames, hidden size) in float16."""


def layer_features(
    *,
    config: ClusteringSlice,
    utterances: Path,
    local_features: Path,
    encoder: Path,
    fold: int,
    layers: list[int],
    outputs: Outputs,
    gpus: int = 0,
) -> None:
    """Write one LAYER_FEATURES file per layer, all from one pass; held-out clips are not opened.

    The reading `clustering.fit_on: all` adds them, for k-means only. In memory are all layers of the clips of two row
    groups of the local features, one that is computed and one that is written.

    Raises:
        LeakageError: the encoder was fitted on a held-out utterance.
        UserError: features of another encoder, or a layer that the encoder lacks.
    """
    device = devices.resolve(gpus)
    model, metadata = model_files.load_fitted(encoder)
    model = model.to(device).eval()
    model.cast(devices.dtype(config.compute.precision, device))
    split = training_split(utterances, config.folds, fold)
    split.refuse_leaks(metadata["fitted_on"], encoder)
    if config.clustering.fit_on == "all":
        split = everything(utterances)
    meter = Meter("clip", len(split.ids))
    with ExitStack() as stack, ThreadPoolExecutor(len(layers)) as pool:
        append: dict[int, Append] = {}
        for layer, path in zip(layers, outputs, strict=True):
            header = {"dimensions": model.architecture.hidden_size, "layer": layer}
            origin = {"encoder": metadata["encoder"], "fitted_on": metadata["fitted_on"]}
            append[layer] = stack.enter_context(LAYER_FEATURES.writer(path, **header, **origin))
        written: list[Future[None]] = []
        for clips in Clips.stream(local_features, split, encoder=metadata["encoder"]):
            states = _hidden_states(model, clips, layers, config, device)
            for each in written:  # of the row group before, meanwhile
                each.result()
            written = [pool.submit(append_features, append[layer], clips.ids, states[layer]) for layer in layers]
            meter.advance(len(clips.ids), audio=FRAME_SECONDS * clips.lengths.sum())
        for each in written:
            each.result()


@torch.inference_mode()
def _hidden_states(
    model: Encoder, clips: Clips, layers: list[int], config: ClusteringSlice, device: torch.device
) -> _States:
    found: _States = {layer: [np.empty(0)] * len(clips.ids) for layer in layers}
    for batch in passes(clips, config.compute.batch_seconds, device):
        states = {layer: h.half() for layer, h in model.hidden_states(batch.local, batch.lengths, layers).items()}
        valid = (batch.rows >= 0)[..., None]
        finite = torch.stack([(h.isfinite() | ~valid).all() for h in states.values()]).tolist()
        if not all(finite):
            raise UserError(
                f"Layer {layers[finite.index(False)]} exceeds the range of float16; the encoder has diverged."
            )
        for layer, hidden in states.items():
            for index, frames in batch.unpadded(hidden.cpu()):
                found[layer][index] = frames.numpy()
    return found
