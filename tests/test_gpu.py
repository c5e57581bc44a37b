"""The stages on a CUDA device against the same on the CPU."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Spoken, Stages
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl import clips, devices, model_files
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import ComputeConfig, OptimisationConfig
from gmp_atl.encoder import Encoder, Regularisation
from gmp_atl.formats import HISTORY, LAYER_FEATURES, read_features
from gmp_atl.graphs import LayerGraphs, Pass
from gmp_atl.packing import Packing
from gmp_atl.positions import PositionEmbedding
from gmp_atl.randomness import Key
from gmp_atl.training import Terms, Trainer

DEVICE = torch.device("cuda")

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


@pytest.mark.parametrize(("norm", "biased"), [("group", False), ("layer", False), ("layer", True)])
def test_local_features_are_those_of_the_cpu(tiny_encoder: Encoder, norm: str, biased: bool) -> None:
    encoder = Encoder(replace(tiny_encoder.architecture, feat_extract_norm=norm, conv_bias=biased)).eval()
    # Without a norm over channels, a new encoder's features are too small for the tolerance.
    encoder.load_state_dict(tiny_encoder.state_dict(), strict=False)
    for layer in encoder.feature_extractor.conv_layers if biased else ():
        nn.init.normal_(layer.conv.bias)
    random = np.random.default_rng(0)
    waves = [random.normal(0, 0.1, length).astype(np.float32) for length in (400, 9000, 5000)]
    found = [
        clips.local_features(encoder.to(device), waves, [Path("noise")] * 3, normalise=False)
        for device in ("cpu", "cuda")
    ]
    for on_cpu, on_gpu in zip(*found, strict=True):
        np.testing.assert_allclose(on_cpu.astype(np.float32), on_gpu.astype(np.float32), atol=5e-3)


def test_positions_of_wide_groups_are_those_of_the_cpu(tiny_encoder: Encoder) -> None:
    """On a GPU they are computed by Fourier transform."""
    positions = PositionEmbedding(replace(tiny_encoder.architecture, num_conv_pos_embedding_groups=2)).eval()
    hidden = torch.randn(2, 70, tiny_encoder.architecture.hidden_size)
    with torch.inference_mode():
        on_cpu, on_gpu = positions(hidden), positions.cuda()(hidden.cuda()).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[50, 50], [1, 37, 50]])
def test_hidden_states_in_bfloat16_point_where_those_of_the_cpu_do(tiny_encoder: Encoder, lengths: list[int]) -> None:
    """Padded clips are packed on a GPU."""
    local = torch.randn(len(lengths), 50, tiny_encoder.architecture.conv_dim[-1])
    valid = torch.arange(50) < torch.tensor(lengths)[:, None]
    encoder = copy.deepcopy(tiny_encoder).eval()
    layers = range(-tiny_encoder.architecture.num_hidden_layers, 0)
    with torch.inference_mode():
        on_cpu = encoder.hidden_states(local, torch.tensor(lengths), layers)
        encoder.cuda().cast(torch.bfloat16)
        on_gpu = encoder.hidden_states(local.cuda(), torch.tensor(lengths), layers)
    for layer in layers:
        similarity = F.cosine_similarity(on_gpu[layer].float().cpu(), on_cpu[layer], dim=-1)[valid]
        assert similarity.min() > 0.995, layer


def plain(hidden: Tensor, packing: Packing, depth: int, run: Pass) -> Tensor:
    return run(hidden, packing)


@pytest.mark.parametrize("fuses", [False, True])
def test_replayed_layers_give_the_states_and_gradients_of_plain_ones(tiny_encoder: Encoder, fuses: bool) -> None:
    """With dropout, which a graph draws anew at every pass."""
    if fuses and not devices.builds_kernels(torch.device("cuda")):
        pytest.skip("Triton needs a C compiler, and finds none")
    architecture = tiny_encoder.architecture
    encoders = [Encoder(architecture, Regularisation(0.1, 0.1)).cuda().train() for _ in range(2)]
    for encoder in encoders:
        encoder.load_state_dict(tiny_encoder.state_dict())
        for parameter in encoder.of_transformer():
            parameter.data = parameter.data.bfloat16()
    graphs = LayerGraphs(encoders[0].encoder.layers)
    encoders[0].encoder.graphs, encoders[1].encoder.graphs = graphs, plain
    encoders[0].encoder.fuses = encoders[1].encoder.fuses = fuses
    for turn in range(10):
        lengths = [torch.tensor([50, 37, 1 + turn]), torch.tensor([90, 90])][turn % 2]
        local = torch.randn(len(lengths), int(lengths.max()), architecture.conv_dim[-1]).cuda()
        valid = torch.arange(local.shape[1]) < lengths[:, None]
        states = []
        for encoder in encoders:
            encoder.zero_grad()
            torch.manual_seed(turn)
            states.append(encoder(local, lengths).float()[valid])
            states[-1].square().sum().backward()
        torch.testing.assert_close(*states, atol=1e-2, rtol=1e-2)
        for replayed, parameter in zip(*(encoder.encoder.layers.parameters() for encoder in encoders), strict=True):
            total = graphs.gradients[replayed] if turn >= 4 else replayed.grad.float()
            torch.testing.assert_close(
                total, parameter.grad.float(), atol=2e-2 * float(parameter.grad.abs().max()), rtol=0
            )
            graphs.gradients[replayed].zero_()
    assert [replayed.grad for replayed in encoders[0].encoder.layers.parameters()] == [None] * len(graphs.gradients)


class Tagger(nn.Module):
    """A class for every frame, by a layer of an encoder."""

    def __init__(self, encoder: Encoder, layer: int) -> None:
        super().__init__()
        self.encoder, self.layer, self.output = encoder, layer, nn.Linear(encoder.architecture.hidden_size, 4)

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.output(self.encoder(batch.local, batch.lengths, self.layer).float())
        return out


def losses(model: Tagger, folder: Path, *, replays: bool) -> list[float]:
    """Of twenty updates, of several batches each, on clips of which some are of equal lengths."""
    random = np.random.default_rng(0)
    lengths = [40, 30, 20, 40, 30, 20, 13, 40, 30, 20]
    width = model.encoder.architecture.conv_dim[-1]
    clips_ = Clips([str(n) for n in range(10)], [random.normal(size=(n, width)).astype(np.float16) for n in lengths])
    labels = torch.from_numpy(random.integers(0, 4, sum(lengths))).to(DEVICE)

    def objective(batch: Batch, _: torch.Generator) -> Terms:
        valid = torch.arange(batch.local.shape[1]) < batch.lengths[:, None]
        predicted, wanted = model(batch)[valid], labels[batch.rows][valid]
        return Terms(F.cross_entropy(predicted, wanted, reduction="sum"), len(wanted))

    trainer = Trainer(
        model,
        objective,
        clips_,
        config=OptimisationConfig(batch_size=5, learning_rate=1e-3),
        compute=ComputeConfig(precision="bfloat16", batch_seconds=1.7),
        key=Key(0, 1, "test"),
        device=DEVICE,
        checkpoint=folder / "checkpoint.safetensors",
        fingerprint="test",
        updates=20,
    )
    if not replays:
        trainer._graphs, trainer._kept = [], {}
        model.encoder.encoder.graphs, model.encoder.encoder.fuses = None, False
    trainer.run()
    assert all(graphs._graphs for graphs in trainer._graphs)
    trainer.finish(folder / "history.parquet")
    rows = HISTORY.read(folder / "history.parquet")[0].to_pylist()
    return [row["value"] for row in rows if row["quantity"] == "loss"]


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("layer", [-1, -3])
def test_training_with_replayed_layers_goes_as_with_plain_ones(
    tiny_encoder: Encoder, tmp_path: Path, pre_norm: bool, layer: int
) -> None:
    architecture = replace(tiny_encoder.architecture, do_stable_layer_norm=pre_norm)
    found = []
    for replays in (False, True):
        torch.manual_seed(0)
        model = Tagger(Encoder(architecture, Regularisation()), layer)
        model.encoder.load_state_dict(tiny_encoder.state_dict())
        found.append(losses(model, tmp_path, replays=replays))
    assert found[0] == pytest.approx(found[1], rel=0.03)


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
    model_files.load(on_gpu.folder)


def test_scores_of_recordings_are_those_of_the_cpu(spoken: Spoken, tmp_path: Path) -> None:
    found = []
    for gpus in ("0", "1"):
        output = tmp_path / f"{gpus}.json"
        named = ["--window", "0.5", "--gpus", gpus, "--format", "json", "--output", str(output)]
        subprocess.run([sys.executable, "-m", "gmp_atl", "predict", spoken.model, spoken.audio, *named], check=True)
        found.append(json.loads(output.read_text(encoding="utf-8")))
    on_cpu, on_gpu = found
    assert [(row["file"], row["part"], row["start"]) for row in on_cpu] == [
        (row["file"], row["part"], row["start"]) for row in on_gpu
    ]
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other["scores"] == pytest.approx(one["scores"], abs=5e-3)
