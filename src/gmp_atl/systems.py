"""What a config asks to be evaluated: one list for the workflow, the tables, the figures and doctor."""

from __future__ import annotations

from dataclasses import dataclass

from gmp_atl import paper
from gmp_atl.architecture import Architecture
from gmp_atl.config import Config, EncoderConfig, shared_variant, variant
from gmp_atl.errors import UserError

LOSSES = {"ce": "CE", "ams": "AMS"}


@dataclass(frozen=True)
class System:
    """What was evaluated: one row of Table 3 or 4, an ablation of it, or the classical reference."""

    model: str = "gmp-atl"
    variant: str = "main"
    layer: int | None = None
    """Of the GMPs; None without."""
    loss: str | None = None

    @property
    def label(self) -> str:
        if self == BASELINE:
            return "eGeMAPS + SVM"
        gmps = "no GMPs" if self.layer is None else f"GMPs of layer {self.layer}"
        variant = "" if self.variant == "main" else f" ({self.variant})"
        return f"{gmps}, {LOSSES.get(self.loss or '', self.loss)}{variant}"


BASELINE = System(model="egemaps-svm")
BASELINE_SEED = 0
"""The classical reference draws nothing at random."""


def main_system(config: Config) -> System:
    """The paper's proposal: GMPs and AM-Softmax."""
    return System(layer=config.tables.layer, loss="ams")


def table_3_systems(config: Config) -> dict[tuple[bool, str], System]:
    """(with GMPs?, loss): system, in the paper's order."""
    return {
        (gmps, loss): System(layer=config.tables.layer if gmps else None, loss=loss) for gmps, loss in paper.TABLE_3
    }


def ablation_system(config: Config, name: str, loss: str) -> System:
    """The row with GMPs under an ablation, which may share its evaluation with an equal variant; `main` is that row."""
    return System(variant=shared_variant(config, "evaluation", name), layer=config.tables.layer, loss=loss)


def systems(config: Config) -> list[System]:
    """Every system whose evaluation the config asks for, each once, in the order of the tables.

    The main system is among them only where a table has it: Table 1 alone asks for none.
    """
    asked: list[System] = []
    if 3 in config.tables.numbers:
        asked += table_3_systems(config).values()
    if 2 in config.tables.numbers:
        asked.append(main_system(config))
    if 4 in config.tables.numbers:
        asked += [System(layer=layer, loss="ams") for layer in config.tables.layers]
    if config.ablations:
        variants = ("main", *config.ablations)
        asked += [ablation_system(config, name, loss) for loss in config.tables.ablation_losses for name in variants]
    if 2 in config.tables.numbers and config.tables.baseline == "egemaps":
        asked.append(BASELINE)
    return list(dict.fromkeys(asked))


def seeds(config: Config, system: System) -> list[int]:
    """The seeds that a system is evaluated with."""
    return [BASELINE_SEED] if system == BASELINE else config.seeds


def check_layers(config: Config) -> None:
    """Look for every layer that a config asks for in its encoder, where that is at hand, before hours are spent.

    Raises:
        UserError: names the key.
    """
    count = _layers(config.encoder)
    if count is None:
        return
    asked = {}
    for system in systems(config):
        if system.layer is not None:
            asked[system.layer] = "tables.layer" if system.layer == config.tables.layer else "tables.layers"
    for name in ("main", *config.ablations):
        key = "head.layer" if name == "main" else f"ablations.{name}.head.layer"
        asked.setdefault(variant(config, name).head.layer, key)
    for layer, key in asked.items():
        if -layer > count:
            raise UserError(f"{key}: layer {layer} is asked for, but the encoder has layers -1 to -{count}.")


def _layers(encoder: EncoderConfig) -> int | None:
    """How many an encoder has; None where that is not known, as of the hub's."""
    if encoder.source == "scratch":
        return encoder.scratch.layers
    if encoder.folder is None or not (encoder.folder / "config.json").exists():
        return None
    return Architecture.read(encoder.folder).num_hidden_layers
