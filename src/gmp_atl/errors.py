"""Errors that a user can act on: the command line prints them without a traceback."""


class UserError(Exception):
    """What is wrong, where (file, line or config key), what was expected, and what to do."""


class LeakageError(UserError):
    """A held-out utterance was about to reach fitting, training or model selection."""
