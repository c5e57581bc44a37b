"""The encoder is transformers' HuBERT, runs no layer too many, and a clip does not depend on its batch."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
    WavLMConfig,
    WavLMModel,
)
from transformers.utils import logging as transformers_logging

from gmp_atl import classifier, devices, model_files
from gmp_atl.classifier import Classifier
from gmp_atl.clips import Batch
from gmp_atl.config import HeadConfig, ScratchEncoderConfig
from gmp_atl.encoder import Encoder, Regularisation, drop, from_scratch
from gmp_atl.errors import UserError
from gmp_atl.frames import HOP, RECEPTIVE_FIELD, n_frames
from gmp_atl.packing import Packing
from gmp_atl.positions import PositionEmbedding

transformers_logging.disable_progress_bar()

LAYERS = list(range(-1, -13, -1))
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
}
BASE = {**SIZE, "feat_extract_norm": "group"}
LARGE = {
    **SIZE,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "num_conv_pos_embeddings": 31,  # odd, whereas base has 128: the padding differs
}
FLOAT16_TOLERANCE = 3e-4
"""Error of hidden states, over their root mean square, when local features are stored in half precision.

Measured here: at most 1.9e-4 in base (layer -12) and 1.5e-4 in large; half precision itself rounds by up to 4.9e-4.
"""


@dataclass(frozen=True)
class Reference:
    """A random HuBERT of transformers, and the folder that it was saved in."""

    model: HubertModel
    folder: Path


@pytest.fixture(scope="module", params=[BASE, LARGE], ids=["base", "large"])
def reference(request, tmp_path_factory) -> Reference:
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**request.param)).eval()
    with torch.no_grad():  # biases of 0 and norms of 1 would hide that one of them is misplaced
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("reference")
    model.save_pretrained(folder)
    return Reference(model, folder)


@pytest.fixture(scope="module")
def encoder(reference) -> Encoder:
    return model_files.load(reference.folder)[0].eval()


def sound(n_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(n_samples, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def layers_of_transformers(model: HubertModel, audio: Tensor, mask: Tensor | None = None) -> dict[int, Tensor]:
    """Every layer for one unpadded clip."""
    output = model(audio[None], output_hidden_states=True, mask_time_indices=None if mask is None else mask[None])
    states = {layer: output.hidden_states[13 + layer][0] for layer in LAYERS}
    return {**states, -1: output.last_hidden_state[0]}  # of large, hidden_states[-1] lacks the final norm


@torch.inference_mode()
def layers_of_encoder(encoder: Encoder, local: Tensor, mask: Tensor | None = None) -> dict[int, Tensor]:
    lengths, masks = torch.tensor([len(local)]), None if mask is None else mask[None]
    states = encoder.hidden_states(local[None], lengths, LAYERS, masks)
    return {layer: hidden[0] for layer, hidden in states.items()}


# Parity with transformers.


@pytest.mark.parametrize("n_samples", [400, 719, 720, 5000, 48_000])
def test_every_layer_is_that_of_transformers(reference, encoder, n_samples):
    audio = sound(n_samples)
    with torch.inference_mode():
        states = layers_of_encoder(encoder, encoder.local_features(audio))
    for layer, expected in layers_of_transformers(reference.model, audio).items():
        torch.testing.assert_close(states[layer], expected, atol=1e-4, rtol=0, msg=f"layer {layer}")


@pytest.mark.parametrize("kind", [BASE, LARGE], ids=["base", "large"])
def test_a_wav2vec_2_is_read_as_the_same_network(kind, tmp_path):
    """From a checkpoint with the head of pre-training on it, as the hub's are."""
    torch.manual_seed(0)
    model = Wav2Vec2ForPreTraining(Wav2Vec2Config(**kind)).eval()
    model.save_pretrained(tmp_path)
    encoder, audio = model_files.load(tmp_path)[0].eval(), sound(5000)
    with torch.inference_mode():
        states = layers_of_encoder(encoder, encoder.local_features(audio))
    for layer, expected in layers_of_transformers(model.wav2vec2, audio).items():
        torch.testing.assert_close(states[layer], expected, atol=1e-4, rtol=0, msg=f"layer {layer}")


@pytest.fixture(scope="module", params=[BASE, LARGE], ids=["base", "large"])
def wavlm(request, tmp_path_factory) -> Reference:
    torch.manual_seed(0)
    # Few buckets, so that a second of speech reaches those of many distances.
    model = WavLMModel(WavLMConfig(**request.param, num_buckets=32, max_bucket_distance=40)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("wavlm")
    model.save_pretrained(folder)
    return Reference(model, folder)


@pytest.mark.parametrize("n_samples", [400, 5000, 48_000])
def test_every_layer_of_a_wavlm_is_that_of_transformers(wavlm, n_samples):
    encoder, audio = model_files.load(wavlm.folder)[0].eval(), sound(n_samples)
    with torch.inference_mode():
        states = layers_of_encoder(encoder, encoder.local_features(audio))
    for layer, expected in layers_of_transformers(wavlm.model, audio).items():
        torch.testing.assert_close(states[layer], expected, atol=1e-4, rtol=0, msg=f"layer {layer}")


def test_a_wavlm_does_not_see_padding_and_is_saved_as_one(wavlm, tmp_path):
    encoder = model_files.load(wavlm.folder)[0].eval()
    clips = [torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in (31, 90)]
    lengths = torch.tensor([31, 90])
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=float("nan"))
    with torch.inference_mode():
        together = encoder(padded, lengths)
        for clip, states in zip(clips, together, strict=True):
            alone = encoder(clip[None], torch.tensor([len(clip)]))[0]
            torch.testing.assert_close(states[: len(clip)], alone, atol=1e-5, rtol=0)
    model_files.save(encoder, tmp_path, encoder="made", fitted_on=[])
    loaded, report = WavLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    audio = sound(5000)
    for layer, expected in layers_of_transformers(wavlm.model, audio).items():
        assert torch.equal(layers_of_transformers(loaded.eval(), audio)[layer], expected)


@pytest.mark.parametrize("level", [0.0, 1e-5, 1e-3, 1.0])
def test_the_first_layers_norm_is_that_of_transformers_at_any_level(reference, encoder, level):
    """It is folded into the filters, by moments that silence leaves at zero and an offset makes large."""
    audio = level * sound(5000) + 0.5 * level
    with torch.inference_mode():
        expected = reference.model.feature_extractor(audio[None])[0].T
        torch.testing.assert_close(encoder.local_features(audio), expected, atol=1e-5 * float(expected.max()), rtol=0)


def test_in_bfloat16_every_layer_points_where_that_of_transformers_does(reference):
    audio = sound(48_000)
    encoder = model_files.load(reference.folder)[0].eval()
    encoder.feature_extractor.arrange(torch.bfloat16)
    with torch.inference_mode():
        local = encoder.local_features(audio).half()
        states = layers_of_encoder(encoder.to(torch.bfloat16), local)
    for layer, expected in layers_of_transformers(reference.model, audio).items():
        assert states[layer].dtype is torch.bfloat16
        # Base itself is closer (docs/speed.md): here, few channels share a rounding.
        assert F.cosine_similarity(states[layer].float(), expected, dim=-1).min() > 0.998, f"layer {layer}"


def test_filters_laid_out_anew_are_the_same_filters(reference, encoder):
    audio, arranged = sound(20_000), model_files.load(reference.folder)[0].eval()
    arranged.cast(torch.float32)
    with torch.inference_mode():
        local = encoder.local_features(audio)
        torch.testing.assert_close(arranged.local_features(audio), local)
        for layer, expected in layers_of_encoder(encoder, local).items():
            torch.testing.assert_close(layers_of_encoder(arranged, local)[layer], expected)
    assert arranged.state_dict().keys() == encoder.state_dict().keys()


def test_storing_local_features_in_half_precision_moves_no_layer_beyond_the_stated_tolerance(reference, encoder):
    audio = sound(48_000)
    with torch.inference_mode():
        states = layers_of_encoder(encoder, encoder.local_features(audio).half().float())
    errors = {
        layer: ((states[layer] - expected).square().mean() / expected.square().mean()).sqrt().item()
        for layer, expected in layers_of_transformers(reference.model, audio).items()
    }
    assert max(errors.values()) <= FLOAT16_TOLERANCE, errors
    assert min(errors.values()) > 0  # or nothing was rounded


def test_masked_frames_are_those_of_transformers(reference, encoder):
    audio = sound(20_000)
    mask = torch.arange(n_frames(len(audio))) % 7 < 4
    with torch.inference_mode():
        states = layers_of_encoder(encoder, encoder.local_features(audio), mask)
    for layer, expected in layers_of_transformers(reference.model, audio, mask).items():
        torch.testing.assert_close(states[layer], expected, atol=1e-4, rtol=0, msg=f"layer {layer}")


def test_training_mode_adds_nothing_that_was_not_asked_for(encoder):
    """Transformers' train() turns on SpecAugment and layerdrop."""
    local = encoder.local_features(sound(20_000))
    trained = encoder.train()(local[None], torch.tensor([len(local)]))
    evaluated = encoder.eval()(local[None], torch.tensor([len(local)]))
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "layerdrop"])
def test_each_regularisation_acts_in_training_and_not_in_evaluation(reference, kind):
    plain = model_files.load(reference.folder)[0].eval()
    regularised = model_files.load(reference.folder, Regularisation(**{kind: 0.5}))[0]
    local, lengths = torch.randn(1, 30, 16), torch.tensor([30])
    assert torch.equal(regularised.eval()(local, lengths), plain(local, lengths))
    assert not torch.allclose(regularised.train()(local, lengths), plain(local, lengths), atol=1e-3)


@pytest.mark.parametrize("groups", [2, 16], ids=["wide", "narrow"])
@pytest.mark.parametrize("clips", [1, 5])
def test_positions_and_their_gradients_are_those_of_the_convolution(reference, encoder, groups, clips):
    """Whether or not they are computed by Fourier transform."""
    positions = PositionEmbedding(replace(encoder.architecture, num_conv_pos_embedding_groups=groups))
    found = []
    for compute in (positions, lambda hidden: plain_positions(positions, hidden)):
        hidden = torch.randn(clips, 37, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        positions.zero_grad()
        relative = compute(hidden)
        relative.square().sum().backward()
        found.append([relative, hidden.grad, *(parameter.grad.clone() for parameter in positions.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def plain_positions(positions: PositionEmbedding, hidden: Tensor) -> Tensor:
    return F.gelu(positions.conv(hidden.mT)[..., : hidden.shape[1]]).mT


@pytest.mark.parametrize("shape", [(3, 5), (40, 50, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_passes_gradients_where_it_passed_values(shape, dtype):
    torch.manual_seed(0)
    hidden = torch.ones(shape, dtype=dtype, requires_grad=True)
    dropped = drop(hidden, 0.3)
    dropped.sum().backward()
    assert torch.equal(hidden.grad, dropped.detach())
    assert sorted({0.0, *dropped.flatten().tolist()}) == pytest.approx([0.0, 1 / 0.7], rel=1e-2)
    count = hidden.numel()
    assert (dropped > 0).float().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / count) ** 0.5)
    torch.manual_seed(0)
    assert torch.equal(drop(hidden, 0.3), dropped)
    assert not torch.equal(drop(hidden, 0.3), dropped)


def test_elements_that_share_a_random_number_are_dropped_independently():
    torch.manual_seed(0)
    kept = (drop(torch.ones(200_000, 4), 0.5) > 0).double()
    torch.testing.assert_close(torch.corrcoef(kept.T), torch.eye(4, dtype=torch.float64), atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("heads", "dtype", "lengths", "packed"),
    [
        (2, torch.bfloat16, [3, 7], True),
        (2, torch.bfloat16, [7, 7], False),  # nothing to leave out
        (2, torch.float32, [3, 7], False),  # no kernel
        (8, torch.bfloat16, [3, 7], False),  # nor for heads as narrow as four
    ],
)
def test_padded_clips_are_packed_where_a_gpu_s_kernel_takes_them(
    tiny_encoder, monkeypatch, heads, dtype, lengths, packed
):
    monkeypatch.setattr(devices, "attends_to_packed", lambda device: True)
    monkeypatch.setattr(devices, "send", lambda values, device: values)
    encoder = Encoder(replace(tiny_encoder.architecture, num_attention_heads=heads))
    valid = torch.empty(2, 7, dtype=torch.bool, device="meta")  # stands for a GPU
    assert isinstance(encoder._padding(valid, torch.tensor(lengths), dtype), Packing) is packed


@pytest.mark.parametrize("training", [False, True])
def test_a_cpu_packs_padded_clips_in_evaluation_only(tiny_encoder, training):
    lengths = torch.tensor([3, 7])
    valid = torch.arange(7) < lengths[:, None]
    padding = Encoder(tiny_encoder.architecture).train(training)._padding(valid, lengths, torch.float32)
    assert isinstance(padding, Packing) is not training


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_packed_clips_hold_the_valid_frames_and_come_back_in_their_places(lengths):
    packing = Packing.of(torch.tensor(lengths), torch.device("cpu"))
    padded = torch.arange(1.0, 1 + len(lengths) * max(lengths) * 2).view(len(lengths), max(lengths), 2)
    packed = packing.pack(padded)
    assert packing.starts.dtype is torch.int32  # as FlashAttention takes them
    ends = packing.starts.tolist()
    for clip, (start, end) in enumerate(pairwise(ends)):
        assert torch.equal(packed[start:end], padded[clip, : lengths[clip]])
    assert ends[-1] == len(packed) == sum(lengths)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    assert torch.equal(packing.unpack(packed), padded * valid[..., None])


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=80))
def test_rounded_packing_fills_up_with_a_clip_of_zeros(lengths):
    packing = Packing.rounded(torch.tensor(lengths), torch.device("cpu"))
    padded = torch.arange(1, 1 + len(lengths) * max(lengths))[:, None].view(len(lengths), max(lengths), 1)
    packed, exact = packing.pack(padded), Packing.of(torch.tensor(lengths), torch.device("cpu"))
    assert torch.equal(packed[: sum(lengths)], exact.pack(padded))
    assert not packed[sum(lengths) :].any()
    assert torch.equal(packing.unpack(packed), exact.unpack(exact.pack(padded)))
    assert sum(lengths) <= len(packed) == packing.size <= max(64 * -(-sum(lengths) // 64), sum(lengths) * 33 / 32)
    frames = packing.starts.diff()
    assert frames[: len(lengths)].tolist() == lengths
    assert frames.sum() == packing.size
    assert frames.max() <= packing.bound
    assert packing.starts[0] == 0


def test_few_sizes_of_packed_clips_occur():
    sizes = {Packing.rounded(torch.tensor([frames]), torch.device("cpu")).kind for frames in range(8_193, 16_385)}
    assert len(sizes) == 32


def test_clips_that_are_filled_up_in_training_have_the_states_and_gradients_of_padded_ones(tiny_encoder):
    def run(hidden, packing, depth, layers):
        assert packing.size > 30 + 11
        return layers(hidden, packing)

    encoder, lengths = copy.deepcopy(tiny_encoder).train(), torch.tensor([30, 11])
    local = torch.randn(2, 30, encoder.architecture.conv_dim[-1])
    valid = torch.arange(30) < lengths[:, None]
    found = []
    for graphs in (None, run):
        encoder.encoder.graphs = graphs
        states = encoder(local, lengths)[valid]
        gradients = torch.autograd.grad(states.square().sum(), [*encoder.encoder.layers.parameters()])
        found.append((states, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("width", "groups", "kernel", "frames"), [(96, 4, 16, 50), (32, 2, 7, 20), (48, 16, 128, 128)])
def test_positions_by_products_are_those_of_the_convolution(tiny_encoder, width, groups, kernel, frames):
    """As a GPU computes them."""
    sizes = {"num_conv_pos_embeddings": kernel, "num_conv_pos_embedding_groups": groups}
    positions = PositionEmbedding(replace(tiny_encoder.architecture, hidden_size=width, **sizes))
    nn.init.normal_(positions.conv.bias)
    hidden, gradient = torch.randn(3, frames, width, requires_grad=True), torch.randn(3, frames, width)
    plain = positions.conv(hidden.transpose(1, 2))[..., :frames].transpose(1, 2)
    found, wanted = positions._by_products(hidden), [hidden, *positions.parameters()]
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    for one, other in zip(*(torch.autograd.grad(y, wanted, gradient) for y in (found, plain)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_filters_of_positions_that_were_transformed_before_are_trained_all_the_same(reference):
    positions = model_files.load(reference.folder)[0].encoder.pos_conv_embed
    positions.arrange()
    hidden = torch.randn(4, 20, positions.conv.in_channels)
    positions(hidden).sum().backward()
    assert positions.conv.parametrizations.weight.original1.grad.abs().max() > 0


@pytest.mark.parametrize("lengths", [[30, 30], [30, 11]], ids=["full", "padded"])
def test_attention_with_dropout_is_that_without_but_for_what_is_dropped(reference, wavlm, lengths):
    """A probability so small that nothing is dropped takes the way of training."""
    check_attention_in_training(reference.folder, lengths)
    check_attention_in_training(wavlm.folder, lengths)


def check_attention_in_training(folder: Path, lengths: list[int]) -> None:
    plain, training = model_files.load(folder)[0].eval(), model_files.load(folder, Regularisation(0.0, 1e-9))[0].train()
    local = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    expected, found = (each(local, torch.tensor(lengths)) for each in (plain, training))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], atol=1e-5, rtol=1e-4)


# Files.


def test_transformers_loads_what_is_saved(reference, encoder, tmp_path):
    model_files.save(encoder, tmp_path, encoder="a name", fitted_on=["a", "b"])
    loaded, report = HubertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    audio = sound(9000)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(audio[None])[0], reference.model(audio[None])[0])
    assert model_files.load(tmp_path)[1] == {"encoder": "a name", "fitted_on": ["a", "b"]}


def test_weights_are_drawn_only_where_no_file_has_them(reference, encoder):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model_files.load(reference.folder)
    assert torch.equal(torch.rand(1), expected)
    first, second = (from_scratch(ScratchEncoderConfig(seed=seed)) for seed in (1, 2))
    assert model_files.digest(first) != model_files.digest(second)


def test_weights_that_change_leave_the_file_that_they_came_from_alone(encoder, tmp_path):
    """They are not copied when they are read."""
    model_files.save(encoder, tmp_path, encoder="a name", fitted_on=[])
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded, _ = model_files.load(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert model_files.digest(model_files.load(tmp_path)[0]) == model_files.digest(encoder)


def test_equal_encoders_are_equal_files(encoder, tmp_path):
    """safetensors alone writes the entries of its header in an order that differs from one call to the next."""
    for number in range(8):
        model_files.save(encoder, tmp_path / str(number), encoder="ein schöner Name", fitted_on=["a"])
    files = [tmp_path / str(number) / "model.safetensors" for number in range(8)]
    assert len({file.read_bytes() for file in files}) == 1


def test_older_names_and_the_prefix_of_a_model_with_a_head_are_understood(reference, encoder, tmp_path):
    shutil.copy(reference.folder / "config.json", tmp_path)
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {"lm_head.weight": torch.zeros(3, 32)}
    for name, tensor in load_file(reference.folder / "model.safetensors").items():
        for new, old in older.items():
            name = name.replace(new, old)
        tensors[f"hubert.{name}"] = tensor
    assert any(name.endswith("weight_g") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")

    loaded, _ = model_files.load(tmp_path)
    local, lengths = encoder.local_features(sound(4000))[None], torch.tensor([n_frames(4000)])
    assert torch.equal(loaded(local, lengths), encoder(local, lengths))


def test_half_precision_weights_are_computed_with_in_single(reference, tmp_path):
    shutil.copy(reference.folder / "config.json", tmp_path)
    weights = load_file(reference.folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    assert {parameter.dtype for parameter in model_files.load(tmp_path)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "data2vec-audio"}, "model_type is 'data2vec-audio'"),
        (
            {"model_type": "wavlm", "num_buckets": 2, "max_bucket_distance": 40},
            "2 buckets of positions do not reach 40 frames",
        ),
        ({"num_attention_heads": 5}, r"hidden_size \d+ is no multiple of num_attention_heads, 5"),
        ({"num_conv_pos_embedding_groups": 5}, r"hidden_size \d+ is no multiple of num_conv_pos_embedding_groups, 5"),
        ({"feat_extract_norm": "Layer"}, "feat_extract_norm: Input should be 'group' or 'layer'"),
        ({"model_type": "wavlm"}, "max_bucket_distance, num_buckets is missing"),
        ({"model_type": "wav2vec2", "add_adapter": True}, "add_adapter is True"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 4]}, "conv_stride"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm"),
        ({"hidden_size": None}, "hidden_size"),
        ({"conv_dim": None}, "conv_dim"),
        ({"conv_dim": [16] * 6}, "conv_dim"),
        ({"intermediate_size": 128}, "does not fit its config.json"),
        ({"num_hidden_layers": 13}, "missing"),
    ],
)
def test_a_config_of_another_network_is_refused(reference, tmp_path, change, complaint):
    """None stands for a key that is not there."""
    config = {**json.loads((reference.folder / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    shutil.copy(reference.folder / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=complaint):
        model_files.load(tmp_path)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not JSON|not the config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a readable safetensors"),
        (lambda folder: cut(folder / "model.safetensors", 0.001), "not a readable safetensors"),
        (lambda folder: cut(folder / "model.safetensors", 0.5), "not a readable safetensors"),
        (lambda folder: cut(folder / "model.safetensors", 0.9999), "not a readable safetensors"),
    ],
    ids=["no config", "cut config", "other JSON", "no weights", "empty weights", "cut header", "cut half", "cut end"],
)
def test_missing_and_damaged_files_are_named(reference, tmp_path, damage: Callable[[Path], None], complaint):
    folder = tmp_path / "encoder"
    shutil.copytree(reference.folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=complaint):
        model_files.load(folder)


# Layers.


@pytest.mark.parametrize(("layers", "runs"), [([-1], 12), ([-3], 10), ([-12], 1), ([-8, -3, -11], 10)])
def test_no_layer_beyond_the_deepest_one_asked_for_is_run(tiny_encoder, layers, runs):
    ran = []
    for index, layer in enumerate(tiny_encoder.encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    states = tiny_encoder.hidden_states(torch.randn(2, 9, 16), torch.tensor([9, 4]), layers)
    assert ran == list(range(1, runs + 1))
    assert sorted(states) == sorted(layers)


@pytest.mark.parametrize("layer", [-13, 0, 1])
def test_a_layer_that_is_not_there_is_refused(tiny_encoder, layer):
    with pytest.raises(UserError, match=f"Layer {layer} .* has layers -1 to -12"):
        tiny_encoder(torch.randn(1, 9, 16), torch.tensor([9]), layer)


def test_random_weights_depend_on_their_seed_alone():
    def weights(seed: int) -> dict[str, Tensor]:
        config = ScratchEncoderConfig(seed=seed, layers=2, hidden_size=16, heads=2, feed_forward=16, conv_channels=8)
        return from_scratch(config).state_dict()

    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"
    torch.rand(3)
    again, other = weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["masked_spec_embed"], other["masked_spec_embed"])


# Frames.


@given(st.integers(0, 600_000))
@example(399)
@example(400)
@example(719)
@example(720)
def test_the_number_of_frames_is_that_of_transformers_and_one_per_hop(n_samples):
    model = HubertModel.__new__(HubertModel)  # the formula needs no weights
    object.__setattr__(model, "config", HubertConfig())
    assert n_frames(n_samples) == max(0, int(model._get_feat_extract_output_lengths(n_samples)))
    assert n_frames(n_samples) == (0 if n_samples < RECEPTIVE_FIELD else (n_samples - RECEPTIVE_FIELD) // HOP + 1)


@settings(max_examples=40)
@given(st.integers(RECEPTIVE_FIELD, 8000))
@example(RECEPTIVE_FIELD)
def test_a_clip_has_as_many_local_features_as_the_formula_says(n_samples):
    config = ScratchEncoderConfig(layers=1, hidden_size=16, heads=2, feed_forward=16, conv_channels=4)
    assert from_scratch(config).local_features(sound(n_samples)).shape == (n_frames(n_samples), 4)


@pytest.mark.parametrize("frame", [1, 7, 30])
def test_frame_k_begins_at_sample_320_k(tmp_path, frame):
    """Convolutions that do not normalise over time see the same in a clip that begins k frames later."""
    torch.manual_seed(0)
    HubertModel(HubertConfig(**LARGE)).save_pretrained(tmp_path)
    encoder, _ = model_files.load(tmp_path)
    audio = sound(16_000)
    with torch.inference_mode():
        local, later = encoder.local_features(audio), encoder.local_features(audio[frame * HOP :])
    torch.testing.assert_close(later, local[frame:], atol=1e-6, rtol=1e-5)


# Batches.

LENGTHS = st.lists(st.integers(1, 48), min_size=1, max_size=5)


def batch_of(clips: list[Tensor], padding: float = 0.0) -> Batch:
    lengths = torch.tensor([len(clip) for clip in clips])
    local = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=padding)
    return Batch(list(range(len(clips))), torch.zeros(local.shape[:2], dtype=torch.long), local, lengths)


def clips_of(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, 16, generator=generator) for length in lengths]


@settings(max_examples=15)
@given(lengths=LENGTHS)
@example(lengths=[48, 1])
def test_features_of_a_clip_do_not_depend_on_its_batch(encoder, lengths):
    clips, layers = clips_of(lengths), [-1, -3, -12]
    batch = batch_of(clips)
    with torch.inference_mode():
        states = encoder.hidden_states(batch.local, batch.lengths, layers)
        for row, clip in enumerate(clips):
            alone = encoder.hidden_states(clip[None], torch.tensor([len(clip)]), layers)
            for layer in layers:
                torch.testing.assert_close(states[layer][row, : len(clip)], alone[layer][0], atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(lengths=LENGTHS, cosine=st.booleans())
def test_logits_of_a_clip_do_not_depend_on_its_batch(encoder, lengths, cosine):
    torch.manual_seed(0)
    model = Classifier(encoder, HeadConfig(lstm_hidden=8, projection=8), {"emotion": 4, "gender": 2}, cosine=cosine)
    clips = clips_of(lengths)
    with torch.inference_mode():
        together = model.eval()(batch_of(clips))
        for row, clip in enumerate(clips):
            for task, logits in model(batch_of([clip])).items():
                torch.testing.assert_close(together[task][row], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_what_stands_in_the_padding_reaches_neither_outputs_nor_gradients(encoder, garbage):
    torch.manual_seed(0)
    model = Classifier(encoder, HeadConfig(lstm_hidden=8, projection=8), {"emotion": 4}).train()
    clips = clips_of([30, 5, 17])

    def outcome(padding: float) -> list[Tensor]:
        model.zero_grad()
        logits = model(batch_of(clips, padding))["emotion"]
        logits.square().sum().backward()
        return [logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    for found, expected in zip(outcome(garbage), outcome(0.0), strict=True):
        assert torch.equal(found, expected)


def test_a_model_reads_back_as_it_was_saved(encoder, tmp_path):
    config, tasks = HeadConfig(lstm_hidden=8, projection=8), {"emotion": 4}
    batch = batch_of(clips_of([30, 5]))
    model = Classifier(encoder, config, tasks).eval()
    classifier.save(model, tmp_path, encoder="made", fitted_on=["a"])
    again = Classifier(model_files.load(tmp_path)[0], config, tasks).eval()
    classifier.load_head(again, tmp_path)
    assert torch.equal(again(batch)["emotion"], model(batch)["emotion"])


@pytest.mark.parametrize("other", [{"tasks": {"emotion": 3}}, {"lstm_hidden": 4}, {"cosine": True}])
def test_the_head_of_another_config_is_refused(encoder, tmp_path, other):
    """An AM-Softmax head lacks only the bias of a cross-entropy head: nothing of a file may be left over."""
    settings = {"tasks": {"emotion": 4}, "lstm_hidden": 8, "cosine": False}

    def model(tasks: dict[str, int], lstm_hidden: int, cosine: bool) -> Classifier:
        return Classifier(encoder, HeadConfig(lstm_hidden=lstm_hidden, projection=8), tasks, cosine=cosine)

    classifier.save(model(**settings), tmp_path)
    with pytest.raises(UserError, match="is not the head that the config describes"):
        classifier.load_head(model(**{**settings, **other}), tmp_path)


@pytest.mark.parametrize("frames", [1, 40, 128, 233])
def test_positions_by_fourier_are_those_of_the_convolution(encoder, frames):
    """Whether or not that way is taken for so few clips."""
    positions = encoder.encoder.pos_conv_embed
    rows = torch.randn(2, encoder.architecture.hidden_size, frames, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = positions.conv(rows)[..., :frames]
        torch.testing.assert_close(positions._by_fourier(rows), expected, atol=1e-5, rtol=1e-4)
