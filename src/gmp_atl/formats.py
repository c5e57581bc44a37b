"""Every Parquet file of a run: columns, dtypes and metadata, declared once and checked at reading.

Each carries, beside its columns, a JSON object of metadata (format name and version included), with digests of every
column of every row group, and one of the metadata themselves, so that no file is read that is not as it was written.
Parquet's own checksums, which leave out the headers of its pages, are written for other readers; here the digests see
all that they would. Tensors in safetensors files, a format without checksums, have a digest among their metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, create_model

from gmp_atl.errors import UserError
from gmp_atl.files import atomic, sha256

KEY = "gmp_atl"
"""Name of this project's JSON object among a file's metadata."""
_DIGEST = "gmp_atl_sha256"
_DAMAGE = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on damaged files; ValueError where a name or text is not UTF-8."""
_READ_AT_ONCE = 2**20
"""Bytes: a column is decoded as it is read, and not held twice."""
_LARGEST_GROUP = 2**28
"""Bytes of features in a row group, which a reader holds as a whole; a column of bytes has room for 2 GiB."""

Append = Callable[[pa.RecordBatch], None]
"""Writes one row group."""


@dataclass(frozen=True)
class Format:
    """A kind of Parquet file: name, version, schema, and the metadata that it must carry, with their types."""

    name: str
    schema: pa.Schema
    metadata: Mapping[str, Any] = field(default_factory=dict)
    version: int = 2
    compression: str = "zstd"

    @contextmanager
    def writer(self, path: Path, /, **metadata: Any) -> Iterator[Append]:
        """A function that appends one row group; the file appears when the block ends without an error."""
        groups: list[dict[str, str]] = []
        header = {"format": self.name, "version": self.version, "groups": groups, **metadata}
        self._check(header, path)
        with (
            atomic(path) as temporary,
            pq.ParquetWriter(temporary, self.schema, compression=self.compression, write_page_checksum=True) as file,
        ):

            def append(rows: pa.RecordBatch) -> None:
                if rows.num_rows:
                    cast = rows.cast(self.schema)
                    file.write_batch(cast, row_group_size=rows.num_rows)
                    groups.append({name: _digest(cast[name]) for name in self.schema.names})

            yield append
            text = json.dumps(header, sort_keys=True)
            file.add_key_value_metadata({KEY: text, _DIGEST: hashlib.sha256(text.encode()).hexdigest()})

    def write(self, path: Path, rows: pa.Table, /, **metadata: Any) -> None:
        """Write all rows atomically, in one row group."""
        with self.writer(path, **metadata) as append:
            for batch in rows.combine_chunks().to_batches():
                append(batch)

    def open(self, path: Path) -> File:
        """The file, once it and its metadata are found to be of this format.

        Raises:
            UserError: the file is missing, damaged, of another format or version.
        """
        try:
            if not path.is_file():
                state = "is not a regular file" if path.exists() else "is missing"
                raise UserError(f"{path} {state}; it should hold {self.name}.")
            file = pq.ParquetFile(path, buffer_size=_READ_AT_ONCE)
            texts = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
            header = _json_object(texts.get(KEY, "{}"))
            schema = file.schema_arrow
        except _DAMAGE as error:
            raise UserError(
                f"{path} is not a readable Parquet file ({error}); delete it and run snakemake again."
            ) from None
        found = (header.get("format"), header.get("version"))
        if found != (self.name, self.version) or not schema.equals(self.schema):
            raise UserError(
                f"{path} holds {found[0] or 'an unknown format'} version {found[1]}, but {self.name} version "
                f"{self.version} is expected; delete it and run snakemake again."
            )
        if hashlib.sha256(texts[KEY].encode()).hexdigest() != texts.get(_DIGEST):
            raise _damaged(path, "its metadata have changed")
        self._check(header, path)
        digests = header.pop("groups")
        if len(digests) != file.num_row_groups:
            raise _damaged(path, "row groups are missing")
        return File(path, header, file, digests)

    def read(self, path: Path, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
        """All rows and the metadata. Raises as `open` does."""
        file = self.open(path)
        groups = [file.read(group, columns) for group in range(file.groups)]
        names = self.schema.names if columns is None else columns
        empty = pa.schema([self.schema.field(name) for name in names]).empty_table()
        return pa.concat_tables([empty, *groups]), file.header

    def _check(self, header: dict[str, Any], path: Path) -> None:
        try:
            self._model.model_validate(header)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"{path}: metadata of {self.name}: {where}: {problem['msg']}; delete it and run snakemake again."
            ) from None

    @cached_property
    def _model(self) -> type[BaseModel]:
        fields: dict[str, Any] = {name: (kind, ...) for name, kind in self.metadata.items()}
        fields["groups"] = (list[dict[str, str]], ...)
        return create_model(self.name, __config__=ConfigDict(strict=True), **fields)


@dataclass(frozen=True)
class File:
    """A file of a run that was opened; every column that is read is compared with its digest."""

    path: Path
    header: dict[str, Any]
    """The metadata."""
    _file: pq.ParquetFile
    _digests: list[dict[str, str]]

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return len(self._digests)

    def read(self, group: int, columns: list[str] | None = None) -> pa.Table:
        """Rows of one group, which is numbered from 0.

        Raises:
            UserError: it is damaged.
        """
        try:
            rows = self._file.read_row_group(group, columns=columns).replace_schema_metadata()
            rows.validate(full=True)
            for name in rows.column_names:
                chunks = rows[name].chunks
                column = chunks[0] if len(chunks) == 1 else rows[name].combine_chunks()  # which copies
                if _digest(column) != self._digests[group].get(name):
                    raise ValueError(f"its column {name} has changed")
        except _DAMAGE as error:
            raise _damaged(self.path, error) from None
        return rows


def content_digest(path: Path) -> str:
    """SHA-256 that changes with what a file holds; of Parquet, that of its metadata, which have one of every column."""
    if path.suffix != ".parquet":
        return sha256(path)
    found: bytes = pq.read_metadata(path).metadata[_DIGEST.encode()]
    return found.decode()


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path} is damaged: {reason}; delete it and run snakemake again.")


def _digest(column: pa.Array) -> str:
    """First 16 hexadecimal digits of a SHA-256 of lengths and values, however they lie in memory."""
    digest = hashlib.sha256()
    while pa.types.is_list(column.type):
        digest.update(f"{len(column)} {column.null_count}\n".encode())
        digest.update(column.value_lengths().to_numpy(zero_copy_only=False).data)
        column = column.flatten()
    digest.update(f"{len(column)} {column.null_count}\n".encode())
    if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        _, positions, data = column.buffers()
        offsets = np.frombuffer(positions, "<i4")[column.offset : column.offset + len(column) + 1]
        digest.update(np.diff(offsets).data)
        digest.update(memoryview(data or b"")[offsets[0] : offsets[-1]] if len(offsets) else b"")
    else:
        digest.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).data)
    return digest.hexdigest()[:16]


def tensor_metadata(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, str]:
    """What goes into the header of a safetensors file: one JSON object, of metadata and a digest of them and tensors.

    One, because safetensors writes several in any order.
    """
    return {KEY: json.dumps({**metadata, "sha256": _tensor_digest(tensors, metadata)}, sort_keys=True)}


def check_tensors(header: Mapping[str, str] | None, tensors: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    """The metadata that `tensor_metadata` was given; empty for a file that another program wrote.

    Raises:
        UserError: metadata or tensors are not as they were written.
        ValueError: the metadata are no JSON object.
    """
    if not header or KEY not in header:
        return {}
    metadata = _json_object(header[KEY])
    if metadata.pop("sha256", None) != _tensor_digest(tensors, metadata):
        raise _damaged(path, "its sha256 has changed")
    return metadata


def _tensor_digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


def _json_object(text: str) -> dict[str, Any]:
    """Raises a ValueError for any other text."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("metadata nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("metadata that are no JSON object")
    return found


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
        sha256=pa.string(),  # of the recording's samples, see audio.AudioInfo
    ),
    # name of the corpus; whether its counts are the full release's; digest of the ids and their decoded audio
    metadata={"corpus": str, "complete": bool, "audio": str},
    version=3,
)
EXCLUDED = Format("excluded", _schema(id=pa.string(), reason=pa.string()))
CORPUS_SUMMARY = Format(
    "corpus_summary",
    _schema(emotion=pa.string(), session=pa.string(), gender=pa.string(), utterances=pa.int64(), n_samples=pa.int64()),
    metadata={
        "corpus": str,
        "complete": bool,
        "audio": str,
        "classes": list[str],
        "excluded": dict[str, int],  # by reason
    },
)
LOCAL_FEATURES = Format(
    "local_features",
    _schema(id=pa.string(), n_frames=pa.int32(), frames=pa.binary()),
    metadata={"dimensions": PositiveInt, "encoder": str},  # encoder: description and sha256 of its weights
    compression="none",  # zstd saves little, and halves the speed of reading (benchmarks/storage.py)
)
LAYER_FEATURES = Format(
    "layer_features",
    _schema(id=pa.string(), n_frames=pa.int32(), frames=pa.binary()),
    metadata={
        "dimensions": PositiveInt,
        "layer": int,
        "encoder": str,  # that training started from
        "fitted_on": list[str],  # ids that it has been trained on
    },
    compression="none",
)
MFCC = "MFCC"
"""Stands for the encoder of layer features that were made without one; their layer is 0."""
PSEUDO_LABELS = Format(
    "pseudo_labels",
    _schema(id=pa.string(), labels=pa.list_(pa.field("item", pa.uint16(), nullable=False))),
    metadata={"layer": int, "size": PositiveInt, "encoder": str, "fitted_on": list[str]},
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
    metadata={"stage": str},
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
    metadata={
        "model": str,  # gmp-atl or egemaps-svm
        "variant": str,
        "layer": int | None,  # of the GMPs; None without
        "loss": str | None,  # ce or ams; None for the baseline
        "fold": int,
        "seed": int,
        "classes": list[str],
        "corpus": str,
        "complete": bool,
        "encoder": str,  # description and sha256 of the weights
        "selection": str,
        "fit_on": str,
    },
)
EMBEDDINGS = Format(
    "embeddings",
    _schema(
        id=pa.string(),
        emotion=pa.string(),
        gender=pa.string(),
        encoder=pa.string(),  # pre-trained or fine-tuned
        x=pa.float64(),  # coordinates on the first two principal components
        y=pa.float64(),
    ),
    metadata={"fold": int, "seed": int, "explained": dict[str, list[float]]},  # shares of the variance, per encoder
)
EXAMPLES = Format(
    "examples",
    _schema(
        id=pa.string(),
        emotion=pa.string(),
        # dB below the maximum, frames x frequencies from 0 to 8 kHz, in C order
        spectrogram=pa.list_(pa.field("item", pa.int8(), nullable=False)),
        # one list per codebook, a label per frame
        labels=pa.list_(pa.field("item", pa.list_(pa.field("item", pa.uint16(), nullable=False)), nullable=False)),
        scores=pa.list_(pa.field("item", pa.float32(), nullable=False)),
    ),
    metadata={"fold": int, "seed": int, "layer": int, "sizes": list[PositiveInt], "classes": list[str]},
)
PROBES = Format(
    "probes",
    _schema(layer=pa.int32(), fold=pa.int32(), uar=pa.float64(), war=pa.float64()),  # layer 0: the convolutions' output
    metadata={"corpus": str, "encoder": str, "utterances": PositiveInt},
)
FUNCTIONALS = Format(
    "functionals",
    _schema(id=pa.string(), values=pa.list_(pa.field("item", pa.float32(), nullable=False))),
    metadata={"features": str},
)


def feature_rows(ids: list[str], frames: list[np.ndarray]) -> pa.RecordBatch:
    """Clips as rows of LOCAL_FEATURES or LAYER_FEATURES: little-endian float16, (frames, dimensions), C order."""
    data = np.concatenate([np.asarray(each, dtype="<f2").ravel() for each in frames])
    offsets = np.cumsum([0, *(2 * each.size for each in frames)], dtype=np.int32)
    # Of one buffer: making Python's bytes of each clip first would copy all of it twice.
    binary = pa.Array.from_buffers(pa.binary(), len(frames), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    lengths = pa.array([len(each) for each in frames], pa.int32())
    return pa.RecordBatch.from_arrays([pa.array(ids, pa.string()), lengths, binary], schema=LOCAL_FEATURES.schema)


def append_features(append: Append, ids: list[str], frames: list[np.ndarray]) -> None:
    """Append what `feature_rows` makes of clips, in row groups of `_LARGEST_GROUP` at most, or of one clip."""
    first, held = 0, 0
    for position, clip in enumerate(frames):
        if position > first and held + 2 * clip.size > _LARGEST_GROUP:
            append(feature_rows(ids[first:position], frames[first:position]))
            first, held = position, 0
        held += 2 * clip.size
    if ids:
        append(feature_rows(ids[first:], frames[first:]))


def read_features(kind: Format, path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Frames of the wanted clips, all in memory, and the metadata. Raises as `stream_features` does."""
    found: dict[str, np.ndarray] = {}
    for clips in stream_features(kind, path, wanted):
        found |= clips
    return found, kind.open(path).header


def stream_features(kind: Format, path: Path, wanted: Collection[str]) -> Iterator[dict[str, np.ndarray]]:
    """Frames of the wanted clips, one row group at a time, in the order of the file.

    A clip is (frames, dimensions) in float16, without a copy. Nothing is kept from one row group to the next.

    Raises:
        UserError: a wanted clip is not in the file, which is found before the first is read, or the file is damaged
            or not of this kind.
    """
    file, wanted = kind.open(path), frozenset(wanted)
    groups = [file.read(group, ["id"])["id"].to_pylist() for group in range(file.groups)]
    missing = sorted(wanted.difference(*groups))
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} clips, {missing[0]} among them; delete it and run snakemake again."
        )
    for group, ids in enumerate(groups):
        if wanted.isdisjoint(ids):
            continue
        rows = file.read(group, ["n_frames", "frames"])
        clips = zip(ids, rows["n_frames"].to_pylist(), _views(rows["frames"]), strict=True)
        try:
            found = {
                utterance: clip.view("<f2").reshape(length, file.header["dimensions"])
                for utterance, length, clip in clips
                if utterance in wanted
            }
        except ValueError as error:
            raise _damaged(path, error) from None
        yield found


def _views(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Bytes of each value of a binary column; pyarrow's own scalars would be copies."""
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset :][: len(chunk) + 1]
        data = np.frombuffer(values or b"", np.uint8)
        for start, end in pairwise(ends):
            yield data[start:end]
