"""Every command in the documents is run: as it stands, in a copy of the project, or else as `INSTEAD` says.

The copy has a small config and, in the places that the documents name, stand-ins for what they leave to the reader:
corpora of noise, recordings, a model. A command that is not in `INSTEAD` must succeed there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Inputs, Stages
from test_corpora import wav_of, write_audio, write_iemocap

from gmp_atl import cli
from gmp_atl.corpora import iemocap
from gmp_atl.formats import PREDICTIONS
from gmp_atl.stages.local_features import local_features

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [ROOT / "config.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
TEXT = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *CONFIGS]}

LONG, IEMOCAP, NETWORK, SLURM = "minutes to hours", "IEMOCAP and hours", "the network", "SLURM"
EXPANDED = {
    "make audit": NETWORK,
    "make bench": LONG,
    "make demo GPU=": "nothing but `make demo`",
    "make demo OPENSMILE=0": "nothing but `make demo`",
    "make lint": "a minute; CI runs it",
    "make coverage": "the network, and many minutes",
    "make lock": NETWORK,
    "make mutants": "the network, and many minutes",
    "make tables FROM=results/reference/emodb.zip": "nothing but `make tables FROM=results/demo/demo.zip`",
    "make opensmile": NETWORK,
    "make report PRESET=emodb": "a run on EmoDB",
    "make setup": NETWORK,
    "make setup opensmile": NETWORK,
    "make test": "minutes; it runs this",
    "make test-conda": "13 GB and many minutes",
    "make test-faults": LONG,
    "make test-heavy": LONG,
    "make test-soak": LONG,
    "make test-slurm": "root and the network; CI runs it where there is time",
}
"""What is needed by targets of which make only prints all commands here."""
CPU = "--workflow-profile workflow/profiles/cpu"
PLANNED = {
    IEMOCAP: [
        "snakemake --cores all --config seeds='[1]'",
        "snakemake --cores all --config name=head-minus-3 head='{layer: -3}' tables='{numbers: [3]}'",
        "snakemake --cores all --config tables='{numbers: [3]}'",
        "snakemake --cores all --configfile presets/ablations.yaml",
        "snakemake --cores all --configfile presets/gender.yaml",
        "snakemake --cores all --configfile presets/peers.yaml",
        "snakemake --cores all --configfile presets/scales.yaml",
        "snakemake --cores all --configfile presets/wav2vec2.yaml",
        "snakemake --cores all --configfile presets/wavlm.yaml",
        "snakemake --cores all --config compute='{batch_seconds: 160}' --rerun-triggers mtime input",
        f"snakemake --cores all {CPU}",
    ],
    NETWORK: ["snakemake --cores 1 --until pretrained"],
    "GPUs, IEMOCAP and hours": [
        "snakemake --cores 16 --resources gpu=4",
        "snakemake --cores all --resources gpu=2 --config compute='{jobs_per_gpu: 2}'",
        "snakemake --cores all --resources gpu=4",
    ],
    "another corpus and hours": [
        "snakemake --cores all --configfile presets/emodb.yaml",
        "snakemake --cores all --configfile presets/emodb.yaml --config corpus='{root: PATH}'",
        "snakemake --cores all --configfile presets/manifest.yaml",
        "snakemake --cores all --configfile presets/ravdess.yaml --config corpus='{root: PATH}'",
    ],
    "speech, a GPU and minutes": [
        "snakemake pretrain --cores all --configfile presets/pretrain.yaml",
        "snakemake probes --cores all --configfile presets/pretrain.yaml",
    ],
    SLURM: ["snakemake --workflow-profile workflow/profiles/slurm"],
}
"""What is needed by runs of which only the plan is made here, of every table."""
IMPORTED = "tests/test_commands.py::test_benchmark_can_be_imported"
BENCHMARKS = ["checkpoint", "dry_run", "extraction", "gpu", "kmeans_fit", "labels", "scale", "storage", "training"]
INSTEAD = {
    "make envs": ("openSMILE", "tests/test_environments.py::test_environment_is_up_to_date"),
    "gmp-atl <stage>": ("a stage's name", "gmp-atl corpus --help"),
    "python benchmarks/labels.py FOLDER": ("recordings", IMPORTED),
    "python benchmarks/rounding.py FOLDER": ("recordings", "python benchmarks/rounding.py --help"),
    "gmp-atl predict": ("arguments", "gmp-atl predict --help"),
    "gmp-atl predict MODEL interview.flac --window 5 --hop 2.5 --gpus 1": (
        "a GPU",
        "gmp-atl predict MODEL interview.flac --window 5 --hop 2.5",
    ),
    'bin/python -c "import torch; print(torch.version.cuda)"': (
        "an environment of conda's",
        'cd .venv; [[ $(bin/python -c "import torch; print(torch.version.cuda)") == 13.0 ]]',
    ),
    f"snakemake --cores all --configfile presets/demo.yaml {CPU}": (
        "minutes; `make demo` does so",
        "tests/test_profiles.py::test_the_demo_can_be_planned",
    ),
    "snakemake --cores all --sdm conda": ("conda, hours", "snakemake -n --cores all --sdm conda"),
    "snakemake --sdm conda --conda-prefix /shared/conda --conda-create-envs-only": (
        "conda and /shared",
        "snakemake --sdm conda --conda-prefix shared/conda --conda-create-envs-only",
    ),
    "squeue --me --noheader --format='%i %j' | awk '$2 ~ /^gmp-atl_/ {print $1}' | xargs -r scancel": (
        SLURM,
        "tests/test_commands.py::test_only_jobs_of_the_workflow_are_cancelled",
    ),
    "squeue --me --format='%i %T %M %k'": (SLURM, "bash -n <<< \"squeue --me --format='%i %T %M %k'\""),
    "salloc --gpus=4 --cpus-per-task=16 --mem=64G --time=1-0": (
        SLURM,
        "bash -n <<< 'salloc --gpus=4 --cpus-per-task=16 --mem=64G --time=1-0'",
    ),
    "srun --pty bash": (SLURM, "bash -n <<< 'srun --pty bash'"),
}
INSTEAD |= {command: (needed, command.replace("make", "make -n -B", 1)) for command, needed in EXPANDED.items()}
INSTEAD |= {f"python benchmarks/{name}.py": ("an idle machine, minutes to hours", IMPORTED) for name in BENCHMARKS}
INSTEAD |= {
    command: (needed, re.sub(r"snakemake( --cores \w+)?", "snakemake -n", command))
    for needed, commands in PLANNED.items()
    for command in commands
}
"""Commands that cannot be run here: what they need, and the test or narrower command that is run in their place."""
FIRST = [
    "snakemake --cores all",
    "snakemake --cores all --configfile presets/my-corpus.yaml",
    "make demo",
    "make archive PRESET=demo",
]
"""What other commands look at; here they run for Table 1 alone."""

LANGUAGES = {"sh", "python", "yaml", "csv", "mermaid", "text"}
"""Of fenced blocks; indented ones hold commands alone."""
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4,}\S.*(?:\n|\Z))+")
COMMENTED = re.compile(r"^#   (\w.*)$", re.MULTILINE)
PROGRAMS = r"\.|bash|conda|git|gmp-atl|make|pip|(?:bin/)?python|sacct|salloc|sbatch|scancel|snakemake|squeue|srun"
INLINE = re.compile(rf"make|(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) \S.*")
"""Names of programs alone are no commands, but for `make`."""


def lines(block: str) -> Iterator[str]:
    """Of a block, without comments."""
    for line in block.splitlines():
        yield re.sub(r"  +#.*$", "", line).strip()


def documented() -> Iterator[str]:
    """Every command: of blocks and in the text of pages, and of comments in configs."""
    for page in PAGES:
        rest = FENCED.sub("", TEXT[page])
        blocks = [block for language, block in FENCED.findall(TEXT[page]) if language == "sh"]
        for block in [*blocks, *INDENTED.findall(rest)]:
            yield from lines(block)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", INDENTED.sub("", rest))]
        yield from filter(INLINE.fullmatch, spans)
    for path in CONFIGS:
        for line in COMMENTED.findall(TEXT[path]):
            yield re.split("  +", line)[0]


COMMANDS = list(dict.fromkeys(documented()))


@dataclass(frozen=True)
class Copy:
    """A copy of the project, and what the commands said that were run in it."""

    folder: Path
    said: dict[str, str] = field(default_factory=dict)

    def run(self, command: str) -> str:
        """Once, as in a shell. The package's own commands run in this process, which has imported torch."""
        if command not in self.said:
            run = self._call if command.startswith("gmp-atl ") else self._shell
            self.said[command] = run(command)
        return self.said[command]

    def _call(self, command: str) -> str:
        said = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(said):
            try:
                code: Any = cli.main(shlex.split(command)[1:])
            except SystemExit as end:  # of --help
                code = end.code
        assert code == 0, said.getvalue()
        return said.getvalue()

    def _shell(self, command: str) -> str:
        path = [self.folder / "bin", Path(sys.executable).parent, os.environ["PATH"]]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env={**os.environ, "PATH": os.pathsep.join(map(str, path)), "PYTHONPATH": str(self.folder / "src")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


def copied(folder: Path, model: Path, **changes: dict[str, Any]) -> Copy:
    """With a config of one seed and three folds, the environment of the tests as .venv, and all stand-ins."""
    for name in ("Makefile", "Snakefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)
    for name in ("benchmarks", "docs", "envs", "presets", "requirements", "src", "tools", "workflow"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "profiles").symlink_to("workflow/profiles")
    config = yaml.safe_load(TEXT[ROOT / "config.yaml"])
    config["seeds"], config["folds"]["held_out"] = [1], [["Ses01"], ["Ses02", "Ses03"], ["Ses04", "Ses05"]]
    config["tables"]["layers"] = [-3]
    config |= {name: {**config[name], **section} for name, section in changes.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    for stamp in (".locked", ".installed", ".opensmile"):  # for make, in this order
        (folder / ".venv" / stamp).touch()
    add_corpora(folder)
    (folder / "MODEL").symlink_to(model)
    for name in ("recordings/one.wav", "FILE_OR_FOLDER.../other.wav", "interview.flac"):
        write_audio(folder / name, n_samples=100_000)
    return Copy(folder)


def add_corpora(folder: Path) -> None:
    """Where config.yaml, the presets and the pages have them; manifest and preset of one's own are corpora.md's."""
    labels = {
        f"Ses0{session}F_impro01_{gender}{number:03}": label
        for session in iemocap.SESSIONS
        for gender in "FM"
        for number, label in enumerate(("ang", "hap", "neu", "sad"))
    }
    release = write_iemocap(folder / "data/IEMOCAP_full_release", labels)
    for id in labels:
        write_audio(wav_of(release, id))
    for speaker, emotion in product(("03", "08", "09", "10", "11", "12", "13", "14", "15", "16"), "WFNT"):
        write_audio(folder / f"data/emodb/wav/{speaker}a01{emotion}a.wav")
    (folder / "PATH").mkdir()
    example = dict(FENCED.findall(TEXT[ROOT / "docs/corpora.md"]))
    (folder / "presets/my-corpus.yaml").write_text(example["yaml"], encoding="utf-8")
    manifest = folder / "data/my-corpus/manifest.csv"
    for row in example["csv"].splitlines()[1:]:
        write_audio(manifest.parent / row.split(",")[0], n_samples=16_000)
    manifest.write_text(example["csv"], encoding="utf-8")


@pytest.fixture(scope="module")
def model(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Stages(inputs, tmp_path_factory.mktemp("model")).finetuning().folder


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """`FIRST` has been run here, with a small random encoder."""
    encoder = {"source": "scratch", "name": None, "revision": None, "sha256": None, "scratch": {"hidden_size": 32}}
    tables = {"numbers": [1], "baseline": "none"}
    folder = tmp_path_factory.mktemp("site")
    copy = copied(folder, model, corpus={"allow_partial": True}, encoder=encoder, tables=tables)
    for command in FIRST:
        copy.run(command)
    (folder / "FILE").symlink_to("results/demo/demo.zip")
    return copy


STANDINS = {
    "conda": """case "$*" in
        --version) echo conda 24.7.1;;
        "info --json") echo '{"conda_prefix": "/nowhere", "platform": "linux-64"}';;
        "config --get channel_priority --json") echo '{"get": {"channel_priority": "strict"}}';;
        "env create "*) for last; do :; done; mkdir "$last";;
        "clean -y --tarballs") ;;
        *) exit 1;;
    esac""",
    "squeue": "printf '%s\\n' '1 gmp-atl_a' '2 other' '3 gmp-atl_b-c' '4 not-gmp-atl_d'",
    "scancel": 'echo "cancelled $*"',
}
"""Programs that are not at hand, as far as commands need them."""


@pytest.fixture(scope="module")
def plans(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Nothing has been run here, and all tables are asked for."""
    copy = copied(tmp_path_factory.mktemp("plans"), model)
    (copy.folder / "bin").mkdir()
    for name, script in STANDINS.items():
        (copy.folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (copy.folder / "bin" / name).chmod(0o755)
    return copy


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in INSTEAD])
def test_command_succeeds(command: str, request: pytest.FixtureRequest) -> None:
    copy: Copy = request.getfixturevalue("plans" if command.startswith("snakemake -n") else "site")
    if command.startswith("gmp-atl export "):  # both wish for a folder that is not there
        shutil.rmtree(copy.folder / "FOLDER", ignore_errors=True)
    copy.run(command)


@pytest.mark.parametrize("command", INSTEAD)
def test_command_that_cannot_be_run_has_a_check_in_its_place(command: str, request: pytest.FixtureRequest) -> None:
    instead = INSTEAD[command][1]
    path, _, test = instead.partition("::")
    if path.startswith("tests/"):
        assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8")
        return
    said = request.getfixturevalue("plans").run(instead)
    assert ("This was a dry-run" in said) == instead.startswith("snakemake -n")


def test_what_is_said_of_commands_is_said_of_those_in_the_documents() -> None:
    assert {*INSTEAD, *FIRST} <= {*COMMANDS}


def test_every_fenced_block_names_its_language() -> None:
    """Else its commands would be missed."""
    for page in PAGES:
        assert len(FENCED.findall(TEXT[page])) * 2 == len(re.findall(r"```|~~~", TEXT[page])), page
    assert {language for page in PAGES for language, _ in FENCED.findall(TEXT[page])} <= LANGUAGES


def test_only_jobs_of_the_workflow_are_cancelled(plans: Copy) -> None:
    [command] = [command for command in COMMANDS if "scancel" in command]
    assert plans.run(command) == "cancelled 1 3\n"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name=name)


def test_python_in_the_documents_runs(site: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(site.folder / "FOLDER", ignore_errors=True)
    monkeypatch.chdir(site.folder)
    assert cli.main(["export", "MODEL", "FOLDER", "--onnx"]) == 0
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 8_000)).astype(np.float32)
    names: dict[str, Any] = dict(zip(("samples", "one", "other"), noise, strict=True))
    for page in PAGES:
        for language, block in FENCED.findall(TEXT[page]):
            if language == "python":
                exec(block, names)
    assert names["scores"].shape == (1, len(names["classes"]))


def test_the_corpus_of_the_example_goes_through_every_stage(site: Copy, inputs: Inputs, tmp_path: Path) -> None:
    """Its table is the run's; the stages are run on the first fold, and leave its clips out until the last."""
    settings = yaml.safe_load((site.folder / "presets/my-corpus.yaml").read_text(encoding="utf-8"))
    changes = {"classes": settings["classes"], "folds": settings["folds"]}
    utterances = site.folder / "results/my-corpus/corpus/utterances.parquet"
    stages = Stages(Inputs(utterances, tmp_path / "local.parquet", inputs.encoder, {}), tmp_path)
    local_features(
        config=stages.config("local_features", changes),
        utterances=utterances,
        audio_root=site.folder / "data/my-corpus",
        encoder=inputs.encoder,
        output=tmp_path / "local.parquet",
    )
    features = stages.layer_features(stages.multitask(changes).folder, -3, changes)
    retrained = stages.retraining([stages.clustering(features, 4, changes)], {**changes, "clustering.sizes": [4]})
    model = stages.finetuning(changes, encoder=retrained.folder)
    tested = PREDICTIONS.read(stages.evaluation(model, changes, gmps=-3))[0]
    assert tested["id"].to_pylist() == ["audio/anna_01", "audio/anna_02"]
