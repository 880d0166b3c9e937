"""A child process that calls functions, for what may crash a process or never gives its memory back.

Training repvgg_a0 at 128 pixels on a CPU ends torch 2.11 with "double free or corruption"; TorchScript keeps every
network that it traced. Parent and child speak pickle, one message each way per call; the child ends when its input
does, however the parent ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from nas.errors import CandidateFailed

# Of <sys/prctl.h>.
PR_SET_PDEATHSIG = 1

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ChildProcess:
    """Calls functions in a child process, which is started when it is needed, and again when it has died.

    Attributes:
        process: the child; None while there is none.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the child process if there is none; it ends with the thread that calls this."""
        if self.process is not None:
            return
        # sys.path as it is here: the packages need not be installed, and a script's own folder is part of it.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nas.child_process", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
            process_group=0,  # apart from our group, which Ctrl-C on a terminal reaches as a whole
        )  # fmt: skip

    def close(self) -> None:
        """End the child process; the next call starts another."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def call(
        self, function: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """The result of a module's function, called in the child with these arguments.

        Raises:
            CandidateFailed: the function raised it, or a signal killed the child.
            RuntimeError: the function raised anything else, whose traceback the child has printed.
        """
        try:
            reply = self._ask((function, args, kwargs))
        except BaseException:
            # An answer may still be on its way, which the next call must not get.
            self.close()
            raise
        if "failed" in reply:
            raise CandidateFailed(reply["failed"])
        value: Result = reply["value"]
        return value

    def _ask(self, question: object) -> dict[str, Any]:
        self.start()
        # Another thread may close this meanwhile.
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            reply: dict[str, Any] = pickle.load(process.stdout)
            return reply
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            status = process.wait()
            if status >= 0:
                raise RuntimeError(f"the child process ended with status {status}") from error
            # Most often because memory ran out.
            raise CandidateFailed(f"its process was killed by {signal.Signals(-status).name}") from error


def die_with_parent() -> None:
    """On Linux, have this process killed when its parent ends: a measurement must not outlast the device's lock.

    The system takes the thread that started the child for its parent: it must last as long.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """The child: calls what it is asked to."""
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):
        # The parent ended before that was set.
        return
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = {"value": function(*args, **kwargs)}
        except CandidateFailed as error:
            reply = {"failed": str(error)}
        pickle.dump(reply, answers)
        answers.flush()


if __name__ == "__main__":
    # The parent may go at any moment, also while it is being answered.
    with contextlib.suppress(BrokenPipeError):
        main()
