"""Stage 5: the held-out utterances, the only stage that opens them (paper, Sec. 4.1.2)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa

from gmp_atl import classifier, devices
from gmp_atl.clips import Clips
from gmp_atl.config import FinetuningSlice, FitOn, Loss
from gmp_atl.errors import UserError
from gmp_atl.files import Output, write_text
from gmp_atl.folds import held_out_split, training_split
from gmp_atl.formats import PREDICTIONS, UTTERANCES
from gmp_atl.metrics import confusion_of_names, uar, war

log = logging.getLogger(__name__)


def evaluation(
    *,
    config: FinetuningSlice,
    utterances: Path,
    local_features: Path,
    model: Path,
    variant: str,
    gmps: int | None,
    loss: Loss,
    fit_on: FitOn,
    fold: int,
    seed: int,
    predictions: Output,
    metrics: Output,
    gpus: int = 0,
) -> None:
    """Classify the fold's held-out utterances, whole and without margin.

    Args:
        gmps: layer of the GMPs, None without.
        fit_on: the reading clustering.fit_on, which the tables must tell.

    Raises:
        LeakageError: the model has been fitted on one of them.
        UserError: a model of other classes, or with another loss, or features of another encoder.
    """
    device = devices.resolve(gpus)
    split = held_out_split(utterances, config.folds, fold)
    network, described = classifier.load(model)
    if (described.classes, described.loss) != (config.classes, loss):
        raise UserError(f"{model} is not the model that the config describes; delete it and run snakemake again.")
    training_split(utterances, config.folds, fold).refuse_leaks(described.fitted_on, model)
    clips = Clips.read(local_features, split, encoder=described.encoder)
    network.encoder.cast(devices.dtype(config.compute.precision, device))
    scores = classifier.scores(network.to(device), described, clips, config.compute, device)
    rows = {
        **{name: split.column(name) for name in ("id", "speaker", "gender", "session")},
        "label": split.column("emotion"),
        "prediction": [config.classes[best] for best in scores.argmax(1)],
        "scores": list(scores),
    }
    corpus = UTTERANCES.open(utterances).header
    PREDICTIONS.write(
        predictions,
        pa.table(rows, schema=PREDICTIONS.schema),
        model="gmp-atl",
        variant=variant,
        layer=gmps,
        loss=loss,
        fold=fold,
        seed=seed,
        classes=config.classes,
        corpus=corpus["corpus"],
        complete=corpus["complete"],
        encoder=described.encoder,
        selection=config.finetuning.selection,
        fit_on=fit_on,
    )
    matrix = confusion_of_names(rows["label"], rows["prediction"], config.classes)
    figures = {"uar": uar(matrix), "war": war(matrix), "utterances": len(clips.ids), "confusion": matrix.tolist()}
    write_text(metrics, json.dumps({**figures, "classes": config.classes}, indent=2) + "\n")
    log.info(
        "fold %d seed %d: UAR %.1f, WAR %.1f on %d clips", fold, seed, figures["uar"], figures["war"], len(clips.ids)
    )
