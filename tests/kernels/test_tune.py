"""The tuner's book-keeping, with a fake timer; on a GPU `test_network.py` tunes for real."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels import contest, cost_model, ops, tune
from kernels.attempts import Attempts
from kernels.compiling import Task, refuses
from kernels.cost_model import H200
from kernels.problem import BlockProblem, Tiling
from kernels.tune import Choice, Target

CUDA = torch.device("cuda", 0)
PROBLEM = BlockProblem(1, 14, 14, 256, 1024, 256, 3, 8, 1, "silu", True, "float16", max_splits=16)


class FakeTimer:
    """Stands for the GPU: the second tiling is the fastest, and slower than torch for ReLU."""

    def __init__(self) -> None:
        self.timed: list[Any] = []
        self.compiled: list[tuple[Any, Any]] = []

    def fastest(self, task: Task, tilings: list[Tiling], records: Attempts, *rest: object) -> Choice:
        self.timed.append(task.problem)
        layers_ms = 0.25 if task.problem.activation == "relu" else 0.75
        by_time = (tilings[1], *(tiling for tiling in tilings if tiling != tilings[1]))
        return Choice(by_time, "tuned", tuple(0.5 + i / 10 for i in range(len(by_time))), layers_ms)

    def compile_together(self, jobs: list[tuple[Task, Any]], alive: object) -> float:
        self.compiled += [(task.problem, tiling) for task, tiling in jobs]
        return 0.0


def on(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Have the tuner believe that it runs on a machine."""
    monkeypatch.setattr(tune.Target, "of", lambda device: Target(machine, H200, 90, False))


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeTimer]:
    fake = FakeTimer()
    monkeypatch.setenv("CONVFIRST_CACHE", str(tmp_path))
    on(monkeypatch, "GPU A, torch 2, triton 3")
    monkeypatch.setattr(tune, "gpu_spec", lambda device: H200)
    monkeypatch.setattr(tune, "time_tilings", fake.fastest)
    monkeypatch.setattr(tune, "compile_together", fake.compile_together)
    monkeypatch.setattr(tune, "kernels_of", lambda launch: [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    tune._chosen.clear()
    yield fake
    tune._chosen.clear()


def task(problem: BlockProblem) -> Task:
    return Task(ops.BLOCK, problem, SimpleNamespace(device=CUDA), [], [])  # type: ignore[arg-type]


def test_a_problem_is_tuned_once_per_machine(timer: FakeTimer, tmp_path: Path) -> None:
    other = replace(PROBLEM, activation="relu")
    choices = tune.tune([task(PROBLEM), task(other), task(PROBLEM)])
    assert timer.timed == [PROBLEM, other]
    assert len(tune.tried(ops.BLOCK, PROBLEM, H200)) == tune.TRIED
    assert len(timer.compiled) == 2 * len(tune.tried(ops.BLOCK, PROBLEM, H200))
    assert choices[0] == choices[2]
    assert [choice.tiling is not None for choice in choices] == [True, False, True]
    assert len(list(tmp_path.rglob("*.json"))) == 2
    assert tune.tune([task(PROBLEM)]) == choices[:1]
    # A new process finds it on disk.
    tune._chosen.clear()
    (again,) = tune.tune([task(PROBLEM)])
    assert again == replace(choices[0], source="remembered")
    assert len(timer.timed) == 2


def test_another_machine_or_other_sources_are_tuned_anew(timer: FakeTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.tune([task(PROBLEM)])
    tune._chosen.clear()
    on(monkeypatch, "GPU B, torch 2, triton 3")
    assert tune.choose(ops.BLOCK, PROBLEM, CUDA).source == "counted"
    tune._chosen.clear()
    on(monkeypatch, "GPU A, torch 2, triton 3")
    assert tune.choose(ops.BLOCK, PROBLEM, CUDA).source == "remembered"
    tune._chosen.clear()
    monkeypatch.setattr(tune, "sources_digest", lambda: "changed")
    assert tune.choose(ops.BLOCK, PROBLEM, CUDA).source == "counted"


def test_a_tiling_that_broke_a_process_is_neither_tuned_nor_chosen_again(timer: FakeTimer) -> None:
    first, second, *_ = tune.tried(ops.BLOCK, PROBLEM, H200)
    records = tune.attempts(ops.BLOCK, PROBLEM, tune.Target.of(CUDA))
    with pytest.raises(RuntimeError, match="illegal"), records.of([first]):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    # Untuned, tuned, and remembered: the fake timer's fastest is the second of what it is given.
    assert tune.choose(ops.BLOCK, PROBLEM, CUDA).tiling == second
    tune._chosen.clear()
    (choice,) = tune.tune([task(PROBLEM)])
    assert first not in choice.tilings
    assert len(choice.tilings) == tune.TRIED
    assert choice.tiling is not None
    with pytest.raises(RuntimeError, match="illegal"), records.of([choice.tiling]):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    tune._chosen.clear()
    again = tune.choose(ops.BLOCK, PROBLEM, CUDA)
    assert again.source == "remembered"
    assert again.tilings == choice.tilings[1:]
    assert again.times_ms == choice.times_ms[1:]
    # What a process would have to compile for it.
    assert tune.wanted(ops.BLOCK, PROBLEM, tune.Target.of(CUDA)) == [choice.tilings[1]]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"tilings": [{"nosuch": 1}]}', '{"tilings": [], "times_ms": [1], "layers_ms": 1}']
)
def test_an_unreadable_file_is_tuned_over(content: str, timer: FakeTimer, tmp_path: Path) -> None:
    tune.tune([task(PROBLEM)])
    (path,) = tmp_path.rglob("*.json")
    path.write_text(content)
    tune._chosen.clear()
    assert tune.tune([task(PROBLEM)])[0].source == "tuned"
    tune._chosen.clear()
    assert tune.tune([task(PROBLEM)])[0].source == "remembered"


def test_where_nothing_can_be_written_tuning_goes_on(
    timer: FakeTimer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("CONVFIRST_CACHE", str(blocked))
    assert tune.tune([task(PROBLEM)])[0].source == "tuned"


def test_untuned_problems_run_the_cost_models_first_choice(timer: FakeTimer) -> None:
    choice = tune.choose(ops.BLOCK, PROBLEM, CUDA)
    assert choice.source == "counted"
    assert choice.tiling == ops.BLOCK.tilings(PROBLEM, H200)[0]
    one, three = (Choice((Tiling(16, 16, "mma", launches=launches),), "counted") for launches in (1, 3))
    assert one.describe() == "fused, not timed"
    assert three.describe() == "in 3 launches, not timed"


def test_the_faster_of_fused_and_layer_by_layer_runs() -> None:
    tilings = tuple(Tiling(32, 32, "mma", splits) for splits in (8, 16))
    choice = Choice(tilings, "tuned", (1.0, 2.0), 2.5)
    assert choice.tiling == tilings[0]
    assert choice.describe() == "fused: 1.0000 ms fused, 2.5000 ms layer by layer"
    slower = replace(choice, layers_ms=0.5)
    assert slower.tiling is None
    assert slower.describe() == "layer by layer: 1.0000 ms fused, 0.5000 ms layer by layer"
    assert Choice(tilings, "counted").tiling == tilings[0]
    assert Choice((), "tuned", (), 1.0).tiling is None
    assert Choice((), "counted").tiling is None


def test_large_batches_are_one_problem_whatever_scratch_is_lent() -> None:
    large, small = replace(PROBLEM, batch=128, height=56, width=56), PROBLEM
    assert ops.with_splits(large, 32) == ops.with_splits(large, 1)
    assert ops.with_splits(small, 32).max_splits == 32
    assert ops.with_splits(small, 2).max_splits == 2
    # What is lent is what fits, a power of two.
    sum_bytes = 4 * 196 * 256
    for lent, most in ((0, 1), (sum_bytes, 1), (3 * sum_bytes, 2), (8 * sum_bytes, 8), (999 * sum_bytes, 32)):
        assert ops.max_splits(196, 256, lent) == most


def test_what_is_dropped_after_one_sample_would_not_have_been_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded times: predictions for 24 blocks, each sampled with a noise of 5 %."""
    rng = np.random.default_rng(0)
    dropped = 0
    for channels, size, batch in product((16, 64, 128), (7, 28), (1, 8, 32, 128)):
        problem = BlockProblem(batch, size, size, channels, 4 * channels, channels, 3, 8, 1, "silu", True, "float16")
        tilings = tune.tried(ops.BLOCK, problem, H200)
        true = {tiling: cost_model.estimate(problem, tiling) for tiling in tilings}
        true[contest.LAYER_BY_LAYER] = cost_model.layer_roofline(problem)
        recorded = {name: seconds * rng.normal(1, 0.05, contest.REPLAYS) for name, seconds in true.items()}
        medians = {name: float(np.median(samples)) for name, samples in recorded.items()}
        monkeypatch.setattr(contest, "one_sample", lambda runs, recorded=recorded: {n: recorded[n][0] for n in runs})

        def in_turns(runs: Any, calls: Any, pool: Any, medians: Any = medians) -> dict[Any, float]:
            nonlocal dropped
            dropped += len(medians) - len(runs)
            return {name: medians[name] for name in runs}

        monkeypatch.setattr(contest, "samples_in_turns", in_turns)
        found = contest.sampled(dict.fromkeys(recorded, lambda: torch.empty(0)), contest.Pool())
        assert set(found) == set(recorded)
        assert min(found, key=found.__getitem__) == min(medians, key=medians.__getitem__)
    assert dropped > 20


def test_a_wrong_result_is_told_from_rounding() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        assert not contest.is_wrong(exact.to(dtype), exact.to(dtype) + exact.to(dtype) * 2**-8)
        assert contest.is_wrong((1.2 * exact).to(dtype), exact.to(dtype))
    assert not contest.is_wrong(exact * (1 + 1e-5), exact)
    assert contest.is_wrong(torch.full_like(exact, float("nan")), exact)


def test_compilers_refusals_are_told_from_bugs() -> None:
    assert refuses(OutOfResources(300000, 232448, "shared memory"))
    assert refuses(RuntimeError("PassManager::run failed"))
    assert not refuses(RuntimeError("size mismatch"))
    assert not refuses(ValueError("x"))
