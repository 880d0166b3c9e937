"""Meters that take architectures: in this process, or in one of their own for engines that never give memory back.

TorchScript keeps every network it has traced for as long as the process lives, some 6 MB each: a study of 200 would end
with more than a gigabyte of them. The meter therefore lives in a child process that is replaced every so often. The
two speak JSON, one line each way per question; the child ends when its input does, however the parent ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from nas.config import LatencyConfig
from nas.errors import CandidateFailed, memory_may_run_out
from nas.latency.block_table import BlockMeter, Figure
from nas.latency.engines import ENGINES
from nas.latency.meter import Latency, LatencyMeter
from search_spaces import ArchSpec

# Candidates that one child measures: starting the next costs some 5 seconds, keeping it 6 MB a candidate.
LIFETIME = 50
# A network's parts, each traced four times over, weigh as much as so many networks.
PARTS_WEIGHT = 4
# Of <sys/prctl.h>.
PR_SET_PDEATHSIG = 1


class ArchMeter(Protocol):
    """Measures architectures in one deployment. `meter_for` makes one.

    Attributes:
        reference_ms: the anchor's reference latency.
    """

    reference_ms: float

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Latency]:
        """Latencies of several networks, sampled in turns; see `LatencyMeter.measure_together`.

        Raises:
            CandidateFailed: the engine cannot run one of them, or the measuring process died of it.
        """
        ...

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[Figure]:
        """What the block latency table lacks of them, and of the anchor as a whole; see `BlockMeter.measure_archs`."""
        ...

    def close(self) -> None:
        """Let go of the device; the next measurement takes it again."""
        ...


def meter_for(config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> ArchMeter:
    """The meter that the deployment's engine wants.

    Args:
        reference_ms: the anchor's reference latency; None measures it now.

    Raises:
        CandidateFailed: the engine cannot run the anchor.
    """
    made: type[LocalMeter | IsolatedMeter] = IsolatedMeter if ENGINES[config.engine].isolated else LocalMeter
    return made(config, anchor, reference_ms)


class LocalMeter:
    """An `ArchMeter` in this process."""

    def __init__(self, config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> None:
        self.config, self.anchor = config, anchor
        with memory_may_run_out():
            self.meter = LatencyMeter(config, anchor.build(config.num_classes), reference_ms)
        self.reference_ms = self.meter.reference_ms
        self.blocks: BlockMeter | None = None

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Latency]:
        with memory_may_run_out():
            return self.meter.measure_together([arch.build(self.config.num_classes) for arch in archs])

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[Figure]:
        with memory_may_run_out():
            if self.blocks is None or self.blocks.yardsticks.references_ms != tuple(references_ms):
                self.blocks = BlockMeter(self.config, references_ms)
            return self.blocks.measure_archs(archs, known, [self.anchor])

    def close(self) -> None:
        self.blocks = None


class IsolatedMeter:
    """An `ArchMeter` whose measuring is done by a child process."""

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

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Latency]:
        reply = self._question({"archs": [arch.to_json() for arch in archs]})
        self._count(len(archs))
        return [Latency(**latency) for latency in reply["latencies"]]

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[Figure]:
        blocks = {
            "blocks": [arch.to_json() for arch in archs],
            "known": dict(known),
            "references_ms": list(references_ms),
        }
        reply = self._question(blocks)
        # Each part was traced, and is held as long as the child lives; together they are some four networks.
        self._count(PARTS_WEIGHT * len(archs) if reply["figures"] else 0)
        return [Figure(**figure) for figure in reply["figures"]]

    def close(self) -> None:
        """End the child process; the next measurement starts another."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child, self.measured = None, 0

    def _count(self, measured: int) -> None:
        self.measured += measured
        if self.measured >= LIFETIME:
            self.close()

    def _question(self, question: dict[str, Any]) -> dict[str, Any]:
        """Ask a child, started if need be."""
        if self.child is None:
            self._start(self.reference_ms)
        try:
            reply = self._ask(question)
        except BaseException:
            # An answer may still be on its way, which the next question must not get.
            self.close()
            raise
        if "failed" in reply:
            self._count(1)
            raise CandidateFailed(reply["failed"])
        return reply

    def _start(self, reference_ms: float | None) -> float:
        """Start a child; returns the anchor's reference latency."""
        # sys.path as it is here: the packages need not be installed, and a script's own folder is part of it.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "nas.latency.isolation", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            # Apart from our group, which Ctrl-C on a terminal reaches as a whole.
            process_group=0,
        )  # fmt: skip
        set_up = {"config": asdict(self.config), "anchor": self.anchor.to_json(), "reference_ms": reference_ms}
        reply = self._ask(set_up)
        if "failed" in reply:
            self.close()
            raise CandidateFailed(reply["failed"])
        measured_ms: float = reply["reference_ms"]
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
    """The child: the first line sets the meter up, each further one has candidates to measure."""
    die_with_parent()
    if len(sys.argv) > 1 and os.getppid() != int(sys.argv[1]):
        # It was gone before that was set.
        return
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    set_up = json.loads(sys.stdin.readline() or "null")
    if set_up is None:
        return
    config = LatencyConfig(**set_up["config"])
    anchor = ArchSpec.from_json(set_up["anchor"])
    try:
        meter = LocalMeter(config, anchor, set_up["reference_ms"])
    except CandidateFailed as error:
        print(json.dumps({"failed": str(error)}), file=answers, flush=True)
        return
    print(json.dumps({"reference_ms": meter.reference_ms}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            archs = [ArchSpec.from_json(arch) for arch in question.get("archs") or question["blocks"]]
            if "blocks" in question:
                figures = meter.measure_blocks(archs, question["known"], question["references_ms"])
                reply: dict[str, Any] = {"figures": [asdict(figure) for figure in figures]}
            else:
                reply = {"latencies": [asdict(latency) for latency in meter.measure_together(archs)]}
        except CandidateFailed as error:
            reply = {"failed": str(error)}
        print(json.dumps(reply), file=answers, flush=True)


def die_with_parent() -> None:
    """On Linux: a measurement must not go on when the process that holds the device's lock is gone.

    The system takes the thread that started the child for its parent: it must last as long.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    # The parent may go at any moment, also while it is being answered.
    with contextlib.suppress(BrokenPipeError):
        main()
