"""A corpus of your own: a CSV or Parquet manifest with one row per clip.

- path: audio file below the manifest's folder, relative to it or absolute
- speaker: any name
- gender: female or male (f and m will do)
- emotion: any name; rows whose emotion is none of `classes` are listed as excluded
- session: optional, what a fold can hold out; by default the speaker
- id: optional, by default the path without its suffix
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from gmp_atl.config import GENDERS
from gmp_atl.corpora.base import NO_AUDIO, Corpus, Found, Utterance, by_id, not_used, read_text
from gmp_atl.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

REQUIRED = ("path", "speaker", "gender", "emotion")
UNLABELLED = ("path",)
"""What a manifest needs of speech that is only to be listened to."""
OPTIONAL = ("id", "session")
_ROWS_AT_ONCE = 10_000
_GENDER_OF: dict[str, Literal["female", "male"]] = {"female": "female", "f": "female", "male": "male", "m": "male"}


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    """File and line of a CSV, file and row (from 1) of a Parquet file."""
    cells: dict[str, str]


def read(manifest: Path, classes: Sequence[str]) -> Corpus:
    """Read a manifest; audio paths in the result are relative to its folder.

    Raises:
        UserError: names file, line and column of whatever is missing or malformed.
    """
    rows = _rows(manifest, REQUIRED, key="corpus.root")
    corpus = Corpus(manifest.stem, manifest.parent, [], {})
    for id, (utterance, present) in by_id(_utterances(rows, manifest.parent)).items():
        if utterance.emotion not in classes:
            corpus.excluded[id] = not_used(utterance.emotion)
        elif not present:
            corpus.excluded[id] = NO_AUDIO
        else:
            corpus.utterances.append(utterance)
    return corpus


def unlabelled(manifest: Path) -> dict[str, str]:
    """Path by id of the clips of a manifest of which only the column `path` is read; raises as `read` does."""
    rows = _rows(manifest, UNLABELLED, key="pretraining.speech")
    return {id: path.as_posix() for id, path in by_id(_paths(rows, manifest.parent)).items()}


def _paths(rows: Iterator[_Row], folder: Path) -> Iterator[Found[PurePath]]:
    for row in rows:
        path = _inside(row, folder)
        if _kind(folder / path) != "file":
            raise UserError(f"{row.place}: {path} is not there, or not a regular file; expected audio.")
        yield Found(path.with_suffix("").as_posix(), row.place, path)


def _rows(manifest: Path, required: Sequence[str], *, key: str) -> Iterator[_Row]:
    """Rows of a CSV or Parquet file, which the config's `key` names."""
    if not manifest.is_file():
        raise UserError(f"{key}: {manifest} is not a file; expected a manifest, CSV or Parquet.")
    match manifest.suffix.lower():
        case ".csv":
            return _csv_rows(manifest, required)
        case ".parquet":
            return _parquet_rows(manifest, required)
        case suffix:
            raise UserError(f"{key}: {manifest} ends in {suffix!r}; a manifest ends in .csv or .parquet.")


def _inside(row: _Row, folder: Path) -> PurePath:
    """The row's path, which must lie below the manifest's folder, relative to it and without `..`."""
    path = PurePath(row.cells["path"])
    if not path.is_absolute() and ".." not in path.parts:
        return path
    for root in (folder.absolute(), folder.resolve()):
        whole = Path(os.path.normpath(root / path))
        if whole.is_relative_to(root):
            return whole.relative_to(root)
    raise UserError(
        f"{row.place}: {path} is outside {folder}, the manifest's folder. Put the manifest above its audio, or "
        "a link to the audio's folder beside the manifest."
    )


def _utterances(rows: Iterator[_Row], folder: Path) -> Iterator[Found[tuple[Utterance, bool]]]:
    """What each row says, and whether its audio is there."""
    gender_of: dict[str, tuple[str, str]] = {}
    for row in rows:
        cells = row.cells
        for column, value in cells.items():
            if not value:
                raise UserError(f"{row.place}: column {column} is empty.")
        gender = _GENDER_OF.get(cells["gender"].lower())
        if gender is None:
            raise UserError(f"{row.place}: gender {cells['gender']!r}; expected {' or '.join(GENDERS)}.")
        known, place = gender_of.setdefault(cells["speaker"], (gender, row.place))
        if known != gender:
            raise UserError(f"{row.place}: speaker {cells['speaker']} is {gender} here and {known} at {place}.")
        path = _inside(row, folder)
        kind = _kind(folder / path)
        if kind == "other":
            raise UserError(f"{row.place}: {path} is not a regular file; expected audio.")
        utterance = Utterance(
            id=cells["id"] if "id" in cells else path.with_suffix("").as_posix(),
            path=path.as_posix(),
            speaker=cells["speaker"],
            gender=gender,
            session=cells.get("session", cells["speaker"]),
            emotion=cells["emotion"],
            text_type="",
        )
        yield Found(utterance.id, row.place, (utterance, kind == "file"))


def _kind(path: Path) -> Literal["file", "absent", "other"]:
    """What there is; a name that no file can have is absent."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "absent"
    return "file" if stat.S_ISREG(mode) else "other"


def _csv_rows(manifest: Path, required: Sequence[str]) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(read_text(manifest), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _require_columns(header, manifest, required)
        for cells in reader:
            place = f"{manifest}:{reader.line_num}"
            if not cells:  # a blank line
                continue
            if len(cells) != len(header):
                raise UserError(f"{place}: {len(cells)} columns, but the header has {len(header)}.")
            yield _Row(place, _wanted(dict(zip(header, cells, strict=True)), required))
    except csv.Error as error:
        raise UserError(f"{manifest}:{reader.line_num}: not well-formed CSV ({error}).") from None


def _parquet_rows(manifest: Path, required: Sequence[str]) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(manifest, page_checksum_verification=True)
        schema = file.schema_arrow
        _require_columns(schema.names, manifest, required)
        wanted = [name for name in (*required, *OPTIONAL) if name in schema.names]
        for name in wanted:
            _require_text(schema.field(name).type, f"{manifest}: column {name}")
        table = file.read(columns=wanted).replace_schema_metadata()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{manifest} is not a readable Parquet file ({error}).") from None
    rows = (cells for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE) for cells in batch.to_pylist())
    for number, cells in enumerate(rows, start=1):
        yield _Row(f"{manifest}, row {number}", _wanted(cells, required))


def _require_text(kind: pa.DataType, place: str) -> None:
    """Refuse bytes, lists, dates and the like, whose text would be Python's."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    allowed = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_null)
    if not any(check(kind) for check in allowed):
        raise UserError(f"{place} is of type {kind}; expected text.")


def _wanted(cells: dict[str, Any], required: Sequence[str]) -> dict[str, str]:
    """The columns of a manifest as stripped text, nulls empty; other columns are the user's own."""
    known = {name: cells[name] for name in (*required, *OPTIONAL) if name in cells}
    return {name: "" if value is None else str(value).strip() for name, value in known.items()}


def _require_columns(found: Sequence[str], manifest: Path, required: Sequence[str]) -> None:
    missing = [name for name in required if name not in found]
    if missing:
        raise UserError(
            f"{manifest}: column {', '.join(missing)} is missing; expected {', '.join(required)}, and optionally "
            f"{', '.join(OPTIONAL)}; found {', '.join(found) or 'none'}."
        )
    twice = sorted({name for name in found if list(found).count(name) > 1})
    if twice:
        raise UserError(f"{manifest}: column {', '.join(twice)} occurs twice.")
