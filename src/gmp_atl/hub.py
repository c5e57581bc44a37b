"""Fine-tuned models as models of Hugging Face's transformers.

Importing this module registers them, so that `AutoModelForAudioClassification.from_pretrained` and
`pipeline("audio-classification")` load what `export` writes, without code from the model's folder. Network and scores
are the package's own. The config is a HuBERT's with the head's keys, and the weights of the encoder have the names of
transformers' HuBERT, so that `HubertModel.from_pretrained` loads the encoder alone from the same folder.
"""

from __future__ import annotations

import json
import logging
from dataclasses import field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    HubertConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from gmp_atl import classifier
from gmp_atl.architecture import Architecture
from gmp_atl.audio import MIN_SAMPLES
from gmp_atl.classifier import Classifier, Description
from gmp_atl.config import HeadConfig
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.files import atomic_folder, write_text
from gmp_atl.frames import SAMPLE_RATE
from gmp_atl.heads import UtteranceHead
from gmp_atl.model_card import model_card

log = logging.getLogger(__name__)


class GmpAtlConfig(HubertConfig):
    """A HuBERT's config, and what stands on top of it."""

    model_type = "gmp-atl"

    encoder_type: str = "hubert"
    """Or wavlm, whose attention has relative positions."""
    head: dict[str, int] = field(default_factory=lambda: HeadConfig().model_dump())
    """As `config.HeadConfig`."""
    loss: str = "ams"
    """That it was trained with: ams for a head that gives cosines, ce for logits."""
    scale: float = 30.0
    """What the head's outputs are multiplied by, to be the model's logits."""


class GmpAtlForAudioClassification(PreTrainedModel):
    """Encoder and utterance head, for inference."""

    config_class = GmpAtlConfig
    base_model_prefix = "hubert"
    main_input_name = "input_values"

    def __init__(self, config: GmpAtlConfig) -> None:
        super().__init__(config)
        settings = json.loads(config.to_json_string(use_diff=False))
        architecture = Architecture.from_config({**settings, "model_type": config.encoder_type}, Path("config.json"))
        head = HeadConfig.model_validate(config.head)
        self.hubert = Encoder(architecture)
        self.layer = head.layer
        assert config.num_labels is not None  # as many as id2label has
        tasks = {"emotion": config.num_labels}
        self.head = UtteranceHead(architecture.hidden_size, head, tasks, cosine=config.loss == "ams")
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Modules of this package come with their initial weights."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits of recordings, (batch, classes), whose softmax are the scores.

        Args:
            input_values: (batch, samples), mono at 16 kHz, as the model's feature extractor gives them.
            attention_mask: (batch, samples), zero where padded. What stands there changes nothing: the convolutions,
                of which HuBERT base's first normalises over time, see one unpadded recording at a time.

        Raises:
            ValueError: A recording is shorter than one frame.
        """
        rows = input_values if attention_mask is None else map(_valid, input_values, attention_mask)
        local = [self._local_features(samples) for samples in rows]
        lengths = torch.tensor([len(frames) for frames in local])
        hidden = self.hubert(pad_sequence(local, batch_first=True), lengths, self.layer)
        return SequenceClassifierOutput(logits=self.config.scale * self.head(hidden, lengths)["emotion"])

    def _local_features(self, samples: Tensor) -> Tensor:
        if len(samples) < MIN_SAMPLES:
            raise ValueError(f"A recording has {len(samples)} samples, but one HuBERT frame takes {MIN_SAMPLES}.")
        return self.hubert.local_features(samples).half().to(samples.dtype)  # in half precision, as trained and tested


def _valid(samples: Tensor, mask: Tensor) -> Tensor:
    return samples[mask.bool()]


AutoConfig.register(GmpAtlConfig.model_type, GmpAtlConfig)
AutoModelForAudioClassification.register(GmpAtlConfig, GmpAtlForAudioClassification)


def export(model: Path, output: Path, evaluations: Path | None = None, *, onnx: bool = False) -> None:
    """Write a fine-tuned model, its feature extractor's settings and its model card to a new folder.

    Args:
        evaluations: Of the run that made the model; None looks for them where the workflow puts them.
        onnx: Whether to add the model as an ONNX graph, `model.onnx`.

    Raises:
        UserError: `model` is not a fine-tuned model, `output` exists, or the evaluations know nothing of the model.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a folder that does not.")
    network, description = classifier.load(model)
    [encoder_alone] = network.encoder.architecture.to_config()["architectures"]
    card = model_card(model, description, evaluations, network=encoder_alone)
    with atomic_folder(output) as folder:
        of(network, description).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(
            sampling_rate=SAMPLE_RATE, do_normalize=description.normalise_audio, return_attention_mask=True
        ).save_pretrained(folder)
        write_text(folder / "README.md", card)
        if onnx:
            from gmp_atl import onnx_graph

            onnx_graph.write(network, description, folder / "model.onnx")
    log.info("%s: model for transformers, once gmp_atl.hub is imported", output)


def of(network: Classifier, description: Description) -> GmpAtlForAudioClassification:
    """The same network, with copied weights, as a model of transformers."""
    architecture = network.encoder.architecture.to_config()
    del architecture["architectures"]
    config = GmpAtlConfig(
        encoder_type=architecture.pop("model_type"),
        **architecture,
        head=description.head.model_dump(),
        loss=description.loss,
        scale=description.scale,
        id2label=dict(enumerate(description.classes)),
        label2id={name: number for number, name in enumerate(description.classes)},
    )
    model = GmpAtlForAudioClassification(config)
    model.hubert.load_state_dict(network.encoder.state_dict())
    model.head.load_state_dict(network.head.state_dict())
    return model.eval()  # type: ignore[no-untyped-call]
