"""The model card of an exported model: what the run's records and metrics say of it, and what its users must know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmp_atl import __version__, provenance
from gmp_atl.classifier import Description
from gmp_atl.corpora.iemocap import NAME as IEMOCAP
from gmp_atl.corpora.iemocap import SYNTHETIC_NAME
from gmp_atl.corpora.ravdess import NAME as RAVDESS
from gmp_atl.errors import UserError
from gmp_atl.evaluations import CLUSTERED_ON, SELECTIONS, corpus_label
from gmp_atl.files import sha256
from gmp_atl.formats import PREDICTIONS
from gmp_atl.provenance import Record
from gmp_atl.systems import LOSSES

_LICENCES = {
    IEMOCAP: "IEMOCAP is given out by the University of Southern California under a licence of its own, on request, "
    "for research. This model is made from it and falls under that licence: do not publish it, pass it on or use it "
    "commercially unless the licence, or its owner, allows you to.",
    RAVDESS: "RAVDESS is under CC BY-NC-SA 4.0, not for commercial use. This model is made from it.",
    SYNTHETIC_NAME: "The corpus was made by a program, eSpeak NG: no licence of a corpus applies.",
}

_ENCODER_ALONE = {
    "HubertModel": 'The encoder alone is a HuBERT of transformers: `HubertModel.from_pretrained("FOLDER")`.',
    "WavLMModel": "The encoder is a WavLM, which `WavLMModel.from_pretrained` loads from the folder of the run.",
}

_CARD = """\
---
library_name: transformers
pipeline_tag: audio-classification
license: other
tags:
- speech-emotion-recognition
- gmp-atl
---

# Emotion of an utterance: {title}

A speech encoder that was fine-tuned by GMP-ATL (Pan et al. 2024, arXiv 2405.02151), as gmp-atl {version} reproduces
it. Its classes: {classes}.

## Use

With gmp-atl installed; the first line registers the model, and no code is loaded from this folder.

```python
import gmp_atl.hub
from transformers import pipeline

classify = pipeline("audio-classification", model="FOLDER")
classify({{"array": samples, "sampling_rate": 16_000}})  # mono, float32
```

{encoder_alone}

## How it was made

{made}

## Test

{test}

## Licence

{licence}

The pre-trained encoder comes under its own licence. gmp-atl is under the MIT licence, which does not extend to the
weights.

## Intended use

Research on speech emotion recognition, and the reproduction of the experiment. It is not made for decisions about
persons. Guessing the emotions of persons at work or in education is prohibited in the European Union (Regulation
2024/1689, Article 5), but for medical or safety reasons.

## Limits

{limits}
"""


@dataclass(frozen=True)
class _Tested:
    """What the run's evaluations hold on a model."""

    record: Record
    """Of the evaluation's job."""
    header: dict[str, Any]
    """Metadata of its predictions."""
    figures: dict[str, Any]
    """Its metrics."""
    origin: list[str]
    """Code, packages and devices of all jobs behind it."""


def model_card(model: Path, description: Description, evaluations: Path | None, *, network: str) -> str:
    """The text of README.md for the fine-tuned model in the folder `model`.

    Args:
        network: Class of transformers that loads the encoder alone.
        evaluations: Of the run that made the model; None looks for them where the workflow puts them. A model without
            is said to be not recorded.

    Raises:
        UserError: the evaluations that are named know nothing of this model.
    """
    folder = evaluations or _evaluations_of(model)
    tested = _find(model, folder) if folder else None
    if evaluations and tested is None:
        raise UserError(f"{evaluations} has no evaluation of {model} as it is now, or lacks its provenance record.")
    corpus = tested.header["corpus"] if tested else "a corpus that is not recorded"
    unknown = f"The model was trained on {corpus}: the licence of that corpus says what may be done with the model."
    return _CARD.format(
        title=f"{corpus}, fold {tested.header['fold']}, seed {tested.header['seed']}" if tested else corpus,
        version=__version__,
        classes=", ".join(description.classes),
        encoder_alone=_ENCODER_ALONE[network],
        made=_list(_made(description, tested)),
        test=_test(tested) if tested else "Not recorded.",
        licence=_LICENCES.get(corpus, unknown),
        limits=_list(_limits(description, tested)),
    )


def _evaluations_of(model: Path) -> Path | None:
    """results/<name>/evaluations, where the model is in results/<name>/finetuning/..."""
    beside = (parent / "evaluations" for parent in model.resolve().parents)
    return next((folder for folder in beside if (folder / "provenance").is_dir()), None)


def _find(model: Path, evaluations: Path) -> _Tested | None:
    """Files are found by the digests in the records, never by their places."""
    records = provenance.read(evaluations / "provenance")
    weights = provenance.path_digest(model)
    jobs = [each for each in records if each.stage == "evaluation" and each.inputs.get("model") == weights]
    for record in jobs:
        predictions = _with_digest(evaluations.rglob("predictions.parquet"), record.outputs["predictions"])
        metrics = _with_digest(evaluations.rglob("metrics.json"), record.outputs["metrics"])
        if predictions and metrics:
            header = PREDICTIONS.open(predictions).header
            figures = json.loads(metrics.read_text(encoding="utf-8"))
            return _Tested(record, header, figures, provenance.lineage(records, [predictions]).remarks())
    return None


def _with_digest(paths: Iterable[Path], digest: str) -> Path | None:
    return next((path for path in sorted(paths) if sha256(path) == digest), None)


def _made(description: Description, tested: _Tested | None) -> list[str]:
    loss = f"{LOSSES[description.loss]}" + (f" (scale {description.scale:g})" if description.loss == "ams" else "")
    lines = [
        f"Encoder: {description.encoder}",
        f"Loss: {loss}; head: {', '.join(f'{key} {value}' for key, value in description.head.model_dump().items())}",
        f"Utterances that it was fitted on: {len(description.fitted_on)}",
    ]
    if tested is None:
        return [*lines, "Corpus, fold, code and packages: not recorded"]
    header = tested.header
    clustered_on = CLUSTERED_ON[header["fit_on"]]
    gmps = "none" if header["layer"] is None else f"of layer {header['layer']}, k-means fitted on {clustered_on}"
    return [
        f"Corpus: {corpus_label(header['corpus'], complete=header['complete'])}",
        f"Trained on all folds but fold {header['fold']}; seed {header['seed']}",
        *lines,
        f"Pseudo-labels (GMPs): {gmps}",
        f"Variant: {header['variant']}; {SELECTIONS[header['selection']]}",
        *tested.origin,
    ]


def _test(tested: _Tested) -> str:
    """UAR, WAR and confusions on the fold that was held out."""
    folds, figures = tested.record.config["folds"], tested.figures
    held_out = ", ".join(folds["held_out"][tested.header["fold"] - 1])
    classes = figures["classes"]
    lines = [
        f"On the held-out fold ({folds['by']} {held_out}; {figures['utterances']} whole utterances):",
        f"**UAR {figures['uar']:.1f} %, WAR {figures['war']:.1f} %**.",
        "One fold and one seed say little: the tables of the run have all of them.",
        "",
        f"| label, classified as | {' | '.join(classes)} |",
        f"|---|{'---:|' * len(classes)}",
        *(f"| {name} | {' | '.join(map(str, row))} |" for name, row in zip(classes, figures["confusion"], strict=True)),
    ]
    return "\n".join(lines)


def _limits(description: Description, tested: _Tested | None) -> list[str]:
    lines = [
        f"It knows the classes {', '.join(description.classes)} and no other: it scores music and silence, too.",
        "A score is no probability of being right.",
        "It was trained on one corpus; other speakers, languages, microphones and kinds of speech were not tested.",
    ]
    if tested:
        longest = tested.record.config["finetuning"]["optimisation"]["max_clip_seconds"]
        lines.append(f"It was trained on at most {longest:g} s at a time, and tested on whole utterances.")
        if tested.header["corpus"] == SYNTHETIC_NAME:
            lines.append("Its corpus is synthetic: it says nothing about the emotions of people.")
    return lines


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
