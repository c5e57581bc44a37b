"""One choice of versions: pyproject.toml, the locks and the rules' Conda environments agree."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from gmp_atl import code

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS = {"main": PROJECT["project"]["dependencies"], **PROJECT["dependency-groups"]}
DIRECT = [requirement for group in GROUPS.values() for requirement in group]
TOOL = runpy.run_path(str(ROOT / "tools" / "envs.py"))
LOCKED: dict[str, str] = TOOL["locked"]()
ENVIRONMENTS = sorted(TOOL["ENVIRONMENTS"])


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(environment: str) -> dict[str, str]:
    content = yaml.safe_load((ROOT / "envs" / f"{environment}.yaml").read_text(encoding="utf-8"))
    [listed] = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    return dict(pin.split("==") for pin in listed)


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Top-level names that the import statements among the nodes name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


PROVIDERS = metadata.packages_distributions()


def distributions(names: set[str]) -> set[str]:
    """The packages that third-party imports come from; one that is not installed goes by its own name."""
    own = {path.stem for path in (ROOT / "src").iterdir()}
    found = {name: PROVIDERS.get(name, [name]) for name in names - set(sys.stdlib_module_names) - own}
    return {canonical(provider) for candidates in found.values() for provider in candidates}


@pytest.mark.parametrize("requirement", DIRECT)
def test_direct_dependency_is_pinned_to_the_locked_version(requirement: str) -> None:
    name, _, version = requirement.partition("==")
    assert LOCKED[canonical(name)] == version


def test_every_locked_file_has_a_hash() -> None:
    locks = sorted((ROOT / "requirements").glob("*.lock"))
    assert locks
    for lock in locks:
        packages = re.split(r"^(?=[a-z0-9])", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        assert packages
        assert all("--hash=sha256:" in package for package in packages), lock.name


@pytest.mark.parametrize("lock", ["opensmile", "conda"])
def test_optional_lock_repeats_nothing_of_the_main_lock(lock: str) -> None:
    assert not set(TOOL["_entries"](lock)) & set(TOOL["_entries"]("main"))


def test_every_import_comes_from_a_direct_dependency() -> None:
    declared = {canonical(requirement.split("==")[0]) for requirement in DIRECT}
    imported = {name for path in (ROOT / "src").rglob("*.py") for name in imports(ast.walk(tree(path)))}
    assert distributions(imported) <= declared


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_environment_has_locked_versions(environment: str) -> None:
    listed = pins(environment)
    assert listed == {name: LOCKED[name] for name in listed}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_environment_is_up_to_date(environment: str) -> None:
    try:
        expected = TOOL["environment"](environment)
    except metadata.PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed (make opensmile)")
    assert (ROOT / "envs" / f"{environment}.yaml").read_text(encoding="utf-8") == expected, "run `make envs`"


def test_lock_for_tables_is_up_to_date() -> None:
    text = (ROOT / "requirements" / "tables.lock").read_text(encoding="utf-8")
    assert text == TOOL["tables_lock"](), "run `make envs`"


def test_no_environment_file_is_left_over() -> None:
    assert sorted(path.stem for path in (ROOT / "envs").iterdir()) == ENVIRONMENTS


def rules_with_environments() -> list[tuple[str, str]]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rule = r"^rule (\w+):(?:\n(?:[ \t].*)?)*?\n    conda:\n +\"\.\./\.\./envs/(\w+)\.yaml\""
    return re.findall(rule, text, re.MULTILINE)


def test_every_stage_has_an_environment() -> None:
    stages = {path.stem for path in (ROOT / "src" / "gmp_atl" / "stages").glob("*.py")} - {"__init__"}
    assert {rule for rule, _ in rules_with_environments()} == stages


@pytest.mark.parametrize(("stage", "environment"), rules_with_environments())
def test_stage_can_be_imported_in_its_environment(stage: str, environment: str) -> None:
    package = ROOT / "src" / "gmp_atl"
    modules: set[Path] = set()
    # Of what the command line imports inside functions, jobs need the record; the rest is for readers of tables.
    frontier = {package / "stages" / f"{stage}.py", package / "provenance.py", package / "leases.py"}
    while frontier:
        modules |= frontier
        frontier = {module for path in frontier for module in code._imports(path)} - modules
    # What stands at module level; an import inside a function is needed only where that function is called.
    needed = {name for path in {*modules, package / "cli.py"} for name in imports(tree(path).body)}
    assert distributions(needed) <= set(pins(environment))
