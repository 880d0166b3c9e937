"""Whole networks, fused, against timm's own; what is refused, and what is left to torch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import MobileNetV3
from timm.models._efficientnet_blocks import UniversalInvertedResidual
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn

from kernels import contest, cost_model, fuse, ops, tune
from kernels.fold import fold_batch_norms
from kernels.lab.emulator import emulated
from kernels.network import LEAST_SCRATCH_BYTES, FusedBlock, FusedNetwork, moved_bytes
from kernels.problem import BlockProblem
from kernels.timing import peak_memory_bytes
from search_spaces import ArchSpec, load_space
from search_spaces.timm_models import add_pooled_shortcuts
from tests.conftest import INTERPRETED
from tests.kernels.cases import make_operands

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Enough outputs that the ratio of two root mean square errors says something: over five outputs it is 0.4 to 1.5
# by chance alone, and more on another processor.
IMAGES, CLASSES = 4, 64


def network(*stages: str, activation: type[nn.Module] = nn.SiLU, **options: object) -> nn.Module:
    """A small timm network of these stages, its norms as if it had been trained."""
    model = MobileNetV3(
        decode_arch_def([[stage] for stage in stages]), num_classes=CLASSES, stem_size=16, num_features=32,
        act_layer=activation, fix_stem=True, **options,
    )  # fmt: skip
    return as_if_trained(model)


def as_if_trained(model: nn.Module) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=rng)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2, generator=rng)  # type: ignore[union-attr]
            module.weight.data.uniform_(0.5, 1.5, generator=rng)
            module.bias.data.normal_(0, 0.3, generator=rng)
    return model.eval()


def images(batch: int, resolution: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn((batch, 3, resolution, resolution), generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def errors(model: nn.Module, fused: FusedNetwork, x: Tensor) -> tuple[float, float]:
    """Root mean square error against float64 of the fused network and of torch's layer by layer."""
    layered = fold_batch_norms(model).to(x.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        outputs = fused(x), layered(x)
        exact = fold_batch_norms(model).double()(x.double())
    own, torchs = (float((out.double() - exact).square().mean().sqrt()) for out in outputs)
    return own, torchs


@pytest.fixture(autouse=True)
def _tuned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice from before; and torch with all bits of float32, for it is what kernels are held against."""
    monkeypatch.setenv("CONVFIRST_CACHE", str(tmp_path))
    tune._chosen.clear()
    with contest.exact(torch.float32):
        yield
    tune._chosen.clear()


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_networks_of_the_search_space_are_fused_whole_and_exactly(
    seed: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    arch = load_space("small").sample(random.Random(seed))
    model = as_if_trained(arch.build(num_classes=CLASSES)).to(kernel_device)
    fused = fuse(model, dtype=dtype)
    assert all(status.fused for status in fused.fusion), fused.report()
    assert len(fused.fusion) == 2 + len(arch.blocks)
    own, torchs = errors(model, fused, images(IMAGES, 16, dtype, kernel_device))
    assert own <= 2 * torchs


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stem_without_stride_and_a_head_without_convolution(dtype: torch.dtype, kernel_device: torch.device) -> None:
    arch = ArchSpec.parse("hard_swish stem 16/1 | 1x16/2 k3 g8 e2 | 2x32/2 k5 g16 e2 | head 0")
    model = as_if_trained(arch.build(num_classes=CLASSES)).to(kernel_device)
    fused = fuse(model, dtype=dtype)
    assert all(status.fused for status in fused.fusion), fused.report()
    own, torchs = errors(model, fused, images(IMAGES, 16, dtype, kernel_device))
    assert own <= 2 * torchs


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_with_the_convolution_in_the_middle(dtype: torch.dtype, kernel_device: torch.device) -> None:
    model = network(
        "ds_r1_k3_s1_c16", "ir_r2_k3_s2_e4_c24", "uir_r2_a0_k5_s1_e2_c24", "uir_r2_a3_k3_s2_e2_c32",
        "uir_r1_a5_k0_s1_e4_c32_gs8", "ir_r1_k3_s1_e2_c32_gs8", layer_scale_init_value=0.5,
    ).to(kernel_device)  # fmt: skip
    fused = fuse(model, dtype=dtype)
    assert all(status.fused for status in fused.fusion), fused.report()
    own, torchs = errors(model, fused, images(IMAGES, 16, dtype, kernel_device))
    assert own <= 2 * torchs


@pytest.mark.kernels
def test_what_has_no_fused_form_runs_in_torch_and_is_named(kernel_device: torch.device) -> None:
    model = network(
        "cn_r1_k3_s1_e1_c16", "ir_r1_k3_s2_e4_c24_se0.25", "uir_r1_a3_k0_s1_e4_c24", "er_r1_k3_s1_e4_c24",
        "uir_r1_a9_k0_s1_e4_c24", activation=nn.ReLU6,
    ).to(kernel_device)  # fmt: skip
    # One block whose activation is known, among those whose is not.
    model.blocks[2][0].pw_exp.bn.act = nn.ReLU()  # type: ignore[index, union-attr]
    fused = fuse(model, dtype=torch.float32)
    by_name = {status.name: status for status in fused.fusion}
    assert "ReLU6" in by_name["conv_stem"].reason
    assert "ConvBnAct" in by_name["blocks.0.0"].reason
    assert "se=SqueezeExcite" in by_name["blocks.1.0"].reason
    assert by_name["blocks.2.0"].fused
    assert "EdgeResidual" in by_name["blocks.3.0"].reason
    assert "ReLU6" in by_name["head"].reason
    assert fused.report().count("not fused") == sum(not status.fused for status in fused.fusion) == 6
    own, torchs = errors(model, fused, images(IMAGES, 16, torch.float32, kernel_device))
    assert own <= 2 * torchs


def test_predicates_reasons_reach_the_report() -> None:
    model = network("uir_r1_a9_k0_s1_e4_c24")
    assert "kernel_size=9" in fuse(model).fusion[1].reason
    model = network("uir_r1_a3_k0_s1_e4_c640")
    assert "out_channels=640" in fuse(model).fusion[1].reason


def test_what_a_part_has_read_is_freed_when_it_has_run() -> None:
    device = torch.device("cpu")
    fused = fuse(network("uir_r2_a3_k0_s1_e1_c16", "uir_r3_a3_k0_s1_e1_c16"), dtype=torch.float16)
    x = images(2, 8, torch.float16, device)
    largest = max(map(moved_bytes, fused.problems(2, 8).values()))
    with torch.inference_mode(), emulated(90):
        fused(x)
        assert peak_memory_bytes(lambda: fused(x), device) <= max(1.05 * largest, largest + LEAST_SCRATCH_BYTES)


@pytest.mark.kernels
def test_export_and_compile_pass_through(kernel_device: torch.device) -> None:
    model = network("uir_r2_a3_k0_s2_e2_c24").to(kernel_device)
    fused = fuse(model, dtype=torch.float32)
    x = images(2, 8, torch.float32, kernel_device)
    with torch.inference_mode():
        expected = fused(x)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"convfirst.stem.default", "convfirst.block.default", "convfirst.head.default"} <= targets
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(exported.module()(x[:1].contiguous(memory_format=torch.channels_last)), expected[:1])
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@pytest.mark.kernels
def test_operators_follow_torchs_rules(kernel_device: torch.device) -> None:
    fused = fuse(network("uir_r1_a3_k0_s1_e2_c16").to(kernel_device), dtype=torch.float32)
    block = fused.fused_modules["blocks.0.0"]
    x = torch.randn(1, 16, 3, 3, device=kernel_device).to(memory_format=torch.channels_last)
    for scratch in (x.new_empty(0), x.new_empty(2 * 9 * 16)):
        arguments = (x, block.weights, block.layers, scratch, 1, "silu", True)
        checks = torch.library.opcheck(ops.block, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}


def test_exact_convolutions_keep_cudnn() -> None:
    with contest.exact(torch.float32):
        assert torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.allow_tf32
    with contest.exact(torch.float16):
        assert torch.backends.cudnn.enabled


def test_the_model_is_left_as_it_was_and_may_be_fused_again() -> None:
    model = network("uir_r1_a3_k0_s1_e2_c16")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert fuse(fold_batch_norms(model)).fusion == fuse(model).fusion


def test_problems_are_those_of_the_shape() -> None:
    fused = fuse(network("uir_r1_a3_k0_s2_e4_c64", "uir_r2_a5_k0_s2_e4_c128_gs8"))
    found = fused.problems(batch=2, resolution=64)
    assert list(found) == ["conv_stem", "blocks.0.0", "blocks.1.0", "blocks.1.1", "global_pool"]
    first, second, third = (found[f"blocks.{name}"] for name in ("0.0", "1.0", "1.1"))
    assert (first.batch, first.height, first.in_channels, first.out_channels, first.stride) == (2, 32, 16, 64, 2)
    assert (second.height, second.kernel_size, second.group_width, second.residual) == (16, 5, 8, False)
    assert (third.height, third.in_channels, third.hidden_channels, third.residual) == (8, 128, 512, True)
    assert found["global_pool"].pixels == 64
    # Asking changes nothing.
    assert fused.problems(batch=2, resolution=64) == found


@pytest.mark.parametrize(("batch", "resolution"), [(1, 224), (2, 64), (16, 32), (1, 32)])
def test_partial_sums_stay_within_the_networks_memory(batch: int, resolution: int) -> None:
    fused = fuse(network("uir_r1_a3_k0_s2_e4_c64", "uir_r2_a5_k0_s2_e4_c128_gs8", "ir_r1_k3_s2_e4_c256"))
    problems = fused.problems(batch, resolution)
    largest = max(map(moved_bytes, problems.values()))
    splits, lent = set(), 0
    for name, module in fused.fused_modules.items():
        if name in ("conv_stem", "global_pool"):
            continue
        tiling = tune.choose(module.kernel, problems[name], torch.device("cpu")).tiling
        assert tiling is not None
        assert tiling.splits <= problems[name].max_splits
        splits.add(module.max_splits)
        lent += problems[name].max_splits > module.max_splits
        scratch = module.new_scratch(
            torch.empty(batch, problems[name].in_channels, problems[name].height, problems[name].width, device="meta")
        )
        assert tiling.partial_bytes(problems[name]) <= scratch.nbytes
        assert scratch.nbytes <= LEAST_SCRATCH_BYTES or scratch.nbytes + moved_bytes(problems[name]) <= 1.05 * largest
    assert len(splits) > 1
    # Where tensors are small, scratch that nobody would notice allows more.
    assert bool(lent) == (batch * resolution**2 < 16 * 32**2)


def pooled(*stages: str) -> nn.Module:
    model = network(*stages)
    add_pooled_shortcuts(model)
    return model


def test_blocks_with_pooled_shortcuts_are_fused() -> None:
    model = pooled("uir_r2_a3_k0_s2_e4_c64", "uir_r1_a5_k0_s1_e4_c24_gs8")
    problems = fuse(model).problems(batch=1, resolution=32)
    assert [problems[f"blocks.{name}"].residual for name in ("0.0", "0.1", "1.0")] == [True, True, True]

    # A network from an exported file brings classes of its own.
    class PooledShortcut(nn.Module):
        pass

    class PooledResidual(UniversalInvertedResidual):
        pass

    block: Any = model.blocks[0][0]
    block.__class__, block.shortcut = PooledResidual, PooledShortcut()
    assert fuse(model).problems(batch=1, resolution=32)["blocks.0.0"].residual
    # Another class may do anything.
    block.shortcut = nn.Identity()
    (status,) = [status for status in fuse(model).fusion if status.name == "blocks.0.0"]
    assert not status.fused


def test_a_pooled_shortcut_around_an_mbconv_is_not_fused() -> None:
    fused = fuse(pooled("uir_r1_a0_k3_s2_e4_c64"))
    (status,) = [status for status in fused.fusion if status.name == "blocks.0.0"]
    assert not status.fused
    assert "pooled shortcut" in str(status)


BLOCK_PROBLEM = BlockProblem(1, 14, 14, 256, 1024, 256, 3, 8, 1, "silu", True, "float16")


def test_a_block_by_itself_exchanges_no_partial_sums_and_still_spreads() -> None:
    _, layers = make_operands(BLOCK_PROBLEM, seed=1, device=torch.device("cpu"))
    block = FusedBlock(layers, 1, "silu", True)
    assert block.new_scratch(torch.empty(1, 256, 14, 14, device="meta")).nbytes == 0
    tiling = tune.choose(block.kernel, block.problem((1, 256, 14, 14)), torch.device("cpu")).tiling
    assert tiling is not None
    assert tiling.partial_bytes(BLOCK_PROBLEM) == 0
    assert all(launch.programs >= 26 for launch in cost_model.launch_costs(BLOCK_PROBLEM, tiling))


def test_a_network_of_which_nothing_is_fused_runs_all_the_same() -> None:
    fused = fuse(network("cn_r1_k3_s1_e1_c16", activation=nn.ReLU6), dtype=torch.float32)
    assert not any(status.fused for status in fused.fusion)
    assert fused.problems(1, 16) == {}
    fused.prepare(1, 16)
    with torch.inference_mode():
        assert fused(images(1, 16, torch.float32, torch.device("cpu"))).shape == (1, CLASSES)


def test_the_report_says_what_runs_on_a_shape() -> None:
    fused = fuse(network("uir_r1_a3_k0_s2_e4_c64", "uir_r1_a3_k3_s2_e2_c32", "cn_r1_k3_s1_e1_c16"))
    lines = fused.report(1, 64).splitlines()
    assert [line.count("[fused, not timed]") for line in lines] == [1, 1, 1, 0, 1]


# -- Bad input -------------------------------------------------------------------------------------------------------


def test_bad_models_are_refused_by_name() -> None:
    model = network("uir_r1_a3_k0_s1_e2_c16")
    with pytest.raises(ValueError, match="training=True"):
        fuse(model.train())
    with pytest.raises(ValueError, match="model=Linear"):
        fuse(nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        fuse(model.eval(), dtype=torch.float64)
    with pytest.raises(ValueError, match="mode=True"):
        fuse(model).train()
    assert not fuse(model).eval().training
    with pytest.raises(ValueError, match=r"dtype=torch\.float32: the network is packed for torch\.float16"):
        fuse(model).float()
    with pytest.raises(ValueError, match="on cpu"):
        fuse(model).graph(1, 16)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(1, 3, 8, 8).half(), "not channels_last"),
        (torch.zeros(1, 3, 8, 8).to(memory_format=torch.channels_last), "input is float32, the layer float16"),
        (torch.zeros(1, 4, 8, 8).half(), "input has 4 channels"),
        (torch.zeros(3, 8, 8).half(), r"input has shape \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8).half(), "nothing in it"),
        (torch.zeros(1, 3, 8, 8).double().to(memory_format=torch.channels_last), "input is float64"),
    ],
)
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU6])
def test_bad_inputs_are_refused_by_name(x: Tensor, told: str, activation: type[nn.Module]) -> None:
    model = network("uir_r1_a3_k0_s1_e2_c16", activation=activation)
    # One fused part is left where the stem is not fused.
    model.blocks[0][0].pw_exp.bn.act = nn.ReLU()  # type: ignore[index, union-attr]
    fused = fuse(model)
    with pytest.raises(ValueError, match=told):
        fused(x)


def test_on_a_cpu_without_the_interpreter_it_is_said_what_is_missing() -> None:
    if INTERPRETED:
        pytest.skip("runs under the interpreter")
    fused = fuse(network("uir_r1_a3_k0_s1_e2_c16"))
    with pytest.raises(ValueError, match="CUDA, or with TRITON_INTERPRET=1"):
        fused(images(1, 8, torch.float16, torch.device("cpu")))


@pytest.mark.gpu
def test_another_device_is_refused_by_name() -> None:
    fused = fuse(network("uir_r1_a3_k0_s1_e2_c16")).cuda()
    with pytest.raises(ValueError, match="input is on cpu, the layer on cuda:0"):
        fused(images(1, 8, torch.float16, torch.device("cpu")))


# -- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
def test_peak_workspace_is_that_of_the_largest_block(batch: int) -> None:
    device = torch.device("cuda")
    fused = fuse(as_if_trained(load_space("imagenet").anchor().build(num_classes=1000)).to(device))
    x = images(batch, 224, torch.float16, device)
    # Not tuned, every part runs fused.
    assert "layer by layer" not in fused.report(batch, 224)
    largest = max(map(moved_bytes, fused.problems(batch, 224).values()))
    with torch.inference_mode():
        fused(x)
        assert peak_memory_bytes(lambda: fused(x), device) <= 1.05 * largest


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [BLOCK_PROBLEM, replace(BLOCK_PROBLEM, batch=64)], ids=str)
def test_a_block_by_itself_allocates_its_output_and_nothing_else(problem: BlockProblem) -> None:
    x, layers = make_operands(problem, seed=1, device=torch.device("cuda"))
    block = FusedBlock(layers, problem.stride, problem.activation, problem.residual).cuda()
    with torch.inference_mode():
        out = block(x)
        expected = out.nbytes
        tiling = tune.choose(block.kernel, block.problem(x.shape), x.device).tiling
        if tiling is not None and tiling.launches > 1:
            # What is between its launches as well.
            channels = problem.in_channels + problem.hidden_channels
            expected += problem.out_pixels * channels * x.element_size()
        assert peak_memory_bytes(lambda: block(x), x.device) == expected


@pytest.mark.gpu
def test_a_graph_replays_on_new_inputs() -> None:
    device = torch.device("cuda")
    fused = fuse(network("uir_r2_a3_k0_s2_e4_c64", "uir_r1_a3_k0_s2_e4_c256_gs8").to(device))
    for batch in (1, 8):
        graph = fused.graph(batch, 64)
        for seed in (1, 2):
            x = torch.randn((batch, 3, 64, 64), generator=torch.Generator().manual_seed(seed))
            x = x.to(device, torch.float16).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                assert torch.equal(graph(x), fused(x))
        with pytest.raises(ValueError, match="shape"):
            graph(x[:, :, :32])
        with pytest.raises(ValueError, match="float32"):
            graph(x.float())


@pytest.mark.gpu
def test_tuned_choices_are_remembered_on_disk_and_used_again() -> None:
    model = network("uir_r2_a3_k0_s2_e4_c64", "uir_r1_a3_k0_s2_e4_c128_gs8").to(torch.device("cuda"))
    fused = fuse(model)
    fused.prepare(4, 64)
    # The device with its number, as choices are kept.
    device = fused.device
    problems = list(fused.problems(4, 64).values())
    kernels = [module.kernel for module in fused.fused_modules.values()]
    first = [tune.choose(kernel, problem, device) for kernel, problem in zip(kernels, problems, strict=True)]
    assert all(choice.source == "tuned" for choice in first)
    tune._chosen.clear()
    again = [tune.choose(kernel, problem, device) for kernel, problem in zip(kernels, problems, strict=True)]
    assert all(choice.source == "remembered" for choice in again)
    assert [choice.tilings for choice in again] == [choice.tilings for choice in first]
    assert fuse(model).prepare(4, 64) < 1
