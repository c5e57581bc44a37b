"""A made corpus, a small random HuBERT, and the stages run on them: what several test modules share."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that wait for each other would otherwise spin, and take the cores that pytest's
# other workers need to go on.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, Phase, settings

from gmp_atl import audio, model_files
from gmp_atl import config as configs
from gmp_atl.encoder import Encoder, from_scratch
from gmp_atl.formats import HISTORY, LAYER_FEATURES, LOCAL_FEATURES, UTTERANCES, feature_rows
from gmp_atl.frames import HOP, RECEPTIVE_FIELD

torch.set_num_threads(1)

# Rich takes a pipe for a terminal, and one of that size, where these are set.
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU
# The same examples in every run, and no verdict from a clock: a busy machine must not fail a test.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
# make mutants: any example that fails will do, and to look for the smallest takes minutes.
settings.register_profile("mutants", settings.get_profile("suite"), phases=[Phase.explicit, Phase.generate])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells how many cases of bad input, and how many faults, were tried; not from xdist's workers."""
    for module in ("test_bad_input", "test_faults"):
        counts = getattr(sys.modules.get(module), "TRIED", {})
        for (target, outcome), count in sorted(counts.items()):
            terminalreporter.write_line(f"{target:32} {outcome:10} {count:6}")
        if counts:
            terminalreporter.write_line(f"{'all':43} {sum(counts.values()):6}")


ENCODER = "tiny random HuBERT"
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0],
    "corpus": {"reader": "synthetic"},
    "classes": ["angry", "sad"],
    "folds": {"by": "session", "held_out": [["S1"], ["S2"], ["S3"]]},
    "encoder": {
        "source": "scratch",
        "scratch": {"hidden_size": 32, "heads": 2, "feed_forward": 64, "conv_channels": 16},
    },
    "compute": {"precision": "float32"},
    "head": {"lstm_hidden": 8, "projection": 8},
    "multitask": {"epochs": 2, "optimisation": {"batch_size": 4, "learning_rate": 1e-3}},
    "clustering": {"sizes": [4, 8]},
    "retraining": {"updates": 3, "projection": 8, "optimisation": {"batch_size": 4, "learning_rate": 1e-3}},
    "finetuning": {"epochs": 2, "optimisation": {"batch_size": 4, "learning_rate": 1e-3, "schedule": "constant"}},
}


@dataclass(frozen=True)
class Inputs:
    """What the corpus and encoder stages hand on: twelve clips of 20 to 60 frames in three sessions."""

    utterances: Path
    local_features: Path
    encoder: Path
    frames: dict[str, np.ndarray]
    """Local features per utterance id."""

    def ids(self, *sessions: str) -> list[str]:
        """Utterances of these sessions; fold n holds out session Sn."""
        return [utterance for utterance in self.frames if utterance[:2] in sessions]


@dataclass(frozen=True)
class Trained:
    """What a training stage wrote."""

    folder: Path
    history_file: Path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return model_files.load_tensors(self.folder / "model.safetensors")[0]

    @property
    def head(self) -> dict[str, torch.Tensor]:
        return model_files.load_tensors(self.folder / "head.safetensors")[0]

    @property
    def fitted_on(self) -> list[str]:
        return model_files.load_tensors(self.folder / "model.safetensors")[1]["fitted_on"]

    @property
    def history(self) -> dict[str, list[float]]:
        """Values per quantity, in the order of the updates."""
        found: dict[str, list[float]] = {}
        for row in HISTORY.read(self.history_file)[0].to_pylist():
            found.setdefault(row["quantity"], []).append(row["value"])
        return found


@dataclass(frozen=True)
class Codebook:
    """What the clustering stage wrote."""

    centroids: Path
    pseudo_labels: Path


@dataclass
class Stages:
    """Runs stages on the made inputs, each into a folder of its own.

    `changes` overlays the settings above by dotted keys: {"multitask.encoder": "frozen"}. An input that a stage
    takes from another can be replaced by keyword.
    """

    inputs: Inputs
    folder: Path
    runs: int = field(default=0, init=False)

    def config(self, stage: str, changes: Mapping[str, Any] | None = None) -> Any:
        """The slice of the config that `stage` reads."""
        overlaid = copy.deepcopy(SETTINGS)
        for key, value in (changes or {}).items():
            *sections, name = key.split(".")
            section = overlaid
            for each in sections:
                section = section.setdefault(each, {})
            section[name] = value
        return configs.SLICES[stage].model_validate(configs.slice_for(configs.parse(overlaid), stage))

    def multitask(self, changes: Mapping[str, Any] | None = None, **others: Any) -> Trained:
        return self._train("multitask", changes, {"encoder": self.inputs.encoder, **others})

    def retraining(
        self, codebooks: Sequence[Codebook], changes: Mapping[str, Any] | None = None, **others: Any
    ) -> Trained:
        labels = [codebook.pseudo_labels for codebook in codebooks]
        defaults = {"encoder": self.inputs.encoder, "pseudo_labels": labels}
        defaults |= {"layer": -3, **others}
        return self._train("retraining", changes, defaults)

    def finetuning(self, changes: Mapping[str, Any] | None = None, **others: Any) -> Trained:
        defaults = {"encoder": self.inputs.encoder, "multitask_head": None, "loss": "ams"}
        return self._train("finetuning", changes, {**defaults, **others})

    def layer_features(
        self, encoder: Path, layer: int, changes: Mapping[str, Any] | None = None, **others: Any
    ) -> Path:
        from gmp_atl.stages.layer_features import layer_features

        output = self._new("layer_features") / "features.parquet"
        shared = self._shared("layer_features", changes, with_seed=False)
        layer_features(**{**shared, "encoder": encoder, "layers": [layer], "outputs": [output], **others})
        return output

    def clustering(
        self, layer_features: Path, size: int, changes: Mapping[str, Any] | None = None, **others: Any
    ) -> Codebook:
        from gmp_atl.stages.clustering import clustering

        folder = self._new("clustering")
        made = Codebook(folder / "centroids.safetensors", folder / "labels.parquet")
        shared = self._shared("clustering", changes)
        del shared["local_features"]
        outputs = {"centroids": made.centroids, "pseudo_labels": made.pseudo_labels}
        layer = LAYER_FEATURES.open(layer_features).header["layer"]
        clustering(**{**shared, "layer_features": layer_features, "layer": layer, "size": size, **outputs, **others})
        return made

    def evaluation(self, model: Trained, changes: Mapping[str, Any] | None = None, **others: Any) -> Path:
        """The predictions; the metrics lie beside them, in metrics.json."""
        from gmp_atl.stages.evaluation import evaluation

        folder = self._new("evaluation")
        outputs = {"predictions": folder / "predictions.parquet", "metrics": folder / "metrics.json"}
        shared = self._shared("evaluation", changes)
        described = {"model": model.folder, "variant": "main", "gmps": None, "loss": "ams", "fit_on": "training"}
        evaluation(**{**shared, **described, **outputs, **others})
        return outputs["predictions"]

    def _train(self, name: str, changes: Mapping[str, Any] | None, others: Mapping[str, Any]) -> Trained:
        import importlib

        folder = self._new(name)
        outputs = {"history": folder / "history.parquet", "checkpoint": folder / "checkpoint.safetensors"}
        stage = getattr(importlib.import_module(f"gmp_atl.stages.{name}"), name)
        stage(**{**self._shared(name, changes), "output": folder, **outputs, **others})
        return Trained(folder, outputs["history"])

    def _shared(self, stage: str, changes: Mapping[str, Any] | None, *, with_seed: bool = True) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "config": self.config(stage, changes),
            "utterances": self.inputs.utterances,
            "local_features": self.inputs.local_features,
            "fold": 1,
        }
        return {**shared, "seed": 0} if with_seed else shared

    def _new(self, stage: str) -> Path:
        self.runs += 1
        folder = self.folder / f"{self.runs:02}-{stage}"
        folder.mkdir()
        return folder


def write_utterances(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """An UTTERANCES file of rows that say what matters to the test; the rest is filled in."""
    filled = [
        {"path": f"{row['id']}.wav", "gender": "female", "emotion": "sad", "n_samples": 4000, "text_type": ""}
        | {"sha256": f"of {row['id']}", **row}
        for row in rows
    ]
    table = pa.Table.from_pylist(filled, schema=UTTERANCES.schema)
    UTTERANCES.write(path, table, corpus="made", complete=True, audio="a1b2")
    return path


@pytest.fixture(name="write_utterances", scope="session")
def _write_utterances() -> Callable[[Path, Sequence[Mapping[str, Any]]], Path]:
    return write_utterances


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Emotion shifts one half of the dimensions, gender the other, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(0)
    rows, frames = [], {}
    for session in ("S1", "S2", "S3"):
        for gender in ("female", "male"):
            for emotion in ("angry", "sad"):
                utterance, length = f"{session}_{gender}_{emotion}", int(random.integers(20, 61))
                shift = np.repeat([emotion == "sad", gender == "male"], 8)
                frames[utterance] = (random.normal(size=(length, 16)) + shift).astype(np.float16)
                speaker = f"{session}{gender[0]}"
                n_samples = RECEPTIVE_FIELD + HOP * (length - 1)
                row = {"id": utterance, "speaker": speaker, "gender": gender, "session": session, "emotion": emotion}
                rows.append({**row, "n_samples": n_samples})
    utterances = write_utterances(folder / "utterances.parquet", rows)
    local_features = folder / "local_features.parquet"
    with LOCAL_FEATURES.writer(local_features, dimensions=16, encoder=ENCODER) as append:
        for first in range(0, len(frames), 5):  # several row groups, as in a real corpus
            part = list(frames)[first : first + 5]
            append(feature_rows(part, [frames[utterance] for utterance in part]))
    scratch = configs.ScratchEncoderConfig(**SETTINGS["encoder"]["scratch"])
    model_files.save(from_scratch(scratch), folder / "encoder", encoder=ENCODER, fitted_on=[])
    return Inputs(utterances, local_features, folder / "encoder", frames)


@pytest.fixture
def stages(inputs: Inputs, tmp_path: Path) -> Stages:
    return Stages(inputs, tmp_path)


@dataclass(frozen=True)
class Upstream:
    """Results of stages 1 and 2 for fold 1, for the tests of what comes after."""

    multitask: Trained
    layer_features: Path
    codebooks: list[Codebook]


@pytest.fixture(scope="session")
def upstream(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    stages = Stages(inputs, tmp_path_factory.mktemp("upstream"))
    multitask = stages.multitask()
    features = stages.layer_features(multitask.folder, -3)
    return Upstream(multitask, features, [stages.clustering(features, size) for size in (4, 8)])


@pytest.fixture
def claim_fitted_on(tmp_path: Path) -> Callable[[Path, list[str]], Path]:
    """Copies an encoder's folder and has it say that it was fitted on other utterances."""

    def claim(folder: Path, fitted_on: list[str]) -> Path:
        copied = tmp_path / "claims"
        shutil.copytree(folder, copied)
        encoder, metadata = model_files.load(folder)
        model_files.save(encoder, copied, **{**metadata, "fitted_on": fitted_on})
        return copied

    return claim


@pytest.fixture
def tiny_encoder(inputs: Inputs) -> Encoder:
    """The random HuBERT of the inputs, in evaluation mode."""
    return model_files.load(inputs.encoder)[0].eval()


@dataclass(frozen=True)
class Spoken:
    """A model that was fine-tuned on sound files and tested on those of session S1."""

    audio: Path
    """Twelve files of noise: several formats, rates and numbers of channels."""
    stages: Stages
    model: Path
    loss: str
    changes: dict[str, Any]
    """To the settings, as `Stages` takes them."""
    predictions: Path


@pytest.fixture(scope="session", params=[("ams", False), ("ce", True)], ids=["ams", "ce, normalised"])
def spoken(request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    from gmp_atl.stages.local_features import local_features

    folder, random = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    (folder / "audio").mkdir()
    rows = UTTERANCES.read(inputs.utterances)[0].to_pylist()
    for number, row in enumerate(rows):
        suffix, rate, channels = [("wav", 16_000, 1), ("flac", 22_050, 2), ("aiff", 8_000, 1)][number % 3]
        row["path"] = f"{row['id']}.{suffix}"
        samples = 0.1 * random.normal(size=(int(rate * random.uniform(0.3, 1.0)), channels))
        soundfile.write(folder / "audio" / row["path"], samples, rate)
        row["n_samples"] = audio.inspect(folder / "audio" / row["path"]).n_samples
    utterances, local = folder / "utterances.parquet", folder / "local_features.parquet"
    table = pa.Table.from_pylist(rows, schema=UTTERANCES.schema)
    UTTERANCES.write(utterances, table, corpus="IEMOCAP", complete=False, audio="a1b2")
    stages = Stages(Inputs(utterances, local, inputs.encoder, {}), folder)
    loss, normalise = request.param
    changes = {"encoder.normalise_audio": normalise, "finetuning.epochs": 1}
    local_features(
        config=stages.config("local_features", changes),
        utterances=utterances,
        audio_root=folder / "audio",
        encoder=inputs.encoder,
        output=local,
    )
    model = stages.finetuning(changes, loss=loss)
    predictions = stages.evaluation(model, changes, loss=loss)
    return Spoken(folder / "audio", stages, model.folder, loss, changes, predictions)


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every connection is refused, as it would be by a proxy that is down."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()
