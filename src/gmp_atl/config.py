"""The typed configuration: the one door through which every setting enters.

`config.yaml` is the paper's experiment; files in `presets/` overlay it. `Config` validates the merged
mapping, refuses unknown keys, and is the source of `workflow/schemas/config.schema.json`. A stage never
sees the whole of it: `slice_for` cuts out the sections that the stage reads, and Snakemake tracks that
slice, so that an edit reruns exactly what depends on it.

Every open reading of the paper (docs/readings.md) is a field here, with the default reading first.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from gmp_atl.errors import UserError

PACKAGED_ENCODER = Path(__file__).parent / "encoders" / "hubert-small"
"""A small HuBERT: config.json, model.safetensors in half precision, and a card that says how it was made."""
GENDERS = ("female", "male")
_PROBLEMS = 20  # told at once
_BRIEF = reprlib.Repr()  # of what was found instead of a setting: a nested value may be as large as it likes
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxother = 80

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Layer = Annotated[int, Field(le=-1)]  # counted from the end: -1 is the last layer
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Precision = Literal["auto", "float32", "bfloat16"]
Loss = Literal["ce", "ams"]
FitOn = Literal["training", "all"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch and Parquet hold


def _at_home(path: Path) -> Path:
    """`~` expanded, as shells do not where it stands between quotes."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


Place = Annotated[Path, AfterValidator(_at_home)]


def _distinct(values: list[Any]) -> list[Any]:
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice")
    return values


Distinct = AfterValidator(_distinct)
Sizes = Annotated[list[Annotated[int, Field(ge=2, le=65_536)]], Field(min_length=1), Distinct]
Speed = Annotated[float, Field(ge=0.5, le=2.0, multiple_of=0.01)]


class Section(BaseModel):
    """A part of the config: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class CorpusConfig(Section):
    """Which speech corpus is read, and from where."""

    reader: Literal["iemocap", "emodb", "ravdess", "manifest", "synthetic"]
    """Layout of the release; `manifest` for a corpus of your own, `synthetic` for the demo's."""
    root: Place | None = None
    """Folder of the release, or, for `manifest`, the CSV or Parquet file. `synthetic` makes its own."""
    allow_partial: bool = False
    """Accept an IEMOCAP whose counts differ from the full release; every table then says so."""


class FoldsConfig(Section):
    """Speaker-independent cross-validation: each fold holds out a group of sessions or speakers."""

    by: Literal["session", "speaker"]
    """What `held_out` names; no speaker may be in two folds in either case."""
    held_out: list[Annotated[list[str], Field(min_length=1)]] = Field(min_length=2)
    """Fold n holds out the n-th group; every utterance of the corpus belongs to exactly one group."""

    @model_validator(mode="after")
    def _check(self) -> FoldsConfig:
        names = [name for group in self.held_out for name in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"held_out names {', '.join(twice)} more than once: folds must not overlap")
        return self


class ScratchEncoderConfig(Section):
    """Size of a HuBERT with random weights; strides and kernels are those of HuBERT base."""

    seed: Seed = 0
    """Of the weights; the experiment's seeds are `seeds`."""
    layers: Count = 12
    """Transformer layers; tables.layers must exist."""
    hidden_size: Count = 192
    """Width of the transformer; a multiple of `heads` and of 16."""
    heads: Count = 4
    """Attention heads."""
    feed_forward: Count = 768
    """Width between the two layers of a feed-forward block."""
    conv_channels: Count = 128
    """Channels of each of the seven convolutions."""

    @model_validator(mode="after")
    def _check(self) -> ScratchEncoderConfig:
        if self.hidden_size % self.heads or self.hidden_size % 16:
            raise ValueError("hidden_size must be a multiple of heads and of 16")
        return self


class EncoderConfig(Section):
    """The pre-trained HuBERT, or a wav2vec 2.0 or WavLM in its place."""

    source: Literal["hub", "directory", "packaged", "scratch"]
    """Hugging Face hub, a folder, the small HuBERT that comes with this package (docs/pretraining.md), or random
    weights of the size that `scratch` gives."""
    name: str | None = None
    """Hub id, such as facebook/hubert-base-ls960."""
    revision: str | None = None
    """Commit of the hub repository; a branch would not be reproducible."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the weights file; needed where the revision holds only a PyTorch archive (converted once)."""
    path: Place | None = None
    """Folder with config.json and model.safetensors."""
    scratch: ScratchEncoderConfig = ScratchEncoderConfig()
    normalise_audio: bool = False
    """Zero mean and unit variance per clip; HuBERT base was trained without."""

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        if self.source == "hub" and not (self.name and self.revision):
            raise ValueError("source: hub needs name and revision")
        if self.source == "hub" and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError("revision must be a full 40-digit commit, not a branch or tag")
        if self.source == "directory" and self.path is None:
            raise ValueError("source: directory needs path")
        return self

    @property
    def folder(self) -> Path | None:
        """That the encoder lies in; None if it is fetched or made."""
        return {"packaged": PACKAGED_ENCODER, "directory": self.path}.get(self.source)


class ComputeConfig(Section):
    """How stages compute; results may move within floating-point tolerance."""

    threads: Count = 4
    """CPU threads of a job."""
    precision: Precision = "auto"
    """Of the encoder. `auto`: bfloat16 where the hardware multiplies it natively."""
    batch_seconds: Positive = 320.0
    """Audio, padding included, that goes through the transformer at once."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Time between two checkpoints of a training stage; 0 writes one after every update."""
    jobs_per_gpu: Count = 1
    """Jobs that may share one GPU, and its memory. The pool, `--resources gpu=N`, must allow as many."""


class HeadConfig(Section):
    """Utterance head of stages 1 and 4: BiLSTM, mean over valid frames, LinearP (paper, Fig. 1)."""

    layer: Layer = -1
    """Of HuBERT that the head reads, counted from the end: -1 is the last. Stages 1 and 4 train none beyond it."""
    lstm_hidden: Count = 256
    """Per direction."""
    lstm_layers: Count = 1
    """BiLSTM layers, one upon the other."""
    projection: Count = 256
    """Width between LinearP's two linear layers."""


class SpecAugmentConfig(Section):
    """Feature masking while a classifier is trained; distinct from retraining's masked prediction."""

    probability: Fraction = 0.0
    """A clip has probability x frames / length masked spans, and two at least; 0 turns masking off."""
    length: Count = 10
    """Frames of a span, at 50 per second."""


class OptimisationConfig(Section):
    """Adam; its first rate, 1e-4, and batches of 64 are the paper's (Sec. 4.1.2), the rest is not stated there."""

    learning_rate: Positive = 1e-4
    """Peak of the schedule, reached at the end of the warm-up."""
    batch_size: Count = 64
    """Utterances per update, whatever fits on the device at once: gradients are accumulated."""
    schedule: Literal["linear", "constant"] = "linear"
    """Decay to zero, or none, after a linear warm-up."""
    warmup: Fraction = 0.0
    """Share of all updates."""
    gradient_clip: Positive = 1.0
    """Largest L2 norm of the gradient."""
    max_clip_seconds: Positive = 10.0
    """Longer clips are cropped at random in training; testing sees whole clips."""
    dropout: Share = 0.1
    """In the transformer: hidden states, activations and the feature projection."""
    attention_dropout: Share = 0.1
    """Of the attention weights."""
    layerdrop: Fraction = 0.0
    """Probability that a transformer layer is left out of a pass."""


class MultitaskConfig(Section):
    """Stage 1: emotion and gender from the utterance (paper, Sec. 3.1, Eq. 1)."""

    encoder: Literal["trained", "frozen"] = "trained"
    """Transformer trained with the head, or frozen; the convolutions are frozen in every stage."""
    emotion_weight: Fraction = 0.9
    """alpha_e of Eq. 1."""
    epochs: Count = 15
    """Passes over the training utterances."""
    class_weights: Literal["none", "inverse_frequency"] = "none"
    """Weighting of the emotions in the loss."""
    spec_augment: SpecAugmentConfig = SpecAugmentConfig()
    optimisation: OptimisationConfig = OptimisationConfig(warmup=0.1)


class ClusteringConfig(Section):
    """Stage 2: frame-level gender-augmented multi-scale pseudo-labels, GMPs (paper, Sec. 3.1)."""

    sizes: Sizes = [64, 512, 4096]
    """Centroids of each codebook."""
    algorithm: Literal["lloyd", "mini_batch"] = "lloyd"
    """Exact k-means on every frame, or on mini-batches (scikit-learn's)."""
    iterations: Count = 20
    """Of k-means; for `mini_batch`, passes over the frames at most."""
    fit_on: FitOn = "training"
    """`all` also fits on the held-out frames: transductive, and labelled so in every table."""


class MaskConfig(Section):
    """Span masking of HuBERT: probability x frames / length spans, which may overlap."""

    probability: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Expected share of the frames in spans, overlaps counted twice."""
    length: Count = 10
    """Frames of a span, at 50 per second."""
    min_spans: Count = 1
    """Spans of a clip at least. P-TAPT's reading takes two; so does HuBERT's code, which at its probability is the same
    for clips of half a second or more."""


class RetrainingConfig(Section):
    """Stage 3: masked prediction of the GMPs (paper, Sec. 3.2)."""

    start: Literal["pretrained", "multitask"] = "pretrained"
    """Which HuBERT is retrained: the pre-trained one, or that of stage 1."""
    updates: Count = 20_000
    """Optimiser steps."""
    mask: MaskConfig = MaskConfig()
    unmasked_weight: float = Field(0.0, ge=0)
    """Weight of the unmasked frames in the loss; HuBERT predicts masked frames only."""
    codebook_head: Literal["linear", "cosine"] = "linear"
    """Linear-ReLU-Linear per codebook, or HuBERT's cosine similarity with codewords, temperature 0.1."""
    projection: Count = 256
    """Width between LinearP's two linear layers, or of the codewords."""
    optimisation: OptimisationConfig = OptimisationConfig(warmup=0.1)


class IterationConfig(Section):
    """One round of clustering and masked prediction, of which HuBERT has two (Hsu et al. 2021, Sec. IV-B)."""

    layer: Annotated[int, Field(le=0)]
    """Whose frames are clustered: 0 stands for MFCCs, others are layers of the encoder of the iteration before."""
    sizes: Sizes
    """Centroids of each codebook."""
    updates: Count
    """Optimiser steps."""
    start: Literal["random", "previous"] = "random"
    """Weights to begin with: random ones, or those of the iteration before."""
    optimisation: OptimisationConfig = OptimisationConfig(warmup=0.1)


class PretrainingConfig(Section):
    """An encoder of one's own, from random weights and speech without labels (docs/pretraining.md)."""

    speech: Place
    """Manifest, CSV or Parquet; of its columns, only `path` is read."""
    attribution: list[str] = Field(min_length=1)
    """Sources and licences of the speech, for the model card."""
    speeds: Annotated[list[Speed], Field(min_length=1), Distinct] = [1.0]
    """At which each clip is heard, tempo and pitch together: 1.0 is as recorded. In hundredths."""
    mixing: Fraction = 0.0
    """Share of the clips that are mixed with another over at most half their length; labels stay those of the clip."""
    iterations: list[IterationConfig] = Field(min_length=1)
    """The first on MFCCs."""
    probes: Annotated[list[Count], Distinct] = []
    """Updates of every iteration after which the encoder is kept and probed, as it is after the last."""
    mask: MaskConfig = MaskConfig()
    codebook_head: Literal["linear", "cosine"] = "linear"
    """As in retraining."""
    projection: Count = 256
    """As in retraining."""

    @model_validator(mode="after")
    def _check(self) -> PretrainingConfig:
        first = self.iterations[0]
        if first.layer != 0 or first.start != "random":
            raise ValueError("iterations: the first has layer 0 and start random, since no encoder is there before it")
        if self.probes and max(self.probes) >= min(iteration.updates for iteration in self.iterations):
            raise ValueError("probes must lie before the last update of every iteration, which is always probed")
        return self


class FinetuningConfig(Section):
    """Stage 4: emotion from the utterance (paper, Sec. 3.3, Eqs. 2 and 3)."""

    epochs: Count = 15
    """Passes over the training utterances."""
    scale: Positive = 30.0
    """s of Eq. 2."""
    margin: float = Field(0.2, ge=0)
    """m of Eq. 2."""
    head: Literal["fresh", "multitask"] = "fresh"
    """BiLSTM and LinearP begin at random, or as stage 1 left them; the last layer of AM-Softmax has no bias."""
    selection: Literal["last", "held_out_training_group", "oracle"] = "last"
    """Which epoch is tested: the last; the best on one group of the training folds, which is then not
    trained on; or the best on the test fold, which every table calls an oracle."""
    class_weights: Literal["none", "inverse_frequency"] = "none"
    """Weighting of the emotions in the loss."""
    spec_augment: SpecAugmentConfig = SpecAugmentConfig()
    optimisation: OptimisationConfig = OptimisationConfig(schedule="constant")


class TablesConfig(Section):
    """Which of the paper's tables a run makes."""

    numbers: Annotated[list[Annotated[int, Field(ge=1, le=4)]], Field(min_length=1), Distinct] = [1, 2, 3, 4]
    """As in the paper; only the runs that these need are made."""
    layer: Layer = -3
    """Of the GMPs in Tables 2 and 3."""
    layers: Annotated[list[Layer], Field(min_length=1), Distinct] = [-1, -2, -3, -4, -5, -6, -7, -8]
    """Of the GMPs in Table 4."""
    ablation_losses: Annotated[list[Loss], Field(min_length=1), Distinct] = ["ams"]
    """Losses that each ablation, and the main row beside it, is fine-tuned with."""
    baseline: Literal["egemaps", "none"] = "egemaps"
    """Classical reference in Table 2: openSMILE functionals and an SVM; openSMILE is for research use."""


class Config(Section):
    """A whole experiment."""

    name: Name
    """Results go to results/<name>."""
    seeds: Annotated[list[Seed], Field(min_length=1), Distinct]
    """Every seed repeats all folds and stages; tables give mean and deviation over them."""
    corpus: CorpusConfig
    classes: Annotated[list[str], Field(min_length=2), Distinct]
    """Emotions that are kept, in the order of the model's outputs; all others are listed as excluded."""
    folds: FoldsConfig
    encoder: EncoderConfig
    compute: ComputeConfig = ComputeConfig()
    head: HeadConfig = HeadConfig()
    multitask: MultitaskConfig = MultitaskConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    retraining: RetrainingConfig = RetrainingConfig()
    finetuning: FinetuningConfig = FinetuningConfig()
    tables: TablesConfig = TablesConfig()
    pretraining: PretrainingConfig | None = None
    """How an encoder is made, which is no part of the experiment (docs/pretraining.md)."""
    ablations: dict[Name, dict[str, Any]] = {}
    """Extra rows: a name, and the keys (of multitask, clustering, retraining, finetuning, head) that it
    changes. Stages that a change does not reach are shared with the main run."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.finetuning.selection == "held_out_training_group" and len(self.folds.held_out) < 3:
            raise ValueError("finetuning.selection: held_out_training_group needs at least three folds")
        for number, iteration in enumerate(self.pretraining.iterations if self.pretraining else []):
            if -iteration.layer > self.encoder.scratch.layers:
                raise ValueError(
                    f"pretraining.iterations.{number}: layer {iteration.layer} is asked for, but the encoder has "
                    f"layers -1 to -{self.encoder.scratch.layers} (encoder.scratch.layers)"
                )
        if taken := sorted(_TAKEN & self.ablations.keys()):
            raise ValueError(
                f"ablations.{taken[0]}: {taken[0]!r} is the name of something else in results; take another"
            )
        for ablation, changes in self.ablations.items():
            foreign = sorted(set(changes) - ABLATABLE)
            if foreign or not changes:
                raise ValueError(
                    f"ablations.{ablation} must change keys of {', '.join(sorted(ABLATABLE))}"
                    + (f", not {', '.join(foreign)}" if foreign else "")
                )
        return self


NOT_IN_RESULTS: dict[str, set[str]] = {"corpus": {"root"}, "compute": {"threads", "checkpoint_minutes", "jobs_per_gpu"}}
"""Keys that say where and how fast, not what: no part of the experiment's identity, nor of what a stage is given."""

_UNREAD: dict[str, dict[str, set[str]]] = {
    # A job makes one codebook, whichever others are asked for.
    "layer_features": {"clustering": {"sizes"}},
    "clustering": {"clustering": {"sizes"}, "compute": {"precision", "batch_seconds"}},
    "local_features": {"compute": {"batch_seconds"}},
}
"""By stage: keys of its sections that it does not read."""

_TAKEN = frozenset({"main", "baseline", "clusters", "histories", "provenance"})
"""Folders of evaluations beside those of ablations."""
ABLATABLE = frozenset({"multitask", "clustering", "retraining", "finetuning", "head"})


class CorpusSlice(Section):
    """What the corpus stage reads."""

    corpus: CorpusConfig
    classes: list[str]
    folds: FoldsConfig


class EncoderSlice(Section):
    """What preparing the pre-trained encoder reads."""

    encoder: EncoderConfig


class LocalFeaturesSlice(Section):
    """What the local features read."""

    encoder: EncoderConfig
    compute: ComputeConfig


class MultitaskSlice(Section):
    """What stage 1 reads."""

    classes: list[str]
    folds: FoldsConfig
    compute: ComputeConfig
    head: HeadConfig
    multitask: MultitaskConfig


class ClusteringSlice(Section):
    """What layer features and clustering read."""

    folds: FoldsConfig
    compute: ComputeConfig
    clustering: ClusteringConfig


class FoldsSlice(Section):
    """What the cluster statistics read."""

    folds: FoldsConfig


class RetrainingSlice(Section):
    """What stage 3 reads."""

    folds: FoldsConfig
    compute: ComputeConfig
    clustering: ClusteringConfig
    retraining: RetrainingConfig


class PretrainingSlice(Section):
    """What pre-training reads."""

    encoder: EncoderConfig
    compute: ComputeConfig
    pretraining: PretrainingConfig


class ProbeSlice(Section):
    """What a probe of an encoder reads."""

    classes: list[str]
    folds: FoldsConfig
    compute: ComputeConfig


class FinetuningSlice(Section):
    """What stage 4 and its evaluation read."""

    classes: list[str]
    folds: FoldsConfig
    encoder: EncoderConfig
    compute: ComputeConfig
    head: HeadConfig
    finetuning: FinetuningConfig


class BaselineSlice(Section):
    """What the classical reference reads."""

    classes: list[str]
    folds: FoldsConfig


SLICES: dict[str, type[Section]] = {
    "corpus": CorpusSlice,
    "pretrained": EncoderSlice,
    "local_features": LocalFeaturesSlice,
    "multitask": MultitaskSlice,
    "layer_features": ClusteringSlice,
    "clustering": ClusteringSlice,
    "cluster_statistics": FoldsSlice,
    "retraining": RetrainingSlice,
    "finetuning": FinetuningSlice,
    "evaluation": FinetuningSlice,
    "examples": FinetuningSlice,
    "baseline": BaselineSlice,
    "pretraining": PretrainingSlice,
    "probe": ProbeSlice,
    "tables": Config,
}
"""The sections of the config that each stage reads."""

UPSTREAM: dict[str, tuple[str, ...]] = {
    "multitask": (),
    "layer_features": ("multitask",),
    "clustering": ("layer_features",),
    "cluster_statistics": ("clustering",),
    "retraining": ("clustering",),
    "finetuning": ("multitask", "retraining"),
    "evaluation": ("finetuning",),
}
"""Stages whose results each stage that an ablation can change builds on."""


def parse(settings: Mapping[str, Any]) -> Config:
    """Validate a merged mapping, and every ablation with it.

    Raises:
        UserError: names each offending key, what was found and what was expected.
    """
    config = _validated(settings)
    if config.corpus.reader != "synthetic" and config.corpus.root is None:
        raise UserError("The config is not valid:\n  corpus.root is needed: where is the corpus?")
    # Numbers of the command line are text until their keys are known.
    typed = {
        name: _typed(changes, variant(config, name).model_dump(mode="json"))
        for name, changes in config.ablations.items()
    }
    return config.model_copy(update={"ablations": typed})


def variant(config: Config, name: str) -> Config:
    """The config that an ablation stands for; `main` is the config itself."""
    if name == "main":
        return config
    settings = config.model_dump(mode="json")
    _overlay(settings, config.ablations[name])
    return _validated(settings, prefix=f"ablations.{name}: ")


def shared_variant(config: Config, stage: str, name: str) -> str:
    """The first variant whose results of `stage` are those of variant `name`, so that both share them."""
    wanted = _closure(variant(config, name), stage)
    for candidate in ("main", *config.ablations):
        if _closure(variant(config, candidate), stage) == wanted:
            return candidate
    raise AssertionError("a variant equals itself")


def slice_for(config: Config, stage: str) -> dict[str, Any]:
    """The sections that a stage reads, as a JSON-able mapping; read back with `SLICES[stage]`."""
    return config.model_dump(mode="json", include=set(SLICES[stage].model_fields), exclude=unread(stage))


def up_to(config: Config, iteration: int) -> Config:
    """The config without the iterations of pre-training after this one (from 1): none of them changes its results."""
    assert config.pretraining is not None
    kept = {"iterations": config.pretraining.iterations[:iteration]}
    return config.model_copy(update={"pretraining": config.pretraining.model_copy(update=kept)})


def unread(stage: str) -> dict[str, Any]:
    """Keys of a stage's sections that its results do not depend on, as pydantic excludes them."""
    of_stage = _UNREAD.get(stage, {})
    return {
        section: NOT_IN_RESULTS.get(section, set()) | of_stage.get(section, set())
        for section in NOT_IN_RESULTS | of_stage
    }


def identity(config: Config) -> str:
    """Twelve hexadecimal digits that name the experiment: equal for equal settings, wherever the corpus lies."""
    settings = config.model_dump(mode="json", exclude={"name": True, "pretraining": True, **NOT_IN_RESULTS})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _validated(settings: Mapping[str, Any], prefix: str = "") -> Config:
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        lines = [
            f"  {prefix}{'.'.join(map(str, problem['loc'])) or 'config'}: {problem['msg']}"
            + ("" if problem["type"] in ("missing", "value_error") else f" (found {_BRIEF.repr(problem['input'])})")
            for problem in error.errors()[:_PROBLEMS]
        ]
        lines += [f"  ... and {error.error_count() - _PROBLEMS} more"] * (error.error_count() > _PROBLEMS)
        raise UserError(
            "The config is not valid:\n"
            + "\n".join(lines)
            + '\nEvery key is described in docs/config.md; in YAML, quote ids such as "03".'
        ) from None


def _typed(changes: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `changes` names, as the validated `settings` have it."""
    return {
        key: _typed(value, settings[key]) if isinstance(value, Mapping) else settings[key]
        for key, value in changes.items()
    }


def _overlay(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict):
            _overlay(settings[key], value)
        else:
            settings[key] = copy.deepcopy(value)


def _closure(config: Config, stage: str) -> str:
    """What the results of `stage` depend on, upstream included, as text."""
    stages, frontier = set(), {stage}
    while frontier:
        stages |= frontier
        frontier = {upstream for each in frontier for upstream in UPSTREAM[each]} - stages
    return json.dumps({each: slice_for(config, each) for each in sorted(stages)}, sort_keys=True)
