"""Whatever a file holds: it is read as it was meant, or one error names it; nothing else, and nothing in silence.

`FUZZ_EXAMPLES=2000 python -m pytest tests/test_bad_input.py` tries more; how many cases were tried of what, and how
many of them were refused, is told at the end.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corpora import FOUR, ROWS, wav_of, write_audio, write_iemocap, write_manifest
from test_tables import Run, fill

from gmp_atl import audio, cli, config, config_files, model_files
from gmp_atl.corpora import Corpus, read_corpus
from gmp_atl.encoder import from_scratch
from gmp_atl.errors import UserError
from gmp_atl.formats import (
    CORPUS_SUMMARY,
    EXCLUDED,
    FUNCTIONALS,
    LAYER_FEATURES,
    LOCAL_FEATURES,
    PREDICTIONS,
    PSEUDO_LABELS,
    UTTERANCES,
    Format,
    feature_rows,
    read_features,
)
from gmp_atl.stages.archive import archive, restore

T = TypeVar("T")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
TRIED: Counter[tuple[str, str]] = Counter()
"""Cases by target and outcome, for the terminal (conftest.py)."""
ROOT = Path(__file__).parent.parent
often = settings(max_examples=EXAMPLES)


def tried(target: str, call: Callable[[], T], *names: str) -> T | None:
    """What the call returns; None if it refuses, in one message that names one of `names`."""
    try:
        value, message = call(), None
    except UserError as error:
        value, message = None, str(error)
    if message is not None:
        assert any(name in message for name in names), message
        assert len(message) < 20_000
    TRIED[target, "read" if message is None else "refused"] += 1
    return value


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut, flip a bit, overwrite or insert some bytes, at a place that is drawn as a share of the length."""
    place = draw(st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert"]))
    bit, garbage = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))

    def damage(data: bytes) -> bytes:
        n = int(place * len(data))
        if kind == "cut" or not data:
            return data[:n]
        if kind == "flip":
            return data[:n] + bytes([data[n] ^ (1 << bit)]) + data[n + 1 :]
        return data[:n] + garbage + data[n + len(garbage) * (kind == "overwrite") :]

    return damage


# --- Audio


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape)


SUBTYPES = {"wav": ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"], "flac": ["PCM_16", "PCM_24"]}


@pytest.mark.parametrize("suffix", SUBTYPES)
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_every_usual_rate_depth_and_number_of_channels_is_read(tmp_path: Path, suffix: str, rate: int) -> None:
    path = tmp_path / f"clip.{suffix}"
    for subtype in SUBTYPES[suffix]:
        for channels in (1, 2, 6):
            soundfile.write(path, noise(1_200, channels), rate, subtype=subtype)
            info = tried("audio: usual formats", lambda: audio.inspect(path))
            assert info is not None
            assert (info.channels, info.clipped) == (channels, 0)
            assert info.n_samples == -(-1_200 * 16_000 // rate)


@pytest.mark.parametrize(
    ("suffix", "options"), [("wav", {}), ("aiff", {}), ("flac", {}), ("ogg", {}), ("wav", {"endian": "BIG"})]
)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_clip_is_refused(tmp_path: Path, suffix: str, options: dict[str, str], share: float) -> None:
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, noise(60_000), 16_000, **options)
    assert audio.inspect(path).n_samples == 60_000
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert tried("audio: truncated", lambda: audio.inspect(path), str(path)) is None


@pytest.mark.parametrize("kind", ["AU", "W64", "RF64", "CAF", "NIST", "VOC", "IRCAM"])
def test_formats_that_libsndfile_shortens_without_a_word_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(1_000), 16_000, format=kind)
    assert tried("audio: other formats", lambda: audio.inspect(path), f"is {kind}, of which") is None


@often
@given(damage=damages(), suffix=st.sampled_from(["wav", "aiff", "flac", "ogg"]))
def test_damaged_audio_is_finite_or_refused(
    tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes], bytes], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("audio") / f"clip.{suffix}"
    soundfile.write(path, noise(3_000), 16_000)
    path.write_bytes(damage(path.read_bytes()))
    info = tried("audio: damaged", lambda: audio.inspect(path), str(path))
    if info is not None and soundfile.info(path).samplerate == audio.SAMPLE_RATE:
        samples = audio.load(path)
        assert len(samples) == info.n_samples
        assert np.isfinite(samples).all()


INTEGERS = st.sampled_from([0, 1, 2, 6, 16, 255, 1024, 65_535])
LENGTHS = st.sampled_from([0, 1, 44, 4_000, 4_001, 2**31 - 1, 2**31, 0x7FFFEFFF, 0x7FFFF000, 2**32 - 1])


@often
@given(
    tag=st.sampled_from([0, 1, 3, 6, 7, 17, 0xFFFE, 0xFFFF]),
    channels=INTEGERS,
    rate=st.sampled_from([0, 1, 100, 3_999, 8_000, 16_000, 44_101, 192_000, 2**31 - 1, 2**32 - 1]),
    align=INTEGERS,
    bits=st.sampled_from([0, 1, 8, 12, 16, 24, 32, 64, 65_535]),
    riff=LENGTHS,
    size=LENGTHS,
)
def test_no_header_makes_the_reader_allocate_what_it_claims(
    tmp_path_factory: pytest.TempPathFactory,
    tag: int,
    channels: int,
    rate: int,
    align: int,
    bits: int,
    riff: int,
    size: int,
) -> None:
    path = tmp_path_factory.mktemp("header") / "clip.wav"
    form = struct.pack("<HHIIHH", tag, channels, rate, (rate * align) % 2**32, align, bits)
    samples = (noise(2_000) * 32_767).astype("<i2").tobytes()
    path.write_bytes(
        struct.pack("<4sI4s4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16)
        + form
        + struct.pack("<4sI", b"data", size)
        + samples
    )
    tracemalloc.start()
    info = tried("audio: headers", lambda: audio.inspect(path), str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26
    assert info is None or info.n_samples <= 4 * 8 * len(samples)


def test_a_clip_of_a_thousand_channels_that_claims_gigabytes_takes_few_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(4, 1_024), 16_000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    start = data.index(b"data") + 4
    data[start : start + 4] = struct.pack("<I", 0x7FFFFFFF)  # as of a program that wrote to a pipe
    path.write_bytes(data)
    tracemalloc.start()
    tried("audio: headers", lambda: audio.inspect(path), str(path))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_a_small_file_that_decodes_to_hours_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "bomb.flac"
    monkeypatch.setattr(audio, "MAX_SECONDS", 1)
    soundfile.write(path, np.r_[np.zeros(16_001), 0.1], 16_000)
    assert tried("audio: headers", lambda: audio.inspect(path), "longer than 1 s") is None


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_silence_is_refused(tmp_path: Path, value: float) -> None:
    soundfile.write(tmp_path / "clip.wav", np.full(1_000, value), 16_000)
    assert tried("audio: silence", lambda: audio.inspect(tmp_path / "clip.wav"), "holds no sound") is None


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_clipping_is_measured(tmp_path: Path, subtype: str) -> None:
    tone = 2 * np.sin(np.arange(16_000) / 10)
    soundfile.write(tmp_path / "clip.wav", tone, 16_000, subtype=subtype)
    info = tried("audio: clipping", lambda: audio.inspect(tmp_path / "clip.wav"))
    assert info is not None
    assert info.clipped == pytest.approx(2 / 3, abs=0.01)


def places(folder: Path) -> dict[str, Path]:
    """Everything that is no regular file, under a name that a reader might open."""
    made = {kind: folder / f"{kind}.wav" for kind in ("pipe", "loop", "broken", "folder", "device")}
    os.mkfifo(made["pipe"])
    made["loop"].symlink_to(made["loop"])
    made["broken"].symlink_to(folder / "nowhere")
    made["folder"].mkdir()
    made["device"].symlink_to("/dev/zero")
    return {**made, "long name": folder / ("x" * 5_000), "nul": Path("a\0b.wav")}


@pytest.mark.parametrize("kind", ["pipe", "loop", "broken", "folder", "device", "long name", "nul"])
def test_what_is_no_regular_file_is_refused_everywhere(tmp_path: Path, kind: str) -> None:
    path = places(tmp_path)[kind]
    calls: list[Callable[[], Any]] = [lambda: audio.inspect(path), lambda: UTTERANCES.open(path)]
    calls.append(lambda: config_files.check(path))
    if kind not in ("long name", "nul"):
        calls.append(lambda: restore(path, tmp_path / "restored"))
        calls.append(lambda: model_files.load_tensors(path))
    for call in calls:
        assert tried("no regular file", call, path.name) is None


# --- Readers of corpora


def accounted(corpus: Corpus, stems: set[str]) -> None:
    assert {*(each.id for each in corpus.utterances), *corpus.excluded} >= stems


LINES = st.sampled_from(
    [
        b"[1.0 - 2.0]\tSes01F_impro01_F000\tneu\t[1, 1, 1]",
        b"[1.0 - 2.0]\tSes01F_impro01_F001\tang\t[1, 1, 1]",
        b"[1.0 - 2.0]\tSes01F_impro01_F000\tneu\t[1, 1",
        b"[1.0 - 2.0] Ses01F_impro01_F000",
        b"% header",
        b"C-E1:\tNeutral;\t()",
        b"\xff\xfe[",
        "[1.0 - 2.0]\tSes01F_impro01_F000\tWut-ärger\t[1]".encode("latin-1"),
        b"",
        b"\0",
    ]
)


@often
@given(lines=st.lists(LINES, max_size=5), end=st.sampled_from([b"\n", b"\r\n", b"\r"]), mark=st.booleans())
def test_label_files_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, mark: bool
) -> None:
    root = write_iemocap(tmp_path_factory.mktemp("labels"), {"Ses01F_impro01_F000": "neu"})
    path = root / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + end.join(lines))
    found = tried("reader: label files", lambda: read_corpus("iemocap", root, FOUR), str(path))
    if found is not None:
        accounted(found, {"Ses01F_impro01_F000"})


NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20),
    st.from_regex(r"(03|08|99)[ab]01[FNTW][abc]", fullmatch=True),
    st.from_regex(r"0[123]-01-0[1-8]-01-01-01-(01|24|25)", fullmatch=True),
    st.from_regex(r"Ses0[16][FM]_impro01_[FMX]00\d", fullmatch=True),
)


@often
@given(reader=st.sampled_from(["emodb", "ravdess", "iemocap"]), names=st.lists(NAMES, max_size=4, unique=True))
def test_files_of_any_name(tmp_path_factory: pytest.TempPathFactory, reader: str, names: list[str]) -> None:
    root = write_iemocap(tmp_path_factory.mktemp("names"), {})
    folder = root / "Session1" / "sentences" / "wav" / "dialog"
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.wav").touch()
    found = tried("reader: file names", lambda: read_corpus(reader, root, FOUR), str(root))
    if found is not None:
        accounted(found, {name for name in names if not name.startswith(".")})


@pytest.mark.parametrize("reader", ["emodb", "ravdess", "iemocap"])
def test_a_name_that_is_not_utf_8_is_an_error(tmp_path: Path, reader: str) -> None:
    root = write_iemocap(tmp_path, {})
    folder = root / "Session1" / "sentences" / "wav"
    folder.mkdir(parents=True)
    Path(os.fsdecode(bytes(folder) + b"/\xff.wav")).touch()
    assert tried("reader: file names", lambda: read_corpus(reader, root, FOUR), str(root)) is None


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path / "release", {"Ses01F_impro01_F000": "neu"})
    elsewhere = tmp_path / "elsewhere"
    (root / "Session1" / "sentences").rename(elsewhere)
    (root / "Session1" / "sentences").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(elsewhere)
    (elsewhere / "wav" / "loop").symlink_to(elsewhere / "wav")
    (elsewhere / "wav" / "self").symlink_to(elsewhere / "wav" / "self")
    found = tried("reader: links", lambda: read_corpus("iemocap", root, FOUR))
    assert found is not None
    assert [each.id for each in found.utterances] == ["Ses01F_impro01_F000"]
    assert found.excluded == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path, {"Ses01F_impro01_F000": "neu"})
    folder = wav_of(root, "Ses01F_impro01_F000").parent
    folder.chmod(0)
    try:
        assert tried("reader: links", lambda: read_corpus("iemocap", root, FOUR), str(folder)) is None
    finally:
        folder.chmod(0o755)


def test_a_label_file_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    root = write_iemocap(tmp_path, {"Ses01F_impro01_F000": "neu"})
    path = root / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro02.txt"
    os.mkfifo(path)
    assert tried("reader: label files", lambda: read_corpus("iemocap", root, FOUR), str(path)) is None


# --- Manifests


CELLS = st.one_of(
    st.sampled_from(
        ["a.wav", "gone.wav", "s1", "f", "male", "sad", "happy", "..", ".", "/", "", "a.wav/", "./a.wav", "x" * 300]
    ),
    st.text(st.characters(codec="utf-8"), max_size=8),
)


@often
@given(
    changes=st.lists(st.dictionaries(st.sampled_from(sorted(ROWS[0])), CELLS, max_size=1), min_size=1, max_size=3),
    suffix=st.sampled_from([".csv", ".parquet"]),
)
def test_manifests_of_any_cells(
    tmp_path_factory: pytest.TempPathFactory, changes: list[dict[str, str]], suffix: str
) -> None:
    """Each row is as it should be, but for one cell at most."""
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "a.wav").touch()
    rows = [{**ROWS[0], "id": f"u{n}", **change} for n, change in enumerate(changes)]
    path = write_manifest(folder / f"own{suffix}", rows)
    found = tried("manifest: cells", lambda: read_corpus("manifest", path, FOUR), str(path))
    if found is not None:
        assert {*(each.id for each in found.utterances), *found.excluded} == {row["id"] for row in rows}
        assert all(folder in (found.audio_root / each.path).resolve().parents for each in found.utterances)


@often
@given(damage=damages(), suffix=st.sampled_from([".csv", ".parquet"]))
def test_damaged_manifests(
    tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes], bytes], suffix: str
) -> None:
    path = write_manifest(tmp_path_factory.mktemp("manifest") / f"own{suffix}", ROWS)
    path.write_bytes(damage(path.read_bytes()))
    tried("manifest: damaged", lambda: read_corpus("manifest", path, FOUR), str(path))


@pytest.mark.parametrize("path", ["../a.wav", "deep/../../a.wav", "/etc/passwd", "/dev/zero", "..", "/"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_may_not_point_outside_its_folder(tmp_path: Path, path: str, suffix: str) -> None:
    manifest = write_manifest(tmp_path / f"own{suffix}", [{**ROWS[0], "path": path}])
    assert tried("manifest: outside", lambda: read_corpus("manifest", manifest, FOUR), f"{path} is outside") is None


def test_a_link_beside_the_manifest_may_lead_anywhere(tmp_path: Path) -> None:
    write_audio(tmp_path / "elsewhere" / "a.wav")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "audio").symlink_to(tmp_path / "elsewhere")
    path = write_manifest(tmp_path / "own" / "own.csv", [{**ROWS[0], "path": "audio/a.wav"}])
    found = tried("manifest: outside", lambda: read_corpus("manifest", path, FOUR))
    assert found is not None
    assert len(found.utterances) == 1


@pytest.mark.parametrize("column", [pa.array([b"a.wav"]), pa.array([["a.wav"]]), pa.array([1.5]), pa.array([{"a": 1}])])
def test_a_manifest_column_that_is_no_text_is_named(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"path": column, "speaker": ["s"], "gender": ["f"], "emotion": ["sad"]})
    pq.write_table(table, tmp_path / "own.parquet")
    assert (
        tried(
            "manifest: types", lambda: read_corpus("manifest", tmp_path / "own.parquet", FOUR), "column path is of type"
        )
        is None
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16"])
def test_manifests_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    write_audio(tmp_path / "ä.wav")
    text = "path,speaker,gender,emotion\r\nä.wav,s1,f,sad\r\n"
    (tmp_path / "own.csv").write_bytes(text.encode(encoding))
    found = tried("manifest: encodings", lambda: read_corpus("manifest", tmp_path / "own.csv", FOUR), "own.csv:")
    assert (found is not None and len(found.utterances) == 1) == (encoding == "utf-8-sig")


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_of_a_million_rows(tmp_path: Path, suffix: str) -> None:
    write_audio(tmp_path / "a.wav")
    columns = {
        "id": [f"u{n}" for n in range(10**6)],
        "path": ["a.wav", "gone.wav"] * (10**6 // 2),
        "speaker": [f"s{n % 1000}" for n in range(10**6)],
        "gender": ["f"] * 10**6,
        "emotion": ["sad"] * 10**6,
    }
    path = tmp_path / f"own{suffix}"
    pq.write_table(pa.table(columns), path) if suffix == ".parquet" else pyarrow.csv.write_csv(pa.table(columns), path)
    found = tried("manifest: a million rows", lambda: read_corpus("manifest", path, FOUR))
    assert found is not None
    assert len(found.utterances) == len(found.excluded) == 10**6 // 2


# --- Config


PAPER = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63), 10**400, float("inf"), float("-inf"), float("nan"), "", "x" * 10_000]),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.recursive(st.none(), lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8),
)


def sections(settings: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every mapping of a config with each of its keys."""
    found = [(settings, key) for key in settings]
    for value in settings.values():
        found += sections(value) if isinstance(value, dict) else []
    return found


@often
@given(place=st.integers(0, 10**6), value=VALUES, key=st.one_of(st.none(), st.text(max_size=6), st.integers()))
def test_settings_of_any_type(place: int, value: Any, key: Any) -> None:
    """One value is replaced, or set beside the others under a name that does not exist."""
    changed = json.loads(json.dumps(PAPER))
    everywhere = sections(changed)
    section, name = everywhere[place % len(everywhere)]
    section[name if key is None else key] = value
    found = tried("config: values", lambda: config.parse(changed), str(name if key is None else key), "config", "root")
    assert found is None or json.loads(json.dumps(config.slice_for(found, "tables"), allow_nan=False))


@often
@given(damage=damages())
def test_damaged_config_files(tmp_path_factory: pytest.TempPathFactory, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_bytes(damage((ROOT / "config.yaml").read_bytes()))

    def read() -> config.Config:
        config_files.check(path)
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise UserError(f"{path}: Snakemake refuses this itself.")
        return config.parse(found)

    tried("config: damaged files", read, str(path), "The config is not valid")


def bomb(kind: str) -> str:
    start, end = ("[", "]") if kind == "lists" else ("{", "}")
    names = "abcdefghi"
    lines = [f"a: &a {start}{'x' if kind == 'lists' else 'x: 1'}{end}"]
    for before, name in itertools.pairwise(names):
        items = [f"*{before}"] * 9 if kind == "lists" else [f"k{n}: *{before}" for n in range(9)]
        lines.append(f"{name}: &{name} {start}{', '.join(items)}{end}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nseeds: [1]\nname: b\n", r"config.yaml:3: name was given in line 1 already"),
        ("folds:\n  by: session\n  by: speaker\n", r"config.yaml:3: by was given in line 2 already"),
        ("mask: {length: 10, length: 5}\n", r"config.yaml:1: length was given in line 1 already"),
        (bomb("lists"), r"config.yaml:\d: stands for over 10000 values"),
        (bomb("mappings"), r"config.yaml:\d: stands for over 10000 values"),
        ("a: &a [*a]\n", r"config.yaml:1: stands for over"),
        ("a: !!python/object/apply:os.system [ls]\n", r"config.yaml:1: python/object/apply:os.system is no type"),
        ("a: !!binary aGVsbG8=\n", r"config.yaml:1: binary is no type"),
        ("when: 2024-01-01\n", r"config.yaml:1: timestamp is no type"),
        ("__use_yte__: true\na: ?1 + 1\n", r"config.yaml:1: __use_yte__ would run"),
        ("? [a, b]\n: c\n", r"config.yaml:1: a list or mapping as a key"),
        ("a: b: c\n", r"config.yaml:1: not YAML"),
        ("a: [\n", r"config.yaml:2: not YAML"),
        ("a: *unknown\n", r"config.yaml:1: not YAML"),
        ("a: 1\n---\nb: 2\n", r"config.yaml:2: not YAML"),
        ("[" * 5_000, r"config.yaml: nested too deeply"),
        ("a: \x01\n", r"config.yaml: not YAML"),
    ],
)
def test_config_files_that_snakemake_would_take_without_a_word(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    TRIED["config: hostile files", "refused"] += 1
    with pytest.raises(UserError, match=words):
        config_files.check(path)


@pytest.mark.parametrize(
    "path", [ROOT / "config.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda path: path.name
)
def test_our_own_config_files_are_plain(path: Path) -> None:
    tried("config: own files", lambda: config_files.check(path))


# --- Parquet


HEADERS: dict[str, Any] = {
    "corpus": "c",
    "complete": True,
    "audio": "a",
    "classes": ["x", "y"],
    "excluded": {"why": 1},
    "dimensions": 4,
    "encoder": "e",
    "layer": -3,
    "fitted_on": ["u0"],
    "size": 4,
    "features": "f",
    "model": "m",
    "variant": "main",
    "loss": "ams",
    "fold": 1,
    "seed": 0,
    "selection": "last",
    "fit_on": "training",
}
KINDS = [UTTERANCES, EXCLUDED, CORPUS_SUMMARY, LOCAL_FEATURES, LAYER_FEATURES, PSEUDO_LABELS, PREDICTIONS, FUNCTIONALS]


def sample(kind: Format, path: Path) -> Path:
    """A small file of a format, in two row groups."""
    made = {pa.string(): "u{}", pa.int64(): 5, pa.int32(): 2, pa.float64(): 0.5, pa.binary(): b"\0\x3c" * 8}
    rows = [{f.name: [1, 2] if pa.types.is_list(f.type) else made[f.type] for f in kind.schema} for _ in range(4)]
    for n, row in enumerate(rows):
        row.update({name: value.format(n) for name, value in row.items() if isinstance(value, str)})
    with kind.writer(path, **{name: HEADERS[name] for name in kind.metadata}) as append:
        for part in (rows[:2], rows[2:]):
            append(pa.RecordBatch.from_pylist(part, schema=kind.schema))
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    return {kind.name: sample(kind, folder / f"{kind.name}.parquet").read_bytes() for kind in KINDS}


@settings(max_examples=4 * EXAMPLES)
@given(kind=st.sampled_from(KINDS), damage=damages())
def test_a_damaged_parquet_file_is_refused_or_reads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, bytes], kind: Format, damage: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    whole, path = folder / "whole.parquet", folder / "damaged.parquet"
    whole.write_bytes(samples[kind.name])
    path.write_bytes(damage(samples[kind.name]))
    expected = kind.read(whole)
    found = tried("Parquet: damaged", lambda: kind.read(path), str(path))
    if found is not None:
        assert found[0].equals(expected[0])
        assert found[1] == expected[1]
    if kind in (LOCAL_FEATURES, LAYER_FEATURES):
        ids = expected[0]["id"].to_pylist()
        clips = tried("Parquet: damaged", lambda: read_features(kind, path, ids), str(path))
        assert clips is None or all(clip.shape == (2, 4) and (clip == 1).all() for clip in clips[0].values())


def test_every_flipped_bit_of_a_row_group_is_noticed_or_changes_nothing(
    tmp_path: Path, samples: dict[str, bytes]
) -> None:
    """Headers of pages are not covered by Parquet's own checksums."""
    whole, path = samples["predictions"], tmp_path / "damaged.parquet"
    path.write_bytes(whole)
    expected, _ = PREDICTIONS.read(path)
    second = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    for bit in range(8 * 4, 8 * second):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = tried("Parquet: one bit", lambda: PREDICTIONS.read(path), str(path))
        assert found is None or found[0].equals(expected), f"bit {bit}"


def test_pages_that_have_changed_places_are_noticed(tmp_path: Path, samples: dict[str, bytes]) -> None:
    """Each of them has a right checksum."""
    path = tmp_path / "damaged.parquet"
    path.write_bytes(samples["predictions"])
    file = pq.ParquetFile(path)
    chunks = [file.metadata.row_group(group).column(0) for group in range(2)]
    places = [slice(c.dictionary_page_offset, c.dictionary_page_offset + c.total_compressed_size) for c in chunks]
    damaged = bytearray(samples["predictions"])
    damaged[places[0]], damaged[places[1]] = damaged[places[1]], damaged[places[0]]
    path.write_bytes(damaged)
    assert pq.read_table(path, page_checksum_verification=True)["id"].to_pylist() == ["u2", "u3", "u0", "u1"]
    assert tried("Parquet: pages changed places", lambda: PREDICTIONS.read(path), str(path)) is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("other", KINDS, ids=lambda kind: kind.name)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, samples: dict[str, bytes], kind: Format, other: Format
) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(samples[other.name])
    assert (tried("Parquet: another kind", lambda: kind.read(path), str(path)) is not None) == (kind is other)


def rewritten(
    samples: dict[str, bytes], kind: Format, path: Path, change: Callable[[dict[bytes, bytes]], None]
) -> Path:
    """The rows of a sample under other key-value metadata."""
    file = pq.ParquetFile(pa.BufferReader(samples[kind.name]))
    metadata = {k: v for k, v in file.metadata.metadata.items() if k != b"ARROW:schema"}
    change(metadata)
    with pq.ParquetWriter(path, kind.schema) as out:
        for group in range(file.num_row_groups):
            out.write_table(file.read_row_group(group).replace_schema_metadata().cast(kind.schema))
        out.add_key_value_metadata(metadata)
    return path


@often
@given(kind=st.sampled_from([kind for kind in KINDS if kind.metadata]), data=st.data())
def test_metadata_of_any_type_under_a_right_digest(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, bytes], kind: Format, data: st.DataObject
) -> None:
    import hashlib

    key = data.draw(st.sampled_from([*kind.metadata, "version", "groups", "format"]))
    value = data.draw(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers()), st.just({"a": {}}))
    )

    def change(metadata: dict[bytes, bytes]) -> None:
        header = json.loads(metadata[b"gmp_atl"])
        header[key] = value
        metadata[b"gmp_atl"] = json.dumps(header).encode()
        metadata[b"gmp_atl_sha256"] = hashlib.sha256(metadata[b"gmp_atl"]).hexdigest().encode()

    path = rewritten(samples, kind, tmp_path_factory.mktemp("metadata") / "file.parquet", change)
    found = tried("Parquet: metadata", lambda: kind.read(path), str(path))
    assert found is None or isinstance(value, type(HEADERS.get(key, 1))) or (key in ("layer", "loss") and value is None)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format": []}'])
def test_metadata_that_are_no_object(tmp_path: Path, samples: dict[str, bytes], text: bytes) -> None:
    path = rewritten(
        samples, UTTERANCES, tmp_path / "file.parquet", lambda metadata: metadata.update({b"gmp_atl": text})
    )
    assert tried("Parquet: metadata", lambda: UTTERANCES.read(path), str(path)) is None


def test_labels_that_have_moved_to_another_clip_are_noticed(tmp_path: Path) -> None:
    """They are as many as they were, and in the same order."""
    parted = {"whole": [[1, 2], [3]], "moved": [[1], [2, 3]]}
    for name, labels in parted.items():
        table = pa.table({"id": ["u0", "u1"], "labels": labels}, schema=PSEUDO_LABELS.schema)
        PSEUDO_LABELS.write(tmp_path / name, table, **{key: HEADERS[key] for key in PSEUDO_LABELS.metadata})
    header = pq.ParquetFile(tmp_path / "whole").metadata.metadata
    path = rewritten(
        {PSEUDO_LABELS.name: (tmp_path / "moved").read_bytes()},
        PSEUDO_LABELS,
        tmp_path / "labels.parquet",
        lambda metadata: metadata.update({key: header[key] for key in metadata}),
    )
    told = f"{path} is damaged: its column labels has changed"
    assert tried("Parquet: values moved", lambda: PSEUDO_LABELS.read(path), told) is None


@pytest.mark.parametrize("frames", [b"", b"\0", b"\0" * 14, b"\0" * 18, b"\0" * 32])
def test_frames_that_are_not_as_many_as_declared_are_refused(tmp_path: Path, frames: bytes) -> None:
    path = tmp_path / "features.parquet"
    with LOCAL_FEATURES.writer(path, dimensions=4, encoder="e") as append:
        append(
            pa.RecordBatch.from_pydict({"id": ["u"], "n_frames": [2], "frames": [frames]}, schema=LOCAL_FEATURES.schema)
        )
    assert tried("Parquet: frames", lambda: read_features(LOCAL_FEATURES, path, ["u"]), str(path)) is None


def test_a_flipped_bit_in_the_frames_does_not_pass(tmp_path: Path) -> None:
    """As many frames as a row group has, so that nearly every bit is one of the data's."""
    path = tmp_path / "features.parquet"
    with LOCAL_FEATURES.writer(path, dimensions=512, encoder="e") as append:
        append(feature_rows(["u"], [noise(2_000, 512).astype(np.float16)]))
    data = path.read_bytes()
    for place in range(1_000, len(data), len(data) // 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        found = tried("Parquet: frames", lambda: read_features(LOCAL_FEATURES, path, ["u"]), str(path))
        assert found is None or place > len(data) - 3_000


# --- Safetensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    scratch = config.ScratchEncoderConfig(layers=1, hidden_size=16, heads=2, feed_forward=16, conv_channels=4)
    model_files.save(from_scratch(scratch), folder, encoder="made", fitted_on=["u0", "u1"])
    return folder


@settings(max_examples=2 * EXAMPLES)
@given(damage=damages(), name=st.sampled_from(["model.safetensors", "config.json"]))
def test_a_damaged_encoder_is_refused_or_reads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, weights: Path, damage: Callable[[bytes], bytes], name: str
) -> None:
    folder = tmp_path_factory.mktemp("encoder")
    for each in weights.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    found = tried("safetensors: damaged", lambda: model_files.load_fitted(folder), str(folder))
    if found is not None and name == "model.safetensors":
        expected, metadata = model_files.load_fitted(weights)
        assert found[1] == metadata
        assert all(bool((a == b).all()) for a, b in zip(found[0].parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("value", [None, "x", -1, 0, 1.5, 10**12, [], {}])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "conv_dim", "layer_norm_eps"]
)
def test_an_architecture_of_any_type(tmp_path: Path, weights: Path, key: str, value: Any) -> None:
    settings = json.loads((weights / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
    assert tried("safetensors: config.json", lambda: model_files.load_architecture(tmp_path), "config.json") is None


# --- Archives


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(tmp_path_factory.mktemp("run"))
    fill(run)
    path = tmp_path_factory.mktemp("packed") / "made.zip"
    archive(config=run.config, evaluations=run.evaluations, tables=[], figures=[], output=path)
    return path


@often
@given(damage=damages())
def test_a_damaged_archive_is_refused_or_restores_what_was_packed(
    tmp_path_factory: pytest.TempPathFactory, packed: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    path = folder / "damaged.zip"
    path.write_bytes(damage(packed.read_bytes()))
    if tried("archive: damaged", lambda: restore(path, folder / "restored"), str(path)) is None:
        assert not (folder / "restored").exists()
        return
    with zipfile.ZipFile(packed) as file:
        for name in file.namelist():
            target = folder / "restored" / ("evaluations/" * (name != "manifest.json") + name)
            assert name == "manifest.json" or target.read_bytes() == file.read(name)


# --- Through the command line


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that a user's mistake ends."""
    TRIED["command line", "refused"] += 1
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


CORPUS = {
    "corpus": {"reader": "manifest"},
    "classes": ["happy", "sad"],
    "folds": {"by": "speaker", "held_out": [["s1"], ["s2"]]},
}


def corpus_arguments(folder: Path, root: Path, settings: str | None = None) -> list[str]:
    outputs = [f"--{name}={folder / name}.parquet" for name in ("utterances", "excluded", "summary")]
    return ["corpus", "--config", settings or json.dumps(CORPUS), "--root", str(root), *outputs]


@pytest.mark.parametrize("settings", ["{", "[]", "null", '{"corpus": 1}', "[" * 100_000])
def test_a_config_that_is_none_ends_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str
) -> None:
    assert "--config is not a CorpusSlice" in refused(capsys, *corpus_arguments(tmp_path, tmp_path, settings))


def test_every_bad_clip_is_listed_with_its_reason(tmp_path: Path) -> None:
    """One of each kind in one corpus, through the command line."""
    for number, name in enumerate(["good", "other", "third", "fourth"]):
        write_audio(tmp_path / f"{name}.wav", n_samples=800 + number)
    bad = {"zero": b"", "cut": (tmp_path / "good.wav").read_bytes()[:500], "text": b"hello", "riff": b"RIFF"}
    for name, data in bad.items():
        (tmp_path / f"{name}.wav").write_bytes(data)
    soundfile.write(tmp_path / "nan.wav", np.r_[noise(500), np.nan], 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "silence.wav", np.zeros(1_000), 16_000)
    soundfile.write(tmp_path / "rate.wav", noise(1_000), 44_101)
    names = ["good", "zero", "cut", "text", "riff", "nan", "silence", "rate", "gone", "x" * 300]
    rows = [{**ROWS[0], "path": f"{name}.wav"} for name in names] + [{**ROWS[1], "path": "other.wav"}]
    rows += [{**ROWS[0], "path": "third.wav", "emotion": "happy"}, {**ROWS[1], "path": "fourth.wav", "emotion": "sad"}]
    path = write_manifest(tmp_path / "own.csv", rows)
    assert cli.main(corpus_arguments(tmp_path, path)) == 0
    kept = UTTERANCES.read(tmp_path / "utterances.parquet")[0]["id"].to_pylist()
    excluded = dict(zip(*EXCLUDED.read(tmp_path / "excluded.parquet")[0].to_pydict().values(), strict=True))
    assert sorted([*kept, *excluded]) == sorted([*names, "other", "third", "fourth"])
    assert sorted(kept) == ["fourth", "good", "other", "third"]
    assert all(excluded.values())
    TRIED["command line", "excluded"] += len(excluded)


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_a_manifest_that_is_none_ends_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\0")
    assert name in refused(capsys, *corpus_arguments(tmp_path, tmp_path / name))


@pytest.mark.parametrize("data", [None, b"", b"PK", b"PAR1PAR1"])
def test_damaged_evaluations_end_tables_show_and_restore(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes | None
) -> None:
    run = Run(tmp_path)
    settings = run.config.model_dump_json()
    target = run.evaluations / "corpus.parquet"
    target.unlink() if data is None else target.write_bytes(data)
    arguments = ["--config", settings, "--evaluations", str(run.evaluations), "--output", str(run.output)]
    assert "corpus.parquet" in refused(capsys, "tables", *arguments)
    assert str(target) in refused(capsys, "restore", str(target), "--output", str(tmp_path / "restored"))
    assert "holds no tables" in refused(capsys, "show", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000, "\xff", '{"stage": 1}'])
def test_a_record_that_is_none_ends_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    run = Run(tmp_path)
    (run.evaluations / "provenance").mkdir()
    (run.evaluations / "provenance" / "job.json").write_bytes(text.encode("latin-1"))
    arguments = ["--evaluations", str(run.evaluations), "--output", str(run.output)]
    assert "job.json" in refused(capsys, "tables", "--config", run.config.model_dump_json(), *arguments)
