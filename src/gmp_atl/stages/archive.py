"""A run's cached intermediates in one file: written by `archive`, read by `restore`.

A zip with `manifest.json` and the run's evaluation folder: predictions and metrics, cluster statistics, training
histories, corpus counts and provenance records. The manifest holds the config, the SHA-256 of every file, and those of
the run's tables and figures, so that who makes them anew can tell whether they are the same. A folder that is packed
twice gives the same archive.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gmp_atl.config import Config, identity
from gmp_atl.errors import NOTICE, UserError
from gmp_atl.files import Output, atomic, atomic_folder, sha256, write_text

log = logging.getLogger(__name__)

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
)
"""What zipfile raises on damaged files, and on those that are encrypted or packed in another way."""
MANIFEST = "manifest.json"
_SUFFIXES = {".parquet", ".json"}
_LARGEST = 4 * 2**30
"""Bytes that an archive may unpack to: IEMOCAP with three seeds takes a hundredth, a malicious file any amount."""


class Manifest(BaseModel):
    """What an archive says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["gmp-atl archive"] = "gmp-atl archive"
    version: Literal[1] = 1
    identity: str
    config: dict[str, Any]
    files: dict[str, str]
    """Path below the evaluation folder: SHA-256."""
    made: dict[str, str]
    """Table or figure of the run, as `tables/table1.csv`: SHA-256."""


def archive(*, config: Config, evaluations: Path, tables: list[Path], figures: list[Path], output: Output) -> None:
    """Pack the evaluation folder of a run.

    Args:
        config: The whole config.
        evaluations: Folder whose Parquet and JSON files are packed.
        tables: Files of the run's tables, in one folder; only their digests are packed.
        figures: Likewise.
        output: Zip file.

    Raises:
        UserError: the folder holds something else, such as a file that was put there by hand.
    """
    paths = {
        path.relative_to(evaluations).as_posix(): path for path in sorted(evaluations.rglob("*")) if path.is_file()
    }
    foreign = [str(path) for path in paths.values() if path.suffix not in _SUFFIXES or path.name.startswith(".")]
    if foreign:
        raise UserError(f"{evaluations} holds what is no part of a run, {foreign[0]}; move it away and try again.")
    manifest = Manifest(
        identity=identity(config),
        config=config.model_dump(mode="json"),
        files={name: sha256(path) for name, path in paths.items()},
        made={**_made(tables, "tables"), **_made(figures, "figures")},
    )
    with atomic(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(_entry(MANIFEST), manifest.model_dump_json(indent=1))
        for name, path in paths.items():
            file.writestr(_entry(name), path.read_bytes())
    log.log(NOTICE, "%s: %d files, %.1f MB", output, len(paths), output.stat().st_size / 1e6)


def restore(path: Path, output: Path) -> Config:
    """Check an archive, unpack it to `output`/evaluations, and return the config of its run.

    Nothing is unpacked unless every file is there, unchanged and expected. An `output` that was restored before is
    replaced; any other folder is left alone.

    Raises:
        UserError: the file is missing, damaged, changed, or no archive of this project and version; `output` is taken.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; expected an archive that `make archive` wrote.")
    try:
        with zipfile.ZipFile(path) as file:
            manifest = _read_manifest(path, file)
            contents = _contents(path, file, manifest)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: which archive is meant? `make archive` writes one.") from None
    except _DAMAGE as error:
        raise UserError(f"{path} is no archive, or a damaged one ({error}); fetch it again.") from None
    config = _config(path, manifest)
    if output.exists() and not _was_restored(output):
        raise UserError(f"{output} exists and was not restored from an archive: name another folder.")
    with atomic_folder(output) as fresh:
        for name, data in contents.items():
            target = fresh / "evaluations" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        write_text(fresh / MANIFEST, manifest.model_dump_json(indent=1))
    return config


def _was_restored(folder: Path) -> bool:
    """Whether all that a folder holds is what `restore` puts there, and what is made of it."""
    try:
        Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        return {path.name for path in folder.iterdir()} <= {MANIFEST, "evaluations", "tables", "figures"}
    except (OSError, ValueError):
        return False


def compare(restored: Path) -> tuple[int, list[str]]:
    """How many tables and figures below a restored folder are those of the archived run, and which are not."""
    manifest = Manifest.model_validate_json((restored / MANIFEST).read_bytes())
    here: dict[str, str] = {}
    for kind in ("tables", "figures"):
        here |= _made((restored / kind).iterdir(), kind)
    differing = sorted(name for name, digest in manifest.made.items() if here.get(name) != digest)
    return len(manifest.made) - len(differing), differing


def _made(files: Iterable[Path], kind: str) -> dict[str, str]:
    return {f"{kind}/{path.name}": sha256(path) for path in sorted(files)}


def _entry(name: str) -> zipfile.ZipInfo:
    """Without the time, so that an archive depends on its files alone."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def _read_manifest(path: Path, file: zipfile.ZipFile) -> Manifest:
    if MANIFEST not in file.namelist():
        raise UserError(f"{path} is a zip file without {MANIFEST}: no archive of gmp-atl.")
    if file.getinfo(MANIFEST).file_size > _LARGEST:
        raise UserError(f"{path}: {MANIFEST} claims to be larger than any; the file is not to be trusted.")
    text = file.read(MANIFEST)
    try:
        found = json.loads(text)
        kind = (found["format"], found["version"]) if isinstance(found, dict) else None
    except (ValueError, KeyError):
        kind = None
    if kind != ("gmp-atl archive", 1):
        raise UserError(f"{path} is not an archive of gmp-atl, version 1 (found {kind or 'no such statement'}).")
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{path}: {MANIFEST} is damaged ({error.errors()[0]['msg']}); fetch the file again.") from None


def _contents(path: Path, file: zipfile.ZipFile, manifest: Manifest) -> dict[str, bytes]:
    """Every file by its name; refuses what the manifest does not name, or names otherwise."""
    names = [name for name in file.namelist() if name != MANIFEST]
    unexpected = sorted({*names} ^ {*manifest.files}) or sorted(n for n, times in Counter(names).items() if times > 1)
    if unexpected:
        raise UserError(
            f"{path}: {MANIFEST} and contents do not agree about {unexpected[0]} ({len(unexpected)} files in all); "
            "fetch the file again."
        )
    for name in names:
        parts = PurePosixPath(name).parts
        plain = "/".join(parts) == name and ".." not in parts and not name.startswith("/") and "\\" not in name
        beneath_a_file = any(parent.suffix in _SUFFIXES for parent in PurePosixPath(name).parents)
        if PurePosixPath(name).suffix not in _SUFFIXES or not plain or beneath_a_file:
            raise UserError(f"{path} holds {name}, which no run writes; the file is not to be trusted.")
    if sum(entry.file_size for entry in file.infolist()) > _LARGEST:
        raise UserError(f"{path} would unpack to more than {_LARGEST >> 30} GiB; the file is not to be trusted.")
    contents = {name: file.read(name) for name in names}
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != manifest.files[name]:
            raise UserError(f"{path}: {name} is not what {MANIFEST} says (sha256 differs); fetch the file again.")
    return contents


def _config(path: Path, manifest: Manifest) -> Config:
    try:
        config = Config.model_validate(manifest.config)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} was made by a version of gmp-atl with another config ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}); use the version that its records name."
        ) from None
    if identity(config) != manifest.identity:
        raise UserError(f"{path}: its config is not the one that it was made with; fetch the file again.")
    return config
