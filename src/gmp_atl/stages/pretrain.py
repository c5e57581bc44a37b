"""The end of a pre-training: the encoder as it is handed on, in half precision, with a model card."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from gmp_atl import __version__, model_files
from gmp_atl.config import IterationConfig, PretrainingSlice
from gmp_atl.files import Output, write_text
from gmp_atl.formats import HISTORY, UTTERANCES
from gmp_atl.frames import SAMPLE_RATE

_CARD = """\
---
library_name: transformers
license: other
tags:
- hubert
- gmp-atl
---

# A small HuBERT

{parameters:.1f} million parameters, frames of 20 ms; `HubertModel.from_pretrained` of transformers loads it from this
folder. It was pre-trained by gmp-atl {version} (`snakemake pretrain`) by masked prediction of clusters, without labels.
It is made for trying gmp-atl out without a download: for research, take a larger one.

    {encoder}

## Speech

{minutes:.0f} minutes, {clips} clips, counting each speed of {speeds}. It stems from:

{attribution}

## Training

| Iteration | Clusters of | Centroids | Updates | Loss | Masked accuracy |
|---:|---|---|---:|---:|---|
{iterations}

Loss and accuracy are means over the last tenth of the updates, on the speech that was trained on.
"""


def pretrain(
    *,
    config: PretrainingSlice,
    utterances: Path,
    encoder: Path,
    histories: list[Path],
    output: Output,
) -> None:
    """Write `config.json`, `model.safetensors` in float16, and `README.md`.

    Args:
        utterances: Of the speech.
        histories: Of each iteration.
    """
    model, origin = model_files.load_fitted(encoder)
    model_files.save(model.half(), output, encoder=origin["encoder"], fitted_on=[])
    samples = UTTERANCES.read(utterances)[0]["n_samples"].to_pylist()
    settings = config.pretraining
    iterations = [
        _iteration(number, iteration, history)
        for number, (iteration, history) in enumerate(zip(settings.iterations, histories, strict=True), start=1)
    ]
    card = _CARD.format(
        encoder=origin["encoder"],
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        version=__version__,
        minutes=sum(samples) / SAMPLE_RATE / 60,
        clips=f"{len(samples):,}",
        speeds=", ".join(f"{speed:g}" for speed in settings.speeds),
        attribution="\n".join(f"- {source}" for source in settings.attribution),
        iterations="\n".join(iterations),
    )
    write_text(output / "README.md", card)


def _iteration(number: int, iteration: IterationConfig, history: Path) -> str:
    """A row of the card's table."""
    rows = HISTORY.read(history)[0].to_pylist()

    def last(quantity: str) -> float:
        """Mean over the last tenth of the updates."""
        values = [row["value"] for row in rows if row["quantity"] == quantity]
        return fmean(values[-max(1, len(values) // 10) :])

    clustered = f"layer {iteration.layer}" if iteration.layer else "MFCCs"
    accuracies = [f"{last(f'masked_accuracy_{size}'):.1%} of {size}" for size in iteration.sizes]
    sizes = ", ".join(map(str, iteration.sizes))
    return (
        f"| {number} | {clustered} | {sizes} | {iteration.updates:,} | {last('loss'):.2f} | {', '.join(accuracies)} |"
    )
