"""Write envs/*.yaml, the Conda environments of the rules, and requirements/tables.lock from the locks: `make envs`.

An environment holds the packages that one kind of rule imports, named in `ENVIRONMENTS`, and all that these
depend on, as read from the metadata of what is installed in .venv. Versions are the locks'. Conda gives Python and pip,
and pip the exact pins: they stand in the file because Snakemake copies it elsewhere, where `pip: -r` finds no lock.

tables.lock has the packages of the environment `tables` with main.lock's hashes, for a virtual environment without
torch that makes tables from evaluations.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

ENVIRONMENTS = {
    "corpus": ["espeakng-loader", "numpy", "pyarrow", "pydantic", "scipy", "soundfile"],
    "torch": [
        "huggingface-hub",
        "numpy",
        "pyarrow",
        "pydantic",
        "safetensors",
        "scikit-learn",
        "soundfile",
        "torch",
        "torchaudio",
        "triton",
    ],
    # No torch: it and faiss bring two OpenMP libraries and two CUDA versions, which crash in one process.
    "faiss": [
        "faiss-gpu",
        "numpy",
        "pandas",
        "pyarrow",
        "pydantic",
        "safetensors",
        "scikit-learn",
        "scipy",
        "threadpoolctl",
    ],
    "opensmile": [
        "numpy",
        "opensmile",
        "pyarrow",
        "pydantic",
        "soundfile",
        "torch",
        "torchaudio",
    ],
    "tables": ["matplotlib", "numpy", "pandas", "pyarrow", "pydantic", "rich", "scipy"],
}

TEMPLATE = """\
# Made from requirements/*.lock by `make envs`; do not edit. The packages asked for, and all that they depend on:
# {roots}
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
{pins}
"""


def main() -> None:
    """Write every environment, and the lock for tables."""
    for name in ENVIRONMENTS:
        (ROOT / "envs" / f"{name}.yaml").write_text(environment(name), encoding="utf-8")
    (ROOT / "requirements" / "tables.lock").write_text(tables_lock(), encoding="utf-8")


def environment(name: str) -> str:
    """The text of an environment file.

    Raises:
        PackageNotFoundError: a package is not installed (for openSMILE: `make opensmile`).
    """
    roots, versions = ENVIRONMENTS[name], locked()
    pins = [f"      - {package}=={versions[package]}" for package in sorted(closure(roots))]
    return TEMPLATE.format(roots=", ".join(roots), pins="\n".join(pins))


def tables_lock() -> str:
    """The text of tables.lock: those packages of main.lock that the environment `tables` has."""
    entries = _entries("main")
    wanted = [entries[package] for package in sorted(closure(ENVIRONMENTS["tables"]))]
    return "# Made from main.lock by `make envs`; do not edit. What envs/tables.yaml has, with hashes.\n" + "".join(
        wanted
    )


def locked() -> dict[str, str]:
    """Version of every package in the locks."""
    entries = {name: entry for lock in ("main", "opensmile", "conda") for name, entry in _entries(lock).items()}
    return {name: re.split(r"==|\s", entry)[1] for name, entry in entries.items()}


def _entries(lock: str) -> dict[str, str]:
    """The text of each package in a lock: its pin, hashes and comments."""
    text = (ROOT / f"requirements/{lock}.lock").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    return {entry.partition("==")[0]: entry for entry in entries}


def closure(roots: list[str]) -> set[str]:
    """Packages, and all that they depend on here, by canonical name."""
    found: set[tuple[str, str]] = set()  # name, extra
    frontier = {(name, "") for name in roots}
    while frontier:
        found |= frontier
        frontier = {dependency for name, extra in frontier for dependency in _dependencies(name, extra)} - found
    return {name for name, _ in found}


def _dependencies(name: str, extra: str) -> set[tuple[str, str]]:
    requirements = [Requirement(text) for text in metadata.requires(name) or []]
    return {
        (canonicalize_name(requirement.name), wanted)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        for wanted in ("", *requirement.extras)
    }


if __name__ == "__main__":
    main()
