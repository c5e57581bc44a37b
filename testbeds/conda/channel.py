"""A local Conda channel with the two packages that envs/*.yaml take from conda-forge: python and pip.

They are this machine's: `python` links to its interpreter in the way of a virtual environment, whose own site-packages
are all that it sees, and `pip` is the wheel that comes with that interpreter.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import platform
import sys
import tarfile
import zipfile
from pathlib import Path

from rattler import Subdir
from rattler.index import index_fs

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
SITE_PACKAGES = f"lib/{PYTHON}/site-packages"
Files = dict[str, bytes | str]
"""Content of every file of a package by its path; a text is where a symbolic link points to."""


def make_channel(folder: Path) -> None:
    """Write both packages and the channel's index below `folder`."""
    _write(folder, "python", platform.python_version(), _python(), depends=[])
    wheel = next((Path(sys.base_prefix) / SITE_PACKAGES / "../ensurepip/_bundled").glob("pip-*.whl"))
    version = wheel.name.split("-")[1]
    _write(folder, "pip", version, _unpacked(wheel), depends=["python"])
    (folder / "noarch").mkdir()  # every channel has it
    asyncio.run(index_fs(folder, write_zst=False, write_shards=False))


def _python() -> Files:
    interpreter = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    files: Files = {f"bin/{name}": str(interpreter) for name in ("python", "python3", PYTHON)}
    files["pyvenv.cfg"] = f"home = {interpreter.parent}\ninclude-system-site-packages = false\n".encode()
    return files


def _unpacked(wheel: Path) -> Files:
    with zipfile.ZipFile(wheel) as archive:
        return {f"{SITE_PACKAGES}/{name}": archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def _write(folder: Path, name: str, version: str, files: Files, depends: list[str]) -> None:
    """One package in the form of https://docs.conda.io/projects/conda-build/en/stable/resources/package-spec.html."""
    subdir = str(Subdir.current())
    described = {
        "name": name,
        "version": version,
        "build": "0",
        "build_number": 0,
        "depends": depends,
        "subdir": subdir,
    }
    paths = [
        {
            "_path": path,
            "path_type": "softlink" if isinstance(content, str) else "hardlink",
            "sha256": hashlib.sha256(b"" if isinstance(content, str) else content).hexdigest(),
            "size_in_bytes": len(content),
        }
        for path, content in files.items()
    ]
    info: Files = {
        "info/index.json": json.dumps(described).encode(),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}).encode(),
    }
    (folder / subdir).mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / subdir / f"{name}-{version}-0.tar.bz2", "w:bz2", compresslevel=1) as archive:
        for path, content in (info | files).items():
            entry = tarfile.TarInfo(path)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                archive.addfile(entry)
            else:
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
