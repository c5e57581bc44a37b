"""Readers: every utterance of a release is kept or listed with the reason, and the traps of real releases hold."""

import csv
import hashlib
import logging
import shutil
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp_atl.config import CorpusSlice
from gmp_atl.corpora import Corpus, iemocap, manifest, read_corpus
from gmp_atl.corpora.synthetic import synthesise
from gmp_atl.errors import NOTICE, UserError
from gmp_atl.formats import CORPUS_SUMMARY, EXCLUDED, UTTERANCES
from gmp_atl.stages.corpus import corpus as corpus_stage
from gmp_atl.stages.synthesis import synthesis

FOUR = ["angry", "happy", "neutral", "sad"]


def write_audio(path: Path, n_samples: int = 800, rate: int = 16_000, channels: int = 1) -> None:
    """Under each name other samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    level = 0.1 + 0.1 * zlib.crc32(path.name.encode()) / 2**32
    soundfile.write(path, np.tile(np.linspace(-level, level, n_samples)[:, None], channels), rate)


def wav_of(root: Path, id: str) -> Path:
    """Where IEMOCAP keeps an utterance."""
    return root / f"Session{id[4]}" / "sentences" / "wav" / id.rpartition("_")[0] / f"{id}.wav"


def write_labels(root: Path, labels: dict[str, str], newline: str = "\n") -> None:
    dialogs: dict[str, list[str]] = {}
    for id, label in labels.items():
        dialogs.setdefault(id.rpartition("_")[0], []).append(
            f"[6.2901 - 8.2357]\t{id}\t{label}\t[2.5000, 2.5000, 2.5000]{newline}"
            f"C-E2:\tNeutral;\t(){newline}C-F1:\tOther;\t(){newline}A-E3:\tval 3; act 2; dom  2;\t(){newline}"
        )
    for dialog, blocks in dialogs.items():
        path = root / f"Session{dialog[4]}" / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]{newline}{newline}" + newline.join(blocks)
        path.write_bytes(text.encode())


def write_iemocap(root: Path, labels: dict[str, str], **options: str) -> Path:
    for n in iemocap.SESSIONS:
        (root / f"Session{n}").mkdir(parents=True, exist_ok=True)
    write_labels(root, labels, **options)
    for id in labels:
        wav_of(root, id).parent.mkdir(parents=True, exist_ok=True)
        wav_of(root, id).touch()
    return root


def read(root: Path, classes: list[str] = FOUR) -> Corpus:
    return read_corpus("iemocap", root, classes)


# --- IEMOCAP


def test_iemocap_utterance(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path, {"Ses03M_impro05a_F012": "exc", "Ses05M_script01_1b_MXX0": "neu"})
    first, second = read(root).utterances
    assert (first.id, first.emotion, first.text_type) == ("Ses03M_impro05a_F012", "happy", "improvised")
    assert (first.speaker, first.gender, first.session) == ("Ses03F", "female", "Ses03")
    assert first.path == "Session3/sentences/wav/Ses03M_impro05a/Ses03M_impro05a_F012.wav"
    assert (second.speaker, second.gender, second.session) == ("Ses05M", "male", "Ses05")
    assert second.text_type == "scripted"


def test_iemocap_reasons(tmp_path: Path) -> None:
    prefix = "Ses01F_impro01_F00"
    labels = {prefix + "0": "ang", prefix + "1": "fru", prefix + "2": "xxx", prefix + "3": "sad", prefix + "4": "wow"}
    root = write_iemocap(tmp_path, {**labels, "Ses01F_other_F000": "neu"})
    wav_of(root, prefix + "3").unlink()
    wav_of(root, prefix + "9").touch()
    found = read(root)
    assert [each.id for each in found.utterances] == [prefix + "0"]
    assert found.excluded == {
        prefix + "1": "label fru is not used",
        prefix + "2": "no majority label (xxx)",
        prefix + "3": "label without audio",
        prefix + "4": "label wow is unknown",
        prefix + "9": "audio without a label",
        "Ses01F_other_F000": "name does not tell session, text and speaker",
    }


LABELS = [*iemocap.EMOTIONS, iemocap.NO_MAJORITY, None]
SUFFIXES = st.builds("{}{:03d}".format, st.sampled_from("FM"), st.integers(0, 5))
IDS = st.builds("Ses0{}{}_{}_{}".format, st.integers(1, 5), st.sampled_from("FM"), st.just("impro01"), SUFFIXES)


@settings(max_examples=40, deadline=None)
@given(
    release=st.dictionaries(IDS, st.tuples(st.sampled_from(LABELS), st.booleans()), max_size=12),
    classes=st.lists(st.sampled_from(sorted(set(iemocap.EMOTIONS.values()))), min_size=2, unique=True),
)
def test_nothing_is_dropped_silently(release: dict[str, tuple[str | None, bool]], classes: list[str]) -> None:
    release = {id: (label, has_audio) for id, (label, has_audio) in release.items() if label or has_audio}
    with tempfile.TemporaryDirectory() as folder:
        root = write_iemocap(Path(folder), {id: label for id, (label, _) in release.items() if label})
        for id, (_, has_audio) in release.items():
            wav_of(root, id).parent.mkdir(parents=True, exist_ok=True)
            wav_of(root, id).touch() if has_audio else wav_of(root, id).unlink()
        found = read(root, classes)
    kept = [each.id for each in found.utterances]
    assert sorted([*kept, *found.excluded]) == sorted(release)
    assert all(each.gender[0].upper() == each.id.rpartition("_")[2][0] for each in found.utterances)


def test_macos_leftovers_and_subfolders_are_no_utterances(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path, {"Ses01F_impro01_F000": "neu"})
    labels = root / "Session1" / "dialog" / "EmoEvaluation"
    (labels / "._Ses01F_impro01.txt").write_bytes(b"\0\x05\xff")
    (labels / "Categorical").mkdir()
    (labels / "Categorical" / "Ses01F_impro01_e2_cat.txt").write_text("Ses01F_impro01_F000 :Neutral; ()\n")
    wav_of(root, "Ses01F_impro01_F000").with_name("._Ses01F_impro01_F000.wav").write_bytes(b"\0\x05\xff")
    found = read(root)
    assert (len(found.utterances), found.excluded) == (1, {})


def test_windows_line_ends(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path, {"Ses01F_impro01_F000": "neu", "Ses01F_impro01_F001": "hap"}, newline="\r\n")
    assert [each.emotion for each in read(root).utterances] == ["neutral", "happy"]


def test_other_classes(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path, {"Ses01F_impro01_F000": "fru", "Ses01F_impro01_F001": "sad"})
    assert [each.emotion for each in read(root, ["frustrated", "sad"]).utterances] == ["frustrated", "sad"]
    with pytest.raises(UserError, match=r"IEMOCAP has no joyful; it has angry, disgusted"):
        read(root, ["joyful", "sad"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"% header\n\n[1.0 - 2.0]\tSes01F_impro01_F000\t\xff\n", r"impro01\.txt:3: not UTF-8"),
        (b"% header\n[1.0 - 2.0]\tSes01F_impro01_F000\n", r"impro01\.txt:2: expected"),
        (
            b"[1.0 - 2.0]\tSes02F_impro01_F000\tneu\t[1, 1, 1]\n",
            r"impro01\.txt:1: .* of session 2 but lies in Session1",
        ),
        (2 * b"[1.0 - 2.0]\tSes01F_impro01_F000\tneu\t[1, 1, 1]\n", r"occurs twice: .*txt:1 and .*txt:2"),
    ],
)
def test_malformed_labels_are_located(tmp_path: Path, content: bytes, message: str) -> None:
    root = write_iemocap(tmp_path, {"Ses01F_impro01_F000": "neu"})
    (root / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(root)


def test_audio_that_occurs_twice(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path, {"Ses01F_impro01_F000": "neu"})
    copy = root / "Session1" / "sentences" / "wav" / "backup" / "Ses01F_impro01_F000.wav"
    copy.parent.mkdir()
    copy.touch()
    with pytest.raises(UserError, match=r"occurs twice: .*wav and .*wav"):
        read(root)


def test_wrong_root_is_put_right(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path / "above" / "release", {"Ses01F_impro01_F000": "neu"})
    for wrong in (root.parent, root / "Session1"):
        with pytest.raises(UserError, match=f"Did you mean corpus.root: {root}"):
            read(wrong)
    (root / "Session4").rmdir()
    with pytest.raises(UserError, match=r"has no Session4\. .*allow_partial"):
        read(root)
    assert len(read_corpus("iemocap", root, FOUR, allow_partial=True).utterances) == 1


@pytest.mark.parametrize("reader", ["iemocap", "emodb", "ravdess", "manifest", "synthetic"])
def test_missing_root_tells_what_to_do(tmp_path: Path, reader: str) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist(.|\n)*make demo"):
        read_corpus(reader, tmp_path / "nowhere", FOUR)


# --- IEMOCAP's published counts (method: Table 1 of the paper)


@pytest.fixture(scope="module")
def full_release(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Labels and empty audio files as many as the full release has, and some that are not used."""
    codes = {"neutral": ["neu"], "happy": ["hap", "exc"], "angry": ["ang"], "sad": ["sad"]}
    counts = iemocap.published(FOUR).counts
    labels = {}
    for n in iemocap.SESSIONS:
        session = f"Ses0{n}"
        wanted = [codes[name][i % len(codes[name])] for name in FOUR for i in range(counts[name, session])]
        for i, label in enumerate([*wanted, "xxx", "fru"]):
            labels[f"{session}F_impro01_{'F' if i < counts['female', session] else 'M'}{i:04d}"] = label
    return read(write_iemocap(tmp_path_factory.mktemp("iemocap"), labels))


def lengths(corpus: Corpus) -> dict[str, int]:
    """Equal within a class, and as many minutes as published."""
    assert corpus.published is not None
    size = Counter(each.emotion for each in corpus.utterances)
    minutes = corpus.published.minutes
    return {each.id: round(minutes[each.emotion] * 60 * 16_000 / size[each.emotion]) for each in corpus.utterances}


def test_the_published_counts_are_table_1() -> None:
    published = iemocap.published(FOUR)
    total = {name: sum(n for (what, _), n in published.counts.items() if what == name) for name in FOUR}
    assert total == {"angry": 1103, "happy": 1636, "neutral": 1708, "sad": 1084}
    assert {name: round(minutes) for name, minutes in published.minutes.items()} == {
        "angry": 83,
        "happy": 126,
        "neutral": 111,
        "sad": 99,
    }
    of_session = Counter[str]()
    for (what, session), n in published.counts.items():
        of_session[session] += n if what in FOUR else -n
    assert set(of_session.values()) == {0}  # genders and classes agree


def test_the_full_release_is_complete(full_release: Corpus) -> None:
    assert full_release.published is not None
    assert (len(full_release.utterances), len(full_release.excluded)) == (5531, 10)
    assert full_release.published.differences(full_release.utterances, lengths(full_release)) == []


def test_whatever_differs_from_the_full_release_is_told(full_release: Corpus) -> None:
    assert full_release.published is not None
    n_samples = lengths(full_release)
    lost = next(each for each in full_release.utterances if each.session == "Ses04" and each.emotion == "sad")
    kept = [each for each in full_release.utterances if each is not lost]
    told = full_release.published.differences(kept, n_samples)
    assert {(d.quantity, d.expected, d.found) for d in told if "minutes" not in d.quantity} == {
        ("sad, Ses04", 143, 142),
        (f"{lost.gender}, Ses04", *((528, 527) if lost.gender == "female" else (503, 502))),
    }
    halved = {id: length // 2 for id, length in n_samples.items()}
    told = full_release.published.differences(full_release.utterances, halved)
    assert [d.quantity for d in told] == [f"{name}, minutes" for name in ("neutral", "happy", "angry", "sad")]


def test_counts_of_other_classes_are_not_invented() -> None:
    assert set(iemocap.published(["sad", "frustrated"]).counts) == {("sad", f"Ses0{n}") for n in range(1, 6)}


# --- EmoDB and RAVDESS


@pytest.mark.parametrize("folder", [".", "wav"])
def test_emodb(tmp_path: Path, folder: str) -> None:
    for name in ("03a01Fa", "08b02Tb", "16a05Wc", "03a01La", "99a01Fa", "noise", "._03a01Fa"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.wav").touch()
    (tmp_path / folder / "11a07Nd.flac").touch()  # converted by whoever owns this copy
    found = read_corpus("emodb", tmp_path, FOUR)
    assert [(each.id, each.speaker, each.gender, each.session, each.emotion) for each in found.utterances] == [
        ("03a01Fa", "03", "male", "03", "happy"),
        ("08b02Tb", "08", "female", "08", "sad"),
        ("11a07Nd", "11", "male", "11", "neutral"),
        ("16a05Wc", "16", "female", "16", "angry"),
    ]
    assert found.excluded == {
        "03a01La": "label L is not used",
        "99a01Fa": "file name is not EmoDB's",
        "noise": "file name is not EmoDB's",
    }
    assert all((found.audio_root / each.path).is_file() for each in found.utterances)


def test_ravdess(tmp_path: Path) -> None:
    names = ("03-01-05-01-02-01-12.wav", "03-01-01-01-01-01-01.wav", "03-01-02-01-01-01-01.wav")
    for name in (*names, "03-02-05-01-02-01-12.wav", "01-01-05-01-02-01-12.mp4", "03-01-09-01-02-01-12.wav"):
        folder = tmp_path / f"Actor_{name[18:20]}"
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    found = read_corpus("ravdess", tmp_path, FOUR)
    assert [(each.speaker, each.gender, each.emotion) for each in found.utterances] == [
        ("Actor_01", "male", "neutral"),
        ("Actor_12", "female", "angry"),
    ]
    assert found.excluded == {
        "01-01-05-01-02-01-12": "video, not audio only",
        "03-01-02-01-01-01-01": "label calm is not used",
        "03-01-09-01-02-01-12": "file name is not RAVDESS's",
        "03-02-05-01-02-01-12": "song, not speech",
    }


@pytest.mark.parametrize(("reader", "name"), [("emodb", "03a01Fa.wav"), ("ravdess", "03-01-05-01-02-01-12.wav")])
def test_copies_are_refused(tmp_path: Path, reader: str, name: str) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    with pytest.raises(UserError, match=r"occurs twice: .*first.* and .*second"):
        read_corpus(reader, tmp_path, FOUR)


# --- Genders and emotions, written out as each release documents them: not taken from the readers

EMODB_SPEAKERS = {
    "03": "male",
    "08": "female",
    "09": "female",
    "10": "male",
    "11": "male",
    "12": "male",
    "13": "female",
    "14": "female",
    "15": "male",
    "16": "female",
}
EMODB_EMOTIONS = {
    "W": "angry",
    "L": "bored",
    "E": "disgusted",
    "A": "fearful",  # its documentation has anxiety and fear as one
    "F": "happy",
    "T": "sad",
    "N": "neutral",
}
RAVDESS_EMOTIONS = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised"]  # 01 to 08
IEMOCAP_EMOTIONS = {
    "ang": "angry",
    "hap": "happy",
    "exc": "happy",  # excited, which the paper merges with happy
    "sad": "sad",
    "neu": "neutral",
    "fru": "frustrated",
    "fea": "fearful",
    "sur": "surprised",
    "dis": "disgusted",
    "oth": "other",
}
DOCUMENTED = {
    "emodb": {
        f"{speaker}a01{code}a": (gender, emotion)
        for speaker, gender in EMODB_SPEAKERS.items()
        for code, emotion in EMODB_EMOTIONS.items()
    },
    "ravdess": {
        f"03-01-{code:02}-01-01-01-{actor:02}": ("female" if actor % 2 == 0 else "male", emotion)
        for actor in range(1, 25)
        for code, emotion in enumerate(RAVDESS_EMOTIONS, start=1)
    },
    "iemocap": {
        f"Ses01F_impro01_{speaker}{number:03}": (gender, emotion)
        for speaker, gender in (("F", "female"), ("M", "male"))
        for number, emotion in enumerate(IEMOCAP_EMOTIONS.values())
    },
}
"""Gender and emotion by utterance; IEMOCAP's labels are in files, the same for both speakers."""


@pytest.mark.parametrize("reader", DOCUMENTED)
def test_every_gender_and_emotion_is_what_the_release_says(tmp_path: Path, reader: str) -> None:
    expected = DOCUMENTED[reader]
    if reader == "iemocap":
        write_iemocap(tmp_path, dict(zip(expected, 2 * [*IEMOCAP_EMOTIONS], strict=True)))
    else:
        for id in expected:
            (tmp_path / f"{id}.wav").touch()
    found = read_corpus(reader, tmp_path, sorted({emotion for _, emotion in expected.values()}))
    assert {each.id: (each.gender, each.emotion) for each in found.utterances} == expected


# --- Manifest

ROWS = [
    {"path": "a.wav", "speaker": "s1", "gender": "F", "emotion": "sad"},
    {"path": "deep/b.flac", "speaker": "s2", "gender": "Male", "emotion": "happy"},
    {"path": "c.ogg", "speaker": "s2", "gender": "m", "emotion": "bored"},
    {"path": "gone.wav", "speaker": "s1", "gender": "female", "emotion": "sad"},
]


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    write_audio(tmp_path / "a.wav", rate=8_000, channels=2)
    write_audio(tmp_path / "deep" / "b.flac", rate=48_000, n_samples=4_800)
    write_audio(tmp_path / "c.ogg", rate=44_100)
    return tmp_path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_manifest(own: Path, suffix: str) -> None:
    path = write_manifest(own / f"own{suffix}", ROWS)
    found = read_corpus("manifest", path, FOUR)
    assert found.audio_root == own
    assert [(each.id, each.path, each.speaker, each.gender, each.session) for each in found.utterances] == [
        ("a", "a.wav", "s1", "female", "s1"),
        ("deep/b", "deep/b.flac", "s2", "male", "s2"),
    ]
    assert found.excluded == {"c": "label bored is not used", "gone": "label without audio"}


def test_blank_lines_and_categories_of_a_manifest_change_nothing(own: Path) -> None:
    """Editors leave the ones, and pandas writes the others."""
    plain = read_corpus("manifest", write_manifest(own / "own.csv", ROWS), FOUR)
    (own / "own.csv").write_text((own / "own.csv").read_text().replace("\n", "\n\n"))
    assert read_corpus("manifest", own / "own.csv", FOUR) == plain
    table = pa.Table.from_pylist(ROWS)
    categories = [column.dictionary_encode() for column in table.columns]
    pq.write_table(pa.table(categories, names=table.column_names), own / "own.parquet")
    assert read_corpus("manifest", own / "own.parquet", FOUR) == plain


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_manifest_with_ids_and_sessions(own: Path, suffix: str) -> None:
    rows = [{**row, "id": f"u{n}", "session": 1, "note": None} for n, row in enumerate(ROWS)]
    rows[0]["path"] = str(own / "a.wav")
    found = read_corpus("manifest", write_manifest(own / f"own{suffix}", rows), FOUR)
    assert [(each.id, each.session) for each in found.utterances] == [("u0", "1"), ("u1", "1")]
    assert all((found.audio_root / each.path).is_file() for each in found.utterances)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gender": "x"}, r"own\.csv:3: gender 'x'; expected female or male"),
        ({"speaker": " "}, r"own\.csv:3: column speaker is empty"),
        ({"speaker": "s1"}, r"own\.csv:3: speaker s1 is male here and female at .*own\.csv:2"),
        ({"path": "deep"}, r"own\.csv:3: deep is not a regular file"),
        ({"path": "/dev/zero"}, r"own\.csv:3: /dev/zero is outside .*, the manifest's folder"),
        ({"path": "a.wav"}, r"a occurs twice: .*own\.csv:2 and .*own\.csv:3"),
        ({"path": "deep/../a.wav"}, r"a occurs twice: .*own\.csv:2 and .*own\.csv:3"),
    ],
)
def test_manifest_errors_are_located(own: Path, change: dict[str, str], message: str) -> None:
    path = write_manifest(own / "own.csv", [ROWS[0], {**ROWS[1], **change}])
    with pytest.raises(UserError, match=message):
        read_corpus("manifest", path, FOUR)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.csv", b"path,speaker\n", r"column gender, emotion is missing; expected path.*found path, speaker"),
        ("own.csv", b"", r"found none"),
        ("own.csv", b"path,path,speaker,gender,emotion\n", r"column path occurs twice"),
        ("own.csv", b"path,speaker,gender,emotion\na.wav,s1,f\n", r"own\.csv:2: 3 columns, but the header has 4"),
        ("own.csv", b"path,speaker,gender,emotion\n\n\xff,s1,f,sad\n", r"own\.csv:3: not UTF-8"),
        ("own.csv", b'path,speaker,gender,emotion\n"a.wav"x,s1,f,sad\n', r"own\.csv:2: not well-formed CSV"),
        ("own.parquet", b"no", r"not a readable Parquet file"),
        ("own.txt", b"", r"ends in \.csv or \.parquet"),
    ],
)
def test_unreadable_manifests(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        manifest.read(tmp_path / name, FOUR)


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file; expected a manifest"):
        manifest.read(tmp_path, FOUR)


# --- The demo's corpus


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    synthesis(output=root / "index.csv")
    return root


def test_the_demo_is_the_same_bytes_again(demo: Path, tmp_path: Path) -> None:
    first = {path.relative_to(demo): path.read_bytes() for path in demo.rglob("*") if path.is_file()}
    second = {path.relative_to(tmp_path): path.read_bytes() for path in synthesise(tmp_path)}
    index = first.pop(Path("index.csv"))
    assert first == second
    listed = dict(row for row in csv.reader(index.decode().splitlines()[1:]))
    assert listed == {path.as_posix(): hashlib.sha256(data).hexdigest() for path, data in first.items()}


def test_the_demo_has_the_awkward_sides_of_iemocap(demo: Path) -> None:
    found = read_corpus("synthetic", demo, FOUR)
    assert Counter(each.emotion for each in found.utterances) == {"neutral": 70, "happy": 60, "angry": 50, "sad": 40}
    assert len({each.speaker for each in found.utterances}) == 10
    assert {each.text_type for each in found.utterances} == {"improvised", "scripted"}
    assert set(found.excluded.values()) == {
        "label fru is not used",
        "label sur is not used",
        "no majority label (xxx)",
    }
    assert any(demo.rglob("._*"))
    seconds = [soundfile.info(demo / each.path).duration for each in found.utterances]
    assert sum(length > 10 for length in seconds) == 1
    assert 2 <= sum(length < 1 for length in seconds) <= 8
    assert 8 <= sum(seconds) / 60 <= 9


def test_synthesis_replaces_only_what_it_made(demo: Path, tmp_path: Path) -> None:
    stale = demo / "Session1" / "sentences" / "wav" / "stale.wav"
    stale.touch()
    synthesise(demo)
    assert not stale.exists()
    (tmp_path / "Session1").mkdir()
    with pytest.raises(UserError, match="not synthetic"):
        synthesise(tmp_path)


# --- The stage


def run_stage(
    folder: Path, root: Path, reader: str, by: str = "session", **corpus: Any
) -> tuple[pa.Table, dict[str, Any]]:
    groups = [[f"Ses0{n}"] for n in range(1, 6)] if by == "session" else [["s1"], ["s2"]]
    config = CorpusSlice.model_validate(
        {
            "corpus": {"reader": reader, "root": str(root), **corpus},
            "classes": FOUR if by == "session" else ["happy", "sad"],
            "folds": {"by": by, "held_out": groups},
        }
    )
    outputs = {name: folder / f"{name}.parquet" for name in ("utterances", "excluded", "summary")}
    corpus_stage(config=config, root=root, **outputs)
    return UTTERANCES.read(outputs["utterances"])


def test_stage_on_the_demo(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        table, metadata = run_stage(tmp_path, demo, "synthetic")
    assert metadata["complete"] is True
    order = list(zip(table["session"].to_pylist(), table["id"].to_pylist(), strict=True))
    assert order == sorted(order)
    excluded, _ = EXCLUDED.read(tmp_path / "excluded.parquet")
    labelled = [
        line for path in demo.rglob("Ses*.txt") for line in path.read_text().splitlines() if line.startswith("[")
    ]
    assert table.num_rows + excluded.num_rows == len(labelled)
    summary, metadata = CORPUS_SUMMARY.read(tmp_path / "summary.parquet")
    assert sum(summary["utterances"].to_pylist()) == table.num_rows
    assert sum(summary["n_samples"].to_pylist()) == sum(table["n_samples"].to_pylist())
    assert sum(metadata["excluded"].values()) == excluded.num_rows
    assert "220 utterances of 10 speakers" in caplog.text
    assert "20 (label fru is not used)" in caplog.text


@pytest.fixture
def rows(own: Path) -> list[dict[str, Any]]:
    """Of a manifest in `own` with both classes in the training part of both folds."""
    write_audio(own / "d.wav", n_samples=1000)
    write_audio(own / "e.wav", n_samples=1200)
    return [*ROWS, {**ROWS[0], "path": "d.wav", "emotion": "happy"}, {**ROWS[1], "path": "e.wav", "emotion": "sad"}]


def test_stage_excludes_clips_that_cannot_be_used(
    own: Path, rows: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_audio(own / "short.wav", n_samples=399)
    (own / "broken.wav").write_bytes(b"RIFF")
    more = [{**ROWS[0], "path": name} for name in ("short.wav", "broken.wav")]
    with caplog.at_level(logging.INFO):
        table, _ = run_stage(tmp_path, write_manifest(own / "own.csv", rows + more), "manifest", by="speaker")
    assert dict(zip(table["id"].to_pylist(), table["n_samples"].to_pylist(), strict=True)) == {
        "a": 1_600,
        "d": 1_000,
        "deep/b": 1_600,
        "e": 1_200,
    }
    excluded, _ = EXCLUDED.read(tmp_path / "excluded.parquet")
    reasons = dict(zip(excluded["id"].to_pylist(), excluded["reason"].to_pylist(), strict=True))
    assert set(reasons) == {"broken", "c", "gone", "short"}
    assert "shorter" in reasons["short"]
    assert "cannot be decoded" in reasons["broken"]
    assert "1 clips have several channels" in caplog.text


def test_stage_keeps_clipped_clips_and_tells_them(
    own: Path, rows: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, loud = [f"loud{n}" for n in range(4)], np.sign(np.sin(np.arange(800) / 9))
    for name in names:
        soundfile.write(own / f"{name}.wav", loud, 16_000)
    more = [{**ROWS[0], "path": f"{name}.wav"} for name in names]
    with caplog.at_level(NOTICE):
        table, _ = run_stage(tmp_path, write_manifest(own / "own.csv", rows + more), "manifest", by="speaker")
    assert {*names} <= {*table["id"].to_pylist()}
    told = "4 clips are kept of which over 1 % is at full scale: loud0, loud1, loud2, ..."
    assert told in caplog.messages


def test_stage_needs_every_class_in_the_training_part_of_every_fold(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Fold 1 would train on no utterance of sad: all of them are of speaker s1"):
        run_stage(tmp_path, write_manifest(own / "own.csv", ROWS), "manifest", by="speaker")


def test_stage_refuses_a_recording_on_both_sides_of_a_split(
    own: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    samples, rate = soundfile.read(own / "a.wav", dtype="int16")
    soundfile.write(own / "copy.flac", samples, rate)
    manifest = write_manifest(own / "own.csv", [*rows, {**ROWS[1], "path": "copy.flac"}])
    with pytest.raises(UserError, match=r"a \(fold 1\) and copy \(fold 2\) are the same samples"):
        run_stage(tmp_path, manifest, "manifest", by="speaker")
    assert not (tmp_path / "utterances.parquet").exists()


def test_stage_tells_copies_within_a_fold(
    own: Path, rows: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(own / "a.wav", own / "copy.wav")
    manifest = write_manifest(own / "own.csv", [*rows, {**ROWS[0], "path": "copy.wav"}])
    with caplog.at_level(NOTICE):
        table, _ = run_stage(tmp_path, manifest, "manifest", by="speaker")
    assert {"a", "copy"} <= {*table["id"].to_pylist()}
    assert "1 clips are copies of others in their fold, sample by sample: copy of a" in caplog.messages


def test_stage_needs_every_class(own: Path, tmp_path: Path) -> None:
    (own / "deep" / "b.flac").unlink()
    with pytest.raises(UserError, match=r"no usable utterance of happy\. Kept: 1; excluded: 2 \(label without audio\)"):
        run_stage(tmp_path, write_manifest(own / "own.csv", ROWS), "manifest", by="speaker")


def test_stage_refuses_a_partial_iemocap_unless_allowed(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the full release:\nquantity +expected +found\nneutral, Ses01 +384 +14"):
        run_stage(tmp_path, demo, "iemocap")
    assert not any(tmp_path.iterdir())
    _, metadata = run_stage(tmp_path, demo, "iemocap", allow_partial=True)
    assert (metadata["corpus"], metadata["complete"]) == ("IEMOCAP", False)
