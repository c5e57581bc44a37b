"""What each stage makes of its inputs: parity with single clips, alignment of frames, and refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from gmp_atl import classifier, model_files, training
from gmp_atl import config as configs
from gmp_atl.classifier import Classifier
from gmp_atl.clips import Clips, Crop, collate, random_crops, within_budget
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.files import sha256
from gmp_atl.formats import LAYER_FEATURES, LOCAL_FEATURES, PREDICTIONS, PSEUDO_LABELS, UTTERANCES, read_features
from gmp_atl.masked_prediction import masked_prediction
from gmp_atl.masking import span_mask
from gmp_atl.model_files import load_tensors
from gmp_atl.randomness import Key
from gmp_atl.stages import local_features as local_features_stage
from gmp_atl.stages import pretraining
from gmp_atl.stages.functionals import functionals
from gmp_atl.stages.local_features import local_features
from gmp_atl.stages.mfcc import mfcc
from gmp_atl.stages.pretrained import pretrained
from gmp_atl.training import Terms, Trainer

# The pre-trained HuBERT.


@pytest.fixture
def archive(inputs, tmp_path) -> Path:
    """A folder as hub revisions are that hold a PyTorch archive only."""
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(inputs.encoder / "config.json", folder)
    torch.save(load_file(inputs.encoder / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def prepared(stages, output: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and metadata of what the stage writes for these keys of `encoder`."""
    config = stages.config("pretrained", {f"encoder.{key}": value for key, value in settings.items()})
    pretrained(config=config, output=output)
    return load_tensors(output / "model.safetensors")


def test_every_source_of_equal_weights_gives_equal_weights_and_an_equal_digest(stages, archive, tmp_path):
    scratch, of_scratch = prepared(stages, tmp_path / "a", source="scratch")
    folder, of_folder = prepared(stages, tmp_path / "b", source="directory", path=str(stages.inputs.encoder))
    pin = sha256(archive / "pytorch_model.bin")
    converted, of_archive = prepared(stages, tmp_path / "c", source="directory", path=str(archive), sha256=pin)
    for name, expected in load_file(stages.inputs.encoder / "model.safetensors").items():
        assert torch.equal(scratch[name], expected)
        assert torch.equal(folder[name], expected)
        assert torch.equal(converted[name], expected)
    digests = {metadata["encoder"].partition(", sha256 ")[2] for metadata in (of_scratch, of_folder, of_archive)}
    assert len(digests) == 1
    assert len(digests.pop()) == 12
    assert all(metadata["fitted_on"] == [] for metadata in (of_scratch, of_folder, of_archive))


def test_the_packaged_encoder_is_small_complete_and_tells_how_it_was_made(stages, tmp_path):
    weights, metadata = prepared(stages, tmp_path, source="packaged")
    assert metadata["encoder"].startswith("hubert-small of gmp-atl, sha256 ")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
    assert (configs.PACKAGED_ENCODER / "model.safetensors").stat().st_size <= 10e6
    card = (configs.PACKAGED_ENCODER / "README.md").read_text()
    assert "CC BY 4.0" in card
    assert "Apache-2.0" in card
    architecture = model_files.load(tmp_path)[0].architecture
    assert (architecture.num_hidden_layers, architecture.hidden_size) == (12, 192)


def test_an_archive_is_opened_only_if_it_is_pinned(stages, archive, tmp_path):
    with pytest.raises(UserError, match=f"pin the file by encoder.sha256: {sha256(archive / 'pytorch_model.bin')}"):
        prepared(stages, tmp_path / "out", source="directory", path=str(archive))
    with pytest.raises(UserError, match=r"encoder\.sha256 pins 0000"):
        prepared(stages, tmp_path / "out", source="directory", path=str(archive), sha256="0" * 64)


def test_an_archive_that_holds_code_is_not_run(stages, archive, tmp_path):
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"weights": Code()}, archive / "pytorch_model.bin")
    pin = sha256(archive / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
        prepared(stages, tmp_path / "out", source="directory", path=str(archive), sha256=pin)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_damaged_archive_is_named(stages, archive, tmp_path, share):
    path = archive / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged"):
        prepared(stages, tmp_path / "out", source="directory", path=str(archive), sha256=sha256(path))


def test_other_weights_than_those_pinned_are_refused(stages, tmp_path):
    with pytest.raises(UserError, match=r"encoder\.sha256 pins 0000"):
        prepared(stages, tmp_path / "out", source="directory", path=str(stages.inputs.encoder), sha256="0" * 64)


HUB = {"source": "hub", "name": "someone/hubert", "revision": "0123456789" * 4}


def test_the_hub_is_asked_for_the_pinned_revision_and_for_safetensors_first(stages, archive, tmp_path, monkeypatch):
    asked = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns[1]))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pin = sha256(archive / "pytorch_model.bin")
    _, metadata = prepared(stages, tmp_path / "out", **HUB, sha256=pin)
    assert asked == [(HUB["name"], HUB["revision"], file) for file in ("model.safetensors", "pytorch_model.bin")]
    assert metadata["encoder"].startswith("someone/hubert@01234567, sha256 ")


@pytest.mark.usefixtures("without_network")
def test_without_network_the_user_is_told_what_to_do(stages, tmp_path):
    with pytest.raises(UserError, match=r"cannot be fetched from the hub.*encoder.source: directory"):
        prepared(stages, tmp_path / "out", **HUB)


# Local features.


@pytest.fixture
def recordings(tmp_path, write_utterances) -> dict[str, Any]:
    """Paths for the stage: three recordings of noise and their utterance table."""
    rows, random = [], np.random.default_rng(0)
    for number, n_samples in enumerate((400, 5000, 16_001)):
        soundfile.write(tmp_path / f"r{number}.wav", 0.05 * random.normal(size=n_samples), 16_000, subtype="FLOAT")
        rows.append({"id": f"r{number}", "session": "S1", "speaker": "s", "n_samples": n_samples})
    utterances = write_utterances(tmp_path / "utterances.parquet", rows)
    return {"utterances": utterances, "audio_root": tmp_path, "output": tmp_path / "local_features.parquet"}


def features_of(stages, recordings: dict[str, Any], settings: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    config = stages.config("local_features", settings or {})
    local_features(config=config, encoder=stages.inputs.encoder, **recordings)
    return read_features(LOCAL_FEATURES, recordings["output"], {"r0", "r1", "r2"})[0]


@pytest.mark.parametrize("row_group_bytes", [1, 1000, 2**25])
def test_local_features_are_those_of_each_clip_alone(stages, recordings, tiny_encoder, monkeypatch, row_group_bytes):
    monkeypatch.setattr(local_features_stage, "_ROW_GROUP_BYTES", row_group_bytes)
    tiny_encoder.feature_extractor.arrange(torch.float32)
    for name, frames in features_of(stages, recordings).items():
        audio, _ = soundfile.read(recordings["audio_root"] / f"{name}.wav", dtype="float32")
        with torch.inference_mode():
            expected = tiny_encoder.local_features(torch.from_numpy(audio)).half().numpy()
        np.testing.assert_array_equal(frames, expected)


def test_normalised_audio_has_no_level_and_other_audio_has(stages, recordings, tiny_encoder):
    """The first norm of HuBERT base takes the level out, too, but for its epsilon: so the level is made low."""
    before = {flag: features_of(stages, recordings, {"encoder.normalise_audio": flag}) for flag in (False, True)}
    for path in recordings["audio_root"].glob("r*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, 0.25 + samples / 20, rate, subtype="FLOAT")
    after = {flag: features_of(stages, recordings, {"encoder.normalise_audio": flag}) for flag in (False, True)}
    for name in before[True]:
        np.testing.assert_allclose(after[True][name], before[True][name], atol=0.02)
    assert np.abs(after[False]["r2"] - before[False]["r2"]).max() > 0.1


def test_local_features_in_bfloat16_are_close(stages, recordings):
    single, half = (
        np.concatenate([*features_of(stages, recordings, {"compute.precision": precision}).values()]).astype(np.float64)
        for precision in ("float32", "bfloat16")
    )
    cosines = (single * half).sum(1) / np.linalg.norm(single, axis=1) / np.linalg.norm(half, axis=1)
    assert 0.998 < cosines.min() < 1


@pytest.fixture
def opensmile(monkeypatch) -> None:
    """Stands for openSMILE, which is optional: zeros for any clip."""
    smile = SimpleNamespace(process_signal=lambda samples, rate: pd.DataFrame(np.zeros((1, 88))))
    kinds = {"FeatureSet": SimpleNamespace(eGeMAPSv02="set"), "FeatureLevel": SimpleNamespace(Functionals="level")}
    module = SimpleNamespace(Smile=lambda **options: smile, __version__="0", **kinds)
    monkeypatch.setitem(sys.modules, "opensmile", module)


READERS: dict[str, Callable[..., Any]] = {
    "local features": features_of,
    "functionals": lambda stages, recordings: functionals(**recordings),
    "MFCCs": lambda stages, recordings: mfcc(**recordings),
    "waveforms of pre-training": lambda stages, recordings: pretraining._waveforms(
        UTTERANCES.read(recordings["utterances"])[0], recordings["audio_root"]
    ),
}
"""All that read recordings of a table, but for examples (test_examples.py)."""


@pytest.mark.usefixtures("opensmile")
@pytest.mark.parametrize("reader", READERS)
def test_a_recording_that_has_changed_since_is_refused(stages, recordings, reader):
    READERS[reader](stages, recordings)
    recordings["output"].unlink(missing_ok=True)
    soundfile.write(recordings["audio_root"] / "r1.wav", np.linspace(0, 0.1, 4999), 16_000)
    with pytest.raises(UserError, match=r"r1.wav has 4999 samples at 16 kHz, but had 5000 when"):
        READERS[reader](stages, recordings)
    assert not recordings["output"].exists()


def test_features_that_half_precision_cannot_hold_are_refused(stages, recordings, tiny_encoder, tmp_path):
    with torch.no_grad():
        tiny_encoder.feature_extractor.conv_layers[6].conv.weight *= 1e6
    model_files.save(tiny_encoder, tmp_path / "loud", encoder="loud", fitted_on=[])
    with pytest.raises(UserError, match="exceed the range of float16"):
        local_features(config=stages.config("local_features"), encoder=tmp_path / "loud", **recordings)


# Layer features.


@pytest.mark.parametrize("batch_seconds", [0.001, 1.0, 320.0])
def test_layer_features_are_those_of_each_clip_alone_in_half_precision(stages, tiny_encoder, batch_seconds):
    layers, changes = [-1, -3, -12], {"compute.batch_seconds": batch_seconds}
    outputs = [stages.folder / f"layer{layer}.parquet" for layer in layers]
    stages.layer_features(stages.inputs.encoder, -1, changes, layers=layers, outputs=outputs)
    for layer, path in zip(layers, outputs, strict=True):
        found, header = read_features(LAYER_FEATURES, path, stages.inputs.ids("S2", "S3"))
        assert header["layer"] == layer
        for name, frames in found.items():
            local = torch.from_numpy(stages.inputs.frames[name].astype(np.float32))[None]
            with torch.inference_mode():
                expected = tiny_encoder(local, torch.tensor([local.shape[1]]), layer)[0].numpy()
            assert frames.dtype == np.float16
            np.testing.assert_allclose(frames, expected, atol=1e-5, rtol=1e-3)


def test_a_layer_that_half_precision_cannot_hold_is_named(stages, monkeypatch):
    """As of an encoder that has diverged."""
    hidden_states = Encoder.hidden_states

    def loud(*arguments: Any) -> dict[int, torch.Tensor]:
        return {layer: 1e5 * hidden for layer, hidden in hidden_states(*arguments).items()}

    monkeypatch.setattr(Encoder, "hidden_states", loud)
    with pytest.raises(UserError, match=r"^Layer -3 exceeds the range of float16; the encoder has diverged\.$"):
        stages.layer_features(stages.inputs.encoder, -3)


# Crops.


def test_every_update_crops_a_long_clip_anew(monkeypatch, tmp_path):
    """Else training would hear the same few seconds of it over and over."""
    starts, updates = [], 30

    def spy(*arguments: Any) -> list[Crop]:
        crops = random_crops(*arguments)
        starts.extend(crop.start for crop in crops)
        return crops

    monkeypatch.setattr(training, "random_crops", spy)
    model, clips = torch.nn.Linear(2, 1), Clips(["long"], [np.ones((1000, 2), np.float16)])
    Trainer(
        model,
        lambda batch, generator: Terms(model(batch.local).sum(), 1),
        clips,
        config=configs.OptimisationConfig(batch_size=1, max_clip_seconds=0.2),
        compute=configs.ComputeConfig(precision="float32"),
        key=Key(0, 1, "stage"),
        device=torch.device("cpu"),
        checkpoint=tmp_path / "checkpoint.safetensors",
        fingerprint="of this run",
        updates=updates,
    ).run()
    assert len(starts) == updates
    assert len(set(starts)) > updates / 2


# Stage 1.


def test_the_loss_of_stage_1_is_that_of_equation_1(stages):
    history = stages.multitask({"multitask.emotion_weight": 0.7}).history
    expected = 0.7 * np.array(history["emotion_loss"]) + 0.3 * np.array(history["gender_loss"])
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)
    assert history["gender_loss"][0] == pytest.approx(math.log(2), abs=0.3)


def test_a_stage_learns_what_there_is_to_learn(stages):
    """Emotion and gender each shift eight of the sixteen dimensions."""
    changes = {"multitask.epochs": 60, "multitask.encoder": "frozen", "multitask.optimisation.learning_rate": 0.03}
    changes |= {"multitask.optimisation.dropout": 0.0, "multitask.optimisation.attention_dropout": 0.0}
    history = stages.multitask(changes).history
    assert np.mean(history["emotion_accuracy"][-4:]) == np.mean(history["gender_accuracy"][-4:]) == 1
    assert history["loss"][-1] < 0.2 * history["loss"][0]


@pytest.mark.parametrize("stage", ["multitask", "finetuning"])
def test_a_class_without_training_clips_is_named(stages, write_utterances, stage):
    rows = UTTERANCES.read(stages.inputs.utterances)[0].to_pylist()
    rows = [{**row, "emotion": "sad" if row["session"] != "S1" else "angry"} for row in rows]
    with pytest.raises(UserError, match="No training utterance of this fold is angry"):
        getattr(stages, stage)(utterances=write_utterances(stages.folder / "utterances.parquet", rows))


# Stage 3.


class Oracle:
    """Stands for the model: predicts the label that each frame carries in its first feature."""

    def __call__(self, local: Tensor, lengths: Tensor, mask: Tensor, chosen: Tensor) -> dict[int, Tensor]:
        return {7: 100 * F.one_hot(local[..., 0].flatten().long(), 7)[chosen].float()}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    crop=st.integers(1, 45),
    budget=st.integers(1, 100),
    unmasked_weight=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 100),
)
def test_pseudo_labels_follow_their_frames_through_crops_and_batches(lengths, crop, budget, unmasked_weight, seed):
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    labels = [random.integers(0, 7, length).astype(np.uint16) for length in lengths]
    clips = Clips([str(n) for n in range(len(labels))], [each[:, None].astype(np.float16) for each in labels])
    crops = random_crops(clips, range(len(lengths)), (crop + 0.5) / 50, generator)
    counted = 0
    for group in within_budget(crops, budget / 50, torch.device("cpu")):
        batch = collate(clips, group)
        mask = span_mask(batch.lengths, 0.8, 10, generator)
        targets = {7: torch.from_numpy(np.concatenate(labels).astype(np.int64))[batch.rows]}
        terms = masked_prediction(Oracle(), batch.local, batch.lengths, mask, targets, unmasked_weight)
        counted += terms.count
        correct, n_masked = terms.quantities["masked_accuracy_7"]
        assert terms.loss.item() == pytest.approx(0, abs=1e-6)
        assert correct == n_masked == mask.sum()
    if unmasked_weight:
        assert counted == sum(crop.length for crop in crops)


def test_labels_that_are_off_by_a_frame_are_noticed_by_that_test():
    labels = [np.arange(20) % 7]
    clips = Clips(["a"], [np.roll(labels[0], 1)[:, None].astype(np.float16)])
    batch = collate(clips, random_crops(clips, [0], 1.0, torch.Generator()))
    mask, targets = torch.ones(1, 20, dtype=torch.bool), {7: torch.from_numpy(labels[0])[batch.rows]}
    terms = masked_prediction(Oracle(), batch.local, batch.lengths, mask, targets, 0.0)
    assert terms.quantities["masked_accuracy_7"][0] < 3


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_retraining_in_small_groups_makes_the_same_updates(stages, upstream, unmasked_weight):
    """Clips have different numbers of masked frames: the mean is over the frames of all groups."""
    changes = {
        "retraining.unmasked_weight": unmasked_weight,
        "retraining.optimisation.dropout": 0.0,
        "retraining.optimisation.attention_dropout": 0.0,
    }
    together = stages.retraining(upstream.codebooks, changes)
    alone = stages.retraining(upstream.codebooks, {**changes, "compute.batch_seconds": 0.001})
    for quantity, values in together.history.items():
        np.testing.assert_allclose(alone.history[quantity], values, rtol=1e-3, atol=1e-5, err_msg=quantity)


def test_retraining_reads_no_utterance_label(stages, upstream, write_utterances):
    rows = UTTERANCES.read(stages.inputs.utterances)[0].to_pylist()
    blank = [{**row, "emotion": "", "gender": ""} for row in rows]
    utterances = write_utterances(stages.folder / "utterances.parquet", blank)
    blind = stages.retraining(upstream.codebooks, utterances=utterances).weights
    for name, tensor in stages.retraining(upstream.codebooks).weights.items():
        assert torch.equal(blind[name], tensor), name


@pytest.mark.parametrize("fault", ["a label too few", "a clip too few"])
def test_pseudo_labels_that_do_not_match_the_frames_are_refused(stages, upstream, fault):
    path = upstream.codebooks[0].pseudo_labels
    table, metadata = PSEUDO_LABELS.read(path)
    rows = table.to_pylist()
    if fault == "a clip too few":
        short = rows.pop(3)["id"]
    else:
        short = rows[3]["id"]
        rows[3]["labels"].pop()
    damaged = stages.folder / "labels.parquet"
    header = {key: metadata[key] for key in PSEUDO_LABELS.metadata}
    PSEUDO_LABELS.write(damaged, pa.Table.from_pylist(rows, schema=PSEUDO_LABELS.schema), **header)
    with pytest.raises(UserError, match=f"labels for {short}, which has {len(stages.inputs.frames[short])} frames"):
        stages.retraining([], pseudo_labels=[damaged])


# Stages that are stopped.


def test_a_stage_that_is_stopped_by_sigterm_ends_as_one_that_is_not(stages, upstream, monkeypatch):
    from gmp_atl.stages import retraining as module

    whole = stages.retraining(upstream.codebooks)
    folder, calls, span_mask = stages.folder / "stopped", [], module.span_mask
    outputs = {
        "output": folder,
        "history": folder / "history.parquet",
        "checkpoint": folder / "checkpoint.safetensors",
    }

    def stop(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return span_mask(*arguments, **options)

    monkeypatch.setattr(module, "span_mask", stop)
    with pytest.raises(SystemExit):
        stages.retraining(upstream.codebooks, **outputs)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.safetensors"]
    stages.retraining(upstream.codebooks, **outputs)
    assert len(calls) == 3, "two updates before, one after"
    for path in whole.folder.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def another(path: Path, folder: Path) -> Path:
    """A copy of a Parquet file, or of a folder with a model or a head, in which values differ and nothing else."""
    copied = folder / f"another-{path.name}"
    if path.is_dir():
        shutil.copytree(path, copied)
        for name in ("model", "head"):
            if (weights := copied / f"{name}.safetensors").exists():
                tensors, metadata = model_files.load_tensors(weights)
                model_files.save_tensors({key: tensor + 1 for key, tensor in tensors.items()}, weights, **metadata)
        return copied
    kind, column = {"labels": (PSEUDO_LABELS, "labels")}.get(path.stem, (LOCAL_FEATURES, "frames"))
    table, header = kind.read(path)
    values = [bytes(len(each)) if isinstance(each, bytes) else each[::-1] for each in table[column].to_pylist()]
    rows = [row | {column: value} for row, value in zip(table.to_pylist(), values, strict=True)]
    kind.write(copied, pa.Table.from_pylist(rows, schema=kind.schema), **header)
    return copied


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *(
            (stage, name)
            for stage in ("multitask", "retraining", "finetuning")
            for name in ("local_features", "encoder")
        ),
        ("retraining", "pseudo_labels"),
        ("finetuning", "multitask_head"),
    ],
)
def test_a_checkpoint_of_other_inputs_is_not_taken_up(stages, upstream, monkeypatch, stage, name):
    inputs = {
        "local_features": stages.inputs.local_features,
        "encoder": stages.inputs.encoder,
        "pseudo_labels": [each.pseudo_labels for each in upstream.codebooks],
        "multitask_head": upstream.multitask.folder,
    }
    own = {"retraining": {"pseudo_labels"}, "finetuning": {"multitask_head"}}.get(stage, set())
    given = {key: inputs[key] for key in {"local_features", "encoder"} | own}
    found = []

    def begin(trainer: Trainer) -> None:
        found.append(trainer.fingerprint)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", begin)
    value = given[name]
    other = (
        [*value[:-1], another(value[-1], stages.folder)] if isinstance(value, list) else another(value, stages.folder)
    )
    for changes in ({}, {}, {name: other}):
        with pytest.raises(KeyboardInterrupt):
            getattr(stages, stage)(*([[]] if stage == "retraining" else []), **given | changes)
    assert found[0] == found[1] != found[2]


# Stages 4 and 5.


@pytest.mark.parametrize("loss", ["ce", "ams"])
def test_predictions_are_those_of_each_held_out_clip_alone(stages, loss):
    model = stages.finetuning(loss=loss)
    predictions = stages.evaluation(model, loss=loss)
    table, metadata = PREDICTIONS.read(predictions)
    network = Classifier(
        model_files.load(model.folder)[0], stages.config("finetuning").head, {"emotion": 2}, cosine=loss == "ams"
    )
    classifier.load_head(network, model.folder)
    for row in table.to_pylist():
        clip = Clips([row["id"]], [stages.inputs.frames[row["id"]]])
        crops = random_crops(clip, [0], 1e9, torch.Generator())
        with torch.inference_mode():
            outputs = network.eval()(collate(clip, crops))["emotion"][0]
        scores = torch.softmax(outputs * (30 if loss == "ams" else 1), dim=0)
        assert row["scores"] == pytest.approx(scores.tolist(), abs=1e-5)
        assert sum(row["scores"]) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == ["angry", "sad"][int(scores.argmax())]
        assert row["label"] in row["id"]
        assert f"_{row['gender']}_" in row["id"]
    assert (metadata["loss"], metadata["selection"], metadata["layer"]) == (loss, "last", None)


def test_a_model_of_another_loss_or_of_other_classes_is_refused(stages):
    model = stages.finetuning({"finetuning.epochs": 1})
    for changes, others in ({}, {"loss": "ce"}), ({"classes": ["sad", "angry"]}, {}):
        with pytest.raises(UserError, match=f"^{model.folder} is not the model that the config describes"):
            stages.evaluation(model, changes, **others)


def test_testing_takes_no_margin(stages):
    model = stages.finetuning({"finetuning.epochs": 1})
    with_margin, without = (stages.evaluation(model, {"finetuning.margin": margin}) for margin in (0.4, 0.0))
    assert PREDICTIONS.read(with_margin)[0].equals(PREDICTIONS.read(without)[0])


def test_training_takes_the_margin(stages):
    with_margin, without = (
        stages.finetuning({"finetuning.epochs": 1, "finetuning.margin": margin}) for margin in (0.4, 0.0)
    )
    assert with_margin.history["loss"][0] > without.history["loss"][0] + 1


def test_figures_are_those_of_scikit_learn(stages):
    predictions = stages.evaluation(stages.finetuning({"finetuning.epochs": 1}))
    rows = PREDICTIONS.read(predictions)[0].to_pylist()
    labels, found = [row["label"] for row in rows], [row["prediction"] for row in rows]
    figures = json.loads((predictions.parent / "metrics.json").read_text())
    assert figures["uar"] == pytest.approx(100 * recall_score(labels, found, average="macro", zero_division=0))
    assert figures["war"] == pytest.approx(100 * accuracy_score(labels, found))
    assert figures["confusion"] == confusion_matrix(labels, found, labels=figures["classes"]).tolist()


def test_how_many_clips_go_through_at_once_changes_no_prediction(stages):
    model = stages.finetuning({"finetuning.epochs": 1})
    together, alone = (
        PREDICTIONS.read(stages.evaluation(model, {"compute.batch_seconds": seconds}))[0].to_pylist()
        for seconds in (320.0, 0.001)
    )
    for one, other in zip(together, alone, strict=True):
        assert one == {**other, "scores": pytest.approx(other["scores"], abs=1e-5)}


def test_bfloat16_moves_predictions_but_little(stages):
    model = stages.finetuning({"finetuning.epochs": 1})
    single, half = (
        PREDICTIONS.read(stages.evaluation(model, {"compute.precision": precision}))[0]["scores"].to_pylist()
        for precision in ("float32", "bfloat16")
    )
    difference = np.abs(np.subtract(single, half)).max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("stage", ["multitask", "retraining", "finetuning"])
def test_every_stage_trains_in_bfloat16(stages, upstream, stage):
    before = [upstream.codebooks] if stage == "retraining" else []
    trained = getattr(stages, stage)(*before, {"compute.precision": "bfloat16"})
    assert {tensor.dtype for tensor in trained.weights.values()} == {torch.float32}
    assert all(map(math.isfinite, trained.history["loss"]))


def test_encoders_of_every_stage_are_read_by_transformers(stages, upstream):
    from transformers import HubertModel

    retrained = stages.retraining(upstream.codebooks, {"retraining.updates": 1})
    tuned = stages.finetuning({"finetuning.epochs": 1}, encoder=retrained.folder)
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    for folder in (upstream.multitask.folder, retrained.folder, tuned.folder):
        reference, encoder = HubertModel.from_pretrained(folder).eval(), model_files.load(folder)[0].eval()
        with torch.inference_mode():
            local = encoder.local_features(audio[0])
            found = encoder(local[None], torch.tensor([len(local)]))
            torch.testing.assert_close(found, reference(audio)[0], atol=1e-4, rtol=0)
    assert isinstance(encoder, Encoder)


THREADS_TOLERANCE = 1e-4
"""Of scores, between one thread and several, after all stages of the tiny network (docs/reliability.md)."""


def test_threads_move_scores_only_within_the_stated_tolerance(stages):
    def scores(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            first = stages.multitask()
            features = stages.layer_features(first.folder, -3)
            books = [stages.clustering(features, size) for size in (4, 8)]
            tuned = stages.finetuning(encoder=stages.retraining(books).folder)
            return np.array(PREDICTIONS.read(stages.evaluation(tuned))[0]["scores"].to_pylist())

    try:
        alone, other = (scores(threads) for threads in (1, 2))
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(other, alone, atol=THREADS_TOLERANCE)


def test_a_held_out_session_of_one_class_is_measured_by_that_class(stages, inputs, write_utterances):
    rows = UTTERANCES.read(inputs.utterances)[0].to_pylist()
    rows = [{**row, "emotion": "sad"} if row["session"] == "S1" else row for row in rows]
    utterances = write_utterances(stages.folder / "utterances.parquet", rows)
    model = stages.finetuning(utterances=utterances)
    predictions = stages.evaluation(model, utterances=utterances)
    found = PREDICTIONS.read(predictions)[0]
    assert set(found["label"].to_pylist()) == {"sad"}
    figures = json.loads((predictions.parent / "metrics.json").read_text())
    share = 100 * np.mean([name == "sad" for name in found["prediction"].to_pylist()])
    assert figures["uar"] == figures["war"] == pytest.approx(share)
