"""What a run needs of a machine, looked at before it begins: `gmp-atl doctor`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

import yaml

from gmp_atl import config as configs
from gmp_atl import config_files
from gmp_atl.config import Config, shared_variant
from gmp_atl.errors import CPU_PROFILE, UserError
from gmp_atl.systems import BASELINE, check_layers, systems

_PYTHON = (3, 11)
_MODEL_GB, _OTHER_GB = 0.4, 16.0
"""HuBERT base and its head; features while clustering lasts, and the rest (docs/scaling.md)."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Either; the stage `pretrained` opens the second only where the config pins it."""
_RESOLVE_SECONDS = 10.0


class State(Enum):
    """Of what was looked at."""

    OK = "ok"
    NOTE = "note"
    """A run works, but not all of it, or slowly."""
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs, how it is here, and, unless all is well, what to do."""

    subject: str
    state: State
    text: str
    remedy: str = ""


def report(config_paths: Sequence[Path], changes: Sequence[str]) -> int:
    """Print what is found under the config that the files make together, the later changing the earlier.

    Args:
        changes: `key=value` each, as Snakemake's --config takes them; they come after the files.

    Returns:
        1 if something is missing, else 0.
    """
    missing = False
    for finding in findings(config_paths, changes):
        print(f"{finding.state.value:9}{finding.subject:10}{finding.text}", flush=True)
        if finding.remedy:
            print(f"{'':19}-> {finding.remedy}", flush=True)
        missing |= finding.state is State.MISSING
    return int(missing)


def findings(config_paths: Sequence[Path], changes: Sequence[str]) -> Iterator[Finding]:
    """In the order in which a run needs them; without a valid config, not what depends on one."""
    yield _python()
    yield from _packages()
    yield _gpu()
    yield _scheduler()
    try:
        config = _load(config_paths, changes)
    except UserError as error:
        yield Finding("config", State.MISSING, str(error), "see docs/config.md")
        return
    yield Finding("config", State.OK, f"{' + '.join(map(str, config_paths))}: {config.name}")
    yield _corpus(config)
    yield _encoder(config)
    yield _disk(config)


def _python() -> Finding:
    found = sys.version.split()[0]
    if sys.version_info[:2] == _PYTHON:
        return Finding("Python", State.OK, found)
    needed = ".".join(map(str, _PYTHON))
    return Finding("Python", State.MISSING, f"{found}, but {needed} is needed", f"install it; python{needed} -m venv")


def _packages() -> Iterator[Finding]:
    """Versions against those that pyproject.toml pins, as they were when the package was installed."""
    try:
        pinned = metadata.requires("gmp-atl") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", State.MISSING, "gmp-atl is not installed for this Python", "make setup")
        return
    wrong = []
    for requirement in pinned:
        name, _, version = requirement.partition("==")
        found = _version(name)
        if found != version:
            wrong.append(f"{name} {version} ({'not installed' if found is None else f'found {found}'})")
    if wrong:
        yield Finding("packages", State.MISSING, "other versions: " + ", ".join(wrong), "make setup")
    else:
        yield Finding("packages", State.OK, f"all {len(pinned)} as pinned")
    if _version("opensmile") is None:
        text = "not installed: Table 2 needs it for its eGeMAPS row, tables.baseline: none leaves that out"
        yield Finding("openSMILE", State.NOTE, text, "make opensmile (its licence is for research use)")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> Finding:
    """As torch sees it, in a process of its own: to ask takes memory of the GPU."""
    code = "from gmp_atl import devices; print(', '.join(map(devices.described, devices.indices())))"
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    except subprocess.TimeoutExpired as error:
        text = f"torch does not tell which there are within {error.timeout:.0f} s"
        return Finding("GPU", State.MISSING, text, "if nvidia-smi hangs too, start the machine anew")
    except subprocess.CalledProcessError as error:
        reason = next(reversed(error.stderr.split("\n")[:-1]), "it was killed")
        return Finding("GPU", State.MISSING, f"torch does not tell which there are: {reason}", "make setup")
    if "too old" in run.stdout:
        return Finding("GPU", State.MISSING, run.stdout.strip(), "compute capability 7.5 (Turing) or newer is needed")
    if devices := run.stdout.strip():
        return Finding("GPU", State.OK, devices)
    if shutil.which("nvidia-smi"):
        text = "nvidia-smi is here, but torch finds no usable device"
        remedy = "torch is built for CUDA 13, which needs a driver since 580; look at CUDA_VISIBLE_DEVICES as well"
        return Finding("GPU", State.MISSING, text, remedy)
    remedy = f"{CPU_PROFILE}; the paper's sizes would take months there"
    return Finding("GPU", State.NOTE, "none", remedy)


def _scheduler() -> Finding:
    if shutil.which("sbatch"):
        return Finding("SLURM", State.OK, "here; --workflow-profile workflow/profiles/slurm, see docs/slurm.md")
    return Finding("SLURM", State.OK, "not here; jobs run on this machine")


def _load(paths: Sequence[Path], changes: Sequence[str]) -> Config:
    # Slow to import; read and merge as a run does.
    from snakemake.cli import parse_config
    from snakemake.utils import update_config

    merged: dict[str, object] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; run this in the project's folder.")
        config_files.check(path)
        update_config(merged, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    try:
        update_config(merged, parse_config(changes))
    except ValueError as error:
        raise UserError(f"--config {' '.join(changes)}: {error}") from None
    return configs.parse(merged)


def _corpus(config: Config) -> Finding:
    """Reads labels and checks folds, but opens no audio, as the stage `corpus` does."""
    reader, root = config.corpus.reader, config.corpus.root
    if reader == "synthetic":
        return Finding("corpus", State.OK, "synthetic, made by the run")
    assert root is not None  # the config has checked
    try:
        from gmp_atl.stages.corpus import check

        found = check(configs.CorpusSlice.model_validate(configs.slice_for(config, "corpus")), root)
    except ImportError as error:
        return Finding("corpus", State.MISSING, f"not looked at ({error})", "make setup")
    except UserError as error:
        return Finding("corpus", State.MISSING, str(error), f"corpus.root is {root}, corpus.reader is {reader}")
    text = f"{found.name} at {root}: {len(found.utterances)} utterances of {', '.join(config.classes)}"
    if reasons := Counter(found.excluded.values()).most_common():
        text += "; left out: " + ", ".join(f"{count} ({reason})" for reason, count in reasons)
    return Finding("corpus", State.OK, text)


def _encoder(config: Config) -> Finding:
    try:
        check_layers(config)
    except UserError as error:
        return Finding("encoder", State.MISSING, str(error), "see docs/config.md")
    settings = config.encoder
    if settings.source == "scratch":
        return Finding("encoder", State.OK, "random weights, made by the run")
    if settings.source == "hub":
        return _hub_encoder(str(settings.name), str(settings.revision))
    folder = settings.folder
    assert folder is not None  # the config has checked
    weights = _WEIGHTS if settings.sha256 else _WEIGHTS[:1]
    absent = [
        " or ".join(names)
        for names in (("config.json",), weights)
        if not any((folder / name).is_file() for name in names)
    ]
    if absent:
        text = f"{folder} lacks {' and '.join(absent)}"
        return Finding("encoder", State.MISSING, text, "encoder.path is a folder of a HuBERT as transformers saves it")
    return Finding("encoder", State.OK, str(folder))


def _hub_encoder(name: str, revision: str) -> Finding:
    from httpx import HTTPError
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    cached = [
        isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in ("config.json", *_WEIGHTS)
    ]
    if cached[0] and any(cached[1:]):
        return Finding("encoder", State.OK, f"{name}, in the hub's cache")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_RESOLVE_SECONDS)
    except (HTTPError, OSError, ValueError) as error:  # the hub's own errors are among the second
        text = f"{name} is not in the hub's cache, and the hub does not answer ({type(error).__name__})"
        remedy = (
            f"on a machine with network: hf download {name} --revision {revision} --local-dir FOLDER; then here "
            "encoder.source: directory, encoder.path: FOLDER"
        )
        return Finding("encoder", State.MISSING, text, remedy)
    return Finding("encoder", State.OK, f"{name}, which the run fetches from the hub")


def _disk(config: Config) -> Finding:
    """Room for results; little is needed for a small encoder."""
    folder = Path("results").resolve() if Path("results").exists() else Path.cwd()
    if not os.access(folder, os.W_OK):
        return Finding("disk", State.MISSING, f"{folder} may not be written to", "run in a folder of your own")
    free = shutil.disk_usage(folder).free / 1e9
    needed = 1.0 if config.encoder.source in ("scratch", "packaged") else _OTHER_GB + _MODEL_GB * _models(config)
    text = f"{free:.0f} GB free at {folder}; a run takes about {needed:.0f} GB"
    if free < needed:
        return Finding("disk", State.MISSING, text, "make results a link to a larger disk, or run fewer seeds at once")
    return Finding("disk", State.OK, text)


def _models(config: Config) -> int:
    """Encoders that a run keeps: of stage 1, retrained ones, and one of each system."""
    evaluated = set(systems(config)) - {BASELINE}
    layers = {system.layer for system in evaluated} - {None}
    variants = ["main", *config.ablations] if layers else []
    multitask = {shared_variant(config, "multitask", name) for name in variants}
    retrained = {("main", layer) for layer in layers}
    retrained |= {(shared_variant(config, "retraining", name), config.tables.layer) for name in config.ablations}
    return len(config.seeds) * len(config.folds.held_out) * (len(multitask) + len(retrained) + len(evaluated))
