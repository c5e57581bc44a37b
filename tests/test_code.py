"""The hash of a stage's code: what it follows, what it leaves out, and that every rule has its own stage's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmp_atl import code

ROOT = Path(__file__).parents[1]
STAGES = sorted(path.stem for path in (ROOT / "src/gmp_atl/stages").glob("[!_]*.py"))


def forget() -> None:
    """What was read of the package."""
    for function in vars(code).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, not yet there, that is hashed in place of the package."""
    monkeypatch.setattr(code, "_PACKAGE", tmp_path / "gmp_atl")
    yield tmp_path / "gmp_atl"
    forget()


def hashes(*stages: str) -> dict[str, str]:
    forget()
    return {stage: code.code_hash(stage) for stage in stages}


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_a_change_counts_for_stages_that_import_it_and_words_for_none(package: Path) -> None:
    """Stages that train import the encoder, and the encoder positions.py."""
    shutil.copytree(ROOT / "src/gmp_atl", package)
    before = hashes(*STAGES)
    append(package / "positions.py", "\n\n# A comment.\n")
    assert hashes(*STAGES) == before
    reworded = re.sub(r'"""(?=\w)', '"""In other words: ', (package / "positions.py").read_text(encoding="utf-8"))
    (package / "positions.py").write_text(reworded, encoding="utf-8")
    assert hashes(*STAGES) == before
    append(package / "positions.py", "CHANGED = 1\n")
    after = hashes(*STAGES)
    changed = {stage for stage in STAGES if after[stage] != before[stage]}
    assert {"finetuning", "retraining"} <= changed
    assert not {"corpus", "tables"} & changed


def test_another_version_is_another_code_for_those_alone_that_read_it(package: Path) -> None:
    shutil.copytree(ROOT / "src/gmp_atl", package)
    before = hashes(*STAGES)
    append(package / "__init__.py", '__version__ = "99"\n')
    after = hashes(*STAGES)
    assert {stage for stage in STAGES if after[stage] != before[stage]} == {"pretrain"}


@pytest.mark.parametrize(
    "statement",
    [
        "from gmp_atl import far",
        "from gmp_atl.far import VALUE",
        "import json, gmp_atl.far as other",
        "def late():\n    from gmp_atl.far import VALUE",
        "from gmp_atl.near import VALUE",
        "from gmp_atl import folder",
        "from gmp_atl.folder import near",
    ],
)
def test_every_form_of_import_is_followed(package: Path, statement: str) -> None:
    for folder in ("stages", "folder"):
        (package / folder).mkdir(parents=True)
    # Modules that import each other have a hash too.
    (package / "far.py").write_text("from gmp_atl import near\n\nVALUE = 1\n", encoding="utf-8")
    for near in ("near.py", "folder/near.py", "folder/__init__.py"):
        (package / near).write_text("from gmp_atl.far import VALUE\n", encoding="utf-8")
    (package / "stages/here.py").write_text(statement, encoding="utf-8")
    (package / "stages/elsewhere.py").write_text("import json\n", encoding="utf-8")
    before = hashes("here", "elsewhere")
    append(package / "far.py", "CHANGED = 1\n")
    after = hashes("here", "elsewhere")
    assert after["here"] != before["here"]
    assert after["elsewhere"] == before["elsewhere"]


def rules() -> Iterator[tuple[str, list[str], list[str]]]:
    """Each rule, the stages that it calls, and what its params have as code; it may have both from another rule."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for path in sorted((ROOT / "workflow/rules").glob("*.smk")):
        blocks = r"^(?:use rule (\w+) as|rule) (\w+)(?: with)?:\n((?:(?: .*)?\n)*)"
        for base, name, block in re.findall(blocks, path.read_text(encoding="utf-8"), re.MULTILINE):
            calls, hashed = found.get(base, ([], []))
            if "    shell:\n" in block:
                calls = re.findall(r"python -m gmp_atl (\w+)", block)
            if params := re.search(r"^    params:\n((?: {8}.*\n)*)", block, re.MULTILINE):
                hashed = re.findall(r"^ {8}code=(.*),$", params[1], re.MULTILINE)
            found[name] = calls, hashed
            yield name, calls, hashed


RULES = list(rules())


@pytest.mark.parametrize(("rule", "calls", "hashed"), RULES, ids=[rule for rule, *_ in RULES])
def test_a_rule_is_rerun_for_the_code_of_the_stage_that_it_calls(
    rule: str, calls: list[str], hashed: list[str]
) -> None:
    [stage] = calls
    assert hashed == [f'code_hash("{stage}")']


def test_every_stage_is_called_by_a_rule() -> None:
    """Else the rules above would not be all of them."""
    assert {stage for _, calls, _ in RULES for stage in calls} == {*STAGES}
