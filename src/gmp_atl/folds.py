"""Cross-validation folds, and the guard that keeps held-out utterances out of everything but the test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gmp_atl.config import FoldsConfig
from gmp_atl.errors import LeakageError, UserError, some
from gmp_atl.formats import UTTERANCES


@dataclass(frozen=True)
class Split:
    """The utterances that a stage may open, and the ids that must not reach it."""

    utterances: pa.Table
    """Rows of the utterance table."""
    forbidden: frozenset[str]

    @property
    def ids(self) -> list[str]:
        return self.utterances["id"].to_pylist()

    def column(self, name: str) -> list[str]:
        return self.utterances[name].to_pylist()

    def refuse_leaks(self, ids: Iterable[str], source: Path | str) -> None:
        """Raise a LeakageError if `source` brings in, or was fitted on, what this split may not open.

        That is any utterance but the split's own: one that the table does not know may be held-out speech under
        another name, or of a class that the config has dropped since.
        """
        others = set(ids).difference(self.ids)
        if not others:
            return
        leaked = sorted(others & self.forbidden)
        kind = "held-out utterances of this fold" if leaked else "utterances that are not in the corpus's table"
        named = leaked or sorted(others)
        raise LeakageError(
            f"{source} contains or was fitted on {len(named)} {kind} ({some(named)}). It belongs to another fold or "
            "corpus, or was made wrongly; delete it and run snakemake again."
        )


def training_split(utterances: Path, folds: FoldsConfig, fold: int) -> Split:
    """What fold `fold` (from 1) trains on; its held-out utterances are forbidden.

    Fold 0 holds out nothing: it is that of speech without labels, on which an encoder is pre-trained, and there is none
    of speech with them.
    """
    if fold == 0:
        whole = everything(utterances)
        if not any(whole.column("emotion")):
            return whole
    table, held_out = _assign(utterances, folds, fold)
    return Split(table.filter(pc.invert(held_out)), frozenset(table.filter(held_out)["id"].to_pylist()))


def held_out_split(utterances: Path, folds: FoldsConfig, fold: int) -> Split:
    """What fold `fold` (from 1) is tested on; its training utterances are forbidden."""
    table, held_out = _assign(utterances, folds, fold)
    return Split(table.filter(held_out), frozenset(table.filter(pc.invert(held_out))["id"].to_pylist()))


def everything(utterances: Path) -> Split:
    """All utterances, none forbidden: for features and for readings that are labelled transductive or oracle."""
    return Split(UTTERANCES.read(utterances)[0], frozenset())


def without_group(split: Split, folds: FoldsConfig, group: int) -> tuple[Split, Split]:
    """Cut group `group` (from 1) out of a training split: what remains, and the cut for validation."""
    cut = pc.is_in(split.utterances[folds.by], pa.array(folds.held_out[group - 1]))
    validation = split.utterances.filter(cut)
    remaining = split.utterances.filter(pc.invert(cut))
    return (
        Split(remaining, split.forbidden | frozenset(validation["id"].to_pylist())),
        Split(validation, split.forbidden),
    )


def check_folds(table: pa.Table, folds: FoldsConfig) -> None:
    """Every utterance in exactly one group, every group with utterances, no speaker on both sides.

    Raises:
        UserError: names the groups, speakers and counts at fault.
    """
    named = {name for group in folds.held_out for name in group}
    found = set(table[folds.by].to_pylist())
    if found != named:
        raise UserError(
            f"folds.held_out does not cover the corpus: {folds.by}s without a fold: "
            f"{', '.join(sorted(found - named)) or 'none'}; named but absent: "
            f"{', '.join(sorted(named - found)) or 'none'}."
        )
    groups = {name: n for n, group in enumerate(folds.held_out, start=1) for name in group}
    fold_of: dict[str, int] = {}
    for speaker, name in zip(table["speaker"].to_pylist(), table[folds.by].to_pylist(), strict=True):
        if fold_of.setdefault(speaker, groups[name]) != groups[name]:
            raise UserError(
                f"Speaker {speaker} is in fold {fold_of[speaker]} and in fold {groups[name]}: the folds would not be "
                "speaker-independent. Change folds.held_out, or set folds.by: speaker."
            )


def _assign(utterances: Path, folds: FoldsConfig, fold: int) -> tuple[pa.Table, pa.ChunkedArray]:
    table, _ = UTTERANCES.read(utterances)
    check_folds(table, folds)
    if not 1 <= fold <= len(folds.held_out):
        raise UserError(f"There is no fold {fold}: folds.held_out has groups for folds 1 to {len(folds.held_out)}.")
    return table, pc.is_in(table[folds.by], pa.array(folds.held_out[fold - 1]))
