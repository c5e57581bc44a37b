"""EmoDB, the Berlin Database of Emotional Speech (Burkhardt et al., 2005).

`03a01Fa.wav`: speaker 03, sentence a01, emotion F (the initial of its German name), version a. Each speaker is a
session of their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gmp_atl.corpora.base import SUFFIXES, Corpus, Utterance, audio_files, by_id, not_used, require_known

NAME = "EmoDB"
EMOTIONS = {
    "W": "angry",  # Wut; Ärger
    "L": "bored",  # Langeweile
    "E": "disgusted",  # Ekel
    "A": "fearful",  # Angst
    "F": "happy",  # Freude
    "T": "sad",  # Trauer
    "N": "neutral",
}
GENDER_OF: dict[str, Literal["female", "male"]] = {
    **dict.fromkeys(("08", "09", "13", "14", "16"), "female"),
    **dict.fromkeys(("03", "10", "11", "12", "15"), "male"),
}
_NAME = re.compile(r"(?P<speaker>\d\d)[ab]\d\d(?P<emotion>[WLEAFTN])[a-z]")


def read(root: Path, classes: Sequence[str]) -> Corpus:
    """Read the audio files anywhere below `root`.

    Raises:
        UserError: a file occurs twice, or `classes` names an emotion that the corpus lacks.
    """
    require_known(classes, EMOTIONS.values(), NAME)
    corpus = Corpus(NAME, root, [], {})
    for id, path in by_id(audio_files(root, *SUFFIXES)).items():
        match = _NAME.fullmatch(id)
        if match is None or match["speaker"] not in GENDER_OF:
            corpus.excluded[id] = "file name is not EmoDB's"
        elif EMOTIONS[match["emotion"]] not in classes:
            corpus.excluded[id] = not_used(match["emotion"])
        else:
            corpus.utterances.append(
                Utterance(
                    id=id,
                    path=path.relative_to(root).as_posix(),
                    speaker=match["speaker"],
                    gender=GENDER_OF[match["speaker"]],
                    session=match["speaker"],
                    emotion=EMOTIONS[match["emotion"]],
                    text_type="scripted",
                )
            )
    return corpus
