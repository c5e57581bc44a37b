"""Records of jobs: what they hold, how they are tied together, and what tables say of mixtures."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import SETTINGS

from gmp_atl import cli, provenance
from gmp_atl import config as configs
from gmp_atl.code import code_hash
from gmp_atl.errors import UserError
from gmp_atl.files import Role
from gmp_atl.formats import FUNCTIONALS, UTTERANCES
from gmp_atl.provenance import Record, lineage


def record(stage: str, inputs: dict[str, str], outputs: dict[str, str], **others: Any) -> Record:
    defaults: dict[str, Any] = {
        "job": {"fold": 1},
        "config": {},
        "code": "c0de",
        "commit": "0123456789abcdef",
        "modified": False,
        "packages": {"python": "3.11.7", "torch": "2.11.0"},
        "device": "CPU A",
        "seconds": 1.0,
        "peak_memory_mb": 100,
        "peak_gpu_memory_mb": None,
    }
    return Record(stage=stage, inputs=inputs, outputs=outputs, **{**defaults, **others})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    """Two files that evaluations are said to have written."""
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        path.write_text(path.name)
    return paths


@pytest.fixture
def chain(results: list[Path]) -> list[Record]:
    """corpus and training behind both evaluations, and a record that has nothing to do with them."""
    first, second = map(digest, results)
    return [
        record("corpus", {}, {"utterances": "u"}),
        record("finetuning", {"utterances": "u"}, {"output": "m1"}, job={"fold": 1}),
        record("finetuning", {"utterances": "u"}, {"output": "m2"}, job={"fold": 2}),
        record("evaluation", {"model": "m1", "utterances": "u"}, {"predictions": first}, job={"fold": 1}),
        record("evaluation", {"model": "m2", "utterances": "u"}, {"predictions": second}, job={"fold": 2}),
        record("finetuning", {"utterances": "old"}, {"output": "m0"}, code="old", device="CPU B"),
    ]


def text(found: provenance.Lineage) -> str:
    return "\n".join(found.remarks())


def test_lineage_holds_what_the_results_come_from_and_nothing_else(chain, results):
    found = lineage(chain, results)
    assert sorted(map(str, found.records)) == sorted(map(str, chain[:-1]))
    assert text(found).splitlines() == [
        "Code: commit 0123456789ab",
        "Packages: python 3.11.7, torch 2.11.0",
        "Computed on: CPU A",
    ]
    assert lineage(reversed(chain), results).records == found.records


def test_jobs_that_wrote_equal_files_are_all_told_and_of_a_readers_job_those_of_its_seed(chain, results):
    """As those of two seeds do that train nothing."""
    seeds = [{"fold": 1, "seed": seed} for seed in (0, 1)]
    twins = [record("finetuning", {"utterances": "u"}, {"output": "m1"}, job=job) for job in seeds]
    readers = [
        record("evaluation", {"model": "m1"}, {"predictions": digest(path)}, job=job)
        for path, job in zip(results, seeds, strict=True)
    ]
    for paths, jobs in ((results, seeds), (results[:1], seeds[:1])):
        found = lineage([chain[0], *twins, *readers], paths).records
        assert [each.job for each in found if each.stage == "finetuning"] == jobs
    unseeded = record("evaluation", {"model": "m1"}, {"predictions": digest(results[0])})
    assert len([each for each in lineage([*twins, unseeded], results[:1]).records if each.stage == "finetuning"]) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code": "other"}, "MIXED code: finetuning (1 jobs of c0de, 1 jobs of other)"),
        ({"packages": {"python": "3.11.7", "torch": "2.10.0"}}, "MIXED packages: python 3.11.7, torch 2.10.0 | 2.11.0"),
        ({"packages": {"tqdm": "1"}}, "Packages: python 3.11.7, torch 2.11.0"),
        ({"device": "H100"}, "Computed on: CPU A (4 jobs) | H100 (1 jobs)"),
        ({"commit": "fedcba9876543210"}, "Code: commit 0123456789ab | commit fedcba987654"),
        ({"modified": True}, "Code: commit 0123456789ab | commit 0123456789ab with uncommitted changes"),
        ({"commit": None}, "Code: commit 0123456789ab | no commit"),
        (
            {"inputs": {"utterances": "another"}},
            "MIXED inputs: no recorded job wrote what these read: finetuning: utterances (1 job)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mixtures_are_told(chain, results, change, words):
    chain[1] = chain[1].model_copy(update=change)
    assert words in text(lineage(chain, results)).splitlines()


def test_a_result_that_was_exchanged_is_told(chain, results):
    results[1].write_text("by hand")
    found = lineage(chain, results)
    assert found.without_record == (results[1],)
    assert "UNRECORDED: 1 evaluations have no record of how they were made" in text(found)
    assert [each.job for each in found.records if each.stage == "evaluation"] == [{"fold": 1}]


def test_a_damaged_record_is_named(tmp_path):
    good = record("corpus", {}, {"utterances": "u"}).model_dump_json()
    for damage in (good[:-9], good.replace('"seconds":1.0', '"seconds":"long"'), good.replace("device", "devise"), ""):
        (tmp_path / "corpus.json").write_text(damage)
        with pytest.raises(UserError, match=r"corpus\.json is not a provenance record"):
            provenance.read(tmp_path)


def run_baseline(inputs, folder: Path, *more: str) -> Path:
    """The SVM on made functionals: the quickest stage that is recorded."""
    ids = UTTERANCES.read(inputs.utterances)[0]["id"]
    values = pa.array([[float(n), 1.0] for n in range(len(ids))], FUNCTIONALS.schema.field("values").type)
    FUNCTIONALS.write(folder / "functionals.parquet", pa.table({"id": ids, "values": values}), features="made")
    settings = configs.SLICES["baseline"].model_validate(configs.slice_for(configs.parse(SETTINGS), "baseline"))
    arguments = ["baseline", "--config", settings.model_dump_json(), "--fold", "2", "--utterances", inputs.utterances]
    arguments += ["--functionals", folder / "functionals.parquet", "--output", folder / "predictions.parquet", *more]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return folder / "predictions.parquet"


def test_the_command_line_writes_the_record_of_a_job(inputs, tmp_path):
    predictions = run_baseline(inputs, tmp_path, "--provenance", str(tmp_path / "records" / "fold2.json"))
    [found] = provenance.read(tmp_path / "records")
    assert (found.stage, found.job, found.code) == ("baseline", {"fold": 2}, code_hash("baseline"))
    assert found.config["classes"] == ["angry", "sad"]
    assert found.inputs == {
        "utterances": digest(inputs.utterances),
        "functionals": digest(tmp_path / "functionals.parquet"),
    }
    assert found.outputs == {"output": digest(predictions)}
    assert found.device.startswith("CPU ")
    assert {"python", "numpy", "sklearn", "pyarrow"} <= found.packages.keys()
    assert 0 < found.seconds < 600
    assert found.peak_memory_mb > 30
    assert str(tmp_path) not in found.model_dump_json()
    assert lineage([found], [predictions]).without_record == ()


def test_without_the_option_nothing_is_recorded(inputs, tmp_path):
    run_baseline(inputs, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["functionals.parquet", "predictions.parquet"]


def test_a_stage_that_fails_leaves_no_record(tmp_path):
    roles = {"output": Role.OUTPUT}
    with (
        pytest.raises(ZeroDivisionError),
        provenance.recording(tmp_path / "r.json", "tables", {"output": tmp_path}, roles),
    ):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_folder_is_known_by_names_and_contents(tmp_path):
    def found(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
        return provenance.path_digest(folder)

    first = found(a="1", b="2")
    assert found(b="2", a="1") == first
    assert len({first, found(a="2", b="1"), found(a="1"), found(a="1", c="2")}) == 4


def test_the_commit_and_its_changes_are_those_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    def state() -> tuple[str | None, bool]:
        path = tmp_path / "record.json"
        with provenance.recording(path, "tables", {}, {}):
            pass
        written = Record.model_validate_json(path.read_bytes())
        path.unlink()
        return written.commit, written.modified

    monkeypatch.setattr(provenance, "_CHECKOUT", tmp_path)
    assert state() == (None, False)
    (tmp_path / "src").mkdir()
    for name in ("Snakefile", "src/module.py", "config.yaml"):
        (tmp_path / name).write_text("1")
    assert state() == (None, False)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit, modified = state()
    assert (len(commit or ""), modified) == (40, False)
    (tmp_path / "config.yaml").write_text("2")  # the record holds the config itself
    assert state() == (commit, False)
    (tmp_path / "src/new.py").write_text("2")
    assert state() == (commit, True)
