"""What the documents say of config, commands, files and readings is so."""

from __future__ import annotations

import copy
import errno
import os
import re
import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gmp_atl import config

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "config_reference.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
PAPER = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
KEYS = dict(TOOL["keys"](config.Config))
DEFAULTS = TOOL["defaults"](config.Config)
OVERLAID_ONLY = ("encoder.scratch.", "pretraining.")
"""The paper's encoder is not made from scratch, so that config.yaml leaves out of what size, and on which speech."""


def pages(*, of: str = "") -> Any:
    return pytest.mark.parametrize("page", [each for each in PAGES if of in TEXT[each]], ids=lambda page: page.name)


def look_up(settings: Mapping[str, Any], path: str) -> Any:
    return TOOL["look_up"](settings, path)


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """As Snakemake merges a preset, or --config, into config.yaml."""
    result = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", TOOL["outputs"](), ids=lambda path: path.name)
def test_generated_file_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == TOOL["outputs"]()[path], "run `python tools/config_reference.py`"


@pytest.mark.parametrize("path", KEYS)
def test_every_key_is_described(path: str) -> None:
    assert KEYS[path].description


@pytest.mark.parametrize("path", [path for path in KEYS if not path.startswith(OVERLAID_ONLY)])
def test_config_yaml_names_the_key_and_agrees_with_the_code(path: str) -> None:
    value, default = look_up(PAPER, path), look_up(DEFAULTS, path)
    assert value is not TOOL["ABSENT"]
    if default is not TOOL["ABSENT"] and default is not None:
        assert value == default


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages(of="](")
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pages(of="`make ")
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = re.findall(r"(?:`|^ +)make ([a-zA-Z=0-9 -]+?)(?:`| *#|$)", TEXT[page], re.MULTILINE)
    named = {word for command in commands for word in command.split() if "=" not in word}
    assert named
    assert named <= targets


def rule_names() -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    return re.findall(r"^rule (\w+):", text, re.MULTILINE)


@pytest.mark.parametrize("rule", rule_names())
def test_workflow_page_tells_of_the_rule(rule: str) -> None:
    assert re.search(rf"\b{rule}\b", TEXT[ROOT / "docs" / "workflow.md"])


def test_it_is_told_how_each_table_is_made_and_from_which_files() -> None:
    page = TEXT[ROOT / "docs" / "readings.md"]
    [section] = re.findall(r"^## How each table is made\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| (`.*?) \| .* \| (.*) \|$", section, re.MULTILINE)
    rules = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "workflow" / "rules").glob("*.smk")}
    listed = " ".join(re.findall(r"^RUN_TABLES.*$", rules["tables"], re.MULTILINE))
    made = {f"table{number}" for number in (1, 2, 3, 4)} | set(re.findall(r'"(\w+)"', listed))
    assert {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)} == made
    outputs = re.findall(r'"<results>/evaluations/([^"]+)"', "".join(rules.values()))
    read = re.findall(r"`([^` ]+(?:/[^` ]+|\.parquet))`", " ".join(paths for _, paths in rows))
    assert read
    for path in read:
        folders = ["/".join(output.split("/")[: path.count("/") + 1]) for output in outputs]
        assert any(re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", folder), path) for folder in folders), path


def readings() -> dict[int, tuple[str, str]]:
    """Number of each open reading: the cells with its default and with the other readings."""
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", TEXT[ROOT / "docs" / "readings.md"], re.MULTILINE)
    return {int(number): (cells.split(" | ")[1], cells.split(" | ")[2]) for number, cells in rows}


def settings_in(cell: str) -> list[tuple[str, Any]]:
    """Key and value of every `key: value` in a cell."""
    spans = [yaml.safe_load(span) for span in re.findall(r"`([^`]+: [^`]+)`", cell)]
    return [pair for span in spans for pair in span.items()]


def test_all_seventeen_readings_are_told_and_named_in_config_yaml() -> None:
    assert list(readings()) == list(range(1, 18))
    marks = re.findall(r"\[(\d+)\]", (ROOT / "config.yaml").read_text(encoding="utf-8").replace("seeds: [1", ""))
    assert set(map(int, marks)) >= set(range(1, 18))


@pytest.mark.parametrize("number", range(1, 18))
def test_default_reading_is_that_of_config_yaml(number: int) -> None:
    told = settings_in(readings()[number][0])
    assert told
    assert all(look_up(PAPER, path) == value for path, value in told)


@pytest.mark.parametrize("number", range(1, 18))
def test_other_readings_are_possible_and_different(number: int) -> None:
    default, other = readings()[number]
    for path, value in settings_in(other):
        assert path in dict(settings_in(default)) or path.split(".")[0] in PAPER
        assert look_up(PAPER, path) != value
        config.parse(merged(PAPER, nested(path, value)))
    assert settings_in(other) or other.strip() == "any"


def test_every_other_reading_is_an_ablation_of_the_preset() -> None:
    preset = yaml.safe_load((ROOT / "presets" / "ablations.yaml").read_text(encoding="utf-8"))
    other = [nested(*pair) for _, cell in readings().values() for pair in settings_in(cell) if pair[0] != "seeds"]
    ablations = list(preset["ablations"].values())
    assert all(change in ablations for change in other)
    assert all(change in other for change in ablations)
    config.parse(merged(PAPER, preset))


@pages(of="`")
def test_every_key_that_is_named_exists(page: Path) -> None:
    sections = {path.rpartition(".")[0] for path in KEYS}
    tops = "|".join(config.Config.model_fields)
    named = re.findall(rf"`((?:{tops})\.[a-z_0-9.]+)(?=[:`])", TEXT[page])
    files = (".parquet", ".safetensors", ".py", ".yaml", ".md")
    assert {path for path in named if not path.endswith(files)} <= {*KEYS, *sections}


@pages(of="```yaml")
def test_yaml_examples_are_valid_overlays(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", TEXT[page], re.DOTALL):
        config.parse(merged(PAPER, yaml.safe_load(block)))


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert project["version"] in TEXT[ROOT / "CHANGELOG.md"]


def test_errors_are_quoted_as_they_are_said() -> None:
    """Those of this project; strings that a source file breaks over two lines are put together."""
    own = TEXT[ROOT / "docs" / "troubleshooting.md"].split("Snakemake's own:")[0]
    quoted = [
        text
        for line in own.splitlines()
        if line.startswith("| `")
        for text in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]
    said = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    said = re.sub(r'"\n\s+f?"', "", said)
    assert len(quoted) > 15
    system = {os.strerror(errno.ENOSPC)}
    assert not [text for text in quoted if text not in said and text not in system]
