"""Files, windows and layouts of `gmp-atl predict`; nothing here needs torch."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmp_atl.errors import UserError
from gmp_atl.recordings import Cut, Recording, Scored, find, windows, write


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    size=st.integers(1, 40),
    hop=st.integers(1, 40),
)
def test_windows_cover_the_recording_from_beginning_to_end_and_are_its_samples(lengths, size, hop):
    hop = min(hop, size)
    recording = np.arange(sum(lengths), dtype=np.float32)
    found = list(windows(np.split(recording, np.cumsum(lengths)[:-1]), Cut(size, hop)))
    for start, samples in found:
        np.testing.assert_array_equal(samples, recording[start : start + size])
        assert len(samples) == min(size, len(recording))
    starts = [start for start, _ in found]
    assert starts == [*range(0, max(1, len(recording) - size), hop), *starts[-1:]][: len(starts)]
    assert starts[-1] == max(0, len(recording) - size)
    assert all(0 < after - before <= hop for before, after in pairwise(starts))


def test_no_more_than_a_window_and_a_piece_is_held():
    held = 0

    def pieces():
        for _ in range(1000):
            yield np.zeros(100, np.float32)

    for _, samples in windows(pieces(), Cut(250, 50)):
        held = max(held, (samples.base if samples.base is not None else samples).size)
    assert held <= 250 + 100 + 50


@pytest.mark.parametrize(
    ("window", "hop", "named"),
    [(0.01, None, "--window"), (float("nan"), None, "--window"), (5.0, 6.0, "--hop"), (5.0, 0.001, "--hop")],
)
def test_windows_without_frames_and_gaps_between_windows_are_refused(window, hop, named):
    with pytest.raises(UserError, match=named):
        Cut.of_seconds(window, hop)


def test_folders_are_searched_for_audio_and_files_are_taken_as_they_are(tmp_path):
    names = ["b.WAV", "a.flac", "deep/er/c.ogg", "deep/d.aif", "notes.txt", "deep/e.raw", "deep/._d.aif"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find([tmp_path / "notes.txt", tmp_path, tmp_path / "a.flac"])
    assert found[0] == tmp_path / "notes.txt"
    assert found[1:] == sorted(tmp_path / name for name in names[:4])


def test_paths_that_are_absent_and_folders_without_audio_are_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="absent does not exist"):
        find([tmp_path / "absent"])
    with pytest.raises(UserError, match=f"{tmp_path.name} holds no audio file .*.flac"):
        find([tmp_path])


def scored(*scores: float) -> Scored:
    return Scored(0.0, 1.0, np.array(scores, np.float32))


RECORDINGS = [
    Recording(Path("short, or so.wav"), [scored(0.9, 0.1)]),
    Recording(Path("long\udcff.wav"), [Scored(0, 2, np.array([0.75, 0.25])), Scored(1.5, 3.5, np.array([0.25, 0.75]))]),
]


def written(layout: str) -> str:
    stream = io.StringIO()
    write(RECORDINGS, ["angry", "sad"], layout, stream)
    return stream.getvalue()


def test_csv_and_json_hold_the_same_rows():
    table = list(csv.DictReader(io.StringIO(written("csv"))))
    rows = json.loads(written("json"))
    assert len(table) == len(rows) == 4
    for of_csv, of_json in zip(table, rows, strict=True):
        scores = of_json.pop("scores")
        assert {**of_json, **{f"score_{name}": score for name, score in scores.items()}} == {
            **of_csv,
            **{name: float(of_csv[name]) for name in ("start", "end", "score_angry", "score_sad")},
        }


def test_the_whole_of_several_windows_is_the_mean_of_their_scores():
    rows = json.loads(written("json"))
    assert [(row["part"], row["start"], row["end"], row["prediction"]) for row in rows] == [
        ("whole", 0.0, 1.0, "angry"),
        ("window", 0.0, 2.0, "angry"),
        ("window", 1.5, 3.5, "sad"),
        ("whole", 0.0, 3.5, "angry"),
    ]
    assert rows[3]["scores"] == {"angry": 0.5, "sad": 0.5}


def test_the_table_has_a_heading_and_columns_below_it():
    heading, *rows = written("table").splitlines()
    assert len(rows) == 4
    for row in rows:
        assert row[heading.index("file") :] in ("short, or so.wav", "long\\udcff.wav")
        assert row[: heading.index("part")].split() == [f"{float(part):.2f}" for part in row.split()[:2]]


@pytest.mark.parametrize("layout", ["table", "csv", "json"])
def test_names_that_are_not_utf_8_can_be_written(layout):
    written(layout).encode()


def test_json_of_nothing_is_an_empty_list():
    stream = io.StringIO()
    write([], ["angry", "sad"], "json", stream)
    assert json.loads(stream.getvalue()) == []
