"""Speech corpora: a release on disk becomes a list of utterances, and a list of those left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gmp_atl.corpora import emodb, iemocap, manifest, ravdess
from gmp_atl.corpora.base import Corpus, Difference, Utterance
from gmp_atl.errors import UserError

__all__ = ["Corpus", "Difference", "Utterance", "missing_release", "read_corpus"]

_OBTAIN = {
    "iemocap": "IEMOCAP is obtained by signing the licence form at https://sail.usc.edu/iemocap/.",
    "emodb": "EmoDB is free to download from http://emodb.bilderbar.info/.",
    "ravdess": "RAVDESS is free to download from https://zenodo.org/records/1188976.",
    "manifest": f"A manifest is a CSV or Parquet file with the columns {', '.join(manifest.REQUIRED)}.",
    "synthetic": "The demo makes its own corpus.",
}


def read_corpus(reader: str, root: Path, classes: Sequence[str], *, allow_partial: bool = False) -> Corpus:
    """Read the release at `root` with the named reader (`corpus.reader` of the config); opens no audio.

    Raises:
        UserError: there is no such release at `root`, or it contradicts itself.
    """
    if not root.exists():
        raise UserError(missing_release(reader, root))
    match reader:
        case "iemocap":
            return iemocap.read(root, classes, allow_partial=allow_partial)
        case "synthetic":
            return iemocap.read_synthetic(root, classes)
        case "emodb":
            return emodb.read(root, classes)
        case "ravdess":
            return ravdess.read(root, classes)
        case "manifest":
            return manifest.read(root, classes)
    raise UserError(f"corpus.reader: {reader!r} is unknown; expected one of {', '.join(_OBTAIN)}.")


def missing_release(reader: str, root: Path | str) -> str:
    """What to tell a user whose `corpus.root` does not exist: where to get the corpus, and what runs without one."""
    return (
        f"{root} does not exist; corpus.root should lead to the corpus. {_OBTAIN[reader]} "
        "`make demo` runs everything on synthetic speech instead."
    )
