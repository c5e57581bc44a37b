"""Every stage, killed, stopped, without disk, memory or temporary folder: nothing half-written, and the same at last.

The jobs are those of a small run, called as rules call them. `make test` kills each once; `make test-faults` tries all
kinds of faults, FAULT_TRIALS times where chance has a part in them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import SETTINGS
from faults import PRELOADED, Fault, job

from gmp_atl import cli
from gmp_atl import config as configs
from gmp_atl.formats import FUNCTIONALS, MFCC, PSEUDO_LABELS, UTTERANCES
from gmp_atl.frames import n_frames
from gmp_atl.model_files import load_tensors
from gmp_atl.provenance import Record

TRIALS = int(os.environ.get("FAULT_TRIALS", "0"))
"""Of each fault with each stage, where chance has a part; 0: one kill of each stage, and nothing else."""
PATIENCE = 10
"""Trials, at most, for each fault that is to be met."""
TRIED: Counter[tuple[str, str]] = Counter()
"""Stage and fault; faults that came too late, after the job's end, are not counted."""
OPENSMILE_NEEDED = pytest.mark.skipif(find_spec("opensmile") is None, reason="needs openSMILE: make opensmile")
ROOT_NEEDED = pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system, which takes root")


@dataclass(frozen=True)
class Job:
    """A stage, its inputs by option, and its outputs as names in the folder that it is run in."""

    stage: str
    inputs: dict[str, Any]
    outputs: dict[str, str]

    def arguments(self, folder: Path) -> list[str]:
        """As a rule would call it."""
        found = [self.stage, "--threads", "1"]
        for name, value in self.inputs.items():
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        for name, value in self.outputs.items():
            found += [f"--{name}", str(folder / value)]
        return [*found, "--provenance", str(folder / "provenance.json")]


@dataclass
class Undisturbed:
    """What a job makes, and what that takes."""

    files: dict[str, bytes]
    seconds: float
    events: int
    """Operations on files."""
    memory: int
    """Bytes of address space."""
    compiler: bool
    """Whether torch's was imported."""


@dataclass
class Bench:
    """Runs jobs in processes that are forked from one that has imported everything."""

    folder: Path
    jobs: dict[str, Job]
    undisturbed: dict[str, Undisturbed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, stage: str, folder: Path, fault: Fault | None = None) -> Any:
        arguments = (self.jobs[stage].arguments(folder), folder, self.report(stage), fault or Fault())
        process = self.context.Process(target=job, args=arguments)
        process.start()
        return process

    def report(self, stage: str) -> Path:
        return self.folder / f"{stage}.report"

    def log(self, stage: str) -> str:
        return self.report(stage).with_suffix(".log").read_text(encoding="utf-8")

    def expected(self, stage: str) -> Undisturbed:
        """Runs the job, and before it those that it needs, unless that has been done."""
        if stage not in self.undisturbed:
            for needed in NEEDS[stage]:
                self.expected(needed)
            PREPARE.get(stage, lambda bench: None)(self)
            folder = self.folder / stage
            began = time.monotonic()
            process = self.start(stage, folder)
            process.join()
            seconds = time.monotonic() - began
            assert process.exitcode == 0, self.log(stage)
            cost = json.loads(self.report(stage).with_suffix(".json").read_text())
            self.undisturbed[stage] = Undisturbed(contents(folder), seconds, **cost)
        return self.undisturbed[stage]


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a job by name, but for its record, which tells the time."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != "provenance.json"}


NEEDS: dict[str, list[str]] = {
    "synthesis": [],
    "corpus": [],
    "pretrained": [],
    "local_features": ["corpus", "pretrained"],
    "multitask": ["local_features"],
    "layer_features": ["multitask"],
    "clustering": ["layer_features"],
    "cluster_statistics": ["clustering"],
    "retraining": ["clustering"],
    "finetuning": ["retraining"],
    "evaluation": ["finetuning"],
    "examples": ["evaluation"],
    "functionals": ["corpus"],
    "baseline": ["corpus"],
    "tables": ["evaluation", "cluster_statistics", "baseline", "examples"],
    "figures": ["evaluation", "cluster_statistics", "baseline", "examples"],
    "archive": ["tables", "figures"],
    "speech": [],
    "mfcc": ["speech"],
    "pretraining": ["speech"],
    "probe": ["local_features"],
    "probes": ["probe", "pretraining"],
    "pretrain": ["pretraining"],
}


def gather(bench: Bench) -> None:
    """The evaluation folder of a run, as the rules lay it out."""
    for stage, name in (
        ("corpus", "corpus.parquet"),
        ("evaluation", "main/gmps-3/ams/fold1/seed0/predictions.parquet"),
        ("baseline", "baseline/fold1/predictions.parquet"),
        ("cluster_statistics", "clusters/main/fold1/seed0/cluster_statistics.parquet"),
        ("finetuning", "histories/finetuning.parquet"),
        ("examples", "examples/embeddings.parquet"),
        ("examples", "examples/examples.parquet"),
    ):
        made = {"corpus.parquet": "summary.parquet", "histories/finetuning.parquet": "history.parquet"}
        target = bench.folder / "evaluations" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bench.folder / stage / made.get(name, Path(name).name), target)


def label(bench: Bench) -> None:
    """Pseudo-labels of the speech, at random."""
    rows = UTTERANCES.read(bench.folder / "speech" / "utterances.parquet")[0].to_pylist()
    draws, ids = np.random.default_rng(0), [row["id"] for row in rows]
    labels = [draws.integers(0, 4, n_frames(row["n_samples"])).astype(np.uint16) for row in rows]
    table = pa.table([ids, labels], schema=PSEUDO_LABELS.schema)
    header = {"layer": 0, "size": 4, "encoder": MFCC, "fitted_on": ids}
    PSEUDO_LABELS.write(bench.folder / "speech_labels.parquet", table, **header)


PREPARE: dict[str, Callable[[Bench], None]] = {"tables": gather, "figures": gather, "pretraining": label}


def made_release(folder: Path) -> Path:
    """A manifest and clips of noise: two speakers and two emotions in each of three sessions."""
    draws, lines = np.random.default_rng(0), ["id,path,speaker,gender,emotion,session"]
    for session in ("S1", "S2", "S3"):
        for gender in ("female", "male"):
            for emotion in ("angry", "sad"):
                name = f"{session}_{gender}_{emotion}"
                samples = 0.05 * draws.normal(size=int(draws.integers(6_000, 16_000)))
                soundfile.write(folder / f"{name}.wav", samples, 16_000)
                lines.append(f"{name},{name}.wav,{session}{gender[0]},{gender},{emotion},{session}")
    (folder / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "manifest.csv"


def made_functionals(folder: Path) -> Path:
    """For the baseline without openSMILE."""
    draws, path = np.random.default_rng(0), folder / "functionals.parquet"
    ids = [f"{s}_{g}_{e}" for s in ("S1", "S2", "S3") for g in ("female", "male") for e in ("angry", "sad")]
    values = pa.array([draws.normal(size=88).tolist() for _ in ids], FUNCTIONALS.schema.field("values").type)
    FUNCTIONALS.write(path, pa.table({"id": ids, "values": values}), features="made")
    return path


def made_jobs(folder: Path) -> dict[str, Job]:
    """One job of each stage, on fold 1."""
    manifest = made_release(folder)
    settings = {**SETTINGS, "corpus": {"reader": "manifest", "root": str(manifest)}, "clustering": {"sizes": [4]}}
    iteration = {"layer": 0, "sizes": [4], "updates": 3, "optimisation": {"batch_size": 4, "max_clip_seconds": 0.5}}
    settings["pretraining"] = {"speech": str(manifest), "attribution": ["noise"], "iterations": [iteration]}
    settings["pretraining"] |= {"probes": [1], "projection": 8}
    config = configs.parse(settings | {"tables": {"layer": -3, "layers": [-3]}})

    def slice_of(stage: str) -> dict[str, Any]:
        return {"config": json.dumps(configs.slice_for(config, stage))}

    def at(stage: str, name: str) -> Path:
        return folder / stage / name

    utterances = {"utterances": at("corpus", "utterances.parquet")}
    fold, seed = {**utterances, "fold": 1}, {"seed": 0}
    features = {**fold, "local-features": at("local_features", "features.parquet")}
    trained = {"output": "model", "history": "history.parquet", "checkpoint": "model/checkpoint.safetensors"}
    layer, made = {"layer": -3}, {"evaluations": folder / "evaluations"}
    pretrained, labels = {"encoder": at("pretrained", "model")}, at("clustering", "labels.parquet")
    heard = {"utterances": at("speech", "utterances.parquet"), "audio-root": at("speech", "audio")}
    history = {"histories": at("pretraining", "history.parquet")}
    described = {"variant": "main", "gmps": -3, "loss": "ams", "fit-on": "training"}
    jobs = [
        Job("synthesis", {}, {"output": "release/index.csv"}),
        Job(
            "corpus",
            {**slice_of("corpus"), "root": manifest},
            {name: f"{name}.parquet" for name in ("utterances", "excluded", "summary")},
        ),
        Job("pretrained", slice_of("pretrained"), {"output": "model"}),
        Job(
            "local_features",
            {**slice_of("local_features"), **utterances, **pretrained, "audio-root": folder},
            {"output": "features.parquet"},
        ),
        Job("multitask", {**slice_of("multitask"), **features, **seed, **pretrained}, trained),
        Job(
            "layer_features",
            {**slice_of("layer_features"), **features, "encoder": at("multitask", "model"), "layers": -3},
            {"outputs": "layer.parquet"},
        ),
        Job(
            "clustering",
            {**slice_of("clustering"), **fold, **seed, **layer, "size": 4}
            | {"layer-features": at("layer_features", "layer.parquet")},
            {"centroids": "centroids.safetensors", "pseudo-labels": "labels.parquet"},
        ),
        Job(
            "cluster_statistics",
            {**slice_of("cluster_statistics"), **fold, **seed, "variant": "main", "pseudo-labels": labels}
            | {"centroids": at("clustering", "centroids.safetensors")},
            {"output": "cluster_statistics.parquet"},
        ),
        Job(
            "retraining",
            {**slice_of("retraining"), **features, **seed, **pretrained, **layer, "pseudo-labels": labels},
            trained,
        ),
        Job(
            "finetuning",
            {**slice_of("finetuning"), **features, **seed, "encoder": at("retraining", "model"), "loss": "ams"}
            | {"multitask-head": "none"},
            trained,
        ),
        Job(
            "evaluation",
            {**slice_of("evaluation"), **features, **seed, **described, "model": at("finetuning", "model")},
            {"predictions": "predictions.parquet", "metrics": "metrics.json"},
        ),
        Job(
            "examples",
            {**slice_of("examples"), **features, **seed, "audio-root": folder, "model": at("finetuning", "model")}
            | {"fit-on": "training", "pretrained": at("pretrained", "model"), "multitask": at("multitask", "model")}
            | {"centroids": at("clustering", "centroids.safetensors")}
            | {"predictions": at("evaluation", "predictions.parquet")},
            {"embeddings": "embeddings.parquet", "output": "examples.parquet"},
        ),
        Job("functionals", {**utterances, "audio-root": folder}, {"output": "functionals.parquet"}),
        Job(
            "baseline",
            {**slice_of("baseline"), **fold, "functionals": made_functionals(folder)},
            {"output": "predictions.parquet"},
        ),
        Job("tables", {**slice_of("tables"), **made}, {"output": "tables"}),
        Job("figures", {**slice_of("tables"), **made}, {"output": "figures"}),
        Job(
            "archive",
            {**slice_of("tables"), **made, "tables": at("tables", "tables/table1.csv")}
            | {"figures": at("figures", "figures/folds.svg")},
            {"output": "run.zip"},
        ),
        Job(
            "speech",
            {"manifest": manifest, "speeds": 1.1},
            {"audio-root": "audio", "utterances": "utterances.parquet", "excluded": "excluded.parquet"},
        ),
        Job("mfcc", heard, {"output": "features.parquet"}),
        Job(
            "pretraining",
            {**slice_of("pretraining"), **heard, **seed, "pseudo-labels": folder / "speech_labels.parquet"},
            {"output": "encoders", "history": "history.parquet", "checkpoint": "checkpoint.safetensors"},
        ),
        Job(
            "probe",
            {**slice_of("probe"), **utterances, **pretrained, "local-features": features["local-features"]},
            {"output": "probes.parquet"},
        ),
        Job("probes", {"names": "random", "probes": at("probe", "probes.parquet"), **history}, {"output": "made"}),
        Job(
            "pretrain",
            {**slice_of("pretraining"), **history, "utterances": heard["utterances"]}
            | {"encoder": at("pretraining", "encoders/last")},
            {"output": "encoder"},
        ),
    ]
    return {each.stage: each for each in jobs}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read as the server starts
            patch.setenv(name, "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield Bench(folder, made_jobs(folder))


# The faults. Each runs the job once, and tells whether it was met; the folder is then looked at.


def killed(number: signal.Signals) -> Callable[[Bench, str, Path, random.Random], bool]:
    """In half of the trials before an operation on its files, in half at some time."""

    def meet(bench: Bench, stage: str, folder: Path, draws: random.Random) -> bool:
        undisturbed = bench.expected(stage)
        if draws.random() < 0.5:
            process = bench.start(stage, folder, Fault(event=draws.randrange(undisturbed.events), signal=number))
            process.join()
        else:
            process = bench.start(stage, folder)
            process.join(draws.random() * undisturbed.seconds)
            process.kill() if number == signal.SIGKILL else process.terminate()  # nothing, where it has ended
            process.join()
        assert process.exitcode in (0, -number, 128 + number), bench.log(stage)
        return process.exitcode != 0

    return meet


def out_of_memory(bench: Bench, stage: str, folder: Path, draws: random.Random) -> bool:
    """Most of the address space that a job takes it can do without; so mostly it gets a small share of that."""
    undisturbed = bench.expected(stage)
    process = bench.start(stage, folder, Fault(memory=int(draws.random() ** 4 * undisturbed.memory)))
    process.join(5 + 10 * undisturbed.seconds)
    process.kill()  # Python waits for ever for a thread that found no memory to start (CPython issue 140746)
    process.join()
    return process.exitcode != 0


def without_temp(bench: Bench, stage: str, folder: Path, draws: random.Random) -> bool:
    """Only speech synthesis, whose library must lie in a short path, needs such a folder."""
    process = bench.start(stage, folder, Fault(without_temp=True))
    process.join()
    assert process.exitcode == (2 if stage == "synthesis" else 0), bench.log(stage)
    return True


def full_disk(bench: Bench, stage: str, folder: Path, draws: random.Random) -> bool:
    needed = sum(4096 * (1 + len(each) // 4096) for each in bench.expected(stage).files.values())
    remount(folder, f"size={max(4096, int(draws.random() * needed))}")
    code, said = ended(bench, stage, folder)
    remount(folder, f"size={100 * 2**20}")
    if code != 0:
        assert_told(code, said, "No space left on device")
        assert not list(folder.rglob("*.part"))
    return code != 0


def read_only(bench: Bench, stage: str, folder: Path, draws: random.Random) -> bool:
    remount(folder, "ro")
    code, said = ended(bench, stage, folder)
    remount(folder, "rw")
    assert_told(code, said, "Read-only file system")
    return True


def ended(bench: Bench, stage: str, folder: Path) -> tuple[int, str]:
    process = bench.start(stage, folder)
    process.join()
    return process.exitcode, bench.log(stage)


def assert_told(code: int, said: str, reason: str) -> None:
    """One message with the file and the reason, as for any other error that is the user's to mend."""
    assert code == 2, said
    assert "Traceback" not in said
    assert f": {reason}" in said.splitlines()[-1], said


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


FAULTS = {
    "SIGKILL": killed(signal.SIGKILL),
    "SIGTERM": killed(signal.SIGTERM),
    "no memory": out_of_memory,
    "no temp": without_temp,
    "full disk": full_disk,
    "read-only": read_only,
}
ON_SMALL_DISK = {"full disk", "read-only"}
ALWAYS_THE_SAME = {"no temp", "read-only"}
FRUGAL = {"pretrained", "archive"}
"""Stages that, with so small files, take no memory beyond what a process has that imported everything."""


def trials() -> Iterator[Any]:
    for stage in NEEDS:
        for fault in FAULTS if TRIALS else ["SIGKILL"]:
            if fault == "no memory" and stage in FRUGAL:
                continue
            marks = [ROOT_NEEDED] * (fault in ON_SMALL_DISK) + [OPENSMILE_NEEDED] * (stage == "functionals")
            yield pytest.param(stage, fault, marks=marks)


def check_what_is_left(folder: Path, expected: dict[str, bytes]) -> None:
    """Under final names lies nothing but what the undisturbed job makes; a record only if all of that is there."""
    found = contents(folder)
    for name, data in found.items():
        if name.endswith("checkpoint.safetensors"):
            assert "fingerprint" in load_tensors(folder / name)[1]
        elif ".part/" not in name:
            # What pre-training keeps for its checkpoint is in the output at last.
            final = name.replace("checkpoint.kept/", "encoders/")
            assert data == expected.get(final), f"{name} is half-written, or no output"
    if (folder / "provenance.json").exists():
        assert expected.items() <= found.items()
        Record.model_validate_json((folder / "provenance.json").read_bytes())


def survive(bench: Bench, stage: str, fault: str, folder: Path, draws: random.Random) -> bool:
    """Meet the fault once, look at what is left, and run the job to its end; whether it was met, and not too late."""
    expected = bench.expected(stage).files
    met = FAULTS[fault](bench, stage, folder, draws)
    check_what_is_left(folder, expected)
    code, said = ended(bench, stage, folder)
    assert code == 0, said
    assert contents(folder) == expected
    assert (folder / "provenance.json").exists()
    return met


def test_every_stage_is_tried() -> None:
    assert {*NEEDS} == {*cli.STAGES}


@pytest.mark.parametrize(
    "stage", [pytest.param(each, marks=OPENSMILE_NEEDED if each == "functionals" else ()) for each in NEEDS]
)
def test_no_stage_imports_the_compiler_of_torch(bench: Bench, stage: str) -> None:
    """It takes seconds, of every job."""
    assert not bench.expected(stage).compiler


@pytest.mark.parametrize(("stage", "fault"), list(trials()))
def test_a_stage_that_meets_a_fault_ends_as_one_that_does_not(
    bench: Bench, tmp_path: Path, stage: str, fault: str
) -> None:
    draws, wanted = random.Random(f"{stage} {fault}"), 1 if fault in ALWAYS_THE_SAME else max(1, TRIALS)
    for trial in range(PATIENCE * wanted):
        folder = tmp_path / str(trial)
        with small_file_system(folder) if fault in ON_SMALL_DISK else nullcontext():
            TRIED[stage, fault] += survive(bench, stage, fault, folder, draws)
        shutil.rmtree(folder)
        if TRIED[stage, fault] == wanted:
            return
    pytest.fail(f"{stage} met {fault} {TRIED[stage, fault]} times in {PATIENCE * wanted} trials, not {wanted} times")
