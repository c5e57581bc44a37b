"""Lines on the progress of a long stage, for its log; the progress display reads them from there."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 20.0
"""Between two lines."""


class Meter:
    """Counts work, and now and then logs how much is done, how fast, and the time that is left."""

    def __init__(self, what: str, total: int) -> None:
        """Args: what: the counted thing, clip or iteration; total: how many there are."""
        self.what, self.total, self.done, self.audio = what, total, 0, 0.0
        self._started = self._told = time.monotonic()

    def advance(self, count: int = 1, audio: float = 0.0) -> None:
        """So many more are done; `audio` is what they last, in seconds, 0 where that says nothing."""
        self.done += count
        self.audio += audio
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS or self.done >= self.total:
            return
        self._told = now
        elapsed = now - self._started
        rate = f", {self.audio / elapsed:.0f} s of audio per second" if self.audio else ""
        log.info("%s %d of %d%s, %s left", self.what, self.done, self.total, rate, clock(elapsed * self._left))

    @property
    def _left(self) -> float:
        """Remaining work, divided by finished work."""
        return (self.total - self.done) / self.done


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
