"""The few exceptions of our own."""


class UsageError(Exception):
    """What the user asked for cannot be done. The message is one line that names the flag and the value."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine; not all of torch's libraries have a class for it."""
    import torch

    words = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class CandidateFailed(Exception):
    """One candidate cannot be evaluated, which is a result; the message is the reason that is recorded."""
