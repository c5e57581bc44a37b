"""IEMOCAP (Busso et al., 2008), and releases made in its layout.

    SessionN/sentences/wav/<dialog>/<utterance>.wav
    SessionN/dialog/EmoEvaluation/<dialog>.txt

A label file has one line per utterance, `[start - end] <utterance> <label> [valence, activation, dominance]`,
separated by tabs and followed by the annotators' own lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gmp_atl.corpora.base import (
    NO_AUDIO,
    NO_LABEL,
    Corpus,
    Found,
    Published,
    T,
    Utterance,
    audio_files,
    by_id,
    not_used,
    read_text,
    require_known,
)
from gmp_atl.errors import UserError

NAME = "IEMOCAP"
SYNTHETIC_NAME = "Synthetic (eSpeak NG, IEMOCAP layout)"
SESSIONS = (1, 2, 3, 4, 5)
EMOTIONS = {
    "ang": "angry",
    "hap": "happy",
    "exc": "happy",  # merged with hap (paper, Sec. 4.1.1)
    "neu": "neutral",
    "sad": "sad",
    "fru": "frustrated",
    "sur": "surprised",
    "fea": "fearful",
    "dis": "disgusted",
    "oth": "other",
}
NO_MAJORITY = "xxx"

PAPER_CLASSES = ("angry", "happy", "neutral", "sad")
# The rows sum to Table 1 of the paper; the split by session and gender is counted from the release's metadata.
_PER_SESSION = {
    "Ses01": {"neutral": 384, "happy": 278, "angry": 229, "sad": 194, "female": 528, "male": 557},
    "Ses02": {"neutral": 362, "happy": 327, "angry": 137, "sad": 197, "female": 481, "male": 542},
    "Ses03": {"neutral": 320, "happy": 286, "angry": 240, "sad": 305, "female": 522, "male": 629},
    "Ses04": {"neutral": 258, "happy": 303, "angry": 327, "sad": 143, "female": 528, "male": 503},
    "Ses05": {"neutral": 384, "happy": 442, "angry": 170, "sad": 245, "female": 590, "male": 651},
}
_MINUTES = {"neutral": 111.1, "happy": 126.0, "angry": 83.0, "sad": 99.3}

_LABEL = re.compile(r"\[\S+ - \S+\]\s+(?P<id>\S+)\s+(?P<label>\S+)\s+\[.*\]\s*")
# The speaker is in the last part (F012, MXX0); the letter after the session number is the dialog's.
_ID = re.compile(r"(?P<session>Ses0[1-5])[FM]_(?P<text>impro|script)\w*_(?P<gender>[FM])[^_]*")
_TEXT_TYPES = {"impro": "improvised", "script": "scripted"}


def read(root: Path, classes: Sequence[str], *, allow_partial: bool = False) -> Corpus:
    """Read a licensed release.

    Raises:
        UserError: sessions are missing, a label file is malformed, or an utterance occurs twice.
    """
    _require_sessions(root, allow_partial=allow_partial)
    return _read(root, classes, NAME, published(classes))


def read_synthetic(root: Path, classes: Sequence[str]) -> Corpus:
    """Read the demo's release, which no published count describes. Raises as `read` does."""
    _require_sessions(root, allow_partial=False)
    return _read(root, classes, SYNTHETIC_NAME, None)


def published(classes: Sequence[str]) -> Published:
    """What a full release holds of the classes; genders are known for the paper's four together only."""
    known = {each for each in classes if each in PAPER_CLASSES}
    if set(classes) == set(PAPER_CLASSES):
        known |= {"female", "male"}
    return Published(
        counts={(what, ses): n for ses, row in _PER_SESSION.items() for what, n in row.items() if what in known},
        minutes={emotion: minutes for emotion, minutes in _MINUTES.items() if emotion in known},
    )


def _read(root: Path, classes: Sequence[str], name: str, published: Published | None) -> Corpus:
    require_known(classes, EMOTIONS.values(), NAME)
    labels = by_id(label for n in SESSIONS for label in _labels(root, n))
    audio = by_id(file for n in SESSIONS for file in _audio(root, n))
    corpus = Corpus(name, root, [], {}, published)
    for id in sorted(labels.keys() | audio.keys()):
        match = _ID.fullmatch(id)
        if reason := _reason(labels.get(id), classes):
            corpus.excluded[id] = reason
        elif id not in audio:
            corpus.excluded[id] = NO_AUDIO
        elif match is None:
            corpus.excluded[id] = "name does not tell session, text and speaker"
        else:
            corpus.utterances.append(
                Utterance(
                    id=id,
                    path=audio[id].relative_to(root).as_posix(),
                    speaker=match["session"] + match["gender"],
                    gender="female" if match["gender"] == "F" else "male",
                    session=match["session"],
                    emotion=EMOTIONS[labels[id]],
                    text_type=_TEXT_TYPES[match["text"]],
                )
            )
    return corpus


def _reason(label: str | None, classes: Sequence[str]) -> str | None:
    """Why an utterance with this label is excluded; None if it is not."""
    if label is None:
        return NO_LABEL
    if label == NO_MAJORITY:
        return f"no majority label ({NO_MAJORITY})"
    if label not in EMOTIONS:
        return f"label {label} is unknown"
    return None if EMOTIONS[label] in classes else not_used(label)


def _labels(root: Path, session: int) -> Iterator[Found[str]]:
    for path in sorted((root / f"Session{session}" / "dialog" / "EmoEvaluation").glob("*.txt")):
        if path.name.startswith("."):  # left by macOS
            continue
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if not line.startswith("["):  # header, or an annotator's line
                continue
            match = _LABEL.fullmatch(line)
            if match is None:
                raise UserError(
                    f"{path}:{number}: expected `[start - end]<tab>utterance<tab>label<tab>[v, a, d]`, found {line!r}. "
                    "Restore the file from the release."
                )
            yield _in_session(Found(match["id"], f"{path}:{number}", match["label"]), session)


def _audio(root: Path, session: int) -> Iterator[Found[Path]]:
    for file in audio_files(root / f"Session{session}" / "sentences" / "wav", ".wav"):
        yield _in_session(file, session)


def _in_session(found: Found[T], session: int) -> Found[T]:
    """Refuse an utterance in another session's folder: its speaker would be on both sides of a fold."""
    match = _ID.fullmatch(found.id)
    if match is not None and match["session"] != f"Ses0{session}":
        raise UserError(
            f"{found.place}: {found.id} is of session {match['session'][-1]} but lies in Session{session}. "
            "Restore the release."
        )
    return found


def _require_sessions(root: Path, *, allow_partial: bool) -> None:
    missing = [f"Session{n}" for n in SESSIONS if not (root / f"Session{n}").is_dir()]
    if not missing or (allow_partial and len(missing) < len(SESSIONS)):
        return
    hint = "Unpack the whole release there, or set corpus.allow_partial: true."
    if len(missing) == len(SESSIONS):
        inside = next((path.parent for path in sorted(root.glob("*/Session1"))), None)
        above = next((path for path in root.resolve().parents if (path / "Session1").is_dir()), None)
        better = inside or above
        hint = f"Did you mean corpus.root: {better}?" if better else "It should hold Session1 to Session5."
    raise UserError(f"corpus.root: {root} has no {', '.join(missing)}. {hint}")
