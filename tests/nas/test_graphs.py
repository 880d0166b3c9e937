"""Training steps as CUDA graphs, on a machine without one: a recorder of torch's operations stands in for the graph."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from kernels import timing
from nas.config import DataConfig, LatencyConfig, SearchConfig
from nas.errors import CandidateFailed
from nas.lab import benchmark_training
from nas.search.real_evaluator import RealEvaluator
from nas.training import graphs, proxy
from nas.training.data import ImageData
from nas.training.pool import DataFile, Trainer, TrainingJob
from nas.training.proxy import Batches, ProxyResult, TrainingStep, train
from nas.training.stopping import Check, Rule
from nas.training.workers import Call, Done, Workers
from tests.conftest import make_tiny_space
from tests.nas.test_proxy import CPU, build, easy_data
from tests.nas.test_proxy import QUICK as PROXY

QUICK = replace(PROXY, steps=20)
# What a capture does not allow (item, memory of the host), or what a replay would not do again.
FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "pin_memory", "rand", "bernoulli", "normal", "exponential")


def small() -> nn.Module:
    """A network that trains quickly, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


def tensors(*values: object) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


class Recording(TorchDispatchMode):
    """A graph of one call: the operations on tensors that it made, on the memory on which it made them.

    As with CUDA, the call leaves tensors as they were, and a replay runs none of its Python.
    """

    def __init__(self, run: Callable[[], None], failing: str | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.made: set[int] = set()
        self.replays = self.resets = 0
        self.failing = failing
        try:
            with self:
                run()
        finally:
            for storage, copy in self.before.values():
                storage.copy_(copy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name.startswith(FORBIDDEN) or name == self.failing:
            raise RuntimeError(f"{name}: not permitted when stream is capturing\nand more")
        for tensor in tensors(args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made:
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        found = func(*args, **kwargs)
        results = tensors(found)
        self.made |= {each.untyped_storage().data_ptr() for each in results} - set(self.before)
        self.calls.append((func, args, kwargs, results))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self.resets += 1
        self.calls.clear()


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread; and memory is measured on CUDA only, because on a CPU that takes longer than these trainings."""

    def unmeasured(run: Callable[[], object], device: torch.device) -> int:
        run()
        return 0

    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(proxy, "peak_memory_bytes", unmeasured)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The graphs that were captured, on a CPU that has graphs."""
    found: list[Recording] = []

    def capture(run: Callable[[], None]) -> Recording:
        found.append(Recording(run))
        return found[-1]

    monkeypatch.setattr(graphs, "capture_on", lambda device: capture)
    monkeypatch.setattr(graphs._Refused, "reason", None)
    return found


def same(one: ProxyResult, other: ProxyResult) -> bool:
    def figures(result: ProxyResult) -> list[object]:
        points = [(each.step, each.train_loss, each.train_accuracy, each.val_loss) for each in result.curve]
        return [result.loss, result.accuracy, points]

    return figures(one) == figures(other)


@pytest.mark.parametrize(("resident", "deterministic"), [(True, False), (False, True)], ids=["resident", "staged"])
def test_a_captured_training_gives_the_losses_of_an_eager_one(
    resident: bool, deterministic: bool, recorded: list[Recording]
) -> None:
    """Validations between steps disturb neither the graph nor what follows."""
    batches, config = Batches(easy_data(flip=True), CPU), replace(QUICK, deterministic=deterministic)
    batches.resident = resident
    networks = build(), build()
    captured = train(networks[0], batches, config, seed=1, checkpoints=(2, 10))
    eager = train(networks[1], batches, config, seed=1, checkpoints=(2, 10), capture=False)
    assert same(captured, eager)
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name]), name
    (graph,) = recorded
    assert graph.replays == QUICK.steps - graphs.EAGER_STEPS
    assert captured.uncaptured is None


def test_a_graph_is_dropped_with_its_training(recorded: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(easy_data(), CPU)
    network = small()
    train(network, batches, QUICK, seed=0)
    needed = Rule(2.0, (Check(step=15, intercept=0.0, weights=(0.0, 0.0, 0.0), deviation=0.1, margin=0.0),), ends=True)
    stopped = train(small(), batches, QUICK, seed=0, rule=needed)

    def fail(network: nn.Module, batches: Batches) -> tuple[float, float]:
        raise CandidateFailed("the validation loss is not finite")

    monkeypatch.setattr(proxy, "validate", fail)
    with pytest.raises(CandidateFailed):
        train(small(), batches, QUICK, seed=0, checkpoints=(5,))
    assert stopped.stopped
    assert stopped.curve[-1].step == 15
    assert [each.resets for each in recorded] == [1, 1, 1]
    # Gradients would hold the graph's memory.
    assert all(each.grad is None for each in network.parameters())
    watched = weakref.ref(recorded.pop(0))
    gc.collect()
    assert watched() is None


def test_on_cuda_the_graphs_memory_is_given_back(recorded: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    step = graphs.RepeatedStep(lambda: None, lambda: None, torch.device("cuda"), 20, capture=True)
    for _ in range(20):
        step()
    monkeypatch.setattr(recorded[0], "reset", lambda: done.append("reset"))
    step.close()
    step.close()
    assert done == ["reset", "emptied"]
    assert step.graph is None


class Peeking(nn.Module):
    """A network whose host looks at the device's numbers, as some that are not ours do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        assert out.detach().sum().item() < float("inf")
        return out


def test_where_a_capture_fails_the_training_goes_on_eagerly(
    recorded: list[Recording],
) -> None:
    batches = Batches(easy_data(flip=True), CPU)
    eager = train(Peeking(), batches, QUICK, seed=0, capture=False)
    result = train(Peeking(), batches, QUICK, seed=0)
    assert same(result, eager)
    assert result.uncaptured == "RuntimeError: _local_scalar_dense: not permitted when stream is capturing"
    # This process does not try again.
    again = train(small(), batches, QUICK, seed=0)
    assert again.uncaptured == result.uncaptured
    assert recorded == []
    # Where there is nothing to gain there is nothing to say.
    assert train(small(), batches, replace(QUICK, steps=5), seed=0).uncaptured is None


def test_a_capture_that_fails_after_the_backward_pass_leaves_no_gradients(
    recorded: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be added to those of the next step."""
    batches = Batches(easy_data(flip=True), CPU)
    eager = train(small(), batches, QUICK, seed=0, capture=False)
    network, left = small(), []
    forget = TrainingStep.forget

    def watched(step: TrainingStep) -> None:
        left.append(any(each.grad is not None for each in network.parameters()))
        forget(step)

    monkeypatch.setattr(TrainingStep, "forget", watched)
    monkeypatch.setattr(graphs, "capture_on", lambda device: lambda run: Recording(run, "_fused_adamw_.tensor_lr"))
    result = train(network, batches, QUICK, seed=0)
    assert "_fused_adamw_.tensor_lr" in str(result.uncaptured)
    assert same(result, eager)
    # One from the beginning, one of each step, and the one of the capture.
    assert left == [False] + [True] * (QUICK.steps + 1)


def test_out_of_memory_in_a_capture_is_no_reason_not_to_capture_the_next(
    recorded: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = graphs.capture_on(CPU)

    def full(run: Callable[[], None]) -> Recording:
        raise torch.OutOfMemoryError("CUDA out of memory")

    batches = Batches(easy_data(), CPU)
    monkeypatch.setattr(graphs, "capture_on", lambda device: full)
    assert "out of memory" in str(train(small(), batches, QUICK, seed=0).uncaptured)
    monkeypatch.setattr(graphs, "capture_on", lambda device: capture)
    assert train(small(), batches, QUICK, seed=0).uncaptured is None
    assert len(recorded) == 1


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1)], ids=["python", "torch"])
def test_a_step_that_draws_on_the_host_is_not_captured(draw: Callable[[], object], recorded: list[Recording]) -> None:
    step = graphs.RepeatedStep(lambda: draw() and None, lambda: None, CPU, 20, capture=True)
    for _ in range(20):
        step()
    assert step.uncaptured == graphs.HOST_RANDOM
    assert recorded == []


class EagerPool(Workers):
    """Workers in which nothing was captured, for a reason that is different each time."""

    def __init__(self) -> None:
        self.reasons = iter((None, "broken", "again", "and again"))

    def run(self, calls: Sequence[Call[Any]]) -> Generator[Done[Any]]:
        for index in range(len(calls)):
            yield Done(index, 0, 1.0, ProxyResult(0.5, 1.0, (), 1.0, 1, uncaptured=next(self.reasons)))
        yield Done(len(calls), 0, 1.0, CandidateFailed("diverged"))


@pytest.mark.parametrize("kind", ["search", "trainer"])
def test_a_search_and_a_command_tell_of_it_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    space = make_tiny_space()
    if kind == "search":
        evaluator = RealEvaluator(SearchConfig(space=space, latency=LatencyConfig(device="cpu")), lines.append)
        evaluator.pool, evaluator.data = EagerPool(), {32: DataFile("none")}
        rounds = [evaluator.train([space.anchor()] * 2) for _ in range(2)]
    else:
        trainer = Trainer(DataConfig(), QUICK, CPU, 0, 1, lines.append)
        trainer.workers = EagerPool()
        job = TrainingJob(SimpleNamespace(resolution=16, ours=True), steps=1, learning_rate=0.1)  # type: ignore[arg-type]
        monkeypatch.setattr(trainer, "data_file", lambda resolution: None)
        rounds = [trainer.results([job] * 2) for _ in range(2)]
    assert [len(list(each)) for each in rounds] == [3, 3]
    (line,) = lines
    assert "could not be captured as a CUDA graph (broken)" in line


class OnOneDevice(TorchDispatchMode):
    """What a step may do on CUDA: nothing that reads from the host, writes to it or draws there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert not name.startswith(FORBIDDEN), name
        if name == "_fused_adamw_.tensor_lr":
            # Fake tensors do not know it. Its kernel reads the rate as float32, whatever it is.
            assert {each.dtype for each in tensors(args, kwargs)} == {torch.float32}
            found = None
        else:
            found = func(*args, **(kwargs or {}))
        assert {each.device.type for each in tensors(args, kwargs, found)} <= {"cuda"}, name
        return found


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "staged"])
def test_a_step_on_cuda_stays_on_the_device(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's fake tensors, which know shapes and devices; they cannot run a backward pass on CUDA."""

    def backward(loss: Tensor) -> None:
        for each in network.parameters():
            each.grad = torch.zeros_like(each)

    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(proxy, "_take_workspaces", lambda device: None)
    monkeypatch.setattr(graphs, "stream_of", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((10**9 if resident else 1), 0))
    with FakeTensorMode():
        labels = torch.zeros(40, dtype=torch.int64)
        images = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
        batches = Batches(ImageData(images, labels, images, labels, ("a", "b"), flip=True), torch.device("cuda"))
        with torch.device("cuda"):
            network = build()
        step = TrainingStep(network, batches, QUICK, seed=0)
        assert all(group["capturable"] for group in step.optimizer.param_groups)
        with OnOneDevice():
            # The optimizer makes its state in the first.
            step.run()
            step.run()
            with pytest.raises(AssertionError):
                step.outcomes.sum().cpu()


class Calls:
    """Torch's entry points of CUDA, which note that they were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end_fails: bool) -> None:
        self.names: list[str] = []
        self.stream: object = SimpleNamespace(wait_stream=lambda other: None, name="default")
        side = SimpleNamespace(wait_stream=lambda other: None, name="side")
        generator = SimpleNamespace(clone_state=lambda: "copy", graphsafe_set_state=self.note("generator"))
        for name, value in dict(
            current_device=lambda: 0, current_stream=lambda: self.stream, set_stream=self.set_stream, CUDAGraph=object,
            graph_pool_handle=lambda: (0, 1), default_generators=(generator,), device=lambda device: nullcontext(),
            stream=lambda stream: nullcontext(), graph=self.graph,
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing, "_side_stream", lambda index: side)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.note("allocator", end_fails))

    def note(self, name: str, fails: bool = False) -> Callable[..., None]:
        def noted(*arguments: object) -> None:
            self.names.append(f"{name} {arguments}")
            if fails:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

        return noted

    def set_stream(self, stream: object) -> None:
        self.stream = stream

    def graph(self, graph: object, pool: object, stream: object) -> Any:
        # As torch does where a capture cannot be ended.
        self.stream = stream
        return nullcontext()


@pytest.mark.parametrize("ended", [False, True])
def test_a_failed_capture_leaves_torch_as_it_was(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2.11 its allocator and its generator would go on as if the capture were under way."""
    calls = Calls(monkeypatch, end_fails=ended)
    before = calls.stream

    def run() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing.captured(run, calls=0)
    assert calls.stream is before
    assert calls.names == ["allocator (0, (0, 1))", "generator ('copy',)"]


def test_a_step_that_has_run_on_the_stream_runs_only_to_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, end_fails=False)
    count = iter(range(100))
    assert timing.captured(lambda: next(count), calls=0)[1] == 0
    assert timing.captured(lambda: next(count))[1] == 1 + timing.CALLS_BEFORE_CAPTURE
    assert calls.names == []


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(benchmark_training.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_the_benchmark_compares_both(recorded: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_training, "load_space", lambda name: make_tiny_space())
    code, output = invoke("--device", "cpu", "--steps", "26", "--rounds", "1", "--batch", "4")
    assert code == 0, output
    # Of the training that warms up, and of the one that is timed.
    assert len(recorded) == 2
    lines = output.splitlines()
    assert "ms a step" in lines[1]
    assert "eager / captured:" in lines[3]
    assert lines[4] == "training losses of the same steps are at most 0 apart"


def test_the_benchmark_says_where_nothing_can_be_compared(
    recorded: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output = invoke()
    assert code == 2
    assert "no CUDA device here" in output
    monkeypatch.setattr(benchmark_training, "load_space", lambda name: make_tiny_space())
    result = ProxyResult(0.5, 1.0, (), 1.0, 1)
    results = {"eager": [result], "captured": [replace(result, uncaptured="it is broken")]}
    monkeypatch.setattr(benchmark_training, "compare", lambda *args: results)
    code, output = invoke("--device", "cpu")
    assert code == 1
    assert output.splitlines()[-1] == "nothing was captured: it is broken"
    monkeypatch.setattr(graphs, "capture_on", lambda device: None)
    assert "cpu: has no graphs" in invoke("--device", "cpu")[1]


# -- CUDA ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(graphs._Refused, "reason", None)
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "staged"])
def test_captured_steps_on_cuda_give_the_losses_of_eager_ones(
    resident: bool, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    batches, config = Batches(easy_data(flip=True), cuda), replace(QUICK, steps=60, deterministic=True)
    assert batches.resident == resident
    captured, eager = (
        train(build(), batches, config, seed=0, checkpoints=(15, 30), capture=capture) for capture in (True, False)
    )
    assert captured.uncaptured is None
    for one, other in zip(captured.curve, eager.curve, strict=True):
        # Both run the same kernels; libraries may choose others for a graph, which round otherwise in bfloat16.
        assert one.train_loss == pytest.approx(other.train_loss, rel=2e-2)
    assert captured.accuracy > 0.95
    # Nothing of the graph is left.
    before = torch.cuda.memory_reserved(cuda)
    for seed in range(3):
        train(build(seed), batches, config, seed=seed)
    assert torch.cuda.memory_reserved(cuda) <= before + 2**21


@pytest.mark.gpu
def test_a_network_that_cannot_be_captured_trains_on_cuda(cuda: torch.device) -> None:
    batches, config = Batches(easy_data(), cuda), replace(QUICK, deterministic=True)
    eager = train(Peeking(), batches, config, seed=0, capture=False)
    result = train(Peeking(), batches, config, seed=0)
    assert result.uncaptured
    assert result.loss == pytest.approx(eager.loss, rel=2e-2)
    # Random numbers on the device work after it, and memory comes back from other streams.
    assert functional.dropout(torch.ones(1000, device=cuda)).eq(0).any()
    graph, _ = timing.captured(lambda: torch.ones(10, device=cuda) * 2)
    graph.replay()
    torch.cuda.synchronize()
