"""A latency meter in a process of its own, for engines that never give memory back.

TorchScript keeps every network it has traced for as long as the process lives, some 6 MB each: a study of 200 would end
with more than a gigabyte of them. The meter therefore lives in a child process that is replaced every so often. The
two speak JSON, one line each way per candidate; the child ends when its input does, however the parent ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from nas.config import LatencyConfig
from nas.errors import CandidateFailed, is_out_of_memory
from nas.latency import Latency, LatencyMeter
from search_spaces import ArchSpec

# Candidates that one child measures: starting the next costs some 5 seconds, keeping it 6 MB a candidate.
LIFETIME = 50


class IsolatedMeter:
    """Like `LatencyMeter`, but takes architectures and measures them in a child process.

    Args:
        config: the deployment.
        anchor: the anchor network's architecture.
        reference_ms: the anchor's reference latency; None measures it now.
    """

    def __init__(self, config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> None:
        self.config = config
        self.anchor = anchor
        self.child: subprocess.Popen[str] | None = None
        self.measured = 0
        try:
            # Measured by the first child if need be; later ones are told it.
            self.reference_ms = self._start(reference_ms)
        except BaseException:
            self.close()
            raise

    def measure(self, arch: ArchSpec) -> Latency:
        """Latency and inference memory of a network.

        Raises:
            CandidateFailed: the engine cannot run it, or the measuring process died of it.
        """
        if self.child is None:
            self._start(self.reference_ms)
        try:
            reply = self._ask({"arch": arch.to_json()})
        except BaseException:
            # An answer may still be on its way, which the next question must not get.
            self.close()
            raise
        self.measured += 1
        if self.measured % LIFETIME == 0:
            self.close()
        if "failed" in reply:
            raise CandidateFailed(reply["failed"])
        return Latency(**reply["latency"])

    def close(self) -> None:
        """End the child process; the next measurement starts another."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None

    def _start(self, reference_ms: float | None) -> float:
        """Start a child; returns the anchor's reference latency."""
        # sys.path as it is here: the packages need not be installed, and a script's own folder is part of it.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "nas.isolation"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            # Apart from our group, which Ctrl-C on a terminal reaches as a whole.
            process_group=0,
        )  # fmt: skip
        set_up = {"config": asdict(self.config), "anchor": self.anchor.to_json(), "reference_ms": reference_ms}
        measured_ms: float = self._ask(set_up)["reference_ms"]
        return measured_ms

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.child is not None
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            print(json.dumps(question), file=self.child.stdin, flush=True)
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.child.wait()
            self.close()
            # It prints the traceback of a bug itself; killed by a signal it is most often out of memory.
            if status > 0:
                raise RuntimeError(f"the measuring process ended with status {status}")
            raise CandidateFailed(f"the measuring process was killed by signal {-status}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def main() -> None:
    """The child: the first line sets the meter up, each further one is a candidate."""
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    set_up = json.loads(sys.stdin.readline() or "null")
    if set_up is None:
        return
    config = LatencyConfig(**set_up["config"])
    anchor = ArchSpec.from_json(set_up["anchor"]).build(config.num_classes)
    meter = LatencyMeter(config, anchor, set_up["reference_ms"])
    print(json.dumps({"reference_ms": meter.reference_ms}), file=answers, flush=True)
    for line in sys.stdin:
        arch = ArchSpec.from_json(json.loads(line)["arch"])
        try:
            reply: dict[str, Any] = {"latency": asdict(meter.measure(arch.build(config.num_classes)))}
        except (CandidateFailed, MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                reply = {"failed": "out of memory"}
            elif isinstance(error, CandidateFailed):
                reply = {"failed": str(error)}
            else:
                raise
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    # The parent may go at any moment, also while it is being answered.
    with contextlib.suppress(BrokenPipeError):
        main()
