from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.config import ProxyConfig
from nas.errors import CandidateFailed
from nas.training import curves, proxy
from nas.training.data import ImageData
from nas.training.proxy import Batches, learning_rate, train
from tests.conftest import make_tiny_space

CPU = torch.device("cpu")
QUICK = ProxyConfig(steps=30, batch_size=16, threads=1)


def easy_data(count: int = 200, size: int = 16, flip: bool = False) -> ImageData:
    """Two classes that differ in brightness: any network that learns at all learns them."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 156, (count, 3, size, size), generator=rng)
    images += 100 * labels.view(-1, 1, 1, 1)
    half = count // 2
    images = images.to(torch.uint8)
    return ImageData(images[:half], labels[:half], images[half:], labels[half:], ("dark", "bright"), flip)


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make_tiny_space().anchor().build(2)


def a_batch(batches: Batches, size: int) -> tuple[Tensor, Tensor]:
    return batches.training(batches.draw(1, size, torch.Generator().manual_seed(0)).at(torch.tensor([0])))


def test_a_network_learns() -> None:
    result = train(build(), Batches(easy_data(), CPU), QUICK, seed=0)
    assert result.accuracy > 0.95
    assert result.loss < 0.4
    assert result.curve[-1].train_accuracy > result.curve[0].train_accuracy
    assert result.curve[-1].train_loss < result.curve[0].train_loss
    assert result.seconds > 0


def test_a_look_at_the_validation_images_changes_nothing_else() -> None:
    batches = Batches(easy_data(), CPU)
    plain = train(build(), batches, QUICK, seed=0)
    looked = train(build(), batches, QUICK, seed=0, checkpoints=(10, 30))
    assert (looked.accuracy, looked.loss) == (plain.accuracy, plain.loss)
    assert [point.train_loss for point in looked.curve] == [point.train_loss for point in plain.curve]
    assert [point.step for point in looked.curve if point.val_accuracy is not None] == [10, 30]
    assert (looked.curve[-1].val_accuracy, looked.curve[-1].val_loss) == (plain.accuracy, plain.loss)
    assert curves.from_json(curves.to_json(looked.curve)) == looked.curve
    assert curves.from_json(curves.to_json(plain.curve)) == plain.curve


def test_a_network_is_scored_on_test_images_where_there_are_any() -> None:
    data = easy_data()
    both = replace(data, test_images=data.val_images[:30], test_labels=1 - data.val_labels[:30])
    network, batches = build(), Batches(both, CPU)
    result = train(network, batches, QUICK, seed=0)
    assert result.test_accuracy is None
    assert proxy.score(network, batches.test(), CPU)[0] == pytest.approx(1 - result.accuracy, abs=0.05)
    assert list(Batches(data, CPU).test()) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_result(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batches = Batches(easy_data(flip=True), CPU)
        one, two = (train(build(), batches, QUICK, seed=3) for _ in range(2))
        other = train(build(), batches, QUICK, seed=4)
    finally:
        torch.set_num_threads(before)
    assert (one.accuracy, one.loss) == (two.accuracy, two.loss)
    assert [point.train_loss for point in one.curve] == [point.train_loss for point in two.curve]
    assert other.loss != one.loss


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_the_curve_ends_with_the_last_step_and_has_some_twenty_points(steps: int) -> None:
    result = train(build(), Batches(easy_data(), CPU), replace(QUICK, steps=steps), seed=0)
    numbers = [point.step for point in result.curve]
    assert numbers[-1] == steps
    assert numbers == sorted(set(numbers))
    assert len(numbers) <= 30
    assert all(math.isfinite(point.train_loss) for point in result.curve)


def test_the_seconds_of_a_step_are_those_of_the_second_half() -> None:
    points = tuple(curves.CurvePoint(step, 1.0, 0.5, seconds) for step, seconds in ((10, 9.0), (20, 10.0), (40, 14.0)))
    result = proxy.ProxyResult(0.5, 1.0, points, 15.0, 1)
    assert result.step_seconds == (14 - 10) / (40 - 20)
    assert replace(result, curve=points[:1]).step_seconds == 9 / 10


def test_a_diverged_loss_fails_the_candidate() -> None:
    with pytest.raises(CandidateFailed, match="loss diverged before step"):
        train(build(), Batches(easy_data(), CPU), replace(QUICK, learning_rate=1e30), seed=0)


def test_training_memory_grows_with_the_batch() -> None:
    batches = Batches(easy_data(), CPU)
    small = train(build(), batches, replace(QUICK, steps=1, batch_size=8), seed=0).train_memory_bytes
    large = train(build(), batches, replace(QUICK, steps=1, batch_size=64), seed=0).train_memory_bytes
    # At the least the input and the stem's output are kept for the backward pass.
    assert small > 4 * 8 * (3 * 16 * 16 + 16 * 8 * 8)
    assert large > 4 * small


def test_the_schedule_warms_up_linearly_and_falls_to_zero() -> None:
    config = ProxyConfig(steps=100, learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert max(rates) == rates[19] == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[19:]))
    assert 0 < rates[-1] < 0.001
    # A full cosine: half of it at the middle of the descent.
    assert learning_rate(59, config) == pytest.approx(0.5, abs=0.03)
    assert learning_rate(0, ProxyConfig(steps=1)) > 0


def test_norms_and_biases_do_not_decay() -> None:
    network = build()
    decayed, free = proxy.make_optimizer(network, QUICK).param_groups
    assert decayed["weight_decay"] > 0 == free["weight_decay"]
    assert {p.ndim for p in free["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) > 1
    assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))


def draw_as_ever(batches: Batches, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch as it was drawn, step by step, when the accuracies in today's studies were reached."""
    where = torch.randint(len(batches.train_labels), (size,), generator=rng)
    images = (batches.train_images[where].float() / 255 - batches.mean) / batches.std
    height, width = images.shape[2:]
    reach = max(1, round(width / 16))
    padded = functional.pad(images, (reach,) * 4, mode="reflect")
    down, right = torch.randint(2 * reach + 1, (2, size, 1), generator=rng).squeeze(2).tolist()
    shifted = [each[:, y : y + height, x : x + width] for each, y, x in zip(padded, down, right, strict=True)]
    if batches.flip:
        mirrored = torch.randint(2, (size, 1), generator=rng).squeeze(1).tolist()
        shifted = [each.flip(2) if flip else each for each, flip in zip(shifted, mirrored, strict=True)]
    return torch.stack(shifted), batches.train_labels[where]


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("flip", [False, True])
def test_all_draws_at_once_give_the_batches_of_ever(flip: bool, size: int) -> None:
    batches = Batches(easy_data(size=size, flip=flip), CPU)
    draws = batches.draw(5, 7, torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    for step in range(5):
        images, labels = batches.training(draws.at(torch.tensor([step])))
        expected, theirs = draw_as_ever(batches, 7, rng)
        assert torch.equal(images, expected)
        assert torch.equal(labels, theirs)
    # As small as what they hold allows, because there is one for each image of each step.
    parts = [draws.images, draws.shifts, *([] if draws.mirrored is None else [draws.mirrored])]
    assert sum(part.nbytes for part in parts) == 5 * 7 * (9 if flip else 8)


def test_a_training_gives_the_losses_of_ever() -> None:
    """The plain loop that trained today's studies, with a rate that is a number of Python, gives the same bits."""
    batches = Batches(easy_data(flip=True), CPU)
    result = train(build(), batches, QUICK, seed=3)
    network = build().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer, rng = proxy.make_optimizer(network, QUICK), torch.Generator().manual_seed(3)
    losses = []
    for step in range(QUICK.steps):
        images, labels = draw_as_ever(batches, QUICK.batch_size, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, QUICK)
        logits = network(images.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits, labels, label_smoothing=QUICK.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [point.train_loss for point in result.curve] == losses
    assert (result.accuracy, result.loss) == proxy.validate(network, batches)


def test_augmentation_shifts_by_at_most_a_sixteenth_and_mirrors_only_where_allowed() -> None:
    data = easy_data()
    # One bright column off the centre tells where an image was moved to, and whether it was mirrored.
    data.train_images.zero_()
    data.train_images[:, :, :, 4] = 255
    columns: dict[bool, set[int]] = {}
    for flip in (False, True):
        batches = Batches(replace(data, flip=flip), CPU)
        images, _ = a_batch(batches, 256)
        assert images.shape == (256, 3, 16, 16)
        assert images.is_contiguous(memory_format=torch.channels_last)
        columns[flip] = set(images[:, 0, 8].argmax(dim=1).tolist())
    assert columns[False] == {3, 4, 5}
    assert columns[True] == {3, 4, 5, 10, 11, 12}


def test_training_batches_come_from_training_images_only() -> None:
    data = easy_data()
    data.val_images.fill_(255)
    data.train_images.fill_(0)
    batches = Batches(data, CPU)
    images, _ = a_batch(batches, 64)
    assert images.unique().numel() <= 3
    ((val_images, val_labels),) = list(batches.validation())
    assert not set(val_images.unique().tolist()) & set(images.unique().tolist())
    assert val_labels.tolist() == data.val_labels.tolist()


def test_evaluation_counts_every_validation_image() -> None:
    data = easy_data(count=3000)
    always_one = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    always_one[1].weight.data.zero_()
    always_one[1].bias.data = torch.tensor([0.0, 1.0])
    labels = torch.cat([torch.ones(1100), torch.zeros(400)]).long()
    accuracy, loss = proxy.validate(always_one, Batches(replace(data, val_labels=labels), CPU))
    assert accuracy == pytest.approx(1100 / 1500)
    expected = (1100 * math.log(1 + math.exp(-1)) + 400 * math.log(1 + math.exp(1))) / 1500
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_algorithms_are_for_the_training_only(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latency is that of the deployment, which asks for nothing of the kind."""
    seen = set()
    validate = proxy.validate

    def watched(network: nn.Module, batches: Batches) -> tuple[float, float]:
        seen.add(torch.are_deterministic_algorithms_enabled())
        return validate(network, batches)

    monkeypatch.setattr(proxy, "validate", watched)
    train(build(), Batches(easy_data(), CPU), replace(QUICK, steps=1, deterministic=asked), seed=0)
    assert seen == {asked}
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(CandidateFailed):
        train(build(), Batches(easy_data(), CPU), replace(QUICK, learning_rate=1e30, deterministic=asked), seed=0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_large_images_are_evaluated_in_smaller_batches() -> None:
    assert [proxy.eval_batch("cuda", resolution) for resolution in (32, 64, 128, 224)] == [1000, 1000, 250, 81]
    assert [proxy.eval_batch("cpu", resolution) for resolution in (32, 64, 224)] == [125, 125, 16]


@pytest.mark.gpu
def test_training_on_cuda_learns_and_is_reproducible_when_asked() -> None:
    device = torch.device("cuda")
    batches = Batches(easy_data(), device)
    assert batches.train_images.is_cuda
    one, two = (train(build(), batches, replace(QUICK, deterministic=True), seed=0) for _ in range(2))
    assert one.accuracy > 0.95
    assert one.loss == two.loss
    assert one.train_memory_bytes > 0
