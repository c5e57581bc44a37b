"""Files that appear under their final name only when they are complete, and what paths mean to a stage."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

from gmp_atl.errors import UserError

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
"""A disk that is full, or that may not be written to."""
_UMASK = os.umask(0)  # read once: to read is to set it, for all threads
os.umask(_UMASK)


class Role(Enum):
    """What a path among a stage's arguments stands for, if not for an input."""

    OUTPUT = "output"
    AUDIO = "audio"


Output = Annotated[Path, Role.OUTPUT]
"""A file or folder that a stage writes."""
Outputs = Annotated[list[Path], Role.OUTPUT]
AudioRoot = Annotated[Path, Role.AUDIO]
"""Folder of a release (or a manifest): far more than what is read, so that only the clips read are accounted for."""


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto it when the block ends without an error.

    Raises:
        UserError: the disk is full, or may not be written to, or no file can be there.
    """
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder.")
    # A folder, since libraries may write under another name beside the one that they are given.
    with _beside(path) as folder:
        temporary = folder / "partial"
        temporary.touch()
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which takes the place of `path` when the block ends without an error.

    Raises:
        UserError: as `atomic` does.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} cannot be written: it is no folder.")
    with _beside(path) as folder:
        fresh = folder / "fresh"
        fresh.mkdir()
        yield fresh
        for file in filter(Path.is_file, fresh.rglob("*")):
            _sync(file)
        if path.exists():
            path.replace(folder / "before")
        fresh.replace(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder for what is to be moved to `path`; what the system has against writing becomes a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(path)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield folder
    except Exception as error:
        reason = _refusal(error)
        # What was read in the block, and not written, is told as it is.
        elsewhere = isinstance(error, OSError) and error.filename and folder.name not in str(error.filename)
        if reason is None or elsewhere:
            raise
        raise UserError(f"{path} cannot be written: {reason}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until the disk holds a file's bytes: were the machine to fail, a new name might outlive them."""
    with path.open("rb") as stream:  # a file of a folder may be read-only
        os.fsync(stream.fileno())


def _refusal(error: Exception) -> str | None:
    """What the system has against writing, if that is the error; safetensors tells its number in the text alone."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return os.strerror(number) if number in _REFUSALS else None


def remove_partial(path: Path) -> None:
    """Remove what a write of `path` that was killed has left beside it: up to the size of the whole file."""
    # Eight characters are mkdtemp's: a write of another file, of whose name this one is the beginning, goes on.
    for partial in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.part"):
        shutil.rmtree(partial, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically, in UTF-8."""
    write_bytes(path, text.encode())
