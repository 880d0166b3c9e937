"""A child process that calls functions, for what may crash a process or never gives its memory back.

Training repvgg_a0 at 128 pixels on a CPU ends torch 2.11 with "double free or corruption"; TorchScript keeps every
network that it traced. Parent and child speak pickle over a socket of their own, one message each way per call: on the
standard streams a library's words would come between. The child ends when the socket does, however the parent ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from io import BufferedRWPair
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from nas.errors import CandidateFailed, OutOfMemory, WorkerDied
from nas.files import no_room

# Of <sys/prctl.h>.
PR_SET_PDEATHSIG = 1
ROOT = str(Path(__file__).parents[1])
# A process whose socket has ended is as good as dead.
DYING_SECONDS = 5.0
# Seconds between two signs of life, each of which is a message.
SIGN_SECONDS = 1.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ChildProcess:
    """Calls functions in a child process, which is started when it is needed, and again when it has died.

    Args:
        environment: environment variables that the child has beside this process's own.
        deadline_s: seconds without a sign of life (`sign_of_life`) or an answer after which the child is killed; None
            stands for no end. It may be changed between calls.

    Attributes:
        process: the child; None while there is none.
    """

    def __init__(self, environment: Mapping[str, str] = MappingProxyType({}), deadline_s: float | None = None) -> None:
        self.environment, self.deadline_s = dict(environment), deadline_s
        self.socket: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.stream: BufferedRWPair | None = None

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the child process if there is none; it ends with the thread that calls this."""
        if self.process is not None:
            return
        # Modules come from where they come from here, but not from the folder that the user stands in (the empty entry,
        # and without -P the first): it may hold a random.py.
        path = [str(folder) for folder in sys.path if folder]
        path = path if ROOT in path else [ROOT, *path]
        code = f"import sys; sys.path[:] = {path!r}; from nas.child_process import main; main()"
        ours, its = socket.socketpair()
        with its:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", code, str(os.getpid()), str(its.fileno())],
                    stdin=subprocess.DEVNULL, stdout=2, pass_fds=[its.fileno()], env=os.environ | self.environment,
                    process_group=0,  # apart from our group, which Ctrl-C on a terminal reaches as a whole
                )  # fmt: skip
                self.stream = ours.makefile("rwb")
                self.socket = ours
            finally:
                if self.socket is not ours:
                    ours.close()

    def close(self) -> None:
        """End the child process; the next call starts another."""
        process, self.process = self.process, None
        stream, self.stream = self.stream, None
        its_socket, self.socket = self.socket, None
        if process is not None:
            process.kill()
            process.wait()
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
        if its_socket is not None:
            its_socket.close()

    def call(
        self, function: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """The result of a module's function, called in the child with these arguments.

        Raises:
            CandidateFailed: the function raised it.
            OutOfMemory: the function raised it.
            WorkerDied: the function raised it, a signal killed the child, or the child gave no sign of life for longer
                than the deadline.
            OSError: the function raised it, because a disk is full.
            RuntimeError: the function raised anything else, whose traceback the child has printed, or the child gives
                no answers.
        """
        try:
            reply = self._ask((function, args, kwargs))
        except BaseException:
            # An answer may still be on its way, which the next call must not get.
            self.close()
            raise
        if "died" in reply:
            # What it holds may be broken, or is memory that a second attempt needs.
            self.close()
            raise OutOfMemory(reply["died"]) if reply["memory"] else WorkerDied(reply["died"])
        if "failed" in reply:
            raise CandidateFailed(reply["failed"])
        if "full" in reply:
            raise OSError(*reply["full"])
        value: Result = reply["value"]
        return value

    def _ask(self, question: object) -> dict[str, Any]:
        self.start()
        # Another thread may close this meanwhile.
        process, stream, its_socket = self.process, self.stream, self.socket
        assert process is not None
        assert stream is not None
        assert its_socket is not None
        try:
            its_socket.settimeout(self.deadline_s)
            pickle.dump(question, stream)
            stream.flush()
            reply: dict[str, Any] = pickle.load(stream)
            while "alive" in reply:
                reply = pickle.load(stream)
            return reply
        except TimeoutError as error:
            raise WorkerDied(f"its process gave no sign of life for {self.deadline_s:g} s") from error
        except (ConnectionError, EOFError, ValueError, pickle.UnpicklingError) as error:
            # A stream that another thread has closed raises a ValueError; so does what cannot be pickled.
            if isinstance(error, ValueError) and not stream.closed:
                raise
            try:
                status = process.wait(DYING_SECONDS)
            except subprocess.TimeoutExpired:
                # The caller closes this, and so ends the process: to wait for it would be to wait for ever.
                raise RuntimeError("the child process lives, but gives no answers") from error
            if status >= 0:
                raise RuntimeError(f"the child process ended with status {status}") from error
            # Most often because memory ran out.
            raise WorkerDied(f"its process was killed by {signal.Signals(-status).name}") from error


def die_with_parent() -> None:
    """On Linux, have this process killed when its parent ends: a measurement must not outlast the device's lock.

    The system takes the thread that started the child for its parent: it must last as long.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# The socket of this process, if it is a child, and when it last gave a sign of life.
_stream: BufferedRWPair | None = None
_signed = 0.0
_sending = threading.Lock()


def sign_of_life() -> None:
    """Tell the parent, if this process is a child, that it still works; from any thread, as often as one likes."""
    global _signed
    with _sending:
        if _stream is not None and time.monotonic() - _signed >= SIGN_SECONDS:
            _signed = time.monotonic()
            pickle.dump({"alive": True}, _stream)
            _stream.flush()


def answer(stream: BufferedRWPair) -> None:
    """Call what the parent asks for, until it asks no more."""
    global _stream
    while True:
        try:
            function, args, kwargs = pickle.load(stream)
        except EOFError:
            return
        _stream = stream
        try:
            reply: dict[str, Any] = {"value": function(*args, **kwargs)}
        except WorkerDied as error:
            reply = {"died": str(error), "memory": isinstance(error, OutOfMemory)}
        except CandidateFailed as error:
            reply = {"failed": str(error)}
        except OSError as error:
            if no_room(error) is None:
                raise
            reply = {"full": (error.errno, error.strerror, error.filename)}
        with _sending:
            # A sign that came after the answer would be taken for the next one's.
            _stream = None
            pickle.dump(reply, stream)
            stream.flush()


def main() -> None:
    """The child, whose arguments are its parent's process id and the number of its socket."""
    parent, number = map(int, sys.argv[1:])
    # The socket must end when this process does, not when one does that a library has started.
    os.set_inheritable(number, False)
    die_with_parent()
    status = 0
    # It may be that the parent ended before that was set.
    if os.getppid() == parent:
        try:
            answer(socket.socket(fileno=number).makefile("rwb"))
        # The parent may go at any moment, also while it is being answered.
        except ConnectionError:
            pass
        except BaseException:
            traceback.print_exc()
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would close the socket before it has ended, and wait for threads that a library has left.
    os._exit(status)
