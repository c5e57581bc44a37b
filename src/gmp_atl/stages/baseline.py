"""Classical reference, second half: a support vector machine on eGeMAPS functionals.

No part of the paper; it shows what one fold of a corpus gives without any pre-trained model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from gmp_atl.classical import support_vector_machine
from gmp_atl.config import BaselineSlice
from gmp_atl.errors import UserError
from gmp_atl.files import Output
from gmp_atl.folds import Split, held_out_split, training_split
from gmp_atl.formats import FUNCTIONALS, PREDICTIONS, UTTERANCES


def baseline(*, config: BaselineSlice, functionals: Path, utterances: Path, fold: int, output: Output) -> None:
    """Fit on the training utterances of a fold, and write predictions for the held-out ones.

    Missing values are imputed with the training fold's median. The scores are a softmax of the machine's
    decision values: they rank the classes, and are no probabilities.

    Args:
        config: Classes and folds.
        functionals: Functionals of all utterances.
        utterances: Utterance table.
        fold: From 1.
        output: Parquet file of predictions.

    Raises:
        UserError: an utterance has no functionals.
    """
    training = training_split(utterances, config.folds, fold)
    test = held_out_split(utterances, config.folds, fold)
    table, header = FUNCTIONALS.read(functionals)
    values = dict(zip(table["id"].to_pylist(), table["values"].to_pylist(), strict=True))

    machine = support_vector_machine()
    machine.fit(_features(values, training, functionals), training.column("emotion"))
    scores = _scores(machine.decision_function(_features(values, test, functionals)), machine.classes_, config.classes)

    corpus = UTTERANCES.open(utterances).header
    PREDICTIONS.write(
        output,
        pa.table(
            {
                **{name: test.column(name) for name in ("id", "speaker", "gender", "session")},
                "label": test.column("emotion"),
                "prediction": [config.classes[best] for best in scores.argmax(axis=1)],
                "scores": pa.array(list(scores), PREDICTIONS.schema.field("scores").type),
            }
        ),
        model="egemaps-svm",
        variant="main",
        layer=None,
        loss=None,
        fold=fold,
        seed=0,
        classes=config.classes,
        corpus=corpus["corpus"],
        complete=corpus["complete"],
        encoder=header["features"],
        selection="last",
        fit_on="training",
    )


def _features(values: dict[str, list[float]], split: Split, source: Path) -> np.ndarray:
    """(utterances, functionals), in the order of the split."""
    missing = [utterance for utterance in split.ids if utterance not in values]
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} utterances, such as {missing[0]}; delete it and run snakemake again."
        )
    return np.array([values[utterance] for utterance in split.ids], dtype=np.float64)


def _scores(decisions: np.ndarray, fitted: np.ndarray, classes: list[str]) -> np.ndarray:
    """Softmax over (utterances, classes); a class that training lacked scores zero."""
    if decisions.ndim == 1:  # two classes: one value, positive for the second
        decisions = np.stack([-decisions, decisions], axis=1)
    powers = np.exp(decisions - decisions.max(axis=1, keepdims=True))
    scores = np.zeros((len(decisions), len(classes)), dtype=np.float32)
    scores[:, [classes.index(name) for name in fitted]] = powers / powers.sum(axis=1, keepdims=True)
    return scores
