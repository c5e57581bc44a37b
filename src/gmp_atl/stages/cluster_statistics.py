"""What the codebooks hold: use of the centroids, and what they share with emotion, gender and speaker.

Whether the pseudo-labels are gender-augmented, as the paper says, can be read off here. This is the only stage
between multi-task training and fine-tuning that opens utterance labels; nothing is fitted on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from sklearn.metrics import homogeneity_score, normalized_mutual_info_score

from gmp_atl import codebooks
from gmp_atl.config import FoldsSlice
from gmp_atl.files import Output
from gmp_atl.folds import Split, training_split
from gmp_atl.formats import CLUSTER_STATISTICS, PSEUDO_LABELS

ATTRIBUTES = ("emotion", "gender", "speaker")


def cluster_statistics(
    *,
    config: FoldsSlice,
    utterances: Path,
    centroids: list[Path],
    pseudo_labels: list[Path],
    variant: str,
    fold: int,
    seed: int,
    output: Output,
) -> None:
    """Write CLUSTER_STATISTICS for all codebooks of one fold and seed.

    `homogeneity_*` is the mutual information of a frame's label with its utterance's attribute, by the attribute's
    entropy: 1 where labels tell it. `nmi_*` is the same by the mean of both entropies, and cannot reach 1 where there
    are more centroids than values of the attribute.
    """
    split = training_split(utterances, config.folds, fold)
    rows = []
    for codebook, path in zip(centroids, pseudo_labels, strict=True):
        origin = codebooks.load(codebook).origin
        statistics = {**origin.statistics, **_mutual_information(path, split)}
        rows += [
            (variant, fold, seed, origin.layer, origin.size, name, float(value)) for name, value in statistics.items()
        ]
    columns = dict(zip(CLUSTER_STATISTICS.schema.names, zip(*rows, strict=True), strict=True))
    CLUSTER_STATISTICS.write(output, pa.table(columns, schema=CLUSTER_STATISTICS.schema))


def _mutual_information(path: Path, split: Split) -> dict[str, float]:
    table, _ = PSEUDO_LABELS.read(path)
    ids = table["id"].to_pylist()
    split.refuse_leaks(ids, path)
    column = table["labels"].combine_chunks()
    labels, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy()
    values = {row["id"]: row for row in split.utterances.select(["id", *ATTRIBUTES]).to_pylist()}
    found = {}
    for attribute in ATTRIBUTES:
        told = np.repeat([values[utterance][attribute] for utterance in ids], lengths)
        found[f"homogeneity_{attribute}"] = homogeneity_score(told, labels)
        found[f"nmi_{attribute}"] = normalized_mutual_info_score(told, labels)
    return found
