"""What the command line tells of itself, to people and to their shells."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gmp_atl import cli, files
from gmp_atl.errors import UserError


@pytest.mark.parametrize(
    ("line", "expected", "absent"),
    [
        ("gmp-atl ", {"doctor", "predict", "export", "clustering"}, {"--window"}),
        ("gmp-atl pre", {"predict", "pretrained"}, {"doctor"}),
        ("gmp-atl predict --", {"--window", "--batch-seconds"}, {"doctor", "--configfile"}),
        ("gmp-atl predict model --format ", {"table", "csv", "json"}, set()),
    ],
)
def test_shells_are_told_what_may_follow(tmp_path: Path, line: str, expected: set[str], absent: set[str]) -> None:
    told = tmp_path / "told"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(told)}
    subprocess.run([sys.executable, "-m", "gmp_atl"], env=environment, check=True)
    found = {each.strip() for each in told.read_text(encoding="utf-8").splitlines()}
    assert expected <= found
    assert not absent & found


def test_help_names_every_command_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    for name in ("doctor", "show", "restore", "predict", "export", *cli.STAGES):
        assert f"\n    {name} " in told or f"\n  {name} " in told


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--loss", "amsoftmax"), ("--fit-on", "trainng")])
def test_a_stage_takes_no_word_that_it_does_not_know(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    """Read as `all`, a mistyped reading of clustering.fit_on would let codebooks of held-out utterances in."""
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluation", option, value])
    assert end.value.code == 2
    assert f"argument {option}: invalid choice: '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan", "long"])
def test_what_is_no_length_of_time_is_refused(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", "model", "a.wav", f"--window={seconds}"])
    assert end.value.code == 2
    assert f"argument --window: invalid positive number value: '{seconds}'" in capsys.readouterr().err


def test_a_name_that_no_file_can_have_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a" * 300 + ".wav"
    for command in (["predict", name, name], ["show", name], ["export", name, "there"]):
        assert cli.main(command) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"gmp-atl {command[0]}: error: ")
        assert name in told


def test_a_reader_who_has_enough_ends_a_command_without_a_traceback() -> None:
    code = "from gmp_atl import cli; cli._command = lambda _: print('row\\n' * 100_000); raise SystemExit(cli.main([]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == b"row\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What happens on the disk, in order: an inode that is synced, or the name that something is given."""
    found: list[object] = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        found.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        found.append(target)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    return found


@pytest.mark.parametrize("place", ["folder", "folder/file/output", "/proc/output"])
def test_where_no_file_can_be_nothing_is_left_and_the_place_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    with pytest.raises(UserError, match=f"{place} cannot be written: ."):
        files.write_text(tmp_path / place, "text")
    if place != "folder":  # which another folder may replace
        with pytest.raises(UserError, match=f"{place} cannot be written: ."), files.atomic_folder(tmp_path / place):
            pass
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", tmp_path / "folder/file"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(UserError, match="file cannot be written: it is no folder"),
        files.atomic_folder(tmp_path / "file"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_is_there_until_the_next_one_is_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with files.atomic_folder(tmp_path / "folder") as fresh:
            (fresh / text).touch()
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "folder"):
        raise RuntimeError
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["folder", "folder/second"]


def test_what_cannot_be_read_is_not_said_to_be_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match=r"clip\.wav"), files.atomic(tmp_path / "output"):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/clip.wav")
    refused = pytest.raises(UserError, match="output cannot be written: Permission denied")
    with refused, files.atomic(tmp_path / "output") as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, disk: list[object]) -> None:
    """Were the machine to fail between the two, the name would stand for nothing, or for a part."""
    files.write_text(tmp_path / "file", "text")
    assert disk == [(tmp_path / "file").stat().st_ino, tmp_path / "file"]


def test_the_files_of_a_folder_are_on_the_disk_before_it_has_its_name(tmp_path: Path, disk: list[object]) -> None:
    with files.atomic_folder(tmp_path / "folder") as fresh:
        (fresh / "deep").mkdir()
        written = [fresh / "file", fresh / "deep/file"]
        for file in written:
            file.touch()
        inodes = {file.stat().st_ino for file in written}
    *synced, named = disk
    assert (set(synced), named) == (inodes, tmp_path / "folder")
