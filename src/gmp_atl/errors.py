"""What a user is told: errors to act on, printed without a traceback, and notices."""

from __future__ import annotations

from collections.abc import Iterable

NOTICE = 25
"""Logging level of messages that the DAG's progress display shows, beside the rule's log: NOTICE and above."""
NOTICE_PREFIX = "note: "
"""How a rule's log marks them."""

CPU_PROFILE = "run on the CPU with --workflow-profile workflow/profiles/cpu"
"""What to do where a job of the workflow finds no GPU."""
NO_GPUS = "leave --gpus out to compute on the CPU"
"""What to do where a command for people finds none."""


def some(names: Iterable[object]) -> str:
    """The first three, and whether there are more."""
    listed = list(map(str, names))
    return ", ".join(listed[:3]) + ", ..." * (len(listed) > 3)


class UserError(Exception):
    """What is wrong, where (file, line or config key), what was expected, and what to do."""


class LeakageError(UserError):
    """A held-out utterance was about to reach fitting, training or model selection."""
