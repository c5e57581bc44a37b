"""Archives of cached intermediates: they make equal tables elsewhere, and damaged or foreign ones are refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tables import BLOCKER, Run, fill

from gmp_atl import cli
from gmp_atl.errors import UserError
from gmp_atl.stages.archive import MANIFEST, archive, compare, restore
from gmp_atl.stages.figures import figures
from gmp_atl.stages.tables import tables


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("run"))
    fill(made)
    tables(config=made.config, evaluations=made.evaluations, output=made.output)
    figures(config=made.config, evaluations=made.evaluations, output=made.output.parent / "figures")
    return made


def pack(run: Run, path: Path) -> Path:
    made = [[*folder.iterdir()] for folder in (run.output, run.output.parent / "figures")]
    archive(config=run.config, evaluations=run.evaluations, tables=made[0], figures=made[1], output=path)
    return path


@pytest.fixture(scope="module")
def packed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(run, tmp_path_factory.mktemp("packed") / "made.zip")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewritten(packed: Path, path: Path, change: Callable[[dict[str, bytes], dict], None]) -> Path:
    """The archive with other contents and another manifest."""
    with zipfile.ZipFile(packed) as file:
        files = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(files.pop(MANIFEST))
    change(files, manifest)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(MANIFEST, json.dumps(manifest))
        for name, data in files.items():
            file.writestr(name, data)
    return path


def test_tables_of_an_archive_are_byte_for_byte_those_of_the_run(run, packed, tmp_path):
    """In a process that has neither torch, FAISS, audio libraries nor the run's folder."""
    prelude = BLOCKER[: BLOCKER.index("import json")]
    command = f"{prelude}\nfrom gmp_atl.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["restore", str(packed), "--output", str(tmp_path / "restored")]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "restored/evaluations") == contents(run.evaluations)
    assert contents(tmp_path / "restored/tables") == contents(run.output)
    assert contents(tmp_path / "restored/figures") == contents(run.output.parent / "figures")
    n = len(contents(run.output)) + len(contents(run.output.parent / "figures"))
    assert f"{n} tables and figures" in done.stdout
    assert "These differ" not in done.stdout


def test_tables_that_other_versions_make_otherwise_are_named(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gmp_atl.stages.archive.compare", lambda _: (7, ["tables/table1.csv"]))
    assert cli.main(["restore", str(packed), "--output", str(tmp_path / "restored")]) == 0
    told = capsys.readouterr().out
    assert "7 tables and figures in" in told
    assert told.endswith("as other versions of gmp-atl or of its packages make them: tables/table1.csv\n")


def test_a_table_that_comes_out_otherwise_is_named(packed, tmp_path):
    restore(packed, tmp_path / "restored")
    shutil.copytree(packed.parent, tmp_path / "restored/figures")
    (tmp_path / "restored/tables").mkdir()
    (tmp_path / "restored/tables/table1.csv").write_text("other")
    same, differing = compare(tmp_path / "restored")
    assert same == 0
    assert {"tables/table1.csv", "tables/table2.md", "figures/table4.svg"} <= {*differing}


def test_equal_runs_give_equal_archives(run, packed, tmp_path):
    assert pack(run, tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_what_is_no_part_of_a_run_is_not_packed(run, tmp_path):
    shutil.copytree(run.output.parent, tmp_path / "run")
    (tmp_path / "run/evaluations/notes.txt").write_text("mine")
    copied = Run(tmp_path / "other")
    copied.evaluations, copied.output = tmp_path / "run/evaluations", tmp_path / "run/tables"
    with pytest.raises(UserError, match=r"notes\.txt"):
        pack(copied, tmp_path / "made.zip")
    assert not (tmp_path / "made.zip").exists()


def test_a_restored_folder_is_replaced_and_any_other_is_left_alone(packed, tmp_path):
    target = tmp_path / "restored"
    restore(packed, target)
    (target / "evaluations/old.json").write_text("{}")
    restore(packed, target)
    assert not (target / "evaluations/old.json").exists()
    (target / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not restored from an archive"):
        restore(packed, target)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_bytes(b'{"name": "an app"}')
    with pytest.raises(UserError, match="was not restored from an archive"):
        restore(packed, mine)
    assert contents(mine) == {"manifest.json": b'{"name": "an app"}'}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "restored"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98, 0.9999])
def test_a_truncated_archive_is_refused(packed, tmp_path, share):
    data = packed.read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"cut\.zip"):
        restore(cut, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_does_not_matter(packed, tmp_path_factory, place, bit):
    """Some bits of a zip say nothing, as those of the creating system; then the contents are still the run's."""
    data = bytearray(packed.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "flipped.zip").write_bytes(data)
    with contextlib.suppress(UserError):
        restore(folder / "flipped.zip", folder / "restored")
    if not (folder / "restored").exists():
        return
    with zipfile.ZipFile(packed) as file:
        expected = {name: file.read(name) for name in file.namelist() if name != MANIFEST}
    assert contents(folder / "restored/evaluations") == expected


def changed_file(files, manifest):
    files["corpus.parquet"] += b" "


def added_file(files, manifest):
    files["extra.parquet"] = b"x"


def removed_file(files, manifest):
    del files["corpus.parquet"]


def named_only(files, manifest):
    manifest["files"]["ghost.parquet"] = "0" * 64


def with_other_config(files, manifest):
    manifest["config"]["seeds"] = [7]


def with_unknown_key(files, manifest):
    manifest["config"]["tempo"] = 1


def of_a_later_version(files, manifest):
    manifest["version"] = 2


def of_another_project(files, manifest):
    manifest["format"] = "holiday pictures"


def without_digests(files, manifest):
    del manifest["files"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_file, r"corpus\.parquet is not what manifest\.json says"),
        (added_file, r"do not agree about extra\.parquet"),
        (removed_file, r"do not agree about corpus\.parquet"),
        (named_only, r"do not agree about ghost\.parquet"),
        (with_other_config, "not the one that it was made with"),
        (with_unknown_key, r"another config \(tempo"),
        (of_a_later_version, r"version 1 \(found \('gmp-atl archive', 2\)\)"),
        (of_another_project, "holiday pictures"),
        (without_digests, "manifest.json is damaged"),
    ],
)
def test_a_changed_or_foreign_archive_is_refused_with_the_reason(packed, tmp_path, change, words):
    path = rewritten(packed, tmp_path / "changed.zip", change)
    with pytest.raises(UserError, match=words) as caught:
        restore(path, tmp_path / "restored")
    assert "changed.zip" in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["changed.zip"]


@pytest.mark.parametrize(
    "name", ["../escaped.json", "/tmp/escaped.json", "a/../../escaped.json", "a\\b.json", "run.sh", "evaluation.pkl"]
)
def test_no_archive_writes_outside_its_folder_or_brings_other_files(packed, tmp_path, name):
    import hashlib

    def change(files, manifest):
        files[name] = b"{}"
        manifest["files"][name] = hashlib.sha256(b"{}").hexdigest()

    path = rewritten(packed, tmp_path / "hostile.zip", change)
    with pytest.raises(UserError, match="not to be trusted"):
        restore(path, tmp_path / "restored")
    assert [each.name for each in tmp_path.iterdir()] == ["hostile.zip"]


def test_an_archive_that_claims_to_be_huge_is_refused_before_it_is_read(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("gmp_atl.stages.archive._LARGEST", 5000)
    with pytest.raises(UserError, match=r"would unpack to more than|claims to be larger"):
        restore(packed, tmp_path / "restored")


@pytest.mark.parametrize(("data", "words"), [(b"no zip", "no archive, or a damaged one"), (None, "is missing")])
def test_what_is_no_archive_is_refused(tmp_path, data, words):
    path = tmp_path / "file.zip"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        restore(path, tmp_path / "restored")


def test_any_other_zip_is_refused(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("holiday.json", "{}")
    (tmp_path / "other.zip").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=r"without manifest\.json: no archive of gmp-atl"):
        restore(tmp_path / "other.zip", tmp_path / "restored")


ROOT = Path(__file__).parents[1]


def test_the_run_in_the_repository_makes_the_figures_that_the_page_of_results_has(tmp_path):
    run = tmp_path / "run"
    config = restore(ROOT / "results" / "reference" / "emodb.zip", run)
    tables(config=config, evaluations=run / "evaluations", output=run / "tables")
    (run / "figures").mkdir()
    assert [name for name in compare(run)[1] if name.startswith("tables/")] == []
    made = "".join(path.read_text() for path in sorted((run / "tables").glob("table*.md")))
    told = re.findall(r"\d+\.\d ±\d+\.\d ±(?:\d+\.\d|n/a)", (ROOT / "docs" / "results.md").read_text())
    assert len(told) == 2 * 12
    assert {figure for figure in told if figure not in made} == set()
