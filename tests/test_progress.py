"""The progress display, on a toy workflow run by Snakemake itself."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gmp_atl import progress
from gmp_atl.progress import Meter, clock
from snakemake_logger_plugin_gmp import STATE, Job

SNAKEFILE = """
rule all:
    input: "table.txt", expand("model{fold}.txt", fold=[1, 2, 3])

rule training:
    output: "model{fold}.txt"
    log: "logs/{fold}.log"
    shell:
        "for n in $(seq 30); do echo epoch $n; done > {log};"
        " echo note: fold {wildcards.fold} has few frames >> {log}; echo note: of this corpus >> {log};"
        " if [ {wildcards.fold} = ${{FAILING:-none}} ]; then exit 3; fi; touch {output}"

rule table:
    input: "model1.txt"
    output: "table.txt"
    shell: "touch {output}"
"""


WAITING = """
rule all:
    input: "waiting.txt", "quick.txt"

rule waiting:
    output: "waiting.txt"
    log: "logs/waiting.log"
    shell:
        "echo note: waiting for a GPU > {log}; touch told.txt; until [ -e go.txt ]; do sleep 0.1; done;"
        " echo note: done with it >> {log}; touch {output}"

rule quick:
    output: "quick.txt"
    shell: "until [ -e told.txt ]; do sleep 0.1; done; touch {output}"
"""


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--cores", "1", "--logger", "gmp", "--keep-going", *options]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")
    return tmp_path


def run(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command(*options),
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_without_a_terminal_each_finished_job_is_one_line(toy: Path) -> None:
    code, output = run(toy)
    assert code == 0
    assert "Jobs to run: 5 (training 3, table 1, all 1)" in output
    lines = re.findall(r"^\[(\d)/5\] (\w+(?: fold=\d)?) \(\S+ s\)$", output, re.MULTILINE)
    assert [int(number) for number, _ in lines] == [1, 2, 3, 4, 5]
    assert {name for _, name in lines} == {"training fold=1", "training fold=2", "training fold=3", "table", "all"}
    assert "5 of 5 jobs done" in output
    assert "rule training:" not in output, "Snakemake's own report of each job is left out"


def test_notices_in_a_log_are_shown_once(toy: Path) -> None:
    _, output = run(toy)
    assert sorted(re.findall(r"^  (fold \d has few frames)$", output, re.MULTILINE)) == [
        f"fold {fold} has few frames" for fold in (1, 2, 3)
    ]
    assert output.count("of this corpus") == 1


def test_notices_of_a_running_job_come_with_the_next_event(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(WAITING, encoding="utf-8")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/waiting.log").write_text("note: of an earlier run\n", encoding="utf-8")
    arguments = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command("--cores", "2"), **arguments) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if line == "waiting: waiting for a GPU\n":
                (tmp_path / "go.txt").touch()
    assert process.returncode == 0
    assert output.index("waiting for a GPU") < output.index("] waiting")
    assert output.count("waiting for a GPU") == 1
    # Below the job's own line, unless another event came between the notice and the job's end.
    assert re.search(r"(\] waiting \(\S+ s\)\n  |\nwaiting: )done with it\n", output)
    assert output.count("done with it") == 1
    assert "of an earlier run" not in output


def test_failed_job_is_shown_with_the_end_of_its_log(toy: Path) -> None:
    code, output = run(toy, FAILING="2")
    assert code != 0
    assert "FAILED training fold=2" in output
    assert "returned non-zero exit status 3" in output
    assert re.findall(r"epoch (\d+)$", output, re.MULTILINE) == [str(epoch) for epoch in range(13, 31)]
    assert "logs/2.log, the last 20 lines" in output
    assert "3 of 5 jobs done" in output
    assert "1 failed or stopped: training fold=2" in output


def test_dry_run_is_snakemakes_own(toy: Path) -> None:
    code, output = run(toy, "--dry-run")
    assert code == 0
    assert "rule training:" in output
    assert "This was a dry-run" in output
    assert "Jobs to run" not in output


def on_terminal(folder: Path) -> str:
    """What a user's terminal is sent."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command(), cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=120) == 0
    return output.decode()


def test_terminal_shows_rules_and_what_remains(toy: Path) -> None:
    text = on_terminal(toy)
    assert re.search(r"training\S*\s+\S*\d/3", text)
    assert "/5 jobs" in text
    assert "left" in text
    assert "5 of 5 jobs done" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


@pytest.mark.parametrize(
    ("log", "state"),
    [
        ("multitask fold 1 seed 2: update 30 of 225, loss 1.234", "update 30 of 225, loss 1.234"),
        ("note: waiting for one of the GPUs 0, 1", "waiting for one of the GPUs 0, 1"),
        ("note: waiting for one of the GPUs 0\nupdate 3 of 5\nloading", "update 3 of 5"),
        ("gmp_atl: clip 30 of 225, 12 s of audio per second", "clip 30 of 225, 12 s of audio per second"),
        ("iteration 4 of 20, 0:01:00 left\nupdate", "iteration 4 of 20, 0:01:00 left"),
        ("loading", ""),
        ("note: too far back\n" + "loading\n" * 1000, ""),
    ],
)
def test_state_of_a_running_job_is_the_last_such_line_of_its_log(tmp_path: Path, log: str, state: str) -> None:
    path = tmp_path / "job.log"
    assert Job("training", "training", 0.0, [path]).state() == "", "not written yet"
    path.write_text(log, encoding="utf-8")
    assert Job("training", "training", 0.0, [path]).state() == state
    later = path.stat().st_mtime + 1
    assert Job("training", "training", 0.0, [path], later).state() == "", "of an earlier try"


def test_terminal_shows_what_running_jobs_do(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(
        """
rule training:
    output: "model.txt"
    log: "training.log"
    shell: "echo fold 1: update 30 of 225 > {log}; sleep 7; touch {output}"
""",
        encoding="utf-8",
    )
    assert re.search(r"training\S*\s+\S*0/1\S*\s+0:0\d update 30 of 225", on_terminal(tmp_path))


def test_a_long_stage_tells_how_far_it_is_how_fast_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = Meter("clip", 400)
    with caplog.at_level("INFO"):
        for _ in range(400):  # a clip of 3 s in 1 s
            now[0] += 1.0
            meter.advance(audio=3.0)
    lines = caplog.messages
    assert len(lines) == 400 // progress.PROGRESS_SECONDS - 1, "the end is no line of its own"
    assert lines[4] == "clip 100 of 400, 3 s of audio per second, 0:05:00 left"
    assert all(STATE.search(line) for line in lines)


def test_what_takes_no_time_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Meter("iteration", 3).advance(2)
    assert not caplog.messages


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.7, "0:01:00"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
