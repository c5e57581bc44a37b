"""A fine-tuned model as an ONNX graph: from the samples of one recording to its scores."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from gmp_atl.classifier import Classifier, Description
from gmp_atl.encoder import Regularisation
from gmp_atl.frames import SAMPLE_RATE

_OPSET = 17
"""The first with layer normalisation."""


class _Graph(nn.Module):
    """The same computation in operations that ONNX has: plain convolutions, and one recording without padding."""

    def __init__(self, network: Classifier, description: Description) -> None:
        super().__init__()
        settings = network.encoder.architecture.to_config()
        del settings["architectures"], settings["model_type"]
        self.convolutions = HubertFeatureEncoder(HubertConfig(**settings))
        self.convolutions.load_state_dict(network.encoder.feature_extractor.state_dict())
        self.encoder, self.head = network.encoder, network.head
        self.layer, self.depths = network.layer, network.encoder.depths([network.layer])
        self.normalise, self.scale = description.normalise_audio, description.scale

    def forward(self, samples: Tensor) -> Tensor:
        if self.normalise:
            centred = samples - samples.mean()
            samples = centred / torch.sqrt((centred * centred).mean() + 1e-7)
        local = self.convolutions(samples).transpose(1, 2).half().float()  # in half precision, as trained and tested
        hidden = self.encoder.feature_projection(local)
        states = self.encoder.encoder(hidden, None, self.depths, Regularisation())[self.layer]
        for ahead, back in zip(self.head.lstm.ahead, self.head.lstm.back, strict=True):
            states = torch.cat([ahead(states)[0], back(states.flip(1))[0].flip(1)], dim=-1)
        logits: Tensor = self.head.tasks["emotion"](states.mean(dim=1))
        return (self.scale * logits).softmax(1)


def write(network: Classifier, description: Description, path: Path) -> None:
    """Write a graph from `samples`, (1, any number from 400 on), mono at 16 kHz, to `scores`, (1, classes), in float32.

    Its metadata have `classes`, a JSON list, and `sample_rate`.
    """
    graph = _Graph(network, description).eval()
    with warnings.catch_warnings():
        # torch's newer exporter cannot yet take an LSTM over a varying number of frames (2.11).
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (torch.zeros(1, SAMPLE_RATE),),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=["samples"],
            output_names=["scores"],
            dynamic_axes={"samples": {1: "samples"}},
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"classes": json.dumps(description.classes), "sample_rate": str(SAMPLE_RATE)})
    onnx.checker.check_model(model)
    onnx.save(model, path)
