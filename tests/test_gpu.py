"""The stages on a CUDA device against the same on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Stages

from gmp_atl import encoder as encoders
from gmp_atl.formats import LAYER_FEATURES, read_features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
]


def test_layer_features_are_those_of_the_cpu(stages: Stages) -> None:
    frames = []
    for gpus in (0, 1):
        path = stages.layer_features(stages.inputs.encoder, -3, gpus=gpus)
        found, _ = read_features(LAYER_FEATURES, path, set(stages.inputs.ids("S2", "S3")))
        frames.append(np.concatenate([found[utterance] for utterance in sorted(found)]).astype(np.float32))
    np.testing.assert_allclose(frames[0], frames[1], atol=5e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_starts_with_the_loss_of_the_cpu(stages: Stages, precision: str) -> None:
    changes = {
        "compute.precision": precision,
        "multitask.optimisation.dropout": 0.0,
        "multitask.optimisation.attention_dropout": 0.0,
    }
    on_cpu, on_gpu = (stages.multitask(changes, gpus=gpus) for gpus in (0, 1))
    assert on_gpu.history["loss"] == pytest.approx(on_cpu.history["loss"], rel=0.05)
    assert on_gpu.weights.keys() == on_cpu.weights.keys()
    encoders.load(on_gpu.folder)
