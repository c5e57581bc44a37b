"""RAVDESS, the Ryerson Audio-Visual Database of Emotional Speech and Song (Livingstone and Russo, 2018).

`Actor_12/03-01-06-01-02-01-12.wav`: modality, vocal channel, emotion, intensity, statement, repetition, actor.
Only the audio-only speech is used. Each actor is a session of their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gmp_atl.corpora.base import SUFFIXES, Corpus, Utterance, audio_files, by_id, not_used, require_known

NAME = "RAVDESS"
EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fearful",
    "07": "disgusted",
    "08": "surprised",
}
_NAME = re.compile(
    r"(?P<modality>0[123])-(?P<channel>0[12])-(?P<emotion>0[1-8])-0[12]-0[12]-0[12]-(?P<actor>0[1-9]|1\d|2[0-4])"
)


def read(root: Path, classes: Sequence[str]) -> Corpus:
    """Read the audio files anywhere below `root`; song and video are listed as excluded.

    Raises:
        UserError: a file occurs twice, or `classes` names an emotion that the corpus lacks.
    """
    require_known(classes, EMOTIONS.values(), NAME)
    corpus = Corpus(NAME, root, [], {})
    for id, path in by_id(audio_files(root, *SUFFIXES, ".mp4")).items():
        match = _NAME.fullmatch(id)
        if match is None:
            corpus.excluded[id] = "file name is not RAVDESS's"
        elif reason := _reason(match, path.suffix.lower(), classes):
            corpus.excluded[id] = reason
        else:
            corpus.utterances.append(
                Utterance(
                    id=id,
                    path=path.relative_to(root).as_posix(),
                    speaker=f"Actor_{match['actor']}",
                    gender="male" if int(match["actor"]) % 2 else "female",
                    session=f"Actor_{match['actor']}",
                    emotion=EMOTIONS[match["emotion"]],
                    text_type="scripted",
                )
            )
    return corpus


def _reason(match: re.Match[str], suffix: str, classes: Sequence[str]) -> str | None:
    """Why a recording is excluded; None if it is not."""
    if match["channel"] == "02":
        return "song, not speech"
    if match["modality"] != "03" or suffix == ".mp4":
        return "video, not audio only"
    emotion = EMOTIONS[match["emotion"]]
    return None if emotion in classes else not_used(emotion)
