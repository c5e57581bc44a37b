"""Progress display of the DAG: what runs, what is done and what remains (`snakemake --logger gmp`).

Snakemake finds logger plugins by the name of this package. On a terminal one table is kept up to date, a row
per rule; anywhere else (CI, a pipe, a batch job's log) each finished job is one line. Notices in the logs of
running jobs are passed on, and a failed job is shown with the end of its log. Dry runs, `--quiet`, `--verbose`
and `--debug-dag` look as they do without the plugin, and the complete log that Snakemake writes to .snakemake/log
is the same in every case.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from gmp_atl.errors import NOTICE_PREFIX

STATE = re.compile(rf"^{NOTICE_PREFIX}(.+)$|((?:update|clip|iteration) \d+ of \d+.*)$", re.MULTILINE)
"""Lines of a job's log that say what it is doing: a notice, or how far it is."""
STATE_SECONDS = 5.0
"""Age at which a running job's state is read again; logs may lie on a network disk."""
TAIL_BYTES = 4096
"""Of a log that are searched for the state."""
LOG_LINES = 20
"""Of a failed job's log that are shown."""

NOISE = (
    "Assuming unrestricted shared filesystem",
    "Building DAG of jobs",
    "Using shell:",
    "Conda environments: ignored",
    "Group jobs: inactive",
    "Select jobs to execute",
    "Removing temporary output",
    "Shutting down, this might take",
    "Elapsed time:",
    "Activating conda environment:",
)
"""Messages of every run that say nothing about progress; any that is not listed here is shown."""


@dataclass
class Job:
    """A job that has been started."""

    rule: str
    name: str
    started: float
    logs: list[Path]
    begun: float = 0.0
    """Time of day; a log that was last written to before is of an earlier try."""
    _read: dict[Path, int] = field(default_factory=dict)
    _state: tuple[float, str] = (-STATE_SECONDS, "")

    def notices(self, since: float) -> list[str]:
        """Notices in the logs, if written to after `since`, that the last call did not return."""
        return [notice for log in self.logs for notice in self._notices(log, since)]

    def state(self) -> str:
        """What the job is doing, from the last such line of its log; empty if none is near the end."""
        read, text = self._state
        now = time.monotonic()
        if now - read >= STATE_SECONDS:
            ends = b"\n".join(_content(log, -TAIL_BYTES, self.begun) for log in self.logs)
            found = STATE.findall(ends.decode(errors="replace"))
            text = max(found[-1]) if found else ""
            self._state = (now, text)
        return text

    def _notices(self, log: Path, since: float) -> list[str]:
        start = self._read.get(log, 0)
        content = _content(log, start, since)
        whole = content[: content.rfind(b"\n") + 1]
        self._read[log] = start + len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return [line.removeprefix(NOTICE_PREFIX).rstrip() for line in lines if line.startswith(NOTICE_PREFIX)]


@dataclass
class Progress:
    """The state of a run, from Snakemake's events alone."""

    planned: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    running: dict[int, Job] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    notices: set[str] = field(default_factory=set)
    """What users have been told already: jobs of many layers say the same."""
    started: float = field(default_factory=time.monotonic)

    def start(self, record: Any) -> None:
        """A job starts, perhaps anew after a failure."""
        wildcards = "".join(f" {key}={value}" for key, value in record.wildcards.items())
        self.failed.pop(record.jobid, None)
        logs = [Path(log) for log in record.log or []]
        name = record.rule_name + wildcards
        self.running[record.jobid] = Job(record.rule_name, name, time.monotonic(), logs, record.created)

    def finish(self, jobid: int) -> tuple[str, list[str]]:
        """A job has ended well; returns the line that says so, and what its log wants the user to see."""
        job = self.running.pop(jobid)
        took = time.monotonic() - job.started
        self.done[job.rule] += 1
        self.seconds[job.rule] = self.seconds.get(job.rule, 0.0) + took
        total = str(self.planned.total())
        line = f"[{self.done.total():>{len(total)}}/{total}] {job.name} ({duration(took)})"
        return line, self._new(job, since=0.0)

    def news(self) -> list[str]:
        """Notices of running jobs that users have not been told."""
        running = self.running.values()
        return [f"{job.name}: {notice}" for job in running for notice in self._new(job, job.begun)]

    def fail(self, jobid: int, rule: str) -> str:
        """A job has failed; returns the line that says so."""
        job = self.running.pop(jobid, None) or Job(rule, rule, time.monotonic(), [])
        self.failed[jobid] = job.name
        return f"FAILED {job.name} after {duration(time.monotonic() - job.started)}"

    def remaining(self) -> str:
        """Time left, from the mean duration of each rule's jobs and the jobs at work at once so far."""
        now = time.monotonic()
        elapsed, spent = now - self.started, sum(list(self.seconds.values()))
        if not spent:
            return "time left unknown"
        seconds = -sum(min(now - job.started, self._mean(job.rule)) for job in list(self.running.values()))
        seconds += sum((self.planned[rule] - self.done[rule]) * self._mean(rule) for rule in self.planned)
        spent += sum(now - job.started for job in list(self.running.values()))
        # A rule none of whose jobs has finished counts as nothing: the estimate is then a lower bound.
        known = all(self.done[rule] or rule == "all" for rule in self.planned)
        return f"{'about' if known else 'at least'} {duration(seconds * elapsed / spent)} left"

    def summary(self) -> str:
        """The run in one line."""
        line = f"{self.done.total()} of {self.planned.total()} jobs done in {duration(time.monotonic() - self.started)}"
        if self.failed:
            line += f", {len(self.failed)} failed or stopped: {', '.join(self.failed.values())}"
        return line

    def _new(self, job: Job, since: float) -> list[str]:
        new = [notice for notice in dict.fromkeys(job.notices(since)) if notice not in self.notices]
        self.notices.update(new)
        return new

    def _mean(self, rule: str) -> float:
        return self.seconds[rule] / self.done[rule] if rule in self.seconds else 0.0


class Display:
    """The table, drawn from the state whenever rich asks for it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __rich__(self) -> Group:
        now, state = time.monotonic(), self.progress
        # Copies, since rich draws from its own thread.
        running, failed = list(state.running.values()), len(state.failed)
        rules = Table.grid(padding=(0, 2), expand=True)
        rules.add_column(no_wrap=True)
        rules.add_column(no_wrap=True, justify="right")
        rules.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for rule, planned in state.planned.items():
            jobs = [
                " ".join(filter(None, [job.name.removeprefix(rule).strip(), clock(now - job.started), job.state()]))
                for job in running
                if job.rule == rule
            ]
            style = "green" if state.done[rule] == planned else "bold" if jobs else "dim"
            rules.add_row(Text(rule, style), Text(f"{state.done[rule]}/{planned}", style), Text(" · ".join(jobs)))
        done, total = state.done.total(), state.planned.total()
        line = Table.grid(padding=(0, 2))
        line.add_row(
            ProgressBar(total=total, completed=done, width=30),
            Text(
                f"{done}/{total} jobs · {len(running)} running · "
                + (f"{failed} failed · " if failed else "")
                + f"{clock(now - state.started)} · {state.remaining()}"
            ),
        )
        return Group(rules, line)


class LogHandler(LogHandlerBase):
    """Snakemake's entry to this plugin."""

    def __post_init__(self) -> None:
        settings = self.common_settings
        self.stream = sys.stdout if settings.stdout else sys.stderr
        as_ever = settings.dryrun or settings.verbose or settings.debug_dag or settings.quiet
        self.plain = self._plain() if as_ever else None
        self.console = Console(file=self.stream, highlight=False, soft_wrap=True)
        self.progress = Progress()
        self.live: Live | None = None
        # Snakemake closes its handlers, but not when it dies half-way; the cursor has to come back.
        atexit.register(self.close)

    def emit(self, record: logging.LogRecord) -> None:
        """Take in one event of the run."""
        if self.plain is not None:
            self.plain.emit(record)
            return
        try:
            self._take(record)
        except Exception:  # As everywhere in logging: a display that fails must not fail the run.
            self.handleError(record)

    def close(self) -> None:
        """Take the table down and sum the run up."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self.progress.planned:
            # Snakemake reports no failure of a job whose outputs are missing: what still runs now has not ended well.
            self.progress.failed |= {jobid: job.name for jobid, job in self.progress.running.items()}
            self._say(self.progress.summary(), "red" if self.progress.failed else "green")
            self.progress = Progress()
        super().close()

    def _take(self, record: Any) -> None:
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self._begin({rule: count for rule, count in record.stats.items() if rule != "total"})
        elif event == LogEvent.JOB_INFO:
            self.progress.start(record)
        elif event == LogEvent.JOB_FINISHED:
            line, notices = self.progress.finish(record.job_id)
            if self.live is None or notices:
                self._say(line)
            for notice in notices:
                self._say(f"  {notice}", "yellow")
        elif event == LogEvent.JOB_ERROR:
            self._say(self.progress.fail(record.jobid, record.rule_name), "bold red")
            for key, value in record.aux.items():
                self._say(f"  {key}: {value}")
            for log in record.log:
                self._say(tail(Path(log)))
        elif event == LogEvent.ERROR or event is None:
            message = record.getMessage() if record.msg else ""
            # The whole command of a failed job, its config included, stands in the complete log.
            message = re.sub(r"^Command '.*' (?=returned|died)", "Command ", message, flags=re.DOTALL | re.MULTILINE)
            if message.strip() and not message.startswith(NOISE):
                self._say(message, {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}.get(record.levelname, ""))
        for notice in self.progress.news():
            self._say(notice, "yellow")

    def _begin(self, planned: dict[str, int]) -> None:
        self.progress = Progress(planned=Counter(planned))
        if self.console.is_terminal:
            self.live = Live(Display(self.progress), console=self.console, transient=True, refresh_per_second=2)
            self.live.start()
        else:
            rules = ", ".join(f"{rule} {count}" for rule, count in planned.items())
            self._say(f"Jobs to run: {self.progress.planned.total()} ({rules})")

    def _say(self, message: str, style: str = "") -> None:
        self.console.print(Text(message, style))
        self.stream.flush()

    def _plain(self) -> logging.Handler:
        from snakemake.logging import ColorizingTextHandler, DefaultFormatter

        settings = self.common_settings
        formatter = DefaultFormatter(settings.quiet, settings.show_failed_logs)
        handler: logging.Handler
        handler = ColorizingTextHandler(nocolor=settings.nocolor, stream=self.stream, formatter=formatter)
        return handler

    @property
    def writes_to_stream(self) -> bool:
        """True: Snakemake then leaves its own terminal output out."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """False: the log in .snakemake/log stays Snakemake's."""
        return False

    @property
    def has_filter(self) -> bool:
        """False: Snakemake's own, so that --quiet is heeded."""
        return False

    @property
    def has_formatter(self) -> bool:
        """True: events become text here."""
        return True

    @property
    def needs_rulegraph(self) -> bool:
        """False: job counts are enough."""
        return False


def tail(log: Path) -> str:
    """The last lines of a log, indented, under its path."""
    try:
        with log.open(errors="replace") as lines:
            last = deque(lines, LOG_LINES)
    except OSError:
        return f"  {log}: not written"
    if not last:
        return f"  {log}: empty"
    return f"  {log}, the last {len(last)} lines:\n" + "\n".join(f"  | {line.rstrip()}" for line in last)


def _content(log: Path, start: int, since: float) -> bytes:
    """A log from byte `start` on, or, below zero, its last bytes; nothing if it was not written to after `since`."""
    try:
        with log.open("rb") as stream:
            if os.fstat(stream.fileno()).st_mtime < since:
                return b""
            end = stream.seek(0, os.SEEK_END)
            stream.seek(start if start >= 0 else max(0, end + start))
            return stream.read()
    except OSError:
        return b""


def clock(seconds: float) -> str:
    """Elapsed time, as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def duration(seconds: float) -> str:
    """A duration in the unit that suits it: 0.4 s, 12 s, 5 min, 3.2 h."""
    if seconds < 3:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
