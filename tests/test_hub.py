"""An exported model is one of transformers, and its scores are those of the model that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HubertModel,
    WavLMConfig,
    WavLMModel,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from gmp_atl import audio, classifier, cli, hub, model_files
from gmp_atl.audio import MIN_SAMPLES
from gmp_atl.clips import Clips, local_features
from gmp_atl.config import ComputeConfig
from gmp_atl.errors import UserError
from gmp_atl.formats import PREDICTIONS

transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def exported(spoken, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert cli.main(["export", str(spoken.model), str(folder)]) == 0
    return folder


def clips(spoken) -> dict[str, np.ndarray]:
    """Those of session S1, as the corpus stage reads them."""
    return {path.stem: audio.load(path) for path in sorted(spoken.audio.glob("S1*"))}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_model_runs_in_any_precision(spoken, exported, dtype, gradients):
    samples = torch.from_numpy(next(iter(clips(spoken).values())))[None]
    with torch.set_grad_enabled(gradients):
        expected, found = (
            AutoModelForAudioClassification.from_pretrained(exported, dtype=each)(samples.to(each)).logits
            for each in (torch.float32, dtype)
        )
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1 * float(expected.abs().max()), rtol=0)


def test_scores_of_the_pipeline_are_those_of_evaluation(spoken, exported):
    classify = pipeline("audio-classification", model=str(exported), device="cpu")
    samples = clips(spoken)
    for row in PREDICTIONS.read(spoken.predictions)[0].to_pylist():
        found = {each["label"]: each["score"] for each in classify(samples[row["id"]])}
        assert found == pytest.approx(dict(zip(["angry", "sad"], row["scores"], strict=True)), abs=1e-5)


def test_padding_changes_nothing_whatever_it_holds(spoken, exported):
    model = AutoModelForAudioClassification.from_pretrained(exported).eval()
    extract = AutoFeatureExtractor.from_pretrained(exported)
    samples = list(clips(spoken).values())
    assert len({len(each) for each in samples}) == 4
    batch = extract(samples, sampling_rate=16_000, padding=True, return_tensors="pt")
    batch["input_values"][batch["attention_mask"] == 0] = float("nan")
    with torch.inference_mode():
        together = model(**batch).logits
        for logits, clip in zip(together, samples, strict=True):
            alone = model(**extract(clip, sampling_rate=16_000, return_tensors="pt")).logits[0]
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
            unmasked = extract(clip, sampling_rate=16_000, return_tensors="pt")["input_values"]
            torch.testing.assert_close(model(unmasked, return_dict=False)[0][0], alone, atol=1e-5, rtol=0)


def test_a_recording_without_a_frame_is_refused(exported):
    model = AutoModelForAudioClassification.from_pretrained(exported)
    with pytest.raises(ValueError, match="399 samples"):
        model(torch.zeros(1, 399))


def test_the_model_survives_saving_and_loading(exported, tmp_path):
    model = AutoModelForAudioClassification.from_pretrained(exported)
    model.save_pretrained(tmp_path / "again")
    again = hub.GmpAtlForAudioClassification.from_pretrained(tmp_path / "again")
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": again.config.name_or_path}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_the_encoder_alone_is_a_hubert_of_transformers(spoken, exported):
    samples = torch.from_numpy(next(iter(clips(spoken).values())))[None]
    with torch.inference_mode():
        of_export, of_folder = (
            HubertModel.from_pretrained(folder).eval()(samples).last_hidden_state for folder in (exported, spoken.model)
        )
    assert torch.equal(of_export, of_folder)


def evaluate(spoken, folder: Path) -> Path:
    """The evaluation as the workflow runs it, with its record; the evaluations' folder."""
    options = {
        "config": spoken.stages.config("evaluation", spoken.changes).model_dump_json(),
        "utterances": spoken.stages.inputs.utterances,
        "local-features": spoken.stages.inputs.local_features,
        "model": spoken.model,
        "variant": "main",
        "gmps": "none",
        "loss": spoken.loss,
        "fit-on": "training",
        "fold": 1,
        "seed": 0,
        "predictions": folder / "evaluations" / "a" / "predictions.parquet",
        "metrics": folder / "evaluations" / "a" / "metrics.json",
        "provenance": folder / "evaluations" / "provenance" / "a.json",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert cli.main(["evaluation", *arguments]) == 0
    return folder / "evaluations"


def test_the_card_tells_corpus_fold_figures_and_licence(spoken, tmp_path):
    evaluations = evaluate(spoken, tmp_path)
    hub.export(spoken.model, tmp_path / "model", evaluations)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    figures = json.loads((evaluations / "a" / "metrics.json").read_text())
    record = json.loads((evaluations / "provenance" / "a.json").read_text())
    for told in (
        f"**UAR {figures['uar']:.1f} %, WAR {figures['war']:.1f} %**",
        "session S1; 4 whole utterances",
        "IEMOCAP (PARTIAL)",
        "falls under that licence",
        "tiny random HuBERT",
        f"torch {torch.__version__}",
        record["packages"]["python"],
        (record["commit"] or "no commit")[:12],
    ):
        assert told in card


def test_without_records_the_card_says_so_and_other_evaluations_are_refused(spoken, exported, upstream, tmp_path):
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "not recorded" in card
    assert "UAR" not in card
    evaluations = evaluate(spoken, tmp_path)
    other = spoken.stages.finetuning({**spoken.changes, "finetuning.margin": 0.3}, loss=spoken.loss, seed=1)
    with pytest.raises(UserError, match="has no evaluation of"):
        hub.export(other.folder, tmp_path / "other", evaluations)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_exists_is_not_written_to(spoken, exported):
    before = sorted((path, path.stat().st_mtime_ns) for path in exported.parent.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        hub.export(spoken.model, exported)
    assert sorted((path, path.stat().st_mtime_ns) for path in exported.parent.rglob("*")) == before


def test_onnx_gives_the_scores_of_evaluation_and_of_any_length(spoken, tmp_path):
    folder = tmp_path / "model"
    assert cli.main(["export", str(spoken.model), str(folder), "--onnx"]) == 0
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["angry", "sad"]
    samples = clips(spoken)
    for row in PREDICTIONS.read(spoken.predictions)[0].to_pylist():
        [[*scores]] = session.run(["scores"], {"samples": samples[row["id"]][None]})[0]
        assert scores == pytest.approx(row["scores"], abs=1e-5)
    random = np.random.default_rng(0)
    network, described = classifier.load(spoken.model)
    for length in (MIN_SAMPLES, MIN_SAMPLES + 1, 7_777, 70_000):
        noise = random.normal(size=length).astype(np.float32)
        [local] = local_features(network.encoder, [noise], [Path("noise")], normalise=described.normalise_audio)
        expected = classifier.scores(
            network, described, Clips(["noise"], [local]), ComputeConfig(precision="float32"), torch.device("cpu")
        )
        found = session.run(["scores"], {"samples": noise[None]})[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_model_on_wavlm_is_exported_too(spoken, tmp_path):
    wavlm = WavLMConfig(
        **json.loads((spoken.model / "config.json").read_text())
        | {"model_type": "wavlm", "num_buckets": 32, "max_bucket_distance": 40}
    )
    torch.manual_seed(0)
    WavLMModel(wavlm).save_pretrained(tmp_path / "wavlm")
    encoder, _ = model_files.load(tmp_path / "wavlm")
    network, described = classifier.load(spoken.model)
    model = classifier.Classifier(encoder, described.head, {"emotion": 2}, cosine=described.loss == "ams")
    model.head.load_state_dict(network.head.state_dict())
    classifier.save(model, tmp_path / "model", **described.model_dump())
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "exported"), "--onnx"]) == 0

    assert "The encoder is a WavLM" in (tmp_path / "exported/README.md").read_text()
    noise = 0.1 * np.random.default_rng(0).normal(size=9_000).astype(np.float32)
    network, described = classifier.load(tmp_path / "model")
    [local] = local_features(network.encoder, [noise], [Path("noise")], normalise=described.normalise_audio)
    expected = classifier.scores(
        network, described, Clips(["noise"], [local]), ComputeConfig(precision="float32"), torch.device("cpu")
    )
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "model.onnx")
    np.testing.assert_allclose(session.run(["scores"], {"samples": noise[None]})[0], expected, atol=1e-5)
    found = pipeline("audio-classification", model=str(tmp_path / "exported"), device="cpu")(noise)
    assert {each["label"]: each["score"] for each in found} == pytest.approx(
        dict(zip(described.classes, expected[0].tolist(), strict=True)), abs=1e-5
    )
