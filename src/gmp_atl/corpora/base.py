"""What every reader returns, and what readers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from gmp_atl.errors import UserError
from gmp_atl.frames import SAMPLE_RATE

T = TypeVar("T")

SUFFIXES = (".wav", ".flac", ".aif", ".aiff", ".ogg", ".mp3")
"""Of the formats that are read, for releases that somebody may have converted."""
NO_LABEL = "audio without a label"
NO_AUDIO = "label without audio"


@dataclass(frozen=True, slots=True)
class Utterance:
    """One labelled clip."""

    id: str
    path: str
    """POSIX, relative to the corpus's audio root."""
    speaker: str
    gender: Literal["female", "male"]
    session: str
    emotion: str
    text_type: str
    """improvised or scripted; empty where the corpus does not say."""


@dataclass(frozen=True)
class Difference:
    """A published statistic that the corpus at hand does not show."""

    quantity: str
    expected: float
    found: float


@dataclass(frozen=True)
class Published:
    """Statistics of the full release: utterances per (emotion or gender, session), minutes per emotion."""

    counts: Mapping[tuple[str, str], int]
    minutes: Mapping[str, float]

    def differences(self, utterances: Sequence[Utterance], n_samples: Mapping[str, int]) -> list[Difference]:
        """What differs from the release, given the length of each utterance (id: samples at 16 kHz)."""
        counts: Counter[tuple[str, str]] = Counter()
        samples: Counter[str] = Counter()
        for each in utterances:
            counts[each.emotion, each.session] += 1
            counts[each.gender, each.session] += 1
            samples[each.emotion] += n_samples[each.id]
        minutes = {emotion: samples[emotion] / SAMPLE_RATE / 60 for emotion in self.minutes}
        return [
            Difference(f"{what}, {session}", expected, counts[what, session])
            for (what, session), expected in self.counts.items()
            if counts[what, session] != expected
        ] + [
            Difference(f"{emotion}, minutes", expected, round(minutes[emotion], 1))
            for emotion, expected in self.minutes.items()
            if abs(minutes[emotion] - expected) > 0.1  # published to a tenth of a minute
        ]


@dataclass(frozen=True)
class Corpus:
    """A release on disk: every utterance found is either in `utterances` or, with the reason, in `excluded`."""

    name: str
    audio_root: Path
    utterances: list[Utterance]
    excluded: dict[str, str]
    """id: reason."""
    published: Published | None = None
    """What a full release holds, where that is known."""


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """Something that a release says about an utterance, and where it says so (a file, or file and line)."""

    id: str
    place: str
    value: T


def by_id(found: Iterable[Found[T]]) -> dict[str, T]:
    """Values by utterance id.

    Raises:
        UserError: an id occurs twice; names both places.
    """
    first: dict[str, Found[T]] = {}
    for each in found:
        if (other := first.setdefault(each.id, each)) is not each:
            raise UserError(
                f"{each.id} occurs twice: {other.place} and {each.place}. Every utterance needs one id; remove the "
                "copy or rename one of the two."
            )
    return {id: each.value for id, each in first.items()}


def audio_files(root: Path, *suffixes: str) -> Iterator[Found[Path]]:
    """What `files` finds below `root` with one of the suffixes, by stem.

    Raises:
        UserError: a folder cannot be read, or a name is not UTF-8.
    """
    for path in files(root, suffixes):
        if not _is_utf8(relative := str(path.relative_to(root))):
            raise UserError(f"{root}: the name {relative!r} is not UTF-8. Rename it, or restore the release.")
        yield Found(path.stem, str(path), path)


def files(root: Path, suffixes: Collection[str]) -> list[Path]:
    """Files below `root` with one of the suffixes, in order; hidden ones (macOS leaves `._*`) are none.

    Links to folders are followed, and every folder is entered once, so that a loop of links ends.

    Raises:
        UserError: a folder cannot be read.
    """
    found = sorted(_files(root, set()))
    return [path for path in found if path.suffix.lower() in suffixes and not path.name.startswith(".")]


def _files(folder: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        state = folder.stat()
        if (state.st_dev, state.st_ino) in entered:
            return
        entered.add((state.st_dev, state.st_ino))
        children = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}. Give access to it, or move it away.") from None
    for child in children:
        if child.is_dir():
            yield from _files(child, entered)
        else:
            yield child


def _is_utf8(text: str) -> bool:
    """Python puts surrogates for the bytes of a name that are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark.

    Raises:
        UserError: not a regular file, unreadable, or not UTF-8; names the line.
    """
    try:
        if not path.is_file():  # reading a pipe or a device would not end
            raise UserError(f"{path} is not a regular file; expected UTF-8 text.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text. Convert the file to UTF-8, or restore it.") from None


def require_known(classes: Sequence[str], known: Iterable[str], corpus: str) -> None:
    """Raise a UserError if the config asks for an emotion that the corpus does not label."""
    known = sorted(set(known))
    unknown = [each for each in classes if each not in known]
    if unknown:
        raise UserError(f"classes: {corpus} has no {', '.join(unknown)}; it has {', '.join(known)}.")


def not_used(label: str) -> str:
    """The reason for excluding an utterance whose label is none of the config's classes."""
    return f"label {label} is not used"
