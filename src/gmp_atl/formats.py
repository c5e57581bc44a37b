"""Every Parquet file of a run: columns, dtypes and metadata, declared once and checked at reading.

Files appear under their final name only when they are complete, and each carries, beside its columns, a
JSON object of metadata (format name and version included).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmp_atl.errors import UserError

_KEY = b"gmp_atl"


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
    """A temporary name beside `path`, moved onto it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove what a write of `path` that was killed has left beside it: up to the size of the whole file."""
    for partial in path.parent.glob(f".{path.name}.*.part"):
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically, in UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Format:
    """A kind of Parquet file: name, version, schema, and the metadata keys that it must carry."""

    name: str
    schema: pa.Schema
    metadata: tuple[str, ...] = ()
    version: int = 1
    compression: str = "zstd"

    @contextmanager
    def writer(self, path: Path, /, **metadata: Any) -> Iterator[Callable[[pa.RecordBatch], None]]:
        """A function that appends one row group; the file appears when the block ends without an error."""
        self._check_keys(metadata, path)
        header = {"format": self.name, "version": self.version, **metadata}
        schema = self.schema.with_metadata({_KEY: json.dumps(header, sort_keys=True).encode()})
        with atomic(path) as temporary, pq.ParquetWriter(temporary, schema, compression=self.compression) as file:
            yield lambda rows: file.write_batch(rows.cast(schema), row_group_size=max(1, rows.num_rows))

    def write(self, path: Path, rows: pa.Table, /, **metadata: Any) -> None:
        """Write all rows atomically, in one row group."""
        with self.writer(path, **metadata) as append:
            for batch in rows.combine_chunks().to_batches():
                append(batch)

    def open(self, path: Path) -> tuple[pq.ParquetFile, dict[str, Any]]:
        """The opened file and its metadata, once both are found to be of this format.

        Raises:
            UserError: the file is missing, damaged, of another format or version.
        """
        try:
            file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; it should hold {self.name}.") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path} is not a readable Parquet file ({error}); delete it and run snakemake again."
            ) from None
        header = json.loads((file.schema_arrow.metadata or {}).get(_KEY, b"{}"))
        found = (header.get("format"), header.get("version"))
        if found != (self.name, self.version) or not file.schema_arrow.equals(self.schema):
            raise UserError(
                f"{path} holds {found[0] or 'an unknown format'} version {found[1]}, but {self.name} version "
                f"{self.version} is expected; delete it and run snakemake again."
            )
        self._check_keys(header, path)
        return file, header

    def read(self, path: Path, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
        """All rows and the metadata. Raises as `open` does."""
        file, header = self.open(path)
        try:
            return file.read(columns=columns), header
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run snakemake again.") from None

    def _check_keys(self, header: dict[str, Any], path: Path) -> None:
        missing = [key for key in self.metadata if key not in header]
        if missing:
            raise UserError(f"{path}: metadata of {self.name} lacks {', '.join(missing)}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


UTTERANCES = Format(
    "utterances",
    _schema(
        id=pa.string(),
        path=pa.string(),  # relative to the corpus root
        speaker=pa.string(),
        gender=pa.string(),  # female or male
        session=pa.string(),
        emotion=pa.string(),
        n_samples=pa.int64(),  # at 16 kHz
        text_type=pa.string(),  # improvised, scripted, ...; empty where the corpus does not say
    ),
    # name of the corpus; whether its counts are the full release's; digest of the ids and their decoded audio
    metadata=("corpus", "complete", "audio"),
)
EXCLUDED = Format("excluded", _schema(id=pa.string(), reason=pa.string()))
CORPUS_SUMMARY = Format(
    "corpus_summary",
    _schema(emotion=pa.string(), session=pa.string(), gender=pa.string(), utterances=pa.int64(), n_samples=pa.int64()),
    metadata=("corpus", "complete", "audio", "classes", "excluded"),  # excluded: {reason: count}
)
LOCAL_FEATURES = Format(
    "local_features",
    _schema(id=pa.string(), n_frames=pa.int32(), frames=pa.binary()),
    metadata=("dimensions", "encoder"),  # encoder: sha256 of its weights
    compression="none",  # zstd saves little, and halves the speed of reading (benchmarks/storage.py)
)
LAYER_FEATURES = Format(
    "layer_features",
    _schema(id=pa.string(), n_frames=pa.int32(), frames=pa.binary()),
    metadata=("dimensions", "layer", "fitted_on"),  # fitted_on: ids that the encoder has been trained on
    compression="none",
)
PSEUDO_LABELS = Format(
    "pseudo_labels",
    _schema(id=pa.string(), labels=pa.list_(pa.field("item", pa.uint16(), nullable=False))),
    metadata=("layer", "size", "fitted_on"),
)
CLUSTER_STATISTICS = Format(
    "cluster_statistics",
    _schema(
        variant=pa.string(),
        fold=pa.int32(),
        seed=pa.int64(),
        layer=pa.int32(),
        size=pa.int32(),
        statistic=pa.string(),
        value=pa.float64(),
    ),
)
HISTORY = Format(
    "history",
    _schema(update=pa.int64(), epoch=pa.float64(), quantity=pa.string(), value=pa.float64()),
    metadata=("stage",),
)
PREDICTIONS = Format(
    "predictions",
    _schema(
        id=pa.string(),
        speaker=pa.string(),
        gender=pa.string(),
        session=pa.string(),
        label=pa.string(),
        prediction=pa.string(),
        scores=pa.list_(pa.field("item", pa.float32(), nullable=False)),  # one per class, summing to one
    ),
    metadata=(
        "model",  # gmp-atl or egemaps-svm
        "variant",
        "layer",  # of the GMPs; null without
        "loss",  # ce or ams; null for the baseline
        "fold",
        "seed",
        "classes",
        "corpus",
        "complete",
        "encoder",  # description and sha256 of the weights
        "selection",
        "fit_on",
    ),
)
FUNCTIONALS = Format(
    "functionals",
    _schema(id=pa.string(), values=pa.list_(pa.field("item", pa.float32(), nullable=False))),
    metadata=("features",),
)


def feature_rows(ids: list[str], frames: list[np.ndarray]) -> pa.RecordBatch:
    """Clips as rows of LOCAL_FEATURES or LAYER_FEATURES: little-endian float16, (frames, dimensions), C order."""
    return pa.RecordBatch.from_arrays(
        [
            pa.array(ids, pa.string()),
            pa.array([len(each) for each in frames], pa.int32()),
            pa.array([np.ascontiguousarray(each, dtype="<f2").tobytes() for each in frames], pa.binary()),
        ],
        schema=LOCAL_FEATURES.schema,
    )


def read_features(kind: Format, path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Frames of the wanted clips, all in memory, and the metadata. Raises as `stream_features` does."""
    found: dict[str, np.ndarray] = {}
    for clips in stream_features(kind, path, wanted):
        found |= clips
    return found, kind.open(path)[1]


def stream_features(kind: Format, path: Path, wanted: Collection[str]) -> Iterator[dict[str, np.ndarray]]:
    """Frames of the wanted clips, one row group at a time, in the order of the file.

    A clip is (frames, dimensions) in float16, without a copy. Nothing is kept from one row group to the next.

    Raises:
        UserError: a wanted clip is not in the file, which is found before the first is read, or the file is damaged
            or not of this kind.
    """
    file, header = kind.open(path)
    wanted = frozenset(wanted)
    try:
        groups = [file.read_row_group(group, columns=["id"])["id"].to_pylist() for group in range(file.num_row_groups)]
        missing = sorted(wanted.difference(*groups))
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} clips, {missing[0]} among them; delete it and run snakemake again."
            )
        for group, ids in enumerate(groups):
            if wanted.isdisjoint(ids):
                continue
            column = file.read_row_group(group, columns=["frames"])["frames"].combine_chunks()
            yield {
                utterance: np.frombuffer(clip.as_buffer(), dtype="<f2").reshape(-1, header["dimensions"])
                for utterance, clip in zip(ids, column, strict=True)
                if utterance in wanted
            }
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run snakemake again.") from None
