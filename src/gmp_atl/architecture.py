"""What `config.json` says of an encoder's network, without the network: HuBERT's, wav2vec 2.0's, WavLM's."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from gmp_atl.errors import UserError
from gmp_atl.frames import CONV_KERNELS, CONV_STRIDES

Size = Annotated[int, Field(gt=0, le=8192)]  # HuBERT X-Large is 5120 wide where it is widest

MODEL_TYPES = {"hubert": "HubertModel", "wav2vec2": "HubertModel", "wavlm": "WavLMModel"}
"""Of `config.json`, and the class of transformers that has the same network."""
_POSITIONS = {"num_buckets", "max_bucket_distance"}
"""Keys that WavLM has and the others have not."""


@dataclass(frozen=True)
class Architecture:
    """The settings of a HuBERT's `config.json` that determine the network."""

    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    conv_dim: tuple[Size, ...]
    conv_bias: bool = False
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_proj_layer_norm: bool = True
    do_stable_layer_norm: bool = False
    num_conv_pos_embeddings: Size = 128
    num_conv_pos_embedding_groups: Size = 16
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    num_buckets: Size | None = None
    """Of relative positions, in WavLM's attention; None elsewhere."""
    max_bucket_distance: Size | None = None
    """In frames, beyond which positions fall into one bucket."""

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {name}, {getattr(self, name)}")
        buckets, farthest = self.num_buckets, self.max_bucket_distance
        if buckets is not None and farthest is not None and not 4 <= buckets < 4 * farthest:
            raise ValueError(f"{buckets} buckets of positions do not reach {farthest} frames")

    @classmethod
    def read(cls, folder: Path) -> Architecture:
        """From the `config.json` in `folder`. Raises a UserError where it is missing or no JSON, and as below."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {folder} should hold config.json and model.safetensors.") from None
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path} is not JSON ({error}).") from None
        if not isinstance(config, dict):
            raise UserError(f"{path} is not the config.json of a HuBERT, but a JSON {type(config).__name__}.")
        return cls.from_config(config, path)

    @classmethod
    def from_config(cls, config: dict[str, Any], source: Path) -> Architecture:
        """Read `config.json` of a HuBERT, of a wav2vec 2.0, whose network is the same, or of a WavLM.

        Raises:
            UserError: another model, other strides, or an option that this encoder does not have.
        """
        kind = config.get("model_type", "hubert")
        if kind not in MODEL_TYPES:
            supported = ", ".join(map(repr, MODEL_TYPES))
            raise UserError(f"{source}: model_type is {kind!r}, but only {supported} are supported.")
        expected = {
            "conv_kernel": list(CONV_KERNELS),
            "conv_stride": list(CONV_STRIDES),
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "conv_pos_batch_norm": False,
            "add_adapter": False,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise UserError(f"{source}: {key} is {config[key]!r}, but only {value!r} is supported.")
        of_kind = [field for field in fields(cls) if kind == "wavlm" or field.name not in _POSITIONS]
        needed = {field.name for field in of_kind if field.default is MISSING or field.name in _POSITIONS}
        absent = sorted(needed - config.keys())
        if absent:
            raise UserError(f"{source} is not the config.json of a HuBERT: {', '.join(absent)} is missing.")
        if not isinstance(config["conv_dim"], list) or len(config["conv_dim"]) != len(CONV_KERNELS):
            raise UserError(f"{source}: conv_dim is {config['conv_dim']!r}, not a list of {len(CONV_KERNELS)} sizes.")
        known = {field.name: config[field.name] for field in of_kind if field.name in config}
        try:
            return TypeAdapter(cls).validate_json(json.dumps(known), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            place = f"{source}: {where}" if where else source
            raise UserError(f"{place}: {problem['msg']}; expected the config.json of a HuBERT.") from None

    def to_config(self) -> dict[str, Any]:
        """A `config.json` from which `HubertModel.from_pretrained`, or WavLM's, builds the same network."""
        kind = "hubert" if self.num_buckets is None else "wavlm"
        return {
            "architectures": [MODEL_TYPES[kind]],
            "model_type": kind,
            "conv_kernel": list(CONV_KERNELS),
            "conv_stride": list(CONV_STRIDES),
            "num_feat_extract_layers": len(CONV_KERNELS),
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            **{key: value for key, value in asdict(self).items() if value is not None},
            "conv_dim": list(self.conv_dim),
        }
