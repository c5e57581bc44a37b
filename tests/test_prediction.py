"""`gmp-atl predict` gives the scores of `evaluation`, whatever the cut, the batches and the other files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from gmp_atl import audio, classifier, cli
from gmp_atl.formats import PREDICTIONS


def predicted(model: Path, *paths: Path, code: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Rows that the command writes."""
    output = model.parent / "predicted.json"
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = ["predict", str(model), *map(str, paths), "--format", "json", "--output", str(output), *arguments]
    assert cli.main(command) == code
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """Four seconds and a bit at 16 kHz, louder and louder."""
    samples = np.random.default_rng(1).normal(size=65_000) * np.linspace(0.001, 0.3, 65_000)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    return tmp_path / "long.wav"


def test_scores_of_a_clip_are_those_of_evaluation(spoken):
    found = {Path(row["file"]).stem: row for row in predicted(spoken.model, spoken.audio)}
    assert len(found) == 12
    tested = PREDICTIONS.read(spoken.predictions)[0].to_pylist()
    assert len(tested) == 4
    for expected in tested:
        row = found[expected["id"]]
        assert row["part"] == "whole"
        assert row["prediction"] == expected["prediction"]
        assert list(row["scores"]) == ["angry", "sad"]
        assert list(row["scores"].values()) == pytest.approx(expected["scores"], abs=1e-5)


def test_scores_of_a_window_are_those_of_a_file_that_holds_it_alone(spoken, long, tmp_path):
    *windows, whole = predicted(spoken.model, long, window=1.5, hop=0.75)
    assert [row["start"] for row in windows] == [0.0, 0.75, 1.5, 2.25, 2.562]
    assert whole["part"] == "whole"
    assert (whole["start"], whole["end"]) == (0.0, 4.062)
    samples = audio.load(long)
    (tmp_path / "alone").mkdir()
    for number, start in enumerate([0, 12_000, 24_000, 36_000, 65_000 - 24_000]):
        window = samples[start : start + 24_000]
        soundfile.write(tmp_path / "alone" / f"{number}.wav", window, 16_000, subtype="FLOAT")
    for row, alone in zip(windows, predicted(spoken.model, tmp_path / "alone"), strict=True):
        assert list(row["scores"].values()) == pytest.approx(list(alone["scores"].values()), abs=1e-5)
    for name, score in whole["scores"].items():
        assert score == pytest.approx(np.mean([row["scores"][name] for row in windows]), abs=1e-5)


def test_what_is_held_is_bounded_and_changes_no_score(spoken, long, monkeypatch):
    held, scores = [], classifier.scores

    def spy(model, description, clips, compute, device):
        held.append(clips.lengths.sum() * 0.02)
        return scores(model, description, clips, compute, device)

    monkeypatch.setattr(classifier, "scores", spy)
    paths = [spoken.audio, long]
    once = predicted(spoken.model, *paths, window=0.5, hop=0.3)
    assert len(held) == 1
    held.clear()
    often = predicted(spoken.model, *paths, window=0.5, hop=0.3, batch_seconds=0.6)
    assert len(held) > 5
    assert max(held) <= 4 * 0.6 + 0.5
    for one, other in zip(once, often, strict=True):
        assert one == {**other, "scores": pytest.approx(other["scores"], abs=1e-5)}


def test_files_that_cannot_be_scored_are_named_and_the_others_are_scored(spoken, long, tmp_path, caplog):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted(spoken.audio.iterdir())[:2]
    for name, source in (("a.wav", long), ("g" + good[0].suffix, good[0]), ("z" + good[1].suffix, good[1])):
        shutil.copy(source, folder / name)
    (folder / "a.wav").write_bytes(long.read_bytes()[:200_000])
    (folder / "b.wav").write_text("no audio")
    soundfile.write(folder / "c.wav", np.zeros(399), 16_000)
    soundfile.write(folder / "d.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(folder / "e.wav", np.zeros(0), 16_000)
    rows = predicted(spoken.model, folder, code=1, window=1, batch_seconds=0.01)
    assert [Path(row["file"]).stem for row in rows] == ["g", "z"]
    reasons = {"a": "truncated", "b": "cannot be decoded", "c": "shorter than one", "d": "NaN", "e": "no samples"}
    for name, reason in reasons.items():
        assert any(f"{name}.wav: " in line and reason in line for line in caplog.messages), name
    assert "5 of 7 files could not be scored" in caplog.text


def test_the_table_is_printed(spoken, capsys):
    path = min(spoken.audio.iterdir())
    assert cli.main(["predict", str(spoken.model), str(path)]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[-3:] == ["angry", "sad", "file"]
    assert row.endswith(str(path))


def test_other_folders_than_those_of_fine_tuned_models_are_refused(inputs, upstream, tmp_path, capsys, spoken):
    for folder, problem in (
        (tmp_path, "config.json is missing"),
        (inputs.encoder, "head.safetensors is missing"),
        (upstream.multitask.folder, "of another version of gmp-atl .*classes"),
    ):
        assert cli.main(["predict", str(folder), str(spoken.audio)]) == 2
        message = capsys.readouterr().err
        assert f"{folder} is not a fine-tuned model" in message
        assert re.search(problem, message)


def test_a_damaged_head_is_named(spoken, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(spoken.model, folder)
    (folder / "head.safetensors").write_bytes(b"damaged")
    assert cli.main(["predict", str(folder), str(spoken.audio)]) == 2
    assert "head.safetensors is not a readable safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("visible", [False, True])
def test_without_a_usable_gpu_the_advice_is_of_the_command(spoken, monkeypatch, capsys, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if visible:
        monkeypatch.setattr(cli, "take_gpu", lambda **_: None)
    assert cli.main(["predict", str(spoken.model), str(spoken.audio), "--gpus", "1"]) == 2
    message = capsys.readouterr().err
    assert "or leave --gpus out to compute on the CPU." in message
    assert "profile" not in message
