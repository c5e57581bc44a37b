"""An encoder from unlabelled speech: its convolutions, its audio, its iterations, and what is handed on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import HubertModel

from gmp_atl import config as configs
from gmp_atl import model_files, training
from gmp_atl.audio import at_speed
from gmp_atl.convolutions import Convolutions
from gmp_atl.encoder import Encoder, from_scratch
from gmp_atl.errors import LeakageError, UserError
from gmp_atl.formats import (
    EXCLUDED,
    HISTORY,
    LAYER_FEATURES,
    LOCAL_FEATURES,
    MFCC,
    PROBES,
    PSEUDO_LABELS,
    UTTERANCES,
    read_features,
)
from gmp_atl.frames import HOP, SAMPLE_RATE, n_frames
from gmp_atl.stages.clustering import clustering
from gmp_atl.stages.corpus import corpus
from gmp_atl.stages.layer_features import layer_features
from gmp_atl.stages.local_features import local_features
from gmp_atl.stages.mfcc import mfcc
from gmp_atl.stages.pretrain import pretrain
from gmp_atl.stages.pretraining import mixed, pretraining
from gmp_atl.stages.probe import probe
from gmp_atl.stages.probes import probes
from gmp_atl.stages.speech import speech

OPTIMISATION = {"batch_size": 4, "learning_rate": 1e-3, "max_clip_seconds": 0.4, "layerdrop": 0.1}
PRETRAINING: dict[str, Any] = {
    "attribution": ["tones, of the test's own making"],
    "speeds": [1.0, 1.25],
    "mixing": 0.5,
    "iterations": [
        {"layer": 0, "sizes": [4, 8], "updates": 6, "optimisation": OPTIMISATION},
        {"layer": -3, "sizes": [6], "updates": 4, "optimisation": OPTIMISATION},
    ],
    "probes": [3],
    "projection": 8,
}


# Convolutions.


@pytest.mark.parametrize(("norm", "biased"), [("group", False), ("layer", False), ("layer", True)])
def test_convolutions_of_padded_clips_are_those_of_each_alone(tiny_encoder, norm, biased):
    encoder = Encoder(replace(tiny_encoder.architecture, feat_extract_norm=norm, conv_bias=biased)).eval()
    # Without a norm over channels, a new encoder's features are too small for the tolerance.
    encoder.load_state_dict(tiny_encoder.state_dict(), strict=False)
    for layer in encoder.feature_extractor.conv_layers if biased else ():
        nn.init.normal_(layer.conv.bias)
    audio = torch.randn(3, 4321, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        clips = [audio[0], audio[1, :2222], audio[2, :400]]
        padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        together = encoder.feature_extractor.together(padded, torch.tensor([len(clip) for clip in clips]))
        for clip, found in zip(clips, together, strict=True):
            alone = encoder.local_features(clip)
            torch.testing.assert_close(found[: len(alone)], alone, atol=1e-5, rtol=1e-4)


# Audio.


@given(speed=st.integers(50, 200), samples=st.integers(4000, 9000))
def test_a_tone_played_faster_is_shorter_and_higher_by_as_much(speed, samples):
    speed /= 100
    tone = np.sin(2 * np.pi * 500 * np.arange(samples) / SAMPLE_RATE).astype(np.float32)
    changed = at_speed(tone, speed)
    assert len(changed) == pytest.approx(samples / speed, abs=1)
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(len(changed)), 2**16))
    assert spectrum.argmax() * SAMPLE_RATE / 2**16 == pytest.approx(500 * speed, rel=0.01)


@given(share=st.floats(0, 1), clips=st.integers(1, 6), seed=st.integers(0, 50))
def test_mixing_leaves_half_of_every_clip_alone_and_the_other_speaker_quieter_than_5_db(share, clips, seed):
    samples = torch.randn(clips, 1000, generator=torch.Generator().manual_seed(seed))
    added = mixed(samples, share, torch.Generator().manual_seed(seed)) - samples
    changed = added != 0
    assert changed.sum(1).max() <= 500
    assert changed.any() <= (share > 0)
    for row, mask in zip(added, changed, strict=True):
        first, *_, last = torch.where(mask)[0].tolist() or [0, 0]
        assert last - first + 1 - mask.sum() in (0, 1)  # one stretch
        assert row.abs().max() <= 10 ** (5 / 20) * 1.2 * samples.abs().max()


def test_every_clip_is_mixed_if_all_shall_be():
    samples = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    assert (mixed(samples, 1.0, torch.Generator().manual_seed(0)) != samples).any(dim=1).float().mean() > 0.95
    assert torch.equal(mixed(samples, 0.0, torch.Generator().manual_seed(0)), samples)


# Stages.


class Speech:
    """Eight clips of tones in noise, and the stages of a pre-training on them."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.config = folder, config
        self.manifest = folder / "manifest.csv"
        self.utterances, self.audio = folder / "utterances.parquet", folder / "audio"
        random = np.random.default_rng(0)
        for number in range(8):
            count = int(random.integers(6000, 20_000))
            tone = np.sin(2 * np.pi * 200 * (1 + number % 3) * np.arange(count) / SAMPLE_RATE)
            soundfile.write(folder / f"{number}.wav", 0.3 * tone + 0.01 * random.normal(size=count), SAMPLE_RATE)
        self.manifest.write_text("path,speaker\n" + "".join(f"{number}.wav,anyone\n" for number in range(8)))

    def write(self) -> None:
        files = {"utterances": self.utterances, "excluded": self.folder / "excluded.parquet", "audio_root": self.audio}
        speech(manifest=self.manifest, speeds=PRETRAINING["speeds"], **files)

    def of(self, iteration: int) -> Path:
        return self.folder / f"iteration{iteration}"

    def encoder(self, iteration: int, update: str = "last") -> Path:
        return self.of(iteration) / "encoders" / update

    def cluster(self, iteration: int) -> None:
        """Into a codebook for each size."""
        layer, folder = PRETRAINING["iterations"][iteration - 1]["layer"], self.of(iteration)
        features = folder / "features.parquet"
        if iteration == 1:
            mfcc(utterances=self.utterances, audio_root=self.audio, output=features)
        else:
            before, local = self.encoder(iteration - 1), folder / "local.parquet"
            convolved = {"utterances": self.utterances, "audio_root": self.audio, "encoder": before, "output": local}
            local_features(config=self.config("local_features"), **convolved)
            fitted = {"utterances": self.utterances, "local_features": local, "encoder": before, "fold": 0}
            layer_features(config=self.config("layer_features"), layers=[layer], outputs=[features], **fitted)
        for size in PRETRAINING["iterations"][iteration - 1]["sizes"]:
            outputs = {"centroids": folder / f"{size}.safetensors", "pseudo_labels": folder / f"{size}.parquet"}
            inputs = {"utterances": self.utterances, "layer_features": features, "fold": 0, "seed": 1}
            clustering(config=self.config("clustering"), layer=layer, size=size, **inputs, **outputs)

    def train(self, iteration: int, **others: Any) -> Path:
        """One iteration; its history."""
        sizes = PRETRAINING["iterations"][iteration - 1]["sizes"]
        folder = others.pop("into", self.of(iteration))
        arguments = {
            "config": self.config("pretraining", iteration),
            "utterances": self.utterances,
            "audio_root": self.audio,
            "previous": self.encoder(iteration - 1) if iteration > 1 else None,
            "pseudo_labels": [self.of(iteration) / f"{size}.parquet" for size in sizes],
            "seed": 1,
        }
        outputs = {"output": folder / "encoders", "history": folder / "history.parquet"}
        pretraining(**{**arguments, **outputs, "checkpoint": folder / "checkpoint.safetensors", **others})
        return outputs["history"]


def slices(settings: dict[str, Any]) -> Any:
    whole = configs.parse({**settings, "pretraining": {**PRETRAINING, "speech": "manifest.csv"}})

    def of(stage: str, iteration: int = 2) -> Any:
        return configs.SLICES[stage].model_validate(configs.slice_for(configs.up_to(whole, iteration), stage))

    return of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both iterations, run."""
    from conftest import SETTINGS

    torch.manual_seed(5)
    built = Speech(tmp_path_factory.mktemp("speech"), slices(SETTINGS))
    built.write()
    for iteration in (1, 2):
        built.cluster(iteration)
        built.train(iteration)
    return built


def test_speech_is_every_clip_at_every_speed_and_as_it_was_at_one(made):
    rows = UTTERANCES.read(made.utterances)[0].to_pylist()
    assert [row["id"] for row in rows] == [f"{speed}/{number}" for number in range(8) for speed in ("1", "1.25")]
    for row in rows:
        samples, rate = soundfile.read(made.audio / row["path"], dtype="float32")
        assert (len(samples), rate) == (row["n_samples"], SAMPLE_RATE)
        if row["id"].startswith("1/"):
            original, _ = soundfile.read(made.folder / f"{row['id'][2:]}.wav", dtype="float32")
            np.testing.assert_allclose(samples, original, atol=2**-15)
    assert len(EXCLUDED.read(made.folder / "excluded.parquet")[0]) == 0


def test_coefficients_are_one_row_per_frame_and_loudness_moves_the_first_alone(made, tmp_path):
    table, header = UTTERANCES.read(made.utterances)
    found, about = read_features(LAYER_FEATURES, made.of(1) / "features.parquet", set(table["id"].to_pylist()))
    assert (about["layer"], about["encoder"], about["dimensions"]) == (0, MFCC, 39)
    assert all(len(found[row["id"]]) == n_frames(row["n_samples"]) for row in table.to_pylist())
    quieter = table.slice(0, 1)
    path = quieter["path"][0].as_py()
    samples, _ = soundfile.read(made.audio / path)
    (tmp_path / path).parent.mkdir()
    soundfile.write(tmp_path / path, 0.5 * samples, SAMPLE_RATE)
    UTTERANCES.write(tmp_path / "utterances.parquet", quieter, **header)
    mfcc(utterances=tmp_path / "utterances.parquet", audio_root=tmp_path, output=tmp_path / "mfcc.parquet")
    [halved] = read_features(LAYER_FEATURES, tmp_path / "mfcc.parquet", {"1/0"})[0].values()
    difference = np.abs(halved.astype(np.float32) - found["1/0"].astype(np.float32)).mean(axis=0)
    assert difference[0] > 5
    assert difference[1:13].max() < 1


def test_an_encoder_is_kept_before_the_first_update_where_it_is_probed_and_at_the_end(made):
    random = from_scratch(made.config("pretraining").encoder.scratch).state_dict()
    weights = {}
    for update in ("0", "3", "last"):
        encoder, origin = model_files.load_fitted(made.encoder(1, update))
        weights[update] = encoder.state_dict()
        assert f"iteration 1, update {update}" in origin["encoder"]
    assert all(torch.equal(random[name], tensor) for name, tensor in weights["0"].items())
    for before, after in (("0", "3"), ("3", "last")):
        moved = {name for name, tensor in weights[after].items() if not torch.equal(tensor, weights[before][name])}
        assert "feature_extractor.conv_layers.0.conv.weight" in moved
        assert "encoder.layers.11.attention.q_proj.weight" in moved
    assert not list(made.folder.rglob("*.kept"))


def test_the_second_iteration_starts_at_random_or_from_the_first(made, tmp_path):
    changed = made.config("pretraining").model_dump(mode="json")
    changed["pretraining"]["iterations"][1]["start"] = "previous"
    config = configs.SLICES["pretraining"].model_validate(changed)
    made.train(2, into=tmp_path, config=config)
    first, random, on = (
        model_files.load(folder)[0].state_dict()["encoder.layers.0.final_layer_norm.weight"]
        for folder in (made.encoder(1), made.encoder(2, "0"), tmp_path / "encoders" / "0")
    )
    assert torch.equal(on, first)
    assert not torch.equal(random, first)


def test_history_tells_loss_and_accuracy_of_every_codebook(made):
    rows = HISTORY.read(made.of(1) / "history.parquet")[0].to_pylist()
    assert {row["update"] for row in rows} == set(range(6))
    assert {"loss", "masked_loss_4", "masked_accuracy_4", "masked_loss_8"} <= {row["quantity"] for row in rows}


def test_masks_are_drawn_as_the_config_says(made, tmp_path, monkeypatch):
    asked = []

    def draw(*drawn: Any, min_spans: int) -> None:
        asked.append((*drawn[1:3], min_spans))
        raise KeyboardInterrupt

    monkeypatch.setattr("gmp_atl.stages.pretraining.span_mask", draw)
    config = made.config("pretraining", 1)
    mask = {"mask": configs.MaskConfig(probability=0.3, length=4, min_spans=3)}
    changed = config.model_copy(update={"pretraining": config.pretraining.model_copy(update=mask)})
    with pytest.raises(KeyboardInterrupt):
        made.train(1, into=tmp_path, config=changed)
    assert asked == [(0.3, 4, 3)]


def test_the_labels_of_a_crop_are_those_of_the_frames_that_are_heard(made, tmp_path, monkeypatch):
    """Clips lie one behind the other, each with a row of samples more than it has frames."""
    together, heard, asked = Convolutions.together, [], []

    def hear(convolutions: Convolutions, samples: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        heard.append(samples.numpy())
        return together(convolutions, samples, lengths)

    def ask(*arguments: Any) -> None:
        asked.append(arguments[4])
        raise KeyboardInterrupt

    monkeypatch.setattr(Convolutions, "together", hear)
    monkeypatch.setattr("gmp_atl.stages.pretraining.masked_prediction", ask)
    changed, clips = made.config("pretraining", 1).model_dump(), UTTERANCES.read(made.utterances)[0].to_pylist()
    changed["pretraining"]["mixing"] = 0.0  # crops are told by their samples
    changed["pretraining"]["iterations"][0]["optimisation"]["batch_size"] = len(clips)
    with pytest.raises(KeyboardInterrupt):
        made.train(1, into=tmp_path, config=configs.SLICES["pretraining"].model_validate(changed))
    [samples], [targets] = heard, asked
    labels = {}
    for size in targets:
        rows = PSEUDO_LABELS.read(made.of(1) / f"{size}.parquet")[0].to_pylist()
        labels[size] = {row["id"]: row["labels"] for row in rows}
    frames, places = n_frames(samples.shape[1]), []
    for number, crop in enumerate(samples):
        [(name, start)] = [(clip["id"], start) for clip in clips for start in starts(crop, made.audio / clip["path"])]
        places.append((name, start))
        for size, of_crops in targets.items():
            assert of_crops[number].tolist() == labels[size][name][start : start + frames], (size, name, start)
    assert sorted({name for name, _ in places}) == sorted(clip["id"] for clip in clips)
    assert len({start for _, start in places}) > 3


def starts(crop: np.ndarray, path: Path) -> list[int]:
    """Frames of a recording that a crop of it, (samples,), may begin at."""
    samples = soundfile.read(path, dtype="float32")[0].astype(np.float16)  # as it is held
    padded = np.pad(samples, (0, HOP))
    firsts = range(0, len(padded) - len(crop) + 1, HOP)
    return [first // HOP for first in firsts if np.array_equal(padded[first : first + len(crop)], crop)]


def test_a_stopped_iteration_ends_with_the_same_encoders(made, tmp_path, monkeypatch):
    """Snakemake removes the output of a stopped job; what was kept on the way must not be lost with it."""
    monkeypatch.setattr(training, "CHECKPOINT_MINUTES", 0.0)
    original = training.Trainer._update

    def stopping(trainer: Any) -> float:
        if trainer.progress.update == 5:
            raise KeyboardInterrupt
        return original(trainer)

    monkeypatch.setattr(training.Trainer, "_update", stopping)
    with pytest.raises(KeyboardInterrupt):
        made.train(1, into=tmp_path)
    assert (tmp_path / "encoders" / "0").exists()
    for file in (tmp_path / "encoders" / "0").iterdir():
        file.unlink()
    monkeypatch.setattr(training.Trainer, "_update", original)
    made.train(1, into=tmp_path)
    for update in ("0", "3", "last"):
        expected = (made.encoder(1, update) / "model.safetensors").read_bytes()
        assert (tmp_path / "encoders" / update / "model.safetensors").read_bytes() == expected


def test_labels_of_other_features_are_refused(made, tmp_path):
    with pytest.raises(UserError, match="pseudo-labels of layer -3, but layer 0 is expected"):
        made.train(1, into=tmp_path, pseudo_labels=[made.of(2) / "6.parquet"])
    with pytest.raises(UserError, match="pseudo-labels of encoder HuBERT 12 x 32, iteration 1, update last"):
        made.train(2, into=tmp_path, previous=made.encoder(1, "3"))


# What is handed on.


def test_what_is_handed_on_is_a_hubert_in_half_precision_with_its_sources(made, tmp_path):
    histories = [made.of(n) / "history.parquet" for n in (1, 2)]
    arguments = {"config": made.config("pretraining"), "utterances": made.utterances, "histories": histories}
    pretrain(**arguments, encoder=made.encoder(2), output=tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    network = HubertModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rounded = model_files.load(made.encoder(2))[0].eval().half().float()
    audio = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = rounded(rounded.local_features(audio[0])[None], torch.tensor([n_frames(4000)]))
        torch.testing.assert_close(network(audio).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "README.md").read_text()
    assert "tones, of the test's own making" in card
    assert "| 1 | MFCCs | 4, 8 | 6 |" in card
    assert "| 2 | layer -3 | 6 | 4 |" in card


# Probes.


def test_a_probe_finds_what_the_features_tell(inputs, stages, made, tmp_path):
    """In the made corpus emotion shifts the local features; the transformer passes it on."""
    arguments = {"config": stages.config("probe"), "utterances": inputs.utterances, "encoder": inputs.encoder}
    probe(**arguments, local_features=inputs.local_features, output=tmp_path / "probes.parquet")
    table, header = PROBES.read(tmp_path / "probes.parquet")
    assert header["utterances"] == 12
    assert sorted(set(table["layer"].to_pylist())) == list(range(-12, 1))
    assert {row["uar"] for row in table.to_pylist() if row["layer"] == 0} == {100.0}
    files = {"probes": [tmp_path / "probes.parquet"], "histories": [made.of(1) / "history.parquet"]}
    probes(names=["random"], **files, output=tmp_path)
    assert "| random  | conv.      | 100.0 |" in (tmp_path / "tables/probes.md").read_text()
    assert "iteration 1" in (tmp_path / "figures/pretraining.svg").read_text()
    assert (tmp_path / "figures/probes.svg").stat().st_size > 1000


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_probe_computes_in_the_precision_of_the_config(inputs, stages, monkeypatch, tmp_path, precision):
    hidden_states, found = Encoder.hidden_states, set()

    def spy(*arguments: Any) -> dict[int, torch.Tensor]:
        states = hidden_states(*arguments)
        found.update(hidden.dtype for hidden in states.values())
        return states

    monkeypatch.setattr(Encoder, "hidden_states", spy)
    files = {"utterances": inputs.utterances, "local_features": inputs.local_features, "output": tmp_path / "probes"}
    probe(config=stages.config("probe", {"compute.precision": precision}), encoder=inputs.encoder, **files)
    assert found == {getattr(torch, precision)}


def test_a_probe_on_what_the_encoder_was_trained_on_is_refused(inputs, stages, claim_fitted_on, tmp_path):
    seen = claim_fitted_on(inputs.encoder, [inputs.ids("S2")[0], "another"])
    files = {"utterances": inputs.utterances, "local_features": inputs.local_features, "output": tmp_path / "no"}
    with pytest.raises(LeakageError, match="trained on 1 of the utterances, such as S2_"):
        probe(config=stages.config("probe"), encoder=seen, **files)


def test_a_recording_that_was_heard_is_known_under_another_name_and_in_another_format(made, stages, tmp_path):
    random = np.random.default_rng(1)
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", random.normal(0, 0.1, 4000), SAMPLE_RATE)
    soundfile.write(tmp_path / "d.flac", soundfile.read(made.folder / "3.wav", dtype="int16")[0], SAMPLE_RATE)
    rows = ["path,emotion,speaker,gender,session"]
    for path, emotion, session in [
        ("a.wav", "sad", 1),
        ("b.wav", "angry", 1),
        ("c.wav", "sad", 2),
        ("d.flac", "angry", 2),
    ]:
        rows.append(f"{path},{emotion},speaker{session},female,S{session}")
    (tmp_path / "own.csv").write_text("\n".join(rows) + "\n")
    changes = {"corpus": {"reader": "manifest", "root": "own.csv"}, "folds.held_out": [["S1"], ["S2"]]}
    outputs = {name: tmp_path / f"{name}.parquet" for name in ("utterances", "excluded", "summary")}
    corpus(config=stages.config("corpus", changes), root=tmp_path / "own.csv", **outputs)
    files = {"utterances": outputs["utterances"], "local_features": tmp_path / "none", "output": tmp_path / "no"}
    with pytest.raises(LeakageError, match="trained on 1 of the utterances, such as d"):
        probe(config=stages.config("probe", changes), encoder=made.encoder(1), **files)


# Mistakes.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\n0.wav\n", "column path is missing; expected path, and optionally id, session; found file"),
        ("path\n9.wav\n", "manifest.csv:2: 9.wav is not there, or not a regular file"),
        ("path\n../0.wav\n", "is outside"),
        ("path\n0.wav\nsome/../0.wav\n", "0 occurs twice: .*manifest.csv:2 and .*manifest.csv:3"),
        ("path\n0.wav\n0.wav\n", "manifest.csv:3"),
        ("path\n", "names no clip that can be used: it has no rows"),
        ("path\nbad.wav\n", "names no clip that can be used: cannot be decoded"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(tmp_path, text, message):
    soundfile.write(tmp_path / "0.wav", np.random.default_rng(0).normal(size=9000) / 9, SAMPLE_RATE)
    (tmp_path / "bad.wav").write_text("no audio")
    (tmp_path / "manifest.csv").write_text(text)
    files = {name: tmp_path / name for name in ("audio_root", "utterances", "excluded")}
    with pytest.raises(UserError, match=message):
        speech(manifest=tmp_path / "manifest.csv", speeds=[1.0], **files)


def test_clips_that_cannot_be_used_are_listed(tmp_path):
    soundfile.write(tmp_path / "0.wav", np.random.default_rng(0).normal(size=9000) / 9, SAMPLE_RATE)
    soundfile.write(tmp_path / "short.wav", np.random.default_rng(0).normal(size=450) / 9, SAMPLE_RATE)
    (tmp_path / "manifest.csv").write_text("path\n0.wav\nshort.wav\n")
    files = {name: tmp_path / name for name in ("audio_root", "utterances", "excluded")}
    speech(manifest=tmp_path / "manifest.csv", speeds=[1.0, 2.0], **files)
    assert EXCLUDED.read(tmp_path / "excluded")[0].to_pylist() == [
        {"id": "short", "reason": "shorter than one HuBERT frame (25 ms) at speed 2"}
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": [{"layer": -3, "sizes": [4], "updates": 5}]}, "the first has layer 0 and start random"),
        ({"probes": [4]}, "probes must lie before the last update of every iteration"),
        ({"speeds": [1.0, 1.004]}, "speeds.1: Input should be a multiple of 0.01"),
        ({"iterations": [{"layer": 0, "sizes": [4, 4], "updates": 5}]}, "sizes: Value error, 4 is named twice"),
        ({"speeds": [1.0, 1.0]}, "speeds: Value error, 1.0 is named twice"),
        ({"attribution": []}, "pretraining.attribution"),
    ],
)
def test_a_config_that_makes_no_pre_training_is_refused(changes, message):
    from conftest import SETTINGS

    with pytest.raises(UserError, match=message):
        configs.parse({**SETTINGS, "pretraining": {**PRETRAINING, "speech": "manifest.csv", **changes}})


def test_iterations_to_come_change_nothing_of_those_before():
    from conftest import SETTINGS

    whole = configs.parse({**SETTINGS, "pretraining": {**PRETRAINING, "speech": "manifest.csv"}})
    of_first = configs.slice_for(configs.up_to(whole, 1), "pretraining")["pretraining"]
    assert json.dumps(of_first["iterations"]) == json.dumps([whole.pretraining.iterations[0].model_dump()])
    assert configs.identity(whole) == configs.identity(configs.parse(SETTINGS))


def test_fold_0_holds_out_nothing_and_its_features_tell_so(made):
    assert LOCAL_FEATURES.open(made.of(2) / "local.parquet").header["encoder"].startswith("HuBERT 12 x 32, iteration 1")
    assert LAYER_FEATURES.open(made.of(2) / "features.parquet").header["fitted_on"] == (
        UTTERANCES.read(made.utterances)[0]["id"].to_pylist()
    )
