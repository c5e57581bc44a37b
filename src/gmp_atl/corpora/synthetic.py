"""The demo's corpus: acted speech from eSpeak NG, in the layout, naming and label format of IEMOCAP.

Five sessions of one woman and one man each. Emotions are acted by rate, pitch, pitch range and loudness, around a
baseline of each speaker and with so much scatter that the classes overlap. The release has IEMOCAP's awkward sides
as well: labels that are not used, utterances without a majority label, files left by macOS, clips shorter than a
second and one longer than ten.
"""

from __future__ import annotations

import ctypes
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from gmp_atl.errors import UserError
from gmp_atl.files import write_bytes, write_text
from gmp_atl.frames import SAMPLE_RATE

README = """\
Synthetic speech, not recordings of people: a made-up release in the layout of IEMOCAP, for demonstration and tests.
Spoken by eSpeak NG. That program is licensed under the GPL, version 3; the audio that it makes is not covered by its
licence and may be used freely.
"""

VOICES = {
    "Ses01F": "en-us+f1",
    "Ses01M": "en-us+m1",
    "Ses02F": "en-gb-scotland+f2",
    "Ses02M": "en-gb-scotland+m2",
    "Ses03F": "en-gb-x-rp+f3",
    "Ses03M": "en-gb-x-rp+m3",
    "Ses04F": "en-029+f4",
    "Ses04M": "en-us-nyc+m6",
    "Ses05F": "en-us+f5",
    "Ses05M": "en-gb-x-gbcwmd+m5",
}
"""eSpeak NG's accent and voice of each speaker."""


@dataclass(frozen=True)
class Prosody:
    """Departure from a speaker's neutral voice, in eSpeak NG's units."""

    rate: float  # words per minute
    pitch: float  # 0 to 99
    range: float  # 0 to 99
    gain: float  # dB


@dataclass(frozen=True)
class Emotion:
    """How often each speaker acts it, how it sounds, and what IEMOCAP's annotators would write."""

    count: int
    prosody: Prosody
    category: str
    valence: float  # 1 to 5
    activation: float  # 1 to 5


EMOTIONS = {
    "neu": Emotion(7, Prosody(0, 0, 0, 0), "Neutral", 3.0, 2.5),
    "hap": Emotion(2, Prosody(10, 16, 28, 1), "Happiness", 4.0, 3.0),
    "exc": Emotion(4, Prosody(16, 20, 34, 2), "Excited", 4.5, 4.0),
    "ang": Emotion(5, Prosody(24, 2, 6, 6), "Anger", 1.5, 4.0),
    "sad": Emotion(4, Prosody(-26, -8, -20, -4.5), "Sadness", 2.0, 2.0),
    "fru": Emotion(2, Prosody(4, 2, 4, 2), "Frustration", 2.0, 3.5),
    "sur": Emotion(1, Prosody(12, 16, 28, 1), "Surprise", 3.0, 3.5),
    "xxx": Emotion(1, Prosody(0, 0, 0, 0), "Other", 2.5, 3.0),
}
"""By IEMOCAP's label; as unbalanced as there."""

NEUTRAL = Prosody(145, 45, 45, 0)
SPEAKER_SCATTER = Prosody(6, 3, 4, 0.6)
CLIP_SCATTER = Prosody(10, 3.5, 7, 1.2)

SENTENCES = (
    "I put the letters on the table by the door.",
    "They are coming back to the house on Friday.",
    "You said that we would talk about it later.",
    "She left the keys with the man at the desk.",
    "We waited for an hour and nobody came.",
    "I have to be at the station before noon.",
    "Did you see what they did to the garden?",
    "There is another form that you have to sign.",
    "He told me about it on the way home.",
    "That is the third time this month.",
    "I did not think that you would be here.",
    "Where were you when I called this morning?",
    "They have moved everything to the other room.",
    "It has been raining since we got here.",
    "I know what you are going to say.",
    "You can take the car if you want to.",
    "My brother is getting married in June.",
    "We are not going back there again.",
    "I heard you talking to them outside.",
    "The plane leaves in twenty minutes.",
    "Nobody told me that it was today.",
    "So what do you want me to do?",
    "It is over there, behind the counter.",
    "That is not what I asked you.",
    "I will call you when I get there.",
    "They gave the job to someone else.",
)
SPECIAL = {
    ("Ses01F", 0): "Yes.",
    ("Ses02M", 13): "No.",
    ("Ses04F", 18): "What?",
    ("Ses05M", 9): "Okay.",
    ("Ses03M", 1): " ".join(SENTENCES[:5]),
}
"""Clips under one second and over ten, by speaker and position in the speaker's labels."""

_SEED = 0
# From eSpeak NG's speak_lib.h.
_SYNCHRONOUS, _DONT_EXIT, _UTF8, _CHARACTERS = 2, 0x8000, 1, 1
_PARAMETERS = {"rate": (1, 80, 450), "pitch": (3, 0, 99), "range": (4, 0, 99)}  # number, lowest, highest
_VOICE_RATE = 22_050  # of eSpeak NG's output, in Hz
_LEVEL = 0.2  # leaves room for the loudest clip
_NOISE = 3e-4  # standard deviation of the room's noise, full scale being 1
_PAUSE = 0.6  # seconds between the turns of a dialog
_APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(16) + b"\xff"  # macOS's `._*` files start so

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_Speak = Callable[[str, str, Prosody], np.ndarray]


@dataclass(frozen=True)
class Turn:
    """One utterance of a dialog."""

    dialog: str
    id: str
    speaker: str
    label: str
    text: str
    prosody: Prosody


def synthesise(root: Path) -> list[Path]:
    """Write the release into `root` and return its files, sorted; the bytes are the same every time.

    Raises:
        UserError: `root` holds sessions that are not synthetic.
    """
    readme = root / "README"
    ours = readme.is_file() and readme.read_text(encoding="utf-8", errors="replace") == README
    for earlier in root.glob("Session*"):
        if not ours:
            raise UserError(f"{root} holds a corpus that is not synthetic. Choose an empty folder for the demo's.")
        shutil.rmtree(earlier)
    write_text(readme, README)
    rng = np.random.default_rng(_SEED)
    files = [readme]
    with _espeak() as speak:
        for session in (1, 2, 3, 4, 5):
            files += _write_session(root / f"Session{session}", _plan(session, rng), speak, rng)
    return sorted(files)


def _plan(session: int, rng: np.random.Generator) -> list[Turn]:
    """Four dialogs, two of them scripted, in which the session's speakers take turns."""
    dialogs = [f"Ses0{session}{kind}" for kind in ("F_impro01", "M_impro02", "F_script01_1", "M_script02_1")]
    turns = []
    for gender in "FM":
        speaker = f"Ses0{session}{gender}"
        baseline = _scattered(NEUTRAL, SPEAKER_SCATTER, rng)
        labels = [label for label, emotion in EMOTIONS.items() for _ in range(emotion.count)]
        for place, n in enumerate(rng.permutation(len(labels))):
            dialog, turn = dialogs[place % len(dialogs)], place // len(dialogs)
            sentence = SENTENCES[rng.integers(len(SENTENCES))]
            prosody = _scattered(_sum(baseline, EMOTIONS[labels[n]].prosody), CLIP_SCATTER, rng)
            text = SPECIAL.get((speaker, int(n)), sentence)
            turns.append(Turn(dialog, f"{dialog}_{gender}{turn:03d}", speaker, labels[n], text, prosody))
    return sorted(turns, key=lambda each: (each.dialog, each.id[-3:], each.id))


def _write_session(folder: Path, turns: list[Turn], speak: _Speak, rng: np.random.Generator) -> list[Path]:
    files = []
    for dialog, members in groupby(turns, key=lambda turn: turn.dialog):
        audio_folder = folder / "sentences" / "wav" / dialog
        label_file = folder / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
        lines, clock = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"], 0.0
        for turn in members:
            samples = _record(speak(VOICES[turn.speaker], turn.text, turn.prosody), turn.prosody.gain, rng)
            files.append(audio_folder / f"{turn.id}.wav")
            wave = io.BytesIO()
            soundfile.write(wave, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")
            write_bytes(files[-1], wave.getvalue())
            end = clock + len(samples) / SAMPLE_RATE
            lines.append(_label_block(turn, clock, end))
            clock = end + _PAUSE
        write_text(label_file, "\n".join(lines))
        files.append(label_file)
        for file in files[-2:]:
            files.append(file.with_name(f"._{file.name}"))
            write_bytes(files[-1], _APPLE_DOUBLE)
    return files


def _label_block(turn: Turn, start: float, end: float) -> str:
    """An utterance's label line and one annotator's lines, as in IEMOCAP's label files."""
    emotion = EMOTIONS[turn.label]
    attributes = f"[{emotion.valence:.4f}, {emotion.activation:.4f}, 3.0000]"  # valence, activation, dominance
    return (
        f"[{start:.4f} - {end:.4f}]\t{turn.id}\t{turn.label}\t{attributes}\n"
        f"C-E1:\t{emotion.category};\t()\n"
        f"A-E1:\tval {emotion.valence:g}; act {emotion.activation:g}; dom 3;\t()\n"
    )


def _record(speech: np.ndarray, gain: float, rng: np.random.Generator) -> np.ndarray:
    """Speech as a microphone in a room might deliver it: float, in [-1, 1], at 16 kHz."""
    samples: np.ndarray = resample_poly(speech, SAMPLE_RATE, _VOICE_RATE) * _LEVEL * 10 ** (gain / 20)
    return np.clip(samples + rng.normal(0, _NOISE, len(samples)), -1, 1)


def _sum(first: Prosody, second: Prosody) -> Prosody:
    return Prosody(*(a + b for a, b in zip(astuple(first), astuple(second), strict=True)))


def _scattered(mean: Prosody, scatter: Prosody, rng: np.random.Generator) -> Prosody:
    return Prosody(*rng.normal(astuple(mean), astuple(scatter)).tolist())


@contextmanager
def _espeak() -> Iterator[_Speak]:
    """A function of voice, text and prosody that returns speech, float in [-1, 1], at `_VOICE_RATE`.

    eSpeak NG keeps state between utterances, and takes no data path beyond 160 bytes. A private copy of the library
    beside a link to its data starts from the same state every time, from a short path.
    """
    import espeakng_loader

    chunks: list[bytes] = []

    def collect(samples: int | None, count: int, _events: int | None) -> int:
        if samples:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    callback = _Callback(collect)  # named, because the library does not keep it alive
    try:
        scratch = tempfile.TemporaryDirectory()
    except OSError as error:
        raise UserError(f"eSpeak NG needs room for temporary files: {error}. Set TMPDIR to another folder.") from None
    with scratch as folder:
        (Path(folder) / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
        try:
            library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        except OSError as error:
            raise UserError(
                f"eSpeak NG cannot be loaded: {error}. Set TMPDIR to a folder that may hold programs."
            ) from None
        if library.espeak_Initialize(_SYNCHRONOUS, 0, folder.encode(), _DONT_EXIT) != _VOICE_RATE:
            raise RuntimeError("eSpeak NG did not start")
        library.espeak_SetSynthCallback(callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))

        def speak(voice: str, text: str, prosody: Prosody) -> np.ndarray:
            chunks.clear()
            failed = library.espeak_SetVoiceByName(voice.encode())
            for name, (number, low, high) in _PARAMETERS.items():
                value = min(max(round(getattr(prosody, name)), low), high)
                failed |= library.espeak_SetParameter(number, value, 0)
            data = text.encode() + b"\0"
            failed |= library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, _CHARACTERS, 0, _UTF8, None, None)
            if failed:
                raise RuntimeError(f"eSpeak NG could not say {text!r} in the voice {voice}")
            return np.frombuffer(b"".join(chunks), np.int16) / 32_768

        try:
            yield speak
        finally:
            library.espeak_Terminate()
