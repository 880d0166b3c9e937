"""The few exceptions of our own."""


class UsageError(Exception):
    """What the user asked for cannot be done. The message is one line that names the flag and the value."""


class CandidateFailed(Exception):
    """One candidate cannot be evaluated, which is a result; the message is the reason that is recorded."""
