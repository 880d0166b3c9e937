"""Calls in worker processes, some of which die.

The processes import this module, so it imports torch only where a call needs it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from nas.errors import CandidateFailed, OutOfMemory, WorkerDied, contained
from nas.training.workers import Call, Done, Workers


def double(number: int, device: str) -> tuple[int, str, int]:
    return 2 * number, device, os.getpid()


def killed(marks: str, times: int, device: str) -> str:
    """Kill this process, as often as told."""
    if len(list(Path(marks).iterdir())) < times:
        (Path(marks) / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def killed_here(marks: str, device: str) -> str:
    killed(marks, 1, device)
    return device


def starved(marks: str, device: str) -> int:
    """Run out of memory while others run; returns how many do."""
    mark = Path(marks) / str(os.getpid())
    mark.touch()
    time.sleep(0.2)
    running = sum(Path(f"/proc/{each.name}").exists() for each in Path(marks).iterdir())
    if running > 1:
        raise OutOfMemory("out of memory")
    return running


def failing(device: str) -> None:
    raise CandidateFailed("the loss diverged")


def broken(device: str) -> None:
    raise ValueError("a bug")


def faulty(kind: str, words: str, device: str) -> None:
    import torch

    with contained():
        if kind == "accelerator":
            raise torch.AcceleratorError(words)
        raise RuntimeError(words)


def sleeping(seconds: float, device: str) -> float:
    time.sleep(seconds)
    return seconds


def results(done: list[Done[object]]) -> dict[int, object]:
    return {each.index: each.result for each in done}


def test_calls_run_side_by_side_on_all_devices() -> None:
    with Workers(3, ["cuda:0", "cuda:1"]) as workers:
        done = list(workers.run([Call(double, (number,)) for number in range(7)]))
        found = results(done)  # type: ignore[arg-type]
        assert [found[index][0] for index in range(7)] == [0, 2, 4, 6, 8, 10, 12]  # type: ignore[index]
        assert {found[each.index][1] for each in done if each.worker == 1} == {"cuda:1"}  # type: ignore[index]
        assert {each.worker for each in done} == {0, 1, 2}
        # Their processes stay.
        again = workers.everywhere(double, 1)
        assert {each[2] for each in again} == {each[2] for each in found.values()}  # type: ignore[index]


def test_results_come_when_they_are_there() -> None:
    with Workers(2, ["cpu"]) as workers:
        workers.everywhere(double, 0)
        done = list(workers.run([Call(sleeping, (1.0,)), Call(sleeping, (0.0,)), Call(sleeping, (0.1,))]))
    assert [each.index for each in done] == [1, 2, 0]
    assert done[2].seconds >= 1.0 > done[0].seconds


@pytest.mark.parametrize("times", [1, 2])
def test_a_call_whose_process_is_killed_runs_once_more(times: int, tmp_path: Path) -> None:
    with Workers(2, ["cpu"]) as workers:
        calls = [Call(double, (1,)), Call(killed, (str(tmp_path), times)), Call(double, (2,))]
        found = results(list(workers.run(calls)))  # type: ignore[arg-type]
        assert len(list(tmp_path.iterdir())) == times
        if times == 1:
            assert found[1] == "done"
        else:
            assert str(found[1]) == "its process was killed by SIGKILL"
        assert found[0][0] == 2  # type: ignore[index]
        assert found[2][0] == 4  # type: ignore[index]
        # The workers go on.
        assert len(list(workers.run([Call(double, (3,)), Call(double, (4,))]))) == 2


def test_what_had_too_little_memory_runs_alone(tmp_path: Path) -> None:
    with Workers(2, ["cpu"]) as workers:
        workers.everywhere(double, 0)
        found = results(list(workers.run([Call(starved, (str(tmp_path),)), Call(starved, (str(tmp_path),))])))  # type: ignore[arg-type]
    assert found == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("kind", "words", "reason"),
    [
        ("accelerator", "an illegal memory access was encountered\nand more", "an illegal memory access"),
        (
            "library",
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            "CUBLAS_STATUS_NOT",
        ),
        ("library", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED"),
        ("library", "CUDA out of memory. Tried to allocate 2.00 GiB", "out of memory"),
    ],
)
def test_a_fault_of_cuda_ends_its_process_and_then_fails(kind: str, words: str, reason: str) -> None:
    with Workers(1, ["cpu"]) as workers:
        (before,) = workers.everywhere(double, 0)
        (done,) = workers.run([Call(faulty, (kind, words))])
        assert isinstance(done.result, WorkerDied)
        assert reason in str(done.result)
        assert "\n" not in str(done.result)
        (after,) = workers.everywhere(double, 0)
    assert before[2] != after[2]


def test_a_second_attempt_is_made_on_another_device(tmp_path: Path) -> None:
    with Workers(2, ["cuda:0", "cuda:1"]) as workers:
        (done,) = workers.run([Call(killed_here, (str(tmp_path),))])
    assert done.result == "cuda:1"


def test_workers_that_another_thread_closes_give_up() -> None:
    begin = time.monotonic()
    with Workers(2, ["cpu"]) as workers:
        threading.Timer(1.0, workers.close).start()
        assert list(workers.run([Call(sleeping, (600.0,)), Call(sleeping, (600.0,)), Call(sleeping, (600.0,))])) == []
        assert time.monotonic() - begin < 300
        assert workers.everywhere(double, 1)[1][0] == 2


def test_a_failure_is_a_result_and_a_bug_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(2, ["cpu"]) as workers:
        (done,) = workers.run([Call(failing, ())])
        assert str(done.result) == "the loss diverged"
        with (
            pytest.raises(RuntimeError, match="ended with status 1"),
            closing(workers.run([Call(broken, ())])) as calls,
        ):
            list(calls)
        assert "ValueError: a bug" in capfd.readouterr().err
        assert workers.everywhere(double, 2)[1][0] == 4


def test_what_may_break_a_process_is_the_last_thing_in_it() -> None:
    with Workers(1, ["cpu"]) as workers:
        calls = [Call(double, (0,)), Call(double, (0,), "resnet"), Call(double, (0,), "resnet"), Call(double, (0,))]
        done = sorted(workers.run(calls), key=lambda each: each.index)
    ids = [each.result[2] for each in done]  # type: ignore[index]
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_closing_the_results_early_ends_the_processes() -> None:
    begin = time.monotonic()
    with Workers(2, ["cpu"]) as workers:
        with closing(workers.run([Call(sleeping, (0.0,)), Call(sleeping, (600.0,))])) as calls:
            assert next(calls).index == 0
        assert time.monotonic() - begin < 300
        assert workers.everywhere(double, 1)[0][0] == 2


def test_fewer_workers_keep_their_processes() -> None:
    with Workers(3, ["cpu"]) as workers:
        before = workers.everywhere(double, 0)
        workers.resize(1)
        assert workers.everywhere(double, 0) == before[:1]
        workers.resize(2)
        after = workers.everywhere(double, 0)
        assert (after[0], len(after)) == (before[0], 2)
