"""The DAG: what is planned, what an edit reruns, and a whole small run on synthetic speech."""

from __future__ import annotations

import base64
import html
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from test_corpora import write_audio, write_manifest

from gmp_atl import doctor, provenance
from gmp_atl.stages.archive import restore
from gmp_atl.stages.tables import tables
from gmp_atl.systems import main_system, systems

ROOT = Path(__file__).parents[1]
PAPER: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
JOBS = {
    "synthesis": 1,
    "corpus": 1,
    "pretrained": 1,
    "local_features": 1,
    "multitask": 2,
    "layer_features": 2,
    "clustering": 4,
    "cluster_statistics": 2,
    "retraining": 2,
    "finetuning": 8,
    "evaluation": 8,
    "examples": 1,
}
"""Of TINY, below, tables and figures aside."""
TINY: dict[str, Any] = {
    "name": "tiny",
    "seeds": [1],
    "corpus": {"reader": "synthetic", "root": None},
    "folds": {"held_out": [["Ses01", "Ses02"], ["Ses03", "Ses04", "Ses05"]]},
    "encoder": {
        "source": "scratch",
        "scratch": {"layers": 12, "hidden_size": 32, "heads": 2, "feed_forward": 64, "conv_channels": 16},
    },
    "compute": {"threads": 1, "precision": "float32", "checkpoint_minutes": 0.0},
    "head": {"lstm_hidden": 8, "projection": 8},
    "multitask": {"epochs": 1, "optimisation": {"batch_size": 32, "max_clip_seconds": 1.0, "attention_dropout": 0.0}},
    "clustering": {"sizes": [8, 16], "iterations": 3},
    # Many short updates, a checkpoint after each, so that a signal meets a job in the middle of them.
    "retraining": {"updates": 30, "projection": 8, "optimisation": {"batch_size": 4, "max_clip_seconds": 0.5}},
    "finetuning": {"epochs": 1, "optimisation": {"batch_size": 32, "max_clip_seconds": 1.0}},
    "tables": {"layers": [-3], "baseline": "none"},
}


def prepared(folder: Path, *arguments: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments for subprocess: snakemake in `folder`, on the repository's workflow, without its profiles."""
    shutil.copy(ROOT / "config.yaml", folder / "config.yaml")
    overlay = []
    if config is not None:
        (folder / "overlay.yaml").write_text(yaml.safe_dump(config))
        overlay = ["--configfile", "overlay.yaml"]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += [*overlay, "--rerun-triggers", "mtime", "params", "input", "code", "--resources", "gpu=0"]
    # An option with one value comes last: others would take a target that follows for a further value of theirs.
    command += ["--cores", "2", "--workflow-profile", "none"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"args": [*command, *arguments], "cwd": folder, "env": {**os.environ, "PATH": path}}


def snakemake(folder: Path, *arguments: str, config: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run what `prepared` says, to its end."""
    return subprocess.run(**prepared(folder, *arguments, config=config), capture_output=True, text=True, check=False)


def plan(folder: Path, *arguments: str, config: dict[str, Any] | None = None) -> Counter[str]:
    """Jobs per rule that snakemake would run."""
    run = snakemake(folder, "--dry-run", *arguments, "--quiet", "rules", config=config)
    assert run.returncode == 0, run.stderr
    output = run.stdout + run.stderr
    if "Nothing to be done" in output:
        return Counter()
    table = output.split("Job stats:")[-1]
    jobs = Counter({rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, flags=re.MULTILINE)})
    total = jobs.pop("total")
    assert jobs.total() == total, output
    del jobs["all"]
    return jobs


def planned_jobs(folder: Path, config: dict[str, Any]) -> Counter[tuple[str, str]]:
    """The jobs that snakemake would run, by rule and seed; the seed is empty for jobs that have none."""
    run = snakemake(folder, "--dry-run", config=config)
    assert run.returncode == 0, run.stderr
    jobs = re.findall(r"^(?:local)?rule (?!all:)(\w+):\n((?: {4}.*\n)+)", run.stdout, re.MULTILINE)
    [total] = {*re.findall(r"^total +(\d+)$", run.stdout, re.MULTILINE)}
    assert len(jobs) == int(total) - 1, run.stdout
    return Counter(
        (rule, "".join(re.findall(r"^ +wildcards: .*\bseed=(\d+)", said, re.MULTILINE))) for rule, said in jobs
    )


def plan_from_one_seed(folder: Path, config: dict[str, Any]) -> Counter[str]:
    """What `plan` gives for all seeds of the config, at the cost of one: jobs that have a seed are there for each."""
    jobs: Counter[str] = Counter()
    for (rule, seed), count in planned_jobs(folder, {**config, "seeds": [1]}).items():
        jobs[rule] += count * len(config["seeds"]) if seed else count
    return jobs


def overlaid(*changes: dict[str, Any]) -> dict[str, Any]:
    """TINY with changes, section by section."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for change in changes:
        for key, value in change.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny run has been completed."""
    folder = tmp_path_factory.mktemp("tiny")
    run = snakemake(folder, config=TINY)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """A folder with empty places where the presets expect corpora: enough to plan."""
    for place in ("data/IEMOCAP_full_release", "data/emodb", "data/RAVDESS", "data/my-corpus"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "data/my-corpus/manifest.csv").touch()
    return tmp_path


@pytest.fixture(scope="module")
def plan_of_config_yaml(tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """As it is, with three seeds."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "data/IEMOCAP_full_release").mkdir(parents=True)
    return plan(folder)


@pytest.mark.parametrize(
    ("preset", "folds", "seeds", "layers"),
    [("demo", 5, 1, 3), (None, 5, 3, 8), ("emodb", 5, 3, 8), ("ravdess", 6, 3, 8), ("manifest", 3, 3, 8)],
)
def test_plan_shares_every_common_stage(
    corpora: Path, plan_of_config_yaml: Counter[str], preset: str | None, folds: int, seeds: int, layers: int
) -> None:
    config = yaml.safe_load((ROOT / "presets" / f"{preset}.yaml").read_text()) if preset else {}
    assert len({**PAPER, **config}["seeds"]) == seeds
    # More seeds only multiply what one has, so that presets are planned with one.
    planned = plan(corpora, config={**config, "seeds": [1]}) if preset else plan_of_config_yaml
    runs = folds * (1 if preset else seeds)
    systems = layers + 3  # the layers with AM-Softmax (Tables 2 and 4), and three more rows of Table 3
    assert planned == Counter(
        {
            "synthesis": int(preset == "demo"),
            "corpus": 1,
            "pretrained": 1,
            "local_features": 1,
            "functionals": 1,
            "baseline": folds,
            "multitask": runs,
            "layer_features": runs,
            "clustering": runs * layers * 3,
            "cluster_statistics": runs,
            "retraining": runs * layers,
            "finetuning": runs * systems,
            "evaluation": runs * systems,
            "examples": 1,
            "tables": 1,
            "figures": 1,
        }
    )


@pytest.mark.parametrize(
    ("tables_", "ablations"),
    [
        ({"numbers": [1]}, {}),
        ({"numbers": [2]}, {}),
        ({"numbers": [4], "layers": [-1]}, {}),
        ({"numbers": [1], "ablation_losses": ["ce"]}, {"no-margin": {"finetuning": {"margin": 0.0}}}),
    ],
)
def test_what_the_tables_ask_for_is_what_is_run(
    tmp_path: Path, tables_: dict[str, Any], ablations: dict[str, Any]
) -> None:
    settings = overlaid({"tables": tables_}, {"ablations": ablations})
    jobs = plan(tmp_path, config=settings)
    config = doctor._load([tmp_path / "config.yaml", tmp_path / "overlay.yaml"], [])
    assert jobs["evaluation"] == 2 * len(systems(config))
    assert jobs["examples"] == int(main_system(config) in systems(config))


@pytest.mark.parametrize(("column", "preset"), [(0, None), (1, "ablations")])
def test_the_plan_is_that_of_the_page_on_scaling(
    corpora: Path, plan_of_config_yaml: Counter[str], column: int, preset: str | None
) -> None:
    config = yaml.safe_load((ROOT / "presets" / f"{preset}.yaml").read_text()) if preset else None
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    [table] = re.findall(r"## Jobs\n(.*?)\n## ", page, re.DOTALL)
    told = Counter(
        {
            rule: int(counts.split("|")[column])
            for rule, counts in re.findall(r"^\| `(\w+)` \|(.*)\|$", table, re.MULTILINE)
        }
    )
    assert (plan_from_one_seed(corpora, config) if config else plan_of_config_yaml) == told
    [total] = re.findall(r"^\| all \|(.*)\|$", table, re.MULTILINE)
    assert int(total.split("|")[column]) == told.total()


def test_every_seed_has_the_jobs_of_the_first(tmp_path: Path) -> None:
    # Ablations that repeat stage 1, clustering, retraining and fine-tuning, and what comes after them.
    ablations = {
        "frozen": {"multitask": {"encoder": "frozen"}},
        "transductive": {"clustering": {"fit_on": "all"}},
        "cosine": {"retraining": {"codebook_head": "cosine"}},
        "oracle": {"finetuning": {"selection": "oracle"}},
    }
    jobs = planned_jobs(tmp_path, overlaid({"seeds": [1, 2], "ablations": ablations}))
    of_seeds = [{rule: count for (rule, of), count in jobs.items() if of == seed} for seed in ("1", "2", "")]
    assert of_seeds[0] == of_seeds[1]
    assert of_seeds[0].keys() == {"ablation_layer_features", *JOBS} - of_seeds[2].keys()


def test_a_codebook_that_one_ablation_adds_is_of_one_layer(corpora: Path, plan_of_the_paper: Counter[str]) -> None:
    added = plan(corpora, config={"seeds": [1], "ablations": {"small": {"clustering": {"sizes": [64, 128]}}}})
    added.subtract(plan_of_the_paper)
    assert +added == Counter(dict.fromkeys(["clustering", "retraining", "finetuning", "evaluation"], 5))


@pytest.fixture(scope="module")
def plan_of_the_paper(tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """With one seed."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "data/IEMOCAP_full_release").mkdir(parents=True)
    return plan(folder, config={"seeds": [1]})


@pytest.mark.parametrize(
    ("preset", "variants"), [("gender", 6), ("scales", 6), ("peers", 2), ("wav2vec2", 0), ("wavlm", 0)]
)
def test_a_preset_adds_what_it_compares(
    corpora: Path, plan_of_the_paper: Counter[str], preset: str, variants: int
) -> None:
    config = yaml.safe_load((ROOT / "presets" / f"{preset}.yaml").read_text())
    added = plan(corpora, config={**config, "seeds": [1]})
    added.subtract(plan_of_the_paper)
    runs = 5 * variants
    losses = len(config.get("tables", {}).get("ablation_losses", ["ams"]))
    expected = {"retraining": runs, "finetuning": runs * losses, "evaluation": runs * losses}
    if preset != "scales":  # those share all that comes before
        sizes = [len(each.get("clustering", {}).get("sizes", "abc")) for each in config.get("ablations", {}).values()]
        expected |= dict.fromkeys(["multitask", "ablation_layer_features", "cluster_statistics"], runs)
        expected["clustering"] = 5 * sum(sizes)
    assert added == Counter(expected)


def test_missing_iemocap_stops_at_once_and_says_what_to_do(tmp_path: Path) -> None:
    run = snakemake(tmp_path)
    output = run.stdout + run.stderr
    assert run.returncode != 0
    for word in ("data/IEMOCAP_full_release", "sail.usc.edu", "make demo"):
        assert word in output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("option", ["--unlock", "--list-rules", "--lint"])
def test_what_reads_no_corpus_works_without_one(tmp_path: Path, option: str) -> None:
    run = snakemake(tmp_path, option)
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_encoder_is_pretrained_without_the_corpus_that_probes_need(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "presets/pretrain.yaml").read_text(encoding="utf-8"))
    jobs = plan(tmp_path, "pretrain", config=config)
    assert jobs["pretraining"] == len(config["pretraining"]["iterations"])
    assert not jobs["corpus"]
    run = snakemake(tmp_path, "probes", config=config)
    assert run.returncode != 0
    assert "data/emodb does not exist" in run.stderr
    assert not (tmp_path / "results").exists()


def test_a_finished_run_is_not_lost_to_a_root_that_does_not_exist(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    corpus = {"reader": "emodb", "root": "data/forgotten"}
    (read_from,) = folder.glob("results/*/corpus/root.txt")
    assert read_from.read_text() == f"{read_from.parents[1].relative_to(folder)}/release\n"
    before = {path: path.read_bytes() for path in folder.glob("results/*/corpus/*")}
    run = snakemake(folder, config=overlaid({"corpus": corpus}))
    assert run.returncode != 0
    assert "data/forgotten does not exist; results/tiny was made from the corpus at results/tiny/release" in (
        run.stdout + run.stderr
    ).replace("\n", " ")
    assert {path: path.read_bytes() for path in folder.glob("results/*/corpus/*")} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folds": {"held_out": [["Ses01", "Ses02"], ["Ses03", "Ses04"]]}}, "without a fold: Ses05"),
        ({"classes": ["angry", "bored"]}, "has no bored"),
    ],
    ids=["folds", "classes"],
)
def test_a_finished_run_is_not_lost_to_settings_that_the_corpus_does_not_fit(
    finished: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    """Snakemake would remove what it had read before the job could refuse to read it anew."""
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    run = snakemake(folder, config=overlaid(change))
    assert run.returncode != 0
    assert words in run.stdout + run.stderr
    assert plan(folder, config=TINY) == Counter()


def test_evaluations_alone_are_not_lost_to_what_needs_the_corpus(tmp_path: Path, finished: Path) -> None:
    audio = {"corpus": {"reader": "emodb", "root": "data/elsewhere"}}
    shutil.copytree(finished / "results/tiny/evaluations", tmp_path / "results/tiny/evaluations")
    assert plan(tmp_path, config=overlaid(audio)) == Counter({"tables": 1, "figures": 1})
    run = snakemake(tmp_path, config=overlaid({**audio, "seeds": [1, 2]}))
    assert run.returncode != 0
    assert "data/elsewhere does not exist" in run.stderr
    assert plan(tmp_path, config=overlaid(audio)) == Counter({"tables": 1, "figures": 1})


def test_an_edited_manifest_is_read_anew_and_an_absent_one_changes_nothing(tmp_path: Path) -> None:
    clips = [
        {"path": f"{speaker}_{emotion}.wav", "speaker": speaker, "gender": "f", "emotion": emotion}
        for speaker in ("a", "b")
        for emotion in ("angry", "happy", "neutral", "sad")
    ]
    for clip in clips:
        write_audio(tmp_path / "own" / clip["path"])
    manifest = write_manifest(tmp_path / "own/manifest.csv", clips)
    folds = {"by": "speaker", "held_out": [["a"], ["b"]]}
    settings = overlaid({"corpus": {"reader": "manifest", "root": "own/manifest.csv"}, "folds": folds})
    run = snakemake(tmp_path, "corpus", config=settings)
    assert run.returncode == 0, run.stderr
    assert plan(tmp_path, "corpus", config=settings) == Counter()
    # Fold 2 would train on no angry clip: refused before Snakemake removes what was read.
    write_manifest(manifest, [*clips[1:], {**clips[0], "emotion": "sad"}])
    refused = snakemake(tmp_path, "corpus", config=settings)
    assert "would train on no utterance of angry" in refused.stderr
    write_manifest(manifest, clips)
    assert plan(tmp_path, "corpus", config=settings) == Counter()
    write_manifest(
        manifest, [*clips[1:3], *clips[4:], {**clips[0], "emotion": "sad"}, {**clips[3], "emotion": "angry"}]
    )
    assert plan(tmp_path, "corpus", config=settings) == Counter(corpus=1)
    manifest.unlink()
    assert plan(tmp_path, "corpus", config=settings) == Counter()


def test_unknown_and_mistyped_keys_are_named(tmp_path: Path) -> None:
    run = snakemake(tmp_path, config={**TINY, "finetuning": {"marign": 0.1, "epochs": "1e1"}})
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "finetuning.marign" in output
    assert "finetuning.epochs" in output
    assert "Traceback" not in output


def test_a_layer_that_the_encoder_lacks_is_told_before_any_job(tmp_path: Path) -> None:
    run = snakemake(tmp_path, config={**TINY, "tables": {"layer": -24}})
    assert run.returncode != 0
    assert "tables.layer: layer -24 is asked for" in run.stdout + run.stderr
    assert not (tmp_path / "results").exists()


def test_tables_hold_every_row_of_the_run(finished: Path) -> None:
    tables = finished / "results/tiny/tables"
    table3 = pd.read_csv(tables / "table3.csv", comment="#")
    table4 = pd.read_csv(tables / "table4.csv", comment="#")
    assert table3["folds_seeds"].tolist() == ["2/2"] * 4
    assert table4.set_index("gmp_layer")["folds_seeds"].to_dict() == {
        layer: "2/2" if layer == -3 else "not run" for layer in range(-1, -9, -1)
    }
    predictions = sorted((finished / "results/tiny/evaluations").glob("main/**/predictions.parquet"))
    assert len(predictions) == 4 * 2
    assert not list((finished / "results/tiny").rglob("*.part"))
    assert not (finished / "results/tiny/layer_features").exists() or not list(
        (finished / "results/tiny/layer_features").rglob("*.parquet")
    )


def test_second_run_has_nothing_to_do(finished: Path) -> None:
    assert plan(finished, config=TINY) == Counter()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"compute": {"threads": 2, "checkpoint_minutes": 1, "jobs_per_gpu": 2}}, {}),
        ({"tables": {"numbers": [1, 4]}}, {"tables": 1, "figures": 1}),
        ({"finetuning": {"margin": 0.3}}, {"finetuning": 8, "evaluation": 8, "examples": 1, "tables": 1, "figures": 1}),
        (
            {"retraining": {"updates": 3}},
            {"retraining": 2, "finetuning": 4, "evaluation": 4, "examples": 1, "tables": 1, "figures": 1},
        ),
        (
            {"clustering": {"iterations": 4}},
            {
                "layer_features": 2,
                "clustering": 4,
                "cluster_statistics": 2,
                "retraining": 2,
                "finetuning": 4,
                "evaluation": 4,
                "examples": 1,
                "tables": 1,
                "figures": 1,
            },
        ),
        (
            # The features that codebooks come from are not kept, so that one more codebook means all of them again.
            {"clustering": {"sizes": [8, 16, 32]}},
            {
                "layer_features": 2,
                "clustering": 6,
                "cluster_statistics": 2,
                "retraining": 2,
                "finetuning": 4,
                "evaluation": 4,
                "examples": 1,
                "tables": 1,
                "figures": 1,
            },
        ),
        (
            # One pass writes all layers, so that one more layer means all of them again.
            {"tables": {"layers": [-1, -3]}},
            {
                "layer_features": 2,
                "clustering": 8,
                "cluster_statistics": 2,
                "retraining": 4,
                "finetuning": 6,
                "evaluation": 6,
                "examples": 1,
                "tables": 1,
                "figures": 1,
            },
        ),
        (
            {"seeds": [1, 2]},
            {
                "multitask": 2,
                "layer_features": 2,
                "clustering": 4,
                "cluster_statistics": 2,
                "retraining": 2,
                "finetuning": 8,
                "evaluation": 8,
                "tables": 1,
                "figures": 1,
            },
        ),
        (
            {"ablations": {"low-mask": {"retraining": {"mask": {"probability": 0.06, "length": 15}}}}},
            {"layer_features": 0, "retraining": 2, "finetuning": 2, "evaluation": 2, "tables": 1, "figures": 1},
        ),
        (
            {"ablations": {"no-margin": {"finetuning": {"margin": 0.0}}}},
            {"finetuning": 2, "evaluation": 2, "tables": 1, "figures": 1},
        ),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else None,
)
def test_an_edit_reruns_exactly_what_depends_on_it(
    finished: Path, change: dict[str, Any], expected: dict[str, int]
) -> None:
    assert plan(finished, config=overlaid(change)) == Counter(expected)


def test_a_smaller_budget_need_not_repeat_what_is_finished(finished: Path) -> None:
    smaller = overlaid({"compute": {"batch_seconds": 10.0}})
    assert plan(finished, config=smaller)["multitask"] == 2
    triggers = ("--rerun-triggers", "mtime", "input")
    assert plan(finished, *triggers, config=smaller) == Counter()
    more = plan(finished, *triggers, config={**smaller, "seeds": [1, 2]})
    assert (more["multitask"], more["retraining"], more["tables"]) == (2, 2, 1)


def test_features_of_fewer_layers_are_those_that_are_there(finished: Path, tmp_path: Path) -> None:
    """One pass writes all layers; without one of them, codebooks of the others are not made anew."""
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    last, third = (f"results/tiny/clustering/main/fold1/seed1/layer{layer}/8.parquet" for layer in (-1, -3))
    run = snakemake(folder, last, third, config=overlaid({"tables": {"layers": [-1, -3]}}))
    assert run.returncode == 0, run.stdout + run.stderr
    assert (folder / last).exists()
    assert plan(folder, third, config=TINY) == Counter()


@pytest.mark.parametrize(
    ("change", "rule", "encoder"),
    [
        ({}, "retraining", "--encoder results/tiny/pretrained "),
        ({"retraining": {"start": "multitask"}}, "retraining", "--encoder results/tiny/multitask/main/fold1/seed1 "),
        ({}, "finetuning", "--multitask-head none "),
        (
            {"finetuning": {"head": "multitask"}},
            "finetuning",
            "--multitask-head results/tiny/multitask/main/fold1/seed1 ",
        ),
    ],
)
def test_readings_2_and_12_choose_what_a_stage_starts_from(
    tmp_path: Path, change: dict[str, Any], rule: str, encoder: str
) -> None:
    run = snakemake(tmp_path, "--dry-run", "--printshellcmds", config=overlaid(change))
    commands = [line for line in run.stdout.splitlines() if f"gmp_atl {rule} " in line and "/fold1/" in line]
    without_gmps = [command for command in commands if "/gmpsnone/" in command]
    assert len(commands) > len(without_gmps) == (2 if rule == "finetuning" else 0)
    assert all(encoder in command for command in {*commands} - {*without_gmps})
    assert all("/pretrained " in each and "--multitask-head none " in each for each in without_gmps)


@pytest.mark.parametrize(
    ("change", "readings"),
    [
        ({"clustering": {"fit_on": "all"}}, {"main": "all"}),
        ({"ablations": {"other": {"clustering": {"fit_on": "all"}}}}, {"main": "training", "other": "all"}),
        (
            {"clustering": {"fit_on": "all"}, "ablations": {"other": {"clustering": {"fit_on": "training"}}}},
            {"main": "all", "other": "training"},
        ),
    ],
    ids=["main run", "ablation", "all but an ablation"],
)
def test_reading_10_reaches_every_job_that_labels_results_with_it(
    tmp_path: Path, change: dict[str, Any], readings: dict[str, str]
) -> None:
    run = snakemake(tmp_path, "--dry-run", "--printshellcmds", config=overlaid(change))
    told = set()
    for command in re.findall(r"gmp_atl (?:evaluation|examples) .*", run.stdout):
        words = shlex.split(command)
        options = dict(itertools.pairwise(words))
        told.add((words[1], options.get("--variant", "main"), options["--fit-on"]))
    evaluations = {("evaluation", variant, fit_on) for variant, fit_on in readings.items()}
    assert told == evaluations | {("examples", "main", readings["main"])}


def test_jobs_per_gpu_and_checkpoint_minutes_reach_jobs_by_their_environment(tmp_path: Path) -> None:
    # In place of a stage: what the package reads from the environment of the job.
    read = "from gmp_atl import leases, training; print(leases.JOBS_PER_GPU, training.CHECKPOINT_MINUTES)"
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n'{sys.executable}' -c '{read}' > '{tmp_path}/read'\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    config = overlaid({"compute": {"jobs_per_gpu": 2, "checkpoint_minutes": 7.5}})
    start = prepared(tmp_path, "results/tiny/pretrained/config.json", config=config)
    start["env"]["PATH"] = f"{python.parent}{os.pathsep}{start['env']['PATH']}"
    run = subprocess.run(**start, capture_output=True, text=True, check=False)
    assert (tmp_path / "read").read_text() == "2 7.5\n", run.stdout + run.stderr


def test_tables_regenerate_from_the_evaluations_alone(finished: Path, tmp_path: Path) -> None:
    made = finished / "results/tiny"
    shutil.copytree(made / "evaluations", tmp_path / "results/tiny/evaluations")
    assert plan(tmp_path, config=TINY) == Counter({"tables": 1, "figures": 1})
    run = snakemake(tmp_path, config=TINY)
    assert run.returncode == 0, run.stderr
    again = tmp_path / "results/tiny"
    for kind in ("tables", "figures"):
        assert {path.name: path.read_bytes() for path in (again / kind).iterdir()} == {
            path.name: path.read_bytes() for path in (made / kind).iterdir()
        }


def test_the_record_of_every_job_leads_back_to_the_corpus(finished: Path) -> None:
    records = provenance.read(finished / "results/tiny/evaluations/provenance")
    assert Counter(record.stage for record in records) == JOBS
    results = sorted((finished / "results/tiny/evaluations/main").rglob("predictions.parquet"))
    found = provenance.lineage(records, results)
    assert (found.without_record, found.broken) == ((), ())
    assert {record.stage for record in found.records} == {*JOBS} - {"synthesis", "cluster_statistics", "examples"}
    assert not re.search("MIXED|UNRECORDED|OTHER SETTINGS", (finished / "results/tiny/tables/table3.md").read_text())


def test_an_archive_gives_the_tables_of_the_run(finished: Path, tmp_path: Path) -> None:
    made = tmp_path / "results/tiny"
    shutil.copytree(finished / "results/tiny/evaluations", made / "evaluations")
    run = snakemake(tmp_path, "results/tiny/tiny.zip", config=TINY)
    assert run.returncode == 0, run.stdout + run.stderr
    config = restore(made / "tiny.zip", tmp_path / "restored")
    tables(config=config, evaluations=tmp_path / "restored/evaluations", output=tmp_path / "restored/tables")
    expected = {path.name: path.read_bytes() for path in (finished / "results/tiny/tables").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "restored/tables").iterdir()} == expected
    histories = (tmp_path / "restored/evaluations/histories").rglob("*.parquet")
    assert Counter(path.relative_to(tmp_path / "restored/evaluations/histories").parts[0] for path in histories) == {
        "multitask": 2,
        "retraining": 2,
        "finetuning": 8,
    }


def test_the_report_is_one_file_that_holds_every_page(finished: Path) -> None:
    run = snakemake(finished, "--report", "report.html", config=TINY)
    assert run.returncode == 0, run.stdout + run.stderr
    page = (finished / "report.html").read_text(encoding="utf-8")
    # Nothing is fetched: what a browser loads by itself stands in a tag, or in a style.
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
    assert not [tag for tag in tags if re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", tag)]
    assert not re.search(r"url\([\"']?https?:", page)
    pages = [*(finished / "results/tiny/tables").glob("*.html"), *(finished / "results/tiny/figures").iterdir()]
    assert len(pages) == 20
    embedded = [
        base64.b64decode(data) for data in re.findall(r"data:(?:text/html|image/svg\+xml);[^,]*base64,([\w+/=]+)", page)
    ]
    assert {path.name for path in pages if path.read_bytes() not in embedded} == set()
    captions = sorted((ROOT / "workflow/report").glob("*.rst"))
    assert captions
    for caption in captions:
        first = caption.read_text(encoding="utf-8").split("{")[0].split("*")[0].split(":")[0][:40]
        assert first in html.unescape(page), caption.name


class Stopped:
    """A copy of the finished run from clustering on, for Table 2 alone, that is stopped while a job trains."""

    config = overlaid({"tables": {"numbers": [2]}})
    job = "retraining/main/fold1/seed1/layer-3"

    def __init__(self, finished: Path, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results/tiny"
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        for made in ("clustering", "retraining", "finetuning", "evaluations/main", "tables", "figures"):
            shutil.rmtree(self.results / made)
        self.checkpoint = self.results / self.job / "checkpoint.safetensors"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Snakemake with its jobs in a process group, as a terminal starts it; returns when a job has trained."""
        before = self.checkpoint.stat().st_mtime_ns if self.checkpoint.exists() else 0
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        arguments = ("--rerun-incomplete", *arguments, "tables")  # as the profiles say
        process = subprocess.Popen(**prepared(self.folder, *arguments, config=self.config), **output)
        while not self.checkpoint.exists() or self.checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        return process

    def stop(self, number: signal.Signals) -> None:
        """Start, and send a signal to Snakemake and its jobs, as Ctrl-C does; returns when all have ended."""
        process = self.start()
        jobs = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number)
        said, _ = process.communicate()
        assert process.returncode != 0, said
        # A job may end after Snakemake; its last checkpoint would look like one of the next start. A container's first
        # process may leave it a zombie.
        left = [job for job in psutil.wait_procs(jobs, timeout=60)[1] if job.status() != psutil.STATUS_ZOMBIE]
        assert not left
        assert self.checkpoint.exists(), said

    @property
    def log(self) -> str:
        """What the training job wrote since it was last started."""
        return (self.results / "logs" / f"{self.job}.log").read_text()

    def resumed_at(self) -> int:
        """The update at which the job took its training up."""
        [update] = re.findall(r"goes on from update (\d+) of 30", self.log)
        return int(update)


def test_a_run_that_is_stopped_in_any_way_goes_on_and_ends_with_the_same_tables(finished: Path, tmp_path: Path) -> None:
    run = Stopped(finished, tmp_path)
    run.stop(signal.SIGINT)
    assert "stopped by SIGINT after update" in run.log
    run.stop(signal.SIGTERM)
    resumed = [run.resumed_at()]
    assert "stopped by SIGTERM after update" in run.log
    run.stop(signal.SIGKILL)
    resumed.append(run.resumed_at())
    # As it would be while another run is in the folder. Without the option, which the profiles have, files that jobs
    # had just written when they were killed would be refused before the folder is.
    refused = snakemake(tmp_path, "--rerun-incomplete", config=run.config)
    assert refused.returncode != 0
    assert "cannot be locked" in refused.stderr
    unlock = snakemake(tmp_path, "--unlock", config=run.config)
    assert unlock.returncode == 0, unlock.stderr
    # On one core, and so in another order. The training process alone, as the kernel does when memory runs out.
    process = run.start("--cores", "1", "--retries", "1")
    resumed.append(run.resumed_at())
    [training] = [
        each for each in psutil.Process(process.pid).children(recursive=True) if "retraining" in each.cmdline()
    ]
    training.kill()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    resumed.append(run.resumed_at())
    assert 0 < resumed[0] < resumed[1] < resumed[2] < resumed[3] < 30

    assert not list(run.results.rglob("checkpoint.safetensors"))
    assert not list(run.results.rglob("*.part"))
    made, expected = run.results, finished / "results/tiny"
    weights = f"{run.job}/model.safetensors"
    assert (made / weights).read_bytes() == (expected / weights).read_bytes()
    predictions = sorted(made.glob("evaluations/main/**/predictions.parquet"))
    assert len(predictions) == 2
    for path in predictions:
        assert path.read_bytes() == (expected / path.relative_to(made)).read_bytes()
    # Their configs differ in which tables they ask for.
    table, wanted = (
        [line for line in (each / "tables/table2.csv").read_text().splitlines() if not line.startswith("# Config:")]
        for each in (made, expected)
    )
    assert table == wanted
