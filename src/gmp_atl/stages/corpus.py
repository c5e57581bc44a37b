"""Stage 0: a speech corpus on disk becomes the utterance table that every later stage reads."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from gmp_atl import audio
from gmp_atl.config import GENDERS, CorpusSlice, FoldsConfig
from gmp_atl.corpora import Corpus, Difference, Utterance, read_corpus
from gmp_atl.errors import NOTICE, UserError, some
from gmp_atl.files import AudioRoot, Output
from gmp_atl.folds import check_folds
from gmp_atl.formats import CORPUS_SUMMARY, EXCLUDED, UTTERANCES
from gmp_atl.frames import SAMPLE_RATE

log = logging.getLogger(__name__)

_CLIPPED = 0.01
"""Share of a clip's samples at full scale, above which it is told."""


def corpus(*, config: CorpusSlice, root: AudioRoot, utterances: Output, excluded: Output, summary: Output) -> None:
    """Read and check the corpus at `root`; write the utterances, what was left out and why, and Table 1's counts.

    Every clip is decoded once, so that a damaged one is found here and not hours into training.

    Raises:
        UserError: no corpus there, a class without utterances, folds that do not fit or that share a recording, or an
            incomplete IEMOCAP that the config does not allow.
    """
    found = read_corpus(config.corpus.reader, root, config.classes, allow_partial=config.corpus.allow_partial)
    clips, rejected = _inspect(found)
    n_samples = {utterance: clip.n_samples for utterance, clip in clips.items()}
    kept = sorted((each for each in found.utterances if each.id in n_samples), key=lambda u: (u.session, u.id))
    reasons = dict(sorted((found.excluded | rejected).items()))
    complete = _is_complete(found, kept, n_samples, reasons, allow_partial=config.corpus.allow_partial)
    _require_classes_and_folds(config, found, kept, reasons)
    table = pa.Table.from_pylist([_row(each, clips[each.id]) for each in kept], schema=UTTERANCES.schema)
    _refuse_copies(kept, clips, config.folds)

    described = {
        "corpus": found.name,
        "complete": complete,
        "audio": _digest({each.id: clips[each.id] for each in kept}),
    }
    UTTERANCES.write(utterances, table, **described)
    exclusions = pa.table([list(reasons), list(reasons.values())], schema=EXCLUDED.schema)
    EXCLUDED.write(excluded, exclusions)
    CORPUS_SUMMARY.write(
        summary,
        _summary(config.classes, kept, n_samples),
        **described,
        classes=config.classes,
        excluded=dict(Counter(reasons.values()).most_common()),
    )
    _log(found.name, config.classes, config.folds, kept, n_samples, reasons)


def check(config: CorpusSlice, root: Path) -> Corpus:
    """Read the corpus at `root`, and refuse what can be refused without opening its audio; raises as `corpus` does."""
    found = read_corpus(config.corpus.reader, root, config.classes, allow_partial=config.corpus.allow_partial)
    _require_classes_and_folds(config, found, found.utterances, found.excluded)
    return found


def _row(utterance: Utterance, clip: audio.AudioInfo) -> dict[str, str | int]:
    of_clip: dict[str, str | int] = {"n_samples": clip.n_samples, "sha256": clip.sha256}
    return of_clip | {name: getattr(utterance, name) for name in UTTERANCES.schema.names if name not in of_clip}


def _digest(clips: Mapping[str, audio.AudioInfo]) -> str:
    """SHA-256 over ids and samples: equal for equal speech, wherever it lies and whatever the file format."""
    lines = [f"{utterance} {clip.sha256}\n" for utterance, clip in sorted(clips.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _inspect(found: Corpus) -> tuple[dict[str, audio.AudioInfo], dict[str, str]]:
    """Decode every clip: what the usable ones hold, and the reason against each of the others."""
    usable: dict[str, audio.AudioInfo] = {}
    rejected: dict[str, str] = {}
    mixed_down, clipped = 0, []

    def info(utterance: Utterance) -> audio.AudioInfo | audio.AudioError:
        try:
            return audio.inspect(found.audio_root / utterance.path)
        except audio.AudioError as error:
            return error

    with ThreadPoolExecutor(audio.DECODERS) as pool:
        for utterance, result in zip(found.utterances, pool.map(info, found.utterances), strict=True):
            if isinstance(result, audio.AudioError):
                log.warning("%s: excluded: %s", utterance.id, result)
                rejected[utterance.id] = result.problem
            elif result.n_samples < audio.MIN_SAMPLES:
                rejected[utterance.id] = audio.TOO_SHORT
            else:
                usable[utterance.id] = result
                mixed_down += result.channels > 1
                clipped += [utterance.id] * (result.clipped > _CLIPPED)
    if mixed_down:
        log.log(NOTICE, "%d clips have several channels, which are averaged.", mixed_down)
    if clipped:
        log.log(NOTICE, "%d clips are kept of which over 1 %% is at full scale: %s", len(clipped), some(clipped))
    return usable, rejected


def _require_classes_and_folds(
    config: CorpusSlice, found: Corpus, kept: list[Utterance], reasons: Mapping[str, str]
) -> None:
    _require_classes(config.classes, found, kept, reasons)
    check_folds(
        pa.table({name: [getattr(each, name) for each in kept] for name in ("speaker", "session")}), config.folds
    )
    _require_training_classes(config.classes, kept, config.folds)


def _require_training_classes(classes: list[str], kept: list[Utterance], folds: FoldsConfig) -> None:
    for fold, group in enumerate(folds.held_out, start=1):
        trained_on = {each.emotion for each in kept if getattr(each, folds.by) not in group}
        if absent := [name for name in classes if name not in trained_on]:
            raise UserError(
                f"Fold {fold} would train on no utterance of {' or '.join(absent)}: all of them are of {folds.by} "
                f"{' or '.join(group)}, which it holds out. Change folds.held_out or classes."
            )


def _refuse_copies(kept: list[Utterance], clips: Mapping[str, audio.AudioInfo], folds: FoldsConfig) -> None:
    """Refuse the same samples, under two ids, on both sides of a split; within a fold they are told."""
    fold_of = {name: number for number, group in enumerate(folds.held_out, start=1) for name in group}
    first: dict[str, Utterance] = {}
    copies = []
    for each in kept:
        other = first.setdefault(clips[each.id].sha256, each)
        if other is each:
            continue
        here, there = (fold_of[getattr(utterance, folds.by)] for utterance in (each, other))
        if here != there:
            raise UserError(
                f"{other.id} (fold {there}) and {each.id} (fold {here}) are the same samples: a model "
                "would be tested on what it was trained on. Remove one of the two, or hold both out in one fold "
                "(folds.held_out)."
            )
        copies.append(f"{each.id} of {other.id}")
    if copies:
        log.log(NOTICE, "%d clips are copies of others in their fold, sample by sample: %s", len(copies), some(copies))


def _is_complete(
    found: Corpus,
    kept: list[Utterance],
    n_samples: Mapping[str, int],
    reasons: Mapping[str, str],
    *,
    allow_partial: bool,
) -> bool:
    """Whether the corpus shows the published statistics; if it must and does not, a UserError lists them."""
    differences = found.published.differences(kept, n_samples) if found.published else []
    if differences and not allow_partial:
        raise UserError(
            f"{found.name} at {found.audio_root} is not the full release:\n{_difference_table(differences)}\n"
            f"Excluded: {_by_reason(reasons)}.\nRestore the release, or set corpus.allow_partial: true; every table "
            "then says that the corpus is partial."
        )
    if differences:
        log.warning("%s is partial:\n%s", found.name, _difference_table(differences))
    return not differences


def _require_classes(classes: list[str], found: Corpus, kept: list[Utterance], reasons: Mapping[str, str]) -> None:
    absent = [name for name in classes if name not in {each.emotion for each in kept}]
    if absent:
        raise UserError(
            f"{found.name} at {found.audio_root} has no usable utterance of {', '.join(absent)}. "
            f"Kept: {len(kept)}; excluded: {_by_reason(reasons)}. Check corpus.root and classes."
        )


def _summary(classes: list[str], kept: list[Utterance], n_samples: Mapping[str, int]) -> pa.Table:
    """Utterances and samples per emotion (in the config's order), session and gender."""
    counts: Counter[tuple[str, str, str]] = Counter()
    samples: Counter[tuple[str, str, str]] = Counter()
    for each in kept:
        group = each.emotion, each.session, each.gender
        counts[group] += 1
        samples[group] += n_samples[each.id]
    order = sorted(counts, key=lambda group: (classes.index(group[0]), *group[1:]))
    rows = [dict(zip(CORPUS_SUMMARY.schema.names, (*g, counts[g], samples[g]), strict=True)) for g in order]
    return pa.Table.from_pylist(rows, schema=CORPUS_SUMMARY.schema)


def _log(
    name: str,
    classes: list[str],
    folds: FoldsConfig,
    kept: list[Utterance],
    n_samples: Mapping[str, int],
    reasons: Mapping[str, str],
) -> None:
    """Print what was found: a row per fold, female/male utterances per class."""
    rows = [["fold", "held out", *classes, "all", "minutes"]]
    members = [[each for each in kept if getattr(each, folds.by) in group] for group in folds.held_out]
    labels = [(str(n), " ".join(group)) for n, group in enumerate(folds.held_out, start=1)]
    for (fold, group), utterances in zip([*labels, ("all", "")], [*members, kept], strict=True):
        of_class = [[each for each in utterances if each.emotion == emotion] for emotion in classes]
        minutes = sum(n_samples[each.id] for each in utterances) / SAMPLE_RATE / 60
        rows.append([fold, group, *map(_female_male, of_class), _female_male(utterances), f"{minutes:.1f}"])
    log.log(
        NOTICE,
        "%s: %d utterances of %d speakers; female/male utterances by fold and class:\n%s\nexcluded: %s",
        name,
        len(kept),
        len({each.speaker for each in kept}),
        _aligned(rows),
        _by_reason(reasons),
    )


def _female_male(utterances: list[Utterance]) -> str:
    counts = Counter[str](each.gender for each in utterances)
    return "/".join(str(counts[gender]) for gender in GENDERS)


def _difference_table(differences: Iterable[Difference]) -> str:
    return _aligned(
        [["quantity", "expected", "found"], *([d.quantity, f"{d.expected:g}", f"{d.found:g}"] for d in differences)]
    )


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _by_reason(reasons: Mapping[str, str]) -> str:
    counts = Counter(reasons.values()).most_common()
    return ", ".join(f"{count} ({reason})" for reason, count in counts) or "none"
