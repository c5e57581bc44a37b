"""Every open reading of the paper is a switch, and the switch does what it says (docs/readings.md, by number)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from gmp_atl import classifier, clips, training
from gmp_atl.classifier import Classifier
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import HeadConfig, RetrainingConfig, SpecAugmentConfig
from gmp_atl.formats import LAYER_FEATURES, PREDICTIONS, PSEUDO_LABELS
from gmp_atl.masked_prediction import MaskedPredictor, masked_prediction
from gmp_atl.model_files import load_tensors
from gmp_atl.stages import clustering as clustering_stage
from gmp_atl.stages import finetuning as finetuning_stage
from gmp_atl.stages import retraining as retraining_stage

STANDSTILL = 1e-12
"""A learning rate at which weights stay, to seven digits, what they were."""
N_LAYERS = 12


@pytest.fixture
def start(inputs) -> dict[str, torch.Tensor]:
    """Weights of the pre-trained HuBERT."""
    return load_tensors(inputs.encoder / "model.safetensors")[0]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def layers_in(names: set[str]) -> set[int]:
    """Transformer layers, from 0, that parameters belong to."""
    return {int(name.split(".")[2]) for name in names if name.startswith("encoder.layers.")}


def spied(monkeypatch, module: Any, name: str) -> list[tuple[tuple, Any]]:
    """Arguments and result of every call of a function."""
    calls, function = [], getattr(module, name)

    def spy(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(module, name, spy)
    return calls


# 1. Is HuBERT trained in stage 1?


def test_1_trained_means_the_transformer_and_never_the_convolutions(stages, start):
    names = changed(start, stages.multitask().weights)
    assert layers_in(names) == set(range(N_LAYERS))
    assert not any(name.startswith("feature_extractor.") for name in names)
    assert any(name.startswith("feature_projection.") for name in names)


def test_1_frozen_leaves_every_weight_of_hubert_as_it_was(stages, start):
    short, long = (stages.multitask({"multitask.encoder": "frozen", "multitask.epochs": n}) for n in (1, 2))
    assert not changed(start, long.weights)
    assert changed(short.head, long.head) == set(long.head)


# 2. What retraining starts from.


def test_2_retraining_goes_on_from_the_encoder_that_it_is_given(stages, upstream, start):
    """Which one the workflow gives it is tested in tests/test_workflow.py."""
    changes = {"retraining.optimisation.learning_rate": STANDSTILL, "retraining.updates": 1}
    pretrained = stages.retraining(upstream.codebooks, changes)
    stage_1 = stages.retraining(upstream.codebooks, changes, encoder=upstream.multitask.folder)
    assert close(pretrained.weights, start)
    assert close(stage_1.weights, upstream.multitask.weights)
    assert not close(pretrained.weights, stage_1.weights)


# 3. Frames in the retraining loss, 5. codebook heads.


class FrameProblem:
    """One batch, its mask, and a model whose loss can be looked at as the labels change."""

    def __init__(self, encoder: Any, **config: Any) -> None:
        torch.manual_seed(0)
        self.config = RetrainingConfig(**config)
        self.model = MaskedPredictor(encoder, 8, [5], self.config.codebook_head).eval()
        self.local, self.lengths = torch.randn(2, 12, 16), torch.tensor([12, 7])
        self.mask = torch.zeros(2, 12, dtype=torch.bool)
        self.mask[0, 2:6] = self.mask[1, 1:5] = True
        self.labels = torch.arange(24).reshape(2, 12) % 5

    def mean_loss(self, shift_masked: int = 0, shift_unmasked: int = 0) -> float:
        """With the labels of masked, or of unmasked, frames replaced by others."""
        labels = (self.labels + torch.where(self.mask, shift_masked, shift_unmasked)) % 5
        weight = self.config.unmasked_weight
        terms = masked_prediction(self.model, self.local, self.lengths, self.mask, {5: labels}, weight)
        return terms.loss.item() / terms.count


def test_3_by_default_unmasked_frames_do_not_count(tiny_encoder):
    problem = FrameProblem(tiny_encoder)
    assert problem.mean_loss(shift_unmasked=1) == problem.mean_loss()
    assert problem.mean_loss(shift_masked=1) != problem.mean_loss()


def test_3_with_a_weight_unmasked_frames_count_by_it(tiny_encoder):
    """Of 19 valid frames 8 are masked; HuBERT divides by all frames that have a weight."""
    none, half, full = (FrameProblem(tiny_encoder, unmasked_weight=weight) for weight in (0.0, 0.5, 1.0))
    masked, everywhere = 8 * none.mean_loss(), 19 * full.mean_loss()
    assert 19 * half.mean_loss() == pytest.approx(masked + 0.5 * (everywhere - masked), rel=1e-5)
    assert full.mean_loss(shift_unmasked=1) != full.mean_loss()


@pytest.mark.parametrize(("kind", "bounded"), [("linear", False), ("cosine", True)])
def test_5_cosine_heads_give_cosines_over_a_temperature_of_a_tenth(tiny_encoder, kind, bounded):
    problem = FrameProblem(tiny_encoder, codebook_head=kind)
    with torch.no_grad():
        for parameter in problem.model.heads.parameters():
            parameter *= 1000
        logits = problem.model(problem.local, problem.lengths, problem.mask, torch.arange(12))[5]
    assert (logits.abs().max() <= 10 + 1e-4) == bounded


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_5_either_head_trains_and_the_codebooks_are_summed_unweighted(stages, upstream, kind):
    history = stages.retraining(upstream.codebooks, {"retraining.codebook_head": kind}).history
    summed = np.add(history["masked_loss_4"], history["masked_loss_8"])
    np.testing.assert_allclose(history["loss"], summed, rtol=1e-5)


# 4. The mask.


@pytest.mark.parametrize(("probability", "length", "spans"), [(0.8, 10, 1), (0.06, 15, 1), (0.06, 15, 2)])
def test_4_frames_are_masked_as_the_config_says(stages, upstream, monkeypatch, probability, length, spans):
    calls = spied(monkeypatch, retraining_stage, "span_mask")
    mask = {"probability": probability, "length": length, "min_spans": spans}
    stages.retraining(upstream.codebooks, {f"retraining.mask.{key}": value for key, value in mask.items()})
    assert {arguments[1:3] for arguments, _ in calls} == {(probability, length)}
    masked = sum(int(mask.sum()) for _, mask in calls)
    valid = sum(int(arguments[0].sum()) for arguments, _ in calls)
    clips = sum(len(mask) for _, mask in calls)
    if probability == 0.8:
        assert 0.4 < masked / valid < 0.7
    elif spans == 1:  # in each of these short clips
        assert masked == pytest.approx(length * clips, rel=0.3)
    else:  # which may overlap
        assert 1.2 * length * clips < masked < 2 * length * clips


# 6. The layer that the head reads.


@pytest.mark.parametrize("stage", ["multitask", "finetuning"])
def test_6_layers_above_the_one_that_the_head_reads_are_not_trained(stages, start, stage):
    train = getattr(stages, stage)
    assert layers_in(changed(start, train({"head.layer": -1}).weights)) == set(range(N_LAYERS))
    assert layers_in(changed(start, train({"head.layer": -3}).weights)) == set(range(N_LAYERS - 2))


def test_6_layers_above_the_one_that_the_head_reads_get_no_gradient(tiny_encoder):
    model = Classifier(tiny_encoder, HeadConfig(layer=-3, lstm_hidden=8, projection=8), {"emotion": 2})
    model(Batch([0], torch.arange(9)[None], torch.randn(1, 9, 16), torch.tensor([9])))["emotion"].sum().backward()
    reached = {name for name, parameter in tiny_encoder.named_parameters() if parameter.grad is not None}
    assert layers_in(reached) == set(range(N_LAYERS - 2))


# 7. Steps, 8. schedule.


def test_7_stages_train_for_as_many_epochs_or_updates_as_the_config_says(stages, upstream):
    """A fold trains on 8 clips: two updates of 4 per epoch."""
    assert len(stages.multitask({"multitask.epochs": 3}).history["loss"]) == 3 * 2
    assert len(stages.retraining(upstream.codebooks, {"retraining.updates": 5}).history["loss"]) == 5
    assert len(stages.finetuning({"finetuning.epochs": 1}).history["loss"]) == 1 * 2


def test_8_the_learning_rate_follows_the_schedule_of_its_stage(stages, upstream):
    def rates(schedule: str, warmup: float) -> list[float]:
        optimisation = {"schedule": schedule, "warmup": warmup, "learning_rate": 1e-3, "batch_size": 4}
        changes = {"retraining.updates": 4, "retraining.optimisation": optimisation}
        return stages.retraining(upstream.codebooks, changes).history["learning_rate"]

    assert rates("constant", 0.0) == pytest.approx([1e-3] * 4)
    assert rates("linear", 0.0) == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert rates("linear", 0.5) == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


# 9. Which checkpoint is tested.


def clips_read(monkeypatch) -> list[list[str]]:
    """Ids of each set of clips that fine-tuning opens."""
    opened, read = [], Clips.read

    def spy(path: Any, split: Any, *, encoder: str) -> Clips:
        opened.append(split.ids)
        return read(path, split, encoder=encoder)

    monkeypatch.setattr(finetuning_stage.Clips, "read", spy)
    return opened


def test_9_by_default_no_clip_is_validated_on(stages, monkeypatch):
    opened = clips_read(monkeypatch)
    history = stages.finetuning().history
    assert opened == [stages.inputs.ids("S2", "S3")]
    assert not any(quantity.startswith("validation") for quantity in history)


def test_9_a_training_group_that_is_held_out_is_not_trained_on(stages, monkeypatch):
    """Fold 1 validates on the group of fold 2."""
    opened = clips_read(monkeypatch)
    history = stages.finetuning({"finetuning.selection": "held_out_training_group"}).history
    assert sorted(opened) == sorted([stages.inputs.ids("S3"), stages.inputs.ids("S2")])
    assert len(history["loss"]) == 2 * 1  # epochs x batches of 4 clips
    assert len(history["validation_uar"]) == 2


def test_9_the_last_fold_validates_on_the_first_group(stages, monkeypatch):
    opened = clips_read(monkeypatch)
    stages.finetuning({"finetuning.selection": "held_out_training_group", "finetuning.epochs": 1}, fold=3)
    assert sorted(opened) == sorted([stages.inputs.ids("S2"), stages.inputs.ids("S1")])


def test_9_an_oracle_looks_at_the_test_fold_and_says_so(stages, monkeypatch):
    opened, changes = clips_read(monkeypatch), {"finetuning.selection": "oracle"}
    model = stages.finetuning(changes)
    assert sorted(opened) == sorted([stages.inputs.ids("S2", "S3"), stages.inputs.ids("S1")])
    assert not set(model.fitted_on) & set(stages.inputs.ids("S1"))
    assert PREDICTIONS.read(stages.evaluation(model, changes))[1]["selection"] == "oracle"


# 10. What k-means is fitted on, 11. by which algorithm.


@pytest.mark.parametrize(("fit_on", "sessions"), [("training", ("S2", "S3")), ("all", ("S1", "S2", "S3"))])
def test_10_k_means_is_fitted_on_the_frames_that_the_reading_allows(stages, upstream, fit_on, sessions):
    changes, ids = {"clustering.fit_on": fit_on}, stages.inputs.ids(*sessions)
    features = stages.layer_features(upstream.multitask.folder, -3, changes)
    codebook = stages.clustering(features, 4, changes)
    labels, metadata = PSEUDO_LABELS.read(codebook.pseudo_labels)
    with safe_open(codebook.centroids, framework="np") as file:
        statistics = file.metadata()["gmp_atl"]
    assert sorted(metadata["fitted_on"]) == sorted(ids)
    assert f'"frames_per_centroid": {sum(len(stages.inputs.frames[each]) for each in ids) / 4}' in statistics
    assert labels["id"].to_pylist() == stages.inputs.ids("S2", "S3"), "labels are for training frames in either case"
    assert sorted(LAYER_FEATURES.read(features)[0]["id"].to_pylist()) == sorted(ids)


def test_10_predictions_of_the_transductive_reading_say_so(stages):
    predictions = stages.evaluation(stages.finetuning({"finetuning.epochs": 1}), fit_on="all")
    assert PREDICTIONS.read(predictions)[1]["fit_on"] == "all"


def test_11_mini_batches_are_scikit_learns_and_lloyd_sees_every_frame(stages, upstream, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Lloyd's algorithm is asked")

    monkeypatch.setattr(clustering_stage.kmeans, "initial_centroids", refuse)
    stages.clustering(upstream.layer_features, 4, {"clustering.algorithm": "mini_batch"})
    with pytest.raises(AssertionError, match="Lloyd's"):
        stages.clustering(upstream.layer_features, 4, {"clustering.algorithm": "lloyd"})


# 12. The head of fine-tuning.


@pytest.mark.parametrize("loss", ["ce", "ams"])
def test_12_the_head_of_stage_1_is_taken_over_where_the_reading_says_so(stages, upstream, loss):
    """With AM-Softmax all but the bias of the last layer, which its cosines have not."""
    rate = {"finetuning.optimisation.learning_rate": STANDSTILL, "finetuning.epochs": 1}
    fresh = stages.finetuning(rate, loss=loss)
    taken = stages.finetuning(
        {**rate, "finetuning.head": "multitask"}, loss=loss, multitask_head=upstream.multitask.folder
    )
    of_stage_1 = upstream.multitask.head
    assert ("tasks.emotion.output.bias" in taken.head) == (loss == "ce")
    assert not any(name.startswith("tasks.gender") for name in taken.head)
    assert close(taken.head, of_stage_1)
    assert not any(torch.allclose(fresh.head[name], of_stage_1[name], atol=1e-3) for name in fresh.head)


# 13. Class weights.


def test_13_inverse_frequency_gives_every_class_the_same_share_of_the_loss():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    names = ["angry", "happy", "sad"]
    weights = classifier.class_weights(labels, names, "inverse_frequency")
    shares = torch.bincount(labels, weights=weights[labels])
    torch.testing.assert_close(shares, torch.full((3,), 10 / 3))
    assert classifier.class_weights(labels, names, "none").tolist() == [1, 1, 1]


@pytest.mark.parametrize("stage", ["multitask", "finetuning"])
def test_13_weights_change_the_loss_of_an_unbalanced_fold(stages, relabelled, stage):
    """Seven clips of one class and one of the other: 4/7 and 4 instead of 1 and 1."""
    utterances = relabelled(lambda utterance: "sad" if utterance == "S2_male_sad" else "angry")
    first = {}
    for kind in ("none", "inverse_frequency"):
        changes = {f"{stage}.class_weights": kind, f"{stage}.optimisation.batch_size": 8}
        history = getattr(stages, stage)(changes, utterances=utterances).history
        first[kind] = history["emotion_loss" if stage == "multitask" else "loss"][0]
    assert first["none"] != pytest.approx(first["inverse_frequency"], rel=1e-3)


@pytest.mark.parametrize("stage", ["multitask", "finetuning"])
def test_13_weights_change_nothing_where_classes_are_balanced(stages, stage):
    none, inverse = (getattr(stages, stage)({f"{stage}.class_weights": kind}) for kind in ("none", "inverse_frequency"))
    assert none.history == inverse.history


# 14. Clip length.


@pytest.mark.parametrize("stage", ["multitask", "retraining", "finetuning"])
def test_14_training_crops_to_the_longest_allowed(stages, upstream, monkeypatch, stage):
    calls = spied(monkeypatch, training, "collate")
    before = [upstream.codebooks] if stage == "retraining" else []
    getattr(stages, stage)(*before, {f"{stage}.optimisation.max_clip_seconds": 0.4})
    lengths = [length for _, batch in calls for length in batch.lengths.tolist()]
    assert set(lengths) == {20}
    assert len({crop.start for (_, crops), _ in calls for crop in crops}) > 3


def test_14_testing_sees_whole_clips(stages, monkeypatch):
    changes = {"finetuning.optimisation.max_clip_seconds": 0.4, "finetuning.epochs": 1}
    model = stages.finetuning(changes)
    calls = spied(monkeypatch, clips, "collate")
    stages.evaluation(model, changes)
    lengths = [length for _, batch in calls for length in batch.lengths.tolist()]
    assert sorted(lengths) == sorted(len(stages.inputs.frames[each]) for each in stages.inputs.ids("S1"))


# 15. SpecAugment.


@pytest.mark.parametrize("stage", ["multitask", "finetuning"])
@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_15_frames_are_masked_in_classification_only_where_the_reading_says_so(stages, start, stage, probability):
    """The embedding that replaces masked frames is trained if, and only if, it is used."""
    changes = {f"{stage}.spec_augment.probability": probability, f"{stage}.spec_augment.length": 5}
    names = changed(start, getattr(stages, stage)(changes).weights)
    assert ("masked_spec_embed" in names) == (probability > 0)


def test_15_a_clip_has_two_spans_at_least_as_in_transformers():
    clips, random = 2000, torch.Generator().manual_seed(0)
    batch = Batch([*range(clips)], torch.empty(0), torch.empty(0), torch.full((clips,), 50))
    drawn = classifier.spec_augment(batch, SpecAugmentConfig(probability=0.05, length=10), random)
    theirs = _compute_mask_indices((clips, 50), 0.05, 10, min_masks=HubertConfig().mask_time_min_masks)
    assert drawn.float().mean() == pytest.approx(theirs.mean(), abs=0.01)


def test_15_testing_masks_nothing(stages, monkeypatch):
    changes = {"finetuning.spec_augment.probability": 0.5, "finetuning.epochs": 1}
    model = stages.finetuning(changes)
    calls = spied(monkeypatch, classifier, "span_mask")
    stages.evaluation(model, changes)
    assert not calls


# 16. Size of the BiLSTM.


@pytest.mark.parametrize(("hidden", "layers"), [(8, 1), (5, 2)])
def test_16_the_bilstm_is_of_the_size_that_the_config_says(stages, hidden, layers):
    changes = {"head.lstm_hidden": hidden, "head.lstm_layers": layers, "multitask.epochs": 1}
    head = stages.multitask(changes).head
    recurrent = [tensor for name, tensor in head.items() if "weight_hh" in name]
    assert [tuple(tensor.shape) for tensor in recurrent] == [(4 * hidden, hidden)] * 2 * layers
    assert head["tasks.emotion.hidden.weight"].shape == (8, 2 * hidden)


# 17. Seeds.


@pytest.mark.parametrize("stage", ["multitask", "retraining", "finetuning"])
def test_17_equal_seeds_write_equal_files_and_other_seeds_others(stages, upstream, stage):
    before = [upstream.codebooks] if stage == "retraining" else []
    first, again, other = (getattr(stages, stage)(*before, seed=seed) for seed in (0, 0, 1))
    for file in first.folder.iterdir():
        assert (again.folder / file.name).read_bytes() == file.read_bytes(), file.name
    assert layers_in(changed(first.weights, other.weights)) == set(range(N_LAYERS))
    assert first.history != other.history


@pytest.fixture
def relabelled(inputs, tmp_path, write_utterances) -> Callable[[Callable[[str], str]], Any]:
    """The utterance table with other emotions."""
    numbers = itertools.count()

    def write(emotion: Callable[[str], str]) -> Any:
        from gmp_atl.formats import UTTERANCES

        rows = UTTERANCES.read(inputs.utterances)[0].to_pylist()
        path = tmp_path / f"relabelled{next(numbers)}.parquet"
        return write_utterances(path, [{**row, "emotion": emotion(row["id"])} for row in rows])

    return write
