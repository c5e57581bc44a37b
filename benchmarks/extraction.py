"""Hidden states of HuBERT base over a corpus: the stages `local_features` and `layer_features`, against fairseq's way.

    python benchmarks/extraction.py [WORD ...]    # only work with these words in its name, such as float32

fairseq's `dump_hubert_feature.py` runs once per layer: single clips in float32, the encoder cut off after that layer,
the frames appended to one array file. It is written anew here on transformers' HuBERT, since fairseq does not install
under this Python. All sides read the same WAV files of noise, and the same random weights. So that all go over the same
clips, `layer_features` is set to those of every session (`clustering.fit_on: all`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sides
import workload

if TYPE_CHECKING:
    from transformers import HubertModel

SECONDS = 240.0
"""Of audio, about: fairseq's way takes more than three minutes for that on two cores."""


def prepare(folder: Path) -> None:
    """Audio and weights."""
    workload.write_corpus(folder, SECONDS)
    workload.write_encoder(folder)


def dump(model: HubertModel, layer: int, paths: Iterable[Path], output: Path) -> None:
    """The peer's way for one layer; the model is left cut off behind it."""
    import soundfile
    import torch

    model.encoder.layers = model.encoder.layers[: model.config.num_hidden_layers + 1 + layer]
    with output.open("wb") as stream, torch.no_grad():
        for path in paths:
            samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            model(samples[None].to(model.device)).last_hidden_state[0].cpu().numpy().tofile(stream)


def fairseq(layers: list[int]) -> sides.Side:
    """The peer's way."""

    def side(folder: Path) -> sides.Work:
        from transformers import HubertModel

        def work() -> float:
            for layer in layers:
                model = HubertModel.from_pretrained(folder / "transformers").train(mode=False)
                dump(model, layer, sorted((folder / "audio").iterdir()), folder / f"fairseq{layer}.f32")
            return workload.seconds(folder)

        return work

    return side


def stages(layers: list[int], precision: str, *, cached: bool = False) -> sides.Side:
    """The stages; cached: without the convolutions, as in every fold and seed but the first."""

    def side(folder: Path) -> sides.Work:
        from gmp_atl.stages.layer_features import layer_features

        transformed = workload.setting("layer_features", precision, fit_on="all")

        def work() -> float:
            if not cached:
                workload.convolve(folder, precision)
            outputs = [folder / f"{precision}{layer}.parquet" for layer in layers]
            layer_features(
                config=transformed,
                utterances=folder / "utterances.parquet",
                local_features=folder / "local_features.parquet",
                encoder=folder / "encoder",
                fold=1,
                layers=layers,
                outputs=outputs,
            )
            return workload.seconds(folder)

        if cached:
            workload.convolve(folder, precision)
        return work

    return side


SIDES = {
    "fairseq, 8 layers": fairseq(workload.LAYERS),
    "fairseq, layer -3": fairseq([-3]),
    "stages, 8 layers, float32": stages(workload.LAYERS, "float32"),
    "stages, 8 layers, bfloat16": stages(workload.LAYERS, "bfloat16"),
    "stages, 8 layers, float32, cached": stages(workload.LAYERS, "float32", cached=True),
    "stages, 8 layers, bfloat16, cached": stages(workload.LAYERS, "bfloat16", cached=True),
    "stages, layer -3, float32": stages([-3], "float32"),
    "stages, layer -3, bfloat16": stages([-3], "bfloat16"),
}
GOALS = {
    "8 layers, bfloat16": 12.0,
    "8 layers, float32": 6.0,
    "8 layers, bfloat16, cached": 18.0,
    "8 layers, float32, cached": 9.0,
    "layer -3, bfloat16": 2.0,
    "layer -3, float32": 1.2,
}
COMPARISONS = [
    sides.Comparison(work, f"stages, {work}", f"fairseq, {work.partition(',')[0]}", goal)
    for work, goal in GOALS.items()
    if any(precision in work for precision in workload.precisions())
]


def accuracy(folder: Path) -> None:
    """Print per precision and layer the smallest cosine similarity of a frame to fairseq's way."""
    from gmp_atl.formats import LAYER_FEATURES, UTTERANCES, read_features

    ids = UTTERANCES.read(folder / "utterances.parquet")[0]["id"].to_pylist()
    precisions = workload.precisions()
    print(f"\n1 - smallest cosine similarity of a frame\n| Layer | {' | '.join(precisions)} |")
    print("|---:" * (1 + len(precisions)) + "|")
    for layer in workload.LAYERS:
        theirs = np.fromfile(folder / f"fairseq{layer}.f32", np.float32).reshape(-1, workload.DIMENSIONS)
        found = []
        for precision in precisions:
            clips, _ = read_features(LAYER_FEATURES, folder / f"{precision}{layer}.parquet", ids)
            ours = np.concatenate([clips[utterance] for utterance in ids]).astype(np.float64)
            norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
            found.append(1 - ((ours * theirs).sum(axis=1) / norms).min())
        print(f"| {layer} | {' | '.join(f'{each:.1e}' for each in found)} |")


if __name__ == "__main__":
    report = None if sides.arguments() else accuracy  # which needs all
    sides.main(__file__, "Seconds of audio", SIDES, sides.asked(COMPARISONS), prepare, report)
