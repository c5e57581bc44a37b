"""What made each file: one record per job, and what the records behind a set of results say together.

A job's record lies among the evaluations, in `provenance/<stage>/...json`, so that tables made from them on another
machine still tell code, packages and devices. Records are tied to one another by content: the digest of what a job
read is that of what another wrote. A file that was exchanged by hand, or cached from another run, breaks the tie and
is reported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gmp_atl.code import code_hash
from gmp_atl.config import unread
from gmp_atl.errors import UserError
from gmp_atl.files import Role, sha256, write_text

_CHECKOUT = Path(__file__).parents[2]
_COMPUTE = ("python", "torch", "faiss", "numpy", "scipy", "sklearn", "pyarrow", "soundfile", "opensmile")
"""Packages whose versions every table tells; of the others only those that differ between jobs."""


class Record(BaseModel):
    """How one job came by its outputs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    stage: str
    job: dict[str, int | str | list[int] | list[float] | list[str] | None]
    """Fold, seed, layer, ...: the stage's arguments that are neither files nor config."""
    config: dict[str, Any]
    """The slice of the config that the stage was given, but for what says where and how fast."""
    code: str
    """Hash of the modules that the stage runs (`code.code_hash`)."""
    commit: str | None
    """Of the checkout; None where the package is not in one."""
    modified: bool
    """Whether the workflow or the package differed from that commit."""
    packages: dict[str, str]
    """Versions of Python and of every package that the job had imported."""
    device: str
    """Model of the GPU, or of the CPU where none was given."""
    inputs: dict[str, str]
    """Argument: SHA-256 of the file or folder. The audio itself is known by the utterance table's header."""
    outputs: dict[str, str]
    seconds: float
    """Of the stage, without its imports, and without the digests of what it read and wrote."""
    peak_memory_mb: int
    """Largest resident memory of the process."""
    peak_gpu_memory_mb: int | None
    """Largest memory that torch had allocated; None on the CPU, and for FAISS, which does not tell."""


@contextmanager
def recording(path: Path, stage: str, options: Mapping[str, Any], roles: Mapping[str, Role | None]) -> Iterator[None]:
    """Write the record of a stage to `path` once the block, which runs it, has ended without an error.

    Args:
        path: JSON file.
        stage: Its name.
        options: The stage's arguments.
        roles: What each argument that is a path, or a list of paths, stands for; None is an input.
    """
    inputs = _digests({name: value for name, value in options.items() if roles[name] is None})
    started = time.monotonic()
    yield
    seconds = round(time.monotonic() - started, 2)
    settings = options.get("config")
    record = Record(
        stage=stage,
        job={name: value for name, value in options.items() if _is_plain(value) and name != "gpus"},
        config=settings.model_dump(mode="json", exclude=unread(stage)) if settings is not None else {},
        code=code_hash(stage),
        commit=_git("rev-parse", "HEAD"),
        modified=bool(_git("status", "--porcelain", "--", "Snakefile", "workflow", "src")),
        packages=_packages(),
        device=_gpu() if options.get("gpus") else _cpu(),
        inputs=inputs,
        outputs=_digests({name: value for name, value in options.items() if roles[name] is Role.OUTPUT}),
        seconds=seconds,
        peak_memory_mb=_peak_memory_mb(),
        peak_gpu_memory_mb=_peak_gpu_memory_mb(),
    )
    write_text(path, record.model_dump_json(indent=1) + "\n")


@dataclass(frozen=True)
class Lineage:
    """The records behind some files, and where they are incomplete."""

    records: tuple[Record, ...]
    without_record: tuple[Path, ...]
    """Files that no recorded job wrote in their present form."""
    broken: tuple[str, ...]
    """Inputs of recorded jobs that no recorded job wrote, as `stage: argument`, each with the number of jobs."""

    def remarks(self) -> list[str]:
        """What a reader of the results must know of how they were made, one line each."""
        return [*self._code(), self._packages(), self._devices(), *self._gaps()]

    def _code(self) -> list[str]:
        """The commits, and stages of which several versions ran."""
        commits = sorted({_commit(record) for record in self.records})
        versions: dict[str, Counter[str]] = {}
        for record in self.records:
            versions.setdefault(record.stage, Counter())[record.code] += 1
        mixed = [
            f"{stage} ({', '.join(f'{n} jobs of {code}' for code, n in sorted(counts.items()))})"
            for stage, counts in sorted(versions.items())
            if len(counts) > 1
        ]
        lines = [f"Code: {' | '.join(commits) or 'not recorded'}"]
        return [*lines, f"MIXED code: {'; '.join(mixed)}"] if mixed else lines

    def _packages(self) -> str:
        """Versions of the packages that computed something, and of all that differ between jobs."""
        versions: dict[str, set[str]] = {name: set() for name in _COMPUTE}
        for record in self.records:
            for name, version in record.packages.items():
                versions.setdefault(name, set()).add(version)
        mixed = {name for name, found in versions.items() if len(found) > 1}
        told = [name for name in versions if versions[name] and name in mixed.union(_COMPUTE)]
        listed = ", ".join(f"{name} {' | '.join(sorted(versions[name]))}" for name in told)
        return f"{'MIXED packages' if mixed else 'Packages'}: {listed or 'not recorded'}"

    def _devices(self) -> str:
        """Models of the devices, with the number of jobs where they differ."""
        jobs = Counter(record.device for record in self.records)
        if len(jobs) > 1:
            return "Computed on: " + " | ".join(f"{device} ({n} jobs)" for device, n in sorted(jobs.items()))
        return f"Computed on: {next(iter(jobs), 'not recorded')}"

    def _gaps(self) -> list[str]:
        """What cannot be traced."""
        lines = []
        if self.without_record:
            lines.append(f"UNRECORDED: {len(self.without_record)} evaluations have no record of how they were made")
        if self.broken:
            lines.append(f"MIXED inputs: no recorded job wrote what these read: {'; '.join(self.broken)}")
        return lines


def read(folder: Path) -> list[Record]:
    """Every record below a folder, in the order of the paths.

    Raises:
        UserError: a record is damaged.
    """
    records = []
    for path in sorted(folder.rglob("*.json")):
        try:
            records.append(Record.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path} is not a provenance record of this version ({where}: {first['msg']}); delete it, and the "
                "tables then say that its job is not recorded."
            ) from None
    return records


def lineage(records: Iterable[Record], results: Iterable[Path]) -> Lineage:
    """The records of the jobs that `results` come from, directly or not; all other records are left out."""
    makers: dict[str, list[Record]] = {}
    for record in records:
        for digest in record.outputs.values():
            makers.setdefault(digest, []).append(record)
    digests = {path: sha256(path) for path in results}
    found: dict[int, Record] = {}
    frontier = [maker for digest in digests.values() for maker in makers.get(digest, [])]
    broken: Counter[str] = Counter()
    while frontier:
        record = frontier.pop()
        if id(record) in found:
            continue
        found[id(record)] = record
        for argument, digest in record.inputs.items():
            if digest in makers:
                frontier += _of_same_job(makers[digest], record)
            else:
                broken[f"{record.stage}: {argument.partition('[')[0]}"] += 1
    ordered = sorted(found.values(), key=lambda record: (record.stage, str(sorted(record.job.items()))))
    missing = tuple(path for path, digest in digests.items() if digest not in makers)
    gaps = tuple(f"{what} ({n} {'job' if n == 1 else 'jobs'})" for what, n in sorted(broken.items()))
    return Lineage(tuple(ordered), missing, gaps)


def _of_same_job(makers: list[Record], reader: Record) -> list[Record]:
    """Of the jobs that wrote equal files, those of the reader's fold and seed, if there are any: else all."""

    def differs(maker: Record) -> bool:
        return any(
            maker.job.get(name, value) != value for name, value in reader.job.items() if name in ("fold", "seed")
        )

    return [maker for maker in makers if not differs(maker)] or makers


def _digests(options: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by argument, `argument[n]` in a list; paths that do not exist, as a checkpoint's, are left out."""
    paths: dict[str, Path] = {}
    for name, value in options.items():
        if isinstance(value, Path):
            paths[name] = value
        elif isinstance(value, list) and value and isinstance(value[0], Path):
            paths |= {f"{name}[{n}]": path for n, path in enumerate(value)}
    return {name: path_digest(path) for name, path in paths.items() if path.exists()}


def path_digest(path: Path) -> str:
    """Of a file, or of the names and digests of the files below a folder."""
    if path.is_file():
        return sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    lines = [f"{each.relative_to(path).as_posix()} {sha256(each)}\n" for each in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, (int, float, str)) for item in items)


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout; None without git, or where this is no checkout of the project."""
    if not (_CHECKOUT / "Snakefile").exists():
        return None
    command = ["git", "-C", str(_CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit(record: Record) -> str:
    if record.commit is None:
        return "no commit"
    return f"commit {record.commit[:12]}{' with uncommitted changes' if record.modified else ''}"


def _packages() -> dict[str, str]:
    """Versions of the imported packages that tell theirs; what belongs to Python comes with its version."""
    found = {
        name: version
        for name, module in list(sys.modules.items())
        if "." not in name
        and not name.startswith("_")
        and name not in sys.stdlib_module_names
        and isinstance(version := getattr(module, "__version__", None), str)
    }
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"CPU {line.partition(':')[2].strip()}"
    return f"CPU {platform.machine()}"


def _gpu() -> str:
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={device}", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "GPU of unknown model"


def _peak_memory_mb() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    raise AssertionError("Linux tells VmHWM")


def _peak_gpu_memory_mb() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated() // 2**20)
