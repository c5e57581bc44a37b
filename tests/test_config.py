"""Settings that contradict each other are refused before a job starts, and the message names them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SETTINGS
from snakemake.utils import update_config

from gmp_atl import config
from gmp_atl.errors import UserError
from gmp_atl.systems import check_layers

ROOT = Path(__file__).parents[1]
CHANGEABLE = "keys of clustering, finetuning, head, multitask, retraining"


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The tests' settings with other values for dotted keys."""
    settings = copy.deepcopy(SETTINGS)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = settings
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    return settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"folds.held_out": [["S1", "S2"], ["S3", "S2", "S1"]]},
            "folds: Value error, held_out names S1, S2 more than once: folds must not overlap",
        ),
        (
            {"encoder.scratch.hidden_size": 40},
            "encoder.scratch: Value error, hidden_size must be a multiple of heads and of 16",
        ),
        (
            {"encoder.scratch.heads": 3},
            "encoder.scratch: Value error, hidden_size must be a multiple of heads and of 16",
        ),
        ({"encoder": {"source": "hub", "name": "x"}}, "encoder: Value error, source: hub needs name and revision"),
        (
            {"encoder": {"source": "hub", "name": "x", "revision": "main"}},
            "encoder: Value error, revision must be a full 40-digit commit, not a branch or tag",
        ),
        ({"encoder": {"source": "directory"}}, "encoder: Value error, source: directory needs path"),
        ({"clustering.sizes": [4, 8, 4]}, "clustering.sizes: Value error, 4 is named twice"),
        ({"seeds": [1, 0, 1]}, "seeds: Value error, 1 is named twice"),
        ({"classes": ["sad", "sad"]}, "classes: Value error, sad is named twice"),
        ({"tables.layers": [-1, -3, -1]}, "tables.layers: Value error, -1 is named twice"),
        ({"tables.numbers": [1, 1]}, "tables.numbers: Value error, 1 is named twice"),
        ({"tables.ablation_losses": ["ce", "ce"]}, "tables.ablation_losses: Value error, ce is named twice"),
        (
            {"folds.held_out": [["S1"], ["S2"]], "finetuning.selection": "held_out_training_group"},
            "config: Value error, finetuning.selection: held_out_training_group needs at least three folds",
        ),
        (
            {"ablations": {"main": {"head": {"projection": 16}}}},
            "config: Value error, ablations.main: 'main' is the name of something else in results; take another",
        ),
        (
            {"ablations": {"none": {}}},
            f"config: Value error, ablations.none must change {CHANGEABLE}",
        ),
        (
            {"ablations": {"other": {"seeds": [1], "classes": ["sad"]}}},
            f"config: Value error, ablations.other must change {CHANGEABLE}, not classes, seeds",
        ),
        (
            {"ablations": {"two": {"clustering": {"sizes": [3, 3]}}}},
            "ablations.two: clustering.sizes: Value error, 3 is named twice",
        ),
    ],
)
def test_contradictions_are_told_with_their_key(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        config.parse(changed(changes))
    first, problem, hint = str(error.value).splitlines()
    assert first == "The config is not valid:"
    assert problem == f"  {told}"
    assert "docs/config.md" in hint


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tables.layer": -5}, "tables.layer: layer -5"),
        ({"tables.numbers": [4], "tables.layers": [-2, -6]}, "tables.layers: layer -6"),
        ({"head": {"layer": -9}}, "head.layer: layer -9"),
        ({"ablations": {"deep": {"head": {"layer": -7}}}}, "ablations.deep.head.layer: layer -7"),
        ({"encoder": {"source": "packaged"}, "tables.layer": -13}, "tables.layer: layer -13"),
    ],
)
def test_a_layer_that_the_encoder_lacks_is_told_with_its_key(changes: dict[str, Any], told: str) -> None:
    few = {"encoder.scratch.layers": 4, "tables.layer": -4, "tables.layers": [-1]}
    settings = config.parse(changed(few | changes))
    with pytest.raises(UserError, match=f"^{told} is asked for, but the encoder has layers -1 to -"):
        check_layers(settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"tables.layers": [-1, -9], "tables.numbers": [1, 2, 3]},  # Table 4 is not asked for
        {"tables.layer": -9, "tables.numbers": [1]},
        {"tables.layer": -12, "encoder": {"source": "packaged"}},
        {"tables.layer": -24, "encoder": {"source": "hub", "name": "large", "revision": 40 * "0"}},
        {"tables.layer": -24, "encoder": {"source": "directory", "path": "absent"}},
    ],
)
def test_layers_that_nothing_reads_or_of_encoders_not_at_hand_are_not_refused(changes: dict[str, Any]) -> None:
    check_layers(
        config.parse(changed({"encoder.scratch.layers": 4, "tables.layer": -4, "tables.layers": [-1]} | changes))
    )


def test_a_corpus_that_is_not_made_needs_a_root() -> None:
    with pytest.raises(UserError, match=r"corpus\.root is needed: where is the corpus\?"):
        config.parse(changed({"corpus": {"reader": "emodb"}}))


def test_no_more_than_twenty_problems_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        config.parse(SETTINGS | {f"unknown{n}": n for n in range(23)})
    lines = str(error.value).splitlines()
    assert lines[1] == "  unknown0: Extra inputs are not permitted (found 0)"
    assert lines[21] == "  ... and 3 more"
    assert len(lines) == 23


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    corpus = {"reader": "emodb", "root": "~/emodb"}
    assert config.parse({**SETTINGS, "corpus": corpus}).corpus.root == Path("/home/someone/emodb")
    with pytest.raises(UserError, match=r"corpus\.root: .*home directory"):
        config.parse({**SETTINGS, "corpus": {**corpus, "root": "~nobody-of-that-name/emodb"}})


def test_of_two_presets_the_later_changes_what_it_names() -> None:
    merged: dict[str, Any] = {}
    for name in ("config.yaml", "presets/emodb.yaml", "presets/wavlm.yaml"):
        update_config(merged, yaml.safe_load((ROOT / name).read_text(encoding="utf-8")))
    found = config.parse(merged)
    assert (found.name, found.corpus.reader) == ("iemocap-wavlm", "emodb")
    assert (found.encoder.source, found.encoder.name) == ("hub", "microsoft/wavlm-base-plus")


def test_ablations_are_the_same_from_a_file_and_from_the_command_line() -> None:
    """Snakemake gives numbers of --config as text where they stand in a mapping."""
    change = {"finetuning": {"margin": 0.0, "optimisation": {"batch_size": 16}}}
    as_text = {"finetuning": {"margin": "0.0", "optimisation": {"batch_size": "16"}}}
    of_file, of_command_line = (config.parse(changed({"ablations": {"a": each}})) for each in (change, as_text))
    assert of_command_line.ablations == of_file.ablations == {"a": change}
    assert config.identity(of_command_line) == config.identity(of_file)
