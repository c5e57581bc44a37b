"""`gmp-atl doctor` finds what a run would miss, and says how to get it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import yaml
from conftest import SETTINGS

from gmp_atl import cli, doctor
from gmp_atl import config as configs
from gmp_atl.config import PACKAGED_ENCODER
from gmp_atl.doctor import Finding, State

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch is told to find, instead of asking it."""
    told = [""]
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout=told[0] + "\n")
    )
    return told


def found(subject: str, tmp_path: Path, **changes: object) -> Finding:
    """What is said of one thing, under the tests' config with other sections."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}), encoding="utf-8")
    [finding] = [each for each in doctor.findings([path], []) if each.subject == subject]
    return finding


def test_the_environment_of_the_tests_is_the_pinned_one(tmp_path):
    assert found("Python", tmp_path).state is State.OK
    assert found("packages", tmp_path).state is State.OK


def test_other_versions_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: ["numpy==0.1", "no-such-package==2"])
    finding = found("packages", tmp_path)
    assert finding.state is State.MISSING
    assert f"numpy 0.1 (found {np.__version__}), no-such-package 2 (not installed)" in finding.text
    assert finding.remedy == "make setup"


def test_another_python_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.version_info", (3, 13, 0))
    assert found("Python", tmp_path).state is State.MISSING


@pytest.mark.parametrize(
    ("told", "driver", "state", "text"),
    [
        ("Some GPU (80 GiB)", True, State.OK, "Some GPU (80 GiB)"),
        ("Old GPU (16 GiB, too old)", True, State.MISSING, "Old GPU (16 GiB, too old)"),
        ("", False, State.NOTE, "none"),
        ("", True, State.MISSING, "nvidia-smi is here, but torch finds no usable device"),
    ],
)
def test_gpus(tmp_path, monkeypatch, devices, told, driver, state, text):
    devices[0] = told
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if driver else None)
    finding = found("GPU", tmp_path)
    assert (finding.state, finding.text) == (state, text)


TOLD = "Traceback:\n  somewhere\nModuleNotFoundError: No module named 'torch'\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (subprocess.CalledProcessError(1, [], stderr=TOLD), "there are: ModuleNotFoundError: No module named 'torch'"),
        (subprocess.CalledProcessError(-9, [], stderr=""), "there are: it was killed"),
        (subprocess.TimeoutExpired([], 300), "there are within 300 s"),
    ],
    ids=["not installed", "killed", "hangs"],
)
def test_a_torch_that_tells_nothing(tmp_path, monkeypatch, error, text):
    def failing(command, **_):
        raise error

    monkeypatch.setattr(subprocess, "run", failing)
    finding = found("GPU", tmp_path)
    assert (finding.state, finding.text) == (State.MISSING, f"torch does not tell which {text}")


def test_a_package_that_is_not_installed(tmp_path, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert found("packages", tmp_path) == Finding(
        "packages", State.MISSING, "gmp-atl is not installed for this Python", "make setup"
    )


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    finding = found("disk", tmp_path)
    assert (finding.state, finding.text) == (State.MISSING, f"{tmp_path} may not be written to")


def test_changes_on_the_command_line_come_after_the_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    changes = [f"corpus={{reader: emodb, root: {tmp_path}/emodb}}", "name=changed"]
    cli.main(["doctor", "--config", *changes])
    told = capsys.readouterr().out
    assert "config    config.yaml: changed" in told
    assert f"{tmp_path}/emodb does not exist" in told
    cli.main(["doctor", "--config", "changed"])
    assert re.search("missing +config +--config changed: ", capsys.readouterr().out)


@pytest.mark.parametrize("text", ["- a", "text", "3"])
def test_config_files_without_keys_are_refused(tmp_path, capsys, text):
    (tmp_path / "list.yaml").write_text(text)
    assert cli.main(["doctor", "--configfile", str(tmp_path / "list.yaml")]) == 1
    assert f"{tmp_path}/list.yaml: a list, or a single value; expected keys and values" in capsys.readouterr().out


def test_a_corpus_that_is_not_there(tmp_path):
    finding = found("corpus", tmp_path, corpus={"reader": "iemocap", "root": str(tmp_path / "release")})
    assert finding.state is State.MISSING
    assert "sail.usc.edu" in finding.text


def test_what_is_left_out_of_a_corpus_is_counted(tmp_path):
    clips = [(speaker, emotion) for speaker in "AB" for emotion in ("angry", "sad", "bored")]
    rows = [f"{speaker}{emotion}.wav,{speaker},female,{emotion},S{speaker}" for speaker, emotion in clips]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,speaker,gender,emotion,session", *rows]), encoding="utf-8")
    for speaker, emotion in clips:
        soundfile.write(tmp_path / f"{speaker}{emotion}.wav", np.ones(800), 16_000)
    corpus = {"reader": "manifest", "root": str(tmp_path / "manifest.csv")}
    folds = {"by": "session", "held_out": [["SA"], ["SB"]]}
    text = found("corpus", tmp_path, corpus=corpus, folds=folds).text
    assert re.search(r"4 utterances of angry, sad; left out: 2 \(.+\)$", text)
    finding = found("corpus", tmp_path, corpus=corpus, folds={"by": "session", "held_out": [["SA"], ["SC"]]})
    assert finding.state is State.MISSING
    assert "sessions without a fold: SB" in finding.text


def test_a_folder_without_an_encoder(tmp_path):
    shutil.copy(PACKAGED_ENCODER / "config.json", tmp_path)
    finding = found("encoder", tmp_path, encoder={"source": "directory", "path": str(tmp_path)})
    assert (finding.state, finding.text) == (State.MISSING, f"{tmp_path} lacks model.safetensors")
    (tmp_path / "model.safetensors").touch()
    finding = found("encoder", tmp_path, encoder={"source": "directory", "path": str(tmp_path)})
    assert finding.state is State.OK


def test_an_encoder_that_lacks_a_layer_or_is_none(tmp_path):
    finding = found("encoder", tmp_path, tables={"layer": -13})
    assert (finding.state, finding.text[:30]) == (State.MISSING, "tables.layer: layer -13 is ask")
    (tmp_path / "config.json").write_text("{}")
    finding = found("encoder", tmp_path, encoder={"source": "directory", "path": str(tmp_path)})
    assert finding.state is State.MISSING
    assert "is not the config.json of a HuBERT" in finding.text


def test_a_folder_with_an_archive_of_pytorch_is_an_encoder_where_it_is_pinned(tmp_path):
    shutil.copy(PACKAGED_ENCODER / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    folder = {"source": "directory", "path": str(tmp_path)}
    assert found("encoder", tmp_path, encoder=folder).state is State.MISSING
    assert found("encoder", tmp_path, encoder={**folder, "sha256": "0" * 64}).state is State.OK


@pytest.mark.parametrize(
    ("cached", "answers", "state"),
    [(True, False, State.OK), (False, True, State.OK), (False, False, State.MISSING)],
)
@pytest.mark.usefixtures("without_network")
def test_encoders_of_the_hub(tmp_path, monkeypatch, cached, answers, state):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cached" if cached else None)
    if answers:
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    finding = found("encoder", tmp_path, encoder={"source": "hub", "name": "a/b", "revision": 40 * "0"})
    assert finding.state is state
    assert ("--local-dir" in finding.remedy) == (state is State.MISSING)


def test_room_for_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usage = namedtuple("usage", "free")
    for free, state in ((5e8, State.MISSING), (5e9, State.OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free))
        assert found("disk", tmp_path).state is state


@pytest.mark.parametrize(("presets", "encoders"), [([], 300), (["ablations"], 1375), (["scales"], 480)])
def test_a_run_needs_what_docs_scaling_adds_up(monkeypatch, presets, encoders):
    """0.4 GB an encoder and its head, and 16 GB of the rest."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1e12))
    config = doctor._load([ROOT / "config.yaml", *(ROOT / "presets" / f"{name}.yaml" for name in presets)], [])
    assert f"about {16 + 0.4 * encoders:.0f} GB" in doctor._disk(config).text


@pytest.mark.parametrize(
    ("tables", "models"),
    [
        ({"numbers": [1]}, 0),
        ({"numbers": [2]}, 3),  # of stage 1, retrained, fine-tuned
        ({"numbers": [3]}, 6),
        ({"numbers": [4], "layers": [-1, -2]}, 5),
        ({"numbers": [2, 4], "layers": [-1, -2]}, 7),
    ],
)
def test_models_are_those_of_the_systems_that_are_asked_for(tables, models):
    config = configs.parse({**SETTINGS, "tables": tables})
    assert doctor._models(config) == models * len(config.seeds) * len(config.folds.held_out)


def test_the_command_adds_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 1
    assert "config.yaml does not exist; run this in the project's folder." in capsys.readouterr().out
    shutil.copy(ROOT / "config.yaml", tmp_path)
    monkeypatch.setattr(doctor, "_packages", lambda: iter(()))
    assert cli.main(["doctor", "--configfile", str(ROOT / "presets/demo.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ok       corpus    synthetic, made by the run" in lines
    (tmp_path / "more.yaml").write_text("seedz: [1]\n")
    assert cli.main(["doctor", "--configfile", "more.yaml"]) == 1
    assert "seedz" in capsys.readouterr().out
