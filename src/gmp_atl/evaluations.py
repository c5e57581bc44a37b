"""Every result of a run, loaded once for the tables and the figures.

The evaluation folder alone is read: `corpus.parquet`, `**/predictions.parquet`,
`**/cluster_statistics.parquet` and the records below `provenance`; for the figures also `histories/**`,
`**/embeddings.parquet` and `**/examples.parquet`. Files are recognised by their metadata or by their records, never by
their places.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gmp_atl import metrics, paper, provenance
from gmp_atl.config import SLICES, Config, identity, shared_variant, slice_for, variant
from gmp_atl.errors import UserError, some
from gmp_atl.files import sha256
from gmp_atl.formats import CLUSTER_STATISTICS, CORPUS_SUMMARY, EMBEDDINGS, EXAMPLES, HISTORY, PREDICTIONS, Format
from gmp_atl.frames import SAMPLE_RATE
from gmp_atl.provenance import Lineage
from gmp_atl.systems import System, main_system, seeds, systems

log = logging.getLogger(__name__)

SAMPLES_PER_MINUTE = 60 * SAMPLE_RATE
MEASURES: dict[str, Callable[[np.ndarray], float]] = {"UAR": metrics.uar, "WAR": metrics.war}
SELECTIONS = {
    "last": "last epoch",
    "held_out_training_group": "best epoch on a group of the training folds",
    "oracle": "ORACLE: epoch chosen on the test fold",
}
CLUSTERED_ON = {
    "training": "the fold's training frames",
    "all": "TRANSDUCTIVE: all frames, those of the test fold included",
}


@dataclass(frozen=True)
class Result:
    """The predictions of a system on one fold, from one seed."""

    system: System
    fold: int
    seed: int
    header: dict[str, Any]
    """Metadata of the file."""
    predictions: pd.DataFrame
    """id, session, and label and prediction as indices into the classes."""
    matrix: np.ndarray
    """Confusion counts, (classes, classes)."""
    path: Path


@dataclass(frozen=True)
class Corpus:
    """The corpus that was evaluated on."""

    name: str
    complete: bool
    audio: str
    """SHA-256 over ids and samples."""
    excluded: dict[str, int]
    """Utterances that were left out, per reason."""
    counts: pd.DataFrame
    """emotion, session, gender, utterances, n_samples (at 16 kHz)."""

    @property
    def label(self) -> str:
        return corpus_label(self.name, complete=self.complete)


@dataclass(frozen=True)
class Evaluations:
    """All that the config asks for and that has been evaluated."""

    config: Config
    corpus: Corpus
    results: tuple[Result, ...]
    clusters: pd.DataFrame
    """variant, fold, seed, layer, size, statistic, value."""
    lineage: Lineage
    """Of the results: how they were made."""
    folder: Path
    """That all this was read from."""

    @cached_property
    def unlike_paper(self) -> list[str]:
        """What keeps the paper's figures from being comparable with these: how they were made, and how these."""
        of_corpus = (
            self.config.corpus.reader == paper.READER  # a manifest may be named as one likes
            and self.corpus.name.lower() == paper.READER
            and self.corpus.complete
            and set(self.config.classes) == set(paper.TABLE_1)
        )
        folds, encoder = self.config.folds, self.config.encoder
        of_folds = folds.by == "session" and all(len(group) == 1 for group in folds.held_out)
        from_hub = encoder.source == "hub" and encoder.name == paper.ENCODER
        of_encoder = from_hub or (encoder.source == "directory" and encoder.sha256 == paper.ENCODER_SHA256)
        part = "" if self.corpus.complete else "a part of "
        differences = {
            f"on the complete IEMOCAP with four classes (here: {part}{self.corpus.name})": of_corpus,
            f"with one session held out at a time (here: {len(folds.held_out)} folds by {folds.by})": of_folds,
            f"with HuBERT base, {paper.ENCODER} (here: another encoder)": of_encoder,
        }
        return [difference for difference, alike in differences.items() if not alike]

    def of(self, system: System) -> list[Result]:
        return [result for result in self.results if result.system == system]

    def covers(self, system: System) -> bool:
        """Whether every fold has been evaluated: sessions differ by more than systems do."""
        return {result.fold for result in self.of(system)} == {*range(1, len(self.config.folds.held_out) + 1)}

    def grid(self, system: System, measure: str) -> pd.DataFrame:
        """UAR or WAR in percent, folds (from 1) x seeds; NaN where not evaluated."""
        folds = range(1, len(self.config.folds.held_out) + 1)
        grid = pd.DataFrame(np.nan, index=folds, columns=seeds(self.config, system))
        for result in self.of(system):
            grid.loc[result.fold, result.seed] = MEASURES[measure](result.matrix)
        return grid

    def confusion(self, system: System) -> np.ndarray:
        """Counts pooled over folds and seeds, (classes, classes)."""
        empty = np.zeros((len(self.config.classes),) * 2, dtype=int)
        return sum((result.matrix for result in self.of(system)), start=empty)

    def histories(self, system: System) -> dict[str, list[pd.DataFrame]]:
        """Of the trainings behind a system's results: update, epoch, quantity, value; per stage, one of each job.

        As far as records tell which files those are.
        """
        paths = {sha256(path): path for path in sorted((self.folder / "histories").rglob("*.parquet"))}
        found: dict[str, list[pd.DataFrame]] = {}
        for record in provenance.lineage(self.lineage.records, [result.path for result in self.of(system)]).records:
            if path := paths.get(record.outputs.get("history", "")):
                found.setdefault(record.stage, []).append(HISTORY.read(path)[0].to_pandas())
        return found

    def embeddings(self) -> tuple[pd.DataFrame, dict[str, Any]] | None:
        """EMBEDDINGS and their metadata; None where there are none, or the main system is not asked for."""
        return self._only(EMBEDDINGS)

    def examples(self) -> tuple[pd.DataFrame, dict[str, Any]] | None:
        """EXAMPLES and their metadata; None where there are none, or the main system is not asked for."""
        return self._only(EXAMPLES)

    def _only(self, kind: Format) -> tuple[pd.DataFrame, dict[str, Any]] | None:
        if main_system(self.config) not in systems(self.config):
            return None  # an earlier config asked for what the folder holds
        paths = sorted(self.folder.rglob(f"{kind.name}.parquet"))
        if len(paths) > 1:
            raise UserError(
                f"{paths[0]} and {paths[1]}: one file of {kind.name} is expected; delete that of another run."
            )
        if not paths:
            return None
        table, header = kind.read(paths[0])
        return table.to_pandas(), header


def load(config: Config, folder: Path) -> Evaluations:
    """Read the evaluation folder of a run; files that the config does not ask for are ignored.

    Raises:
        UserError: a file is damaged; two claim the same result; folds of one model share an utterance;
            classes differ from the config's.
    """
    summary, header = CORPUS_SUMMARY.read(folder / "corpus.parquet")
    corpus = Corpus(header["corpus"], header["complete"], header["audio"], header["excluded"], summary.to_pandas())
    chosen = _choose(config, folder)
    order = {system: position for position, system in enumerate(systems(config))}
    keys = sorted(chosen, key=lambda key: (order[key[0]], *key[1:]))
    results = tuple(_read(config, *key, chosen[key]) for key in keys)
    _check_disjoint(results)
    lineage = provenance.lineage(provenance.read(folder / "provenance"), map(chosen.__getitem__, keys))
    return Evaluations(config, corpus, results, _read_clusters(config, folder), lineage, folder)


def corpus_label(name: str, *, complete: bool) -> str:
    """A corpus's name, with a mark where part of its full release is missing."""
    return name if complete else f"{name} (PARTIAL)"


def matrix_of(predictions: pd.DataFrame, n_classes: int) -> np.ndarray:
    """Confusion counts, (classes, classes), of rows as `Result` has them."""
    return metrics.confusion(predictions["label"].to_numpy(), predictions["prediction"].to_numpy(), n_classes)


def origin(evaluations: Evaluations) -> list[str]:
    """What the figures come from, one line each: the footer of every table."""
    config, corpus = evaluations.config, evaluations.corpus
    main = [r.header for r in evaluations.results if r.system.model == "gmp-atl" and r.system.variant == "main"]
    clustered = [header for header in main if header["layer"] is not None]
    corpora = {corpus_label(r.header["corpus"], complete=r.header["complete"]) for r in evaluations.results}
    reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(corpus.excluded.items()))
    return [
        _one_of("corpus", corpora | {corpus.label})
        + f", {corpus.counts['utterances'].sum()} utterances; {sum(corpus.excluded.values())} excluded"
        + (f" ({reasons})" if reasons else "")
        + f"; audio sha256 {corpus.audio[:12]}",
        _one_of("encoder", {header["encoder"] for header in main}),
        f"Seeds: {', '.join(map(str, config.seeds))}; {len(config.folds.held_out)} folds by {config.folds.by}",
        _one_of("selection", {SELECTIONS.get(header["selection"], header["selection"]) for header in main}),
        _one_of("k-means fitted on", {CLUSTERED_ON.get(header["fit_on"], header["fit_on"]) for header in clustered}),
        f"Config: {config.name}, identity {identity(config)}",
        *evaluations.lineage.remarks(),
        *_other_settings(evaluations),
    ]


def _other_settings(evaluations: Evaluations) -> list[str]:
    """Whether jobs behind the results ran with settings that this config does not have."""
    config = evaluations.config
    variants = [variant(config, name) for name in ("main", *config.ablations)]
    asked = {stage: [slice_for(each, stage) for each in variants] for stage in SLICES}
    others = Counter(
        record.stage
        for record in evaluations.lineage.records
        if record.stage in SLICES and not any(_holds(record.config, settings) for settings in asked[record.stage])
    )
    jobs = ", ".join(f"{stage} ({n} {'job' if n == 1 else 'jobs'})" for stage, n in sorted(others.items()))
    return [f"OTHER SETTINGS than this config's: {jobs}"] if jobs else []


def _holds(recorded: Any, asked: Any) -> bool:
    """Whether a job had these settings; it may have had others that its stage does not read any more."""
    if isinstance(asked, dict) and isinstance(recorded, dict):
        return all(key in recorded and _holds(recorded[key], value) for key, value in asked.items())
    return bool(recorded == asked)


def _choose(config: Config, folder: Path) -> dict[tuple[System, int, int], Path]:
    """The prediction file of every (system, fold, seed) that is asked for and exists."""
    asked = set(systems(config))
    chosen: dict[tuple[System, int, int], Path] = {}
    ignored = []
    for path in sorted(folder.rglob("predictions.parquet")):
        header = PREDICTIONS.open(path).header
        system = System(header["model"], header["variant"], header["layer"], header["loss"])
        fold, seed = header["fold"], header["seed"]
        known = system in asked and 1 <= fold <= len(config.folds.held_out) and seed in seeds(config, system)
        if not known:
            ignored.append(path)
            continue
        if (system, fold, seed) in chosen:
            raise UserError(
                f"{chosen[system, fold, seed]} and {path} both claim to be {system.label}, fold {fold}, seed {seed}; "
                "delete the one that is not of this run."
            )
        if header["classes"] != config.classes:
            raise UserError(
                f"{path} has the classes {', '.join(header['classes'])}, but the config asks for "
                f"{', '.join(config.classes)}; delete it and run snakemake again."
            )
        chosen[system, fold, seed] = path
    if ignored:
        log.warning("Ignored %d prediction files that the config does not ask for: %s", len(ignored), some(ignored))
    return chosen


def _read(config: Config, system: System, fold: int, seed: int, path: Path) -> Result:
    table, header = PREDICTIONS.read(path, columns=["id", "session", "label", "prediction"])
    frame = table.to_pandas()
    for column in ("label", "prediction"):
        unknown = set(frame[column]) - set(config.classes)
        if unknown:
            raise UserError(f"{path}: {column} {min(unknown)!r} is not one of {', '.join(config.classes)}.")
        frame[column] = pd.Index(config.classes).get_indexer(frame[column])
    if frame.empty:
        raise UserError(f"{path} holds no prediction; delete it and run snakemake again.")
    return Result(system, fold, seed, header, frame, matrix_of(frame, len(config.classes)), path)


def _check_disjoint(results: Iterable[Result]) -> None:
    """No utterance is tested twice by one model: it would be in two folds, and in training for one."""
    tested: dict[tuple[System, int, str], int] = {}
    for result in results:
        for utterance in result.predictions["id"]:
            other = tested.setdefault((result.system, result.seed, utterance), result.fold)
            if other != result.fold:
                raise UserError(
                    f"Utterance {utterance} was tested in fold {other} and in fold {result.fold} of "
                    f"{result.system.label}, seed {result.seed}: folds must not overlap. The evaluations are of "
                    "different folds.held_out; delete them and run snakemake again."
                )


def _read_clusters(config: Config, folder: Path) -> pd.DataFrame:
    columns = CLUSTER_STATISTICS.schema.names
    paths = sorted(folder.rglob("cluster_statistics.parquet"))
    frames = [CLUSTER_STATISTICS.read(path)[0].to_pandas() for path in paths]
    clusters = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    making = {shared_variant(config, "clustering", name) for name in ("main", *config.ablations)}
    asked = (
        clusters["variant"].isin(making)
        & clusters["layer"].isin([system.layer for system in systems(config)])
        & clusters["fold"].between(1, len(config.folds.held_out))
        & clusters["seed"].isin(config.seeds)
    )
    return clusters[asked].drop_duplicates(columns[:-1], ignore_index=True)


def _one_of(what: str, values: Iterable[Any]) -> str:
    found = sorted(map(str, values))
    if len(found) > 1:
        return f"MIXED {what}: {' | '.join(found)}"
    return f"{what[0].upper()}{what[1:]}: {found[0] if found else 'nothing evaluated'}"
