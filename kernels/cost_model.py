"""An analytic model of a fused block's time, which ranks the tilings that are worth trying.

Every term is a time on one resource, in seconds: its work, counted or estimated, over the GPU's rate. The terms of a
problem (`least_terms`) count the work that no kernel can avoid, and the largest of them is the block's bound. The terms
of a tiling count what its programs do, waste and repeated reads included. A tiling's estimate adds what terms leave
out: the last wave of programs, what overlaps only in part, and the latencies within a program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil

from kernels.problem import (
    LARGEST_PART,
    MAX_SPLITS,
    MIN_DOT,
    PAIR,
    PAIR_BLOCK,
    PAIR_SPAN,
    BlockProblem,
    ProductTiling,
    Tiling,
    conv_forms,
    pair_steps,
    parts,
    product_tilings,
    shares,
)

# Special-function results, and issue slots, of an activation per hidden element, bias and rounding included.
SPECIAL_FUNCTIONS = {"silu": 1, "relu": 0, "gelu": 1, "hard_swish": 0}
ISSUE_SLOTS = {"silu": 4.5, "relu": 2.5, "gelu": 9.5, "hard_swish": 6.5}
# The fewest issue slots of an activation per hidden element, with two float16 in each instruction: the conversion, and
# the activation's own arithmetic. Bias and loads are for nothing: products begin with the bias, and copies of whole
# boxes take one instruction.
LEAST_ISSUE_SLOTS = {"silu": 1.5, "relu": 1.0, "gelu": 3.5, "hard_swish": 2.0}
# Elements of an activation for each special function, at best: half of the elements can take a polynomial on the lanes
# instead, as in FlashAttention-4, which then are as busy. (`tanh.approx.f16x2` is two special functions: see
# `test_inspect`.)
ELEMENTS_PER_SPECIAL_FUNCTION = 2
# Issue slots of a thread's other work, without moves, as the emulator counts PTX: for 16 bytes of pixels (address,
# mask, copy and the way into products), a tap at a time or in rows, which share much of that; for 16 bytes of weights;
# for an output element; for a multiply-add of a depthwise convolution without tensor cores, conversions included; and
# for an element of a dense block that is made from weights on its diagonal. The last is for an element of the input
# in a pooled shortcut.
PIXEL_SLOTS, ROW_PIXEL_SLOTS, WEIGHT_SLOTS, OUT_SLOTS, FMA_SLOTS, DIAGONAL_SLOTS = 20, 15, 18, 5, 1.5, 4
SHORTCUT_SLOTS = 3.5


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """The sizes and rates of a GPU. The defaults are an H200's, partly assumed: see `docs/kernels.md`.

    Args:
        multiprocessors: number of multiprocessors.
        clock_hz: clock of the multiprocessors.
        registers: number of 32-bit registers of a multiprocessor.
        shared_bytes: shared memory that one program may use; a multiprocessor has hardly more.
        dram_bytes, l2_bytes: bytes per second of memory and second-level cache, read and written together.
        wgmma_macs, mma_macs: multiply-accumulates per second of 16-bit operands, by Hopper's warp-group products and by
            the older ones; the two are equal for a chip without warp-group products.
        l1_bytes, special_functions, lanes: bytes from the first-level cache, special functions and instructions of
            threads, each per clock and multiprocessor.
        launch_seconds: time of one launch inside a CUDA graph.
        latency_seconds: time of a load that misses the first-level cache.
    """

    multiprocessors: int = 132
    clock_hz: float = 1.755e9
    registers: int = 65536
    shared_bytes: int = 232_448
    dram_bytes: float = 4.3e12
    l2_bytes: float = 5.5e12
    wgmma_macs: float = 395e12
    mma_macs: float = 250e12
    l1_bytes: int = 128
    special_functions: int = 16
    lanes: int = 128
    launch_seconds: float = 1.5e-6
    latency_seconds: float = 0.6e-6


H200 = GpuSpec()
# By compute capability: rough numbers of an A100 (80), an RTX 4090 (89) and an H200, which rank tilings and make
# predictions; for its bounds the benchmark measures the GPU at hand. Shared memory is exact: 163, 99 and 227 KiB (CUDA
# C++ Programming Guide, table of technical specifications).
GPU_SPECS = {
    80: GpuSpec(
        multiprocessors=108, clock_hz=1.41e9, shared_bytes=166_912, dram_bytes=1.5e12, l2_bytes=3.5e12,
        wgmma_macs=156e12, mma_macs=156e12,
    ),
    89: GpuSpec(
        multiprocessors=128, clock_hz=2.52e9, shared_bytes=101_376, dram_bytes=0.95e12, l2_bytes=4e12,
        wgmma_macs=82e12, mma_macs=82e12,
    ),
    90: H200,
}  # fmt: skip


def conv_shape(problem: BlockProblem, tiling: Tiling) -> tuple[int, int]:
    """Channels of a block of the convolution's products, and columns of a tile's row that one warp can share out."""
    if tiling.conv == "pairs":
        return PAIR_BLOCK, tiling.columns // PAIR
    return problem.conv_block, tiling.columns


def conv_inputs(problem: BlockProblem, tiling: Tiling) -> int:
    """Inputs of a channel of the convolution as computed, zeros included, without a "dense" one's: weights a channel.

    In pairs each weight block has two columns of the output, and computes both.
    """
    if tiling.conv == "fma":
        return problem.kernel_size**2
    if tiling.conv == "pairs":
        return problem.kernel_size * pair_steps(problem.kernel_size) * PAIR_SPAN * PAIR_BLOCK
    return problem.kernel_size**2 * problem.conv_block


def conv_weights(problem: BlockProblem, tiling: Tiling) -> int:
    """Elements of the convolution's weights for each channel, as a product reads them."""
    return conv_inputs(problem, tiling) * (PAIR if tiling.conv == "pairs" else 1)


def padded_conv_macs(problem: BlockProblem, tiling: Tiling) -> int:
    """Multiply-accumulates of the convolution as computed, in dense blocks that are zero outside of the groups."""
    inputs = conv_inputs(problem, tiling)
    if tiling.conv == "dense":
        inputs = problem.kernel_size**2 * ceil(problem.in_channels / tiling.dense_block) * tiling.dense_block
    return tiling.tiles(problem) * tiling.block_m * problem.padded_in * inputs


def loaded_pixels(problem: BlockProblem, tiling: Tiling) -> int:
    """Input pixels that a tile loads for its convolution, each counted as often as it is loaded."""
    if tiling.rows == 1:
        return problem.kernel_size**2 * tiling.block_m
    if tiling.conv == "pairs":
        rows = tiling.rows - 1 + problem.kernel_size
        return rows * (tiling.columns // PAIR) * PAIR_SPAN * pair_steps(problem.kernel_size)
    return problem.kernel_size * ((tiling.rows - 1) * problem.stride + problem.kernel_size) * tiling.columns


def fetched_pixels(problem: BlockProblem, tiling: Tiling) -> float:
    """Input pixels that a tile's loads ask of the caches, each counted once for each instruction of a warp.

    In pairs an instruction loads `PAIR_SPAN` columns for each of four neighbouring pairs, half of which they share.
    Nothing is loaded past the last column that a pair needs.
    """
    if tiling.conv != "pairs":
        return loaded_pixels(problem, tiling)
    together, columns = 4, 0
    for step in range(pair_steps(problem.kernel_size)):
        span = min(PAIR_SPAN, problem.kernel_size + PAIR - 1 - step * PAIR_SPAN)
        columns += PAIR * (together - 1) + span
    return (tiling.rows - 1 + problem.kernel_size) * tiling.columns * columns / (PAIR * together)


def distinct_pixels(problem: BlockProblem, tiling: Tiling) -> int:
    """Number of different input pixels that a tile needs, roughly: its own and a rim."""
    rows, columns = tiling.rows, tiling.columns
    if rows == 1:
        rows, columns = ceil(columns / problem.out_width), min(columns, problem.out_width)
    height, width = ((count - 1) * problem.stride + problem.kernel_size for count in (rows, columns))
    return min(height * width, int(fetched_pixels(problem, tiling)))


def repeated(problem: BlockProblem, tiling: Tiling, part: int) -> float:
    """Number of warps that compute the same part of the convolution, where warps outnumber blocks and shares."""
    block, columns = conv_shape(problem, tiling)
    each = shares(columns, part, block, tiling.num_warps)
    return max(1.0, tiling.num_warps * block / (part * each))


def on_chip_bytes(problem: BlockProblem, tiling: Tiling, wgmma: bool) -> float:
    """Bytes that a program moves through shared memory and the first-level cache, which share one path.

    The result is 0.7 to 1.2 times what the emulator counts for compiled kernels of 16 bits (`test_emulator.py`).

    Args:
        wgmma: whether the chip has Hopper's products, which read their second operand from shared memory once for 64
            rows; with the older products each warp reads what it needs.
    """
    size, taps, pixels = problem.itemsize, problem.kernel_size**2, tiling.block_m
    into, out = problem.padded_in, problem.padded_out // tiling.out_splits
    loaded = loaded_pixels(problem, tiling)
    warp_groups = wgmma and pixels >= 64 and problem.itemsize == 2
    weights_read = pixels / 64 if warp_groups else min(tiling.num_warps, pixels // MIN_DOT)
    tile_read = max(1.0, tiling.num_warps * MIN_DOT / pixels)
    # A pipeline copies past its end, as zeros; without one the stored data comes through the cache first.
    conv_steps = tiling.tap_steps(problem.kernel_size)
    copied = (conv_steps + tiling.conv_stages - 1) / conv_steps if tiling.conv_stages > 1 else 2
    conv = 0.0
    block, columns = conv_shape(problem, tiling)
    for part in parts(problem.in_channels, problem.conv_block, tiling.part):
        if tiling.conv == "fma":
            conv += loaded * part * size
        elif tiling.conv == "dense":
            inputs = ceil(problem.in_channels / tiling.dense_block) * tiling.dense_block
            conv += inputs * size * (loaded * (copied + tile_read) + taps * part * (1 + weights_read))
        else:
            each = shares(columns, part, block, tiling.num_warps)
            again = repeated(problem, tiling, part)
            conv += part * size * (loaded * (copied + again) + conv_weights(problem, tiling) * 2 * each)
    steps = tiling.steps(problem)
    weights = tiling.block_e * (into + out) * size
    if tiling.tiles_each > 1:
        fetched = 2 * steps / tiling.tiles_each
    else:
        fetched = steps + tiling.num_stages - 1 if tiling.num_stages > 1 else 2 * steps
    hidden = steps * (pixels * into * size * tile_read + weights * weights_read) + weights * fetched
    # The convolution's result on its way to a product, and the output on its way out.
    return tiling.tiles_each * (conv + hidden + 3 * pixels * into * size + 3 * pixels * out * 4)


def issue_slots(problem: BlockProblem, tiling: Tiling) -> float:
    """Issue slots of all threads together.

    The result is 0.75 to 1.25 times the PTX that the emulator counts, without moves (0.6 for a "dense" convolution).
    """
    size = problem.itemsize
    outputs = problem.padded_out // tiling.out_splits
    steps = tiling.steps(problem)
    weights = steps * tiling.block_e * (problem.padded_in + outputs) / tiling.tiles_each
    pixels = loaded_pixels(problem, tiling) * problem.padded_in
    a_tile = tiling.block_m * (steps * tiling.block_e * ISSUE_SLOTS[problem.activation] + outputs * OUT_SLOTS)
    if problem.residual and problem.stride > 1:
        a_tile += tiling.block_m * outputs * problem.stride**2 * SHORTCUT_SLOTS
    taps = problem.kernel_size**2 * problem.padded_in
    if tiling.conv == "fma":
        a_tile += tiling.block_m * taps * FMA_SLOTS
    elif tiling.conv == "diagonal":
        a_tile += taps * problem.conv_block * DIAGONAL_SLOTS
    elif tiling.conv == "dense":
        inputs = ceil(problem.in_channels / tiling.dense_block) * tiling.dense_block
        weights += taps * inputs
        pixels = loaded_pixels(problem, tiling) * inputs * len(parts(problem.in_channels, MIN_DOT, tiling.part))
    else:
        block, columns = conv_shape(problem, tiling)
        for part in parts(problem.in_channels, problem.conv_block, tiling.part):
            weights += part * conv_weights(problem, tiling) * shares(columns, part, block, tiling.num_warps)
    a_tile += pixels * size / 16 * (PIXEL_SLOTS if tiling.rows == 1 else ROW_PIXEL_SLOTS)
    a_tile += weights * size / 16 * WEIGHT_SLOTS
    return tiling.tiles(problem) * tiling.splits * tiling.out_splits * a_tile


def l2_bytes(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec) -> float:
    """Bytes that all programs read from and write to the second-level cache."""
    size = problem.itemsize
    outputs = problem.padded_out // tiling.out_splits
    widths = parts(problem.in_channels, problem.conv_block, tiling.part)
    # Each program reads the weights of the 1x1 convolutions, and each tile those of the grouped convolution.
    weights = tiling.steps(problem) * tiling.block_e * (problem.padded_in + outputs)
    of_conv = problem.kernel_size**2 * problem.padded_in
    if tiling.conv not in ("fma", "diagonal"):
        of_conv = padded_conv_macs(problem, tiling) // (tiling.tiles(problem) * tiling.block_m)
        of_conv *= PAIR if tiling.conv == "pairs" else 1
    # Asynchronous copies bypass the first-level cache.
    together, pixels = resident(problem, tiling, gpu), float(distinct_pixels(problem, tiling))
    past = tiling.conv_stages > 1 and tiling.conv != "fma"
    missed = past or together * pixels * max(widths) * size > cache_bytes(problem, tiling, gpu)
    if missed:
        pixels = fetched_pixels(problem, tiling)
    # A full convolution reads all of its input for each part of its output.
    channels = problem.in_channels * (len(widths) if tiling.conv == "dense" else 1)
    tiles = tiling.tiles(problem) * tiling.splits * tiling.out_splits
    # What misses the cache has to be loaded again for the shortcut.
    out = problem.out_pixels * problem.out_channels + (problem.shortcut_elements if missed else 0)
    elements = tiling.programs(problem) * weights + tiles * (of_conv + pixels * channels) + out
    return size * elements + 2 * tiling.partial_bytes(problem)


def cache_bytes(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec) -> int:
    """Bytes left for a multiprocessor's first-level cache.

    If a kernel uses more than 48 KiB of shared memory, Triton asks for as much as there is, however much the kernel
    uses (its driver.c: `CU_FUNC_CACHE_PREFER_SHARED`).
    """
    shared = shared_bytes(problem, tiling)
    if shared >= PREFER_SHARED_BYTES:
        return OTHER_CACHE_BYTES
    return gpu.shared_bytes + OTHER_CACHE_BYTES - resident(problem, tiling, gpu) * shared


@dataclass(frozen=True, slots=True)
class LaunchCost:
    """The counted cost of one launch.

    Args:
        terms: seconds on each resource, by name.
        programs: number of programs.
        together: programs that a multiprocessor holds at once.
        latencies: number of load latencies of a tile, if it ran alone.
        tiles_each: tiles of a program.
    """

    terms: dict[str, float]
    programs: int
    together: int
    latencies: float
    tiles_each: int = 1

    def seconds(self, gpu: GpuSpec) -> float:
        """Seconds of the launch: the binding resource in whole waves of programs, plus exposed latencies."""
        slots = gpu.multiprocessors * self.together
        waves = ceil(self.programs / slots)
        # A part-filled wave takes as long as a full one, up to what fewer programs on a multiprocessor gain.
        many = self.programs > slots
        idle = waves * slots / self.programs if many else max(1.0, gpu.multiprocessors / self.programs)
        # Products, special functions and plain instructions of different warps overlap, but never completely.
        compute = [self.terms[name] for name in ("tensor", "special", "issue", "shared")]
        busy = max(max(compute) + 0.4 * (sum(compute) - max(compute)), self.terms["l2"]) * idle
        # The other programs of the multiprocessor, if there are any, hide a tile's latencies.
        rounds = waves * self.tiles_each
        exposed = max(min(rounds, 2), rounds / self.together)
        return gpu.launch_seconds + max(self.terms["dram"], busy) + gpu.latency_seconds * self.latencies * exposed


def launch_costs(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec = H200) -> list[LaunchCost]:
    """Costs of the block's one launch, or of its layers' three."""
    if tiling.launches == 1:
        return [_block_cost(problem, tiling, gpu)]
    # One slice of channels after the other, and what each slice stores.
    one = conv_slice(problem, tiling)
    conv = _block_cost(one, replace(tiling, launches=1), gpu)
    slices = problem.padded_in // tiling.part
    stored = problem.out_pixels * problem.in_channels
    terms = {name: slices * seconds for name, seconds in conv.terms.items()}
    terms["dram"] += _dram_bytes(problem, stored) / gpu.dram_bytes
    terms["l2"] += problem.itemsize * stored / gpu.l2_bytes
    terms["issue"] += OUT_SLOTS * stored / (gpu.lanes * gpu.multiprocessors * gpu.clock_hz)
    expansion, projection = product_tilings(problem)
    into, hidden, out = problem.in_channels, problem.hidden_channels, problem.out_channels
    return [
        replace(conv, terms=terms, programs=slices * conv.programs),
        _product_cost(problem, expansion, into, hidden, problem.activation, 0, gpu),
        _product_cost(problem, projection, hidden, out, "none", problem.shortcut_elements, gpu),
    ]


def conv_slice(problem: BlockProblem, tiling: Tiling) -> BlockProblem:
    """The block as one program of a separate convolution launch sees it: a slice of channels and nothing else."""
    return replace(problem, in_channels=tiling.part, hidden_channels=0, out_channels=0, residual=False)


def _dram_bytes(problem: BlockProblem, elements: int) -> int:
    """Bytes of a tensor between two launches that do not stay in the second-level cache."""
    return elements * problem.itemsize if elements * problem.itemsize > KEPT_IN_L2_BYTES else 0


def _block_cost(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec) -> LaunchCost:
    pixels = tiling.tiles(problem) * tiling.block_m
    per_clock = gpu.multiprocessors * gpu.clock_hz
    steps = tiling.steps(problem)
    # Programs that share a tile each compute the convolution, and with split outputs the hidden channels, themselves.
    hidden = pixels * steps * tiling.splits * tiling.block_e * tiling.out_splits
    matrix = (gpu.wgmma_macs if tiling.block_m >= 64 else gpu.mma_macs) / (4 if problem.itemsize == 4 else 1)
    conv_macs = padded_conv_macs(problem, tiling) * tiling.splits * tiling.out_splits
    outputs = problem.padded_out // tiling.out_splits
    shared = tiling.programs(problem) * on_chip_bytes(problem, tiling, gpu.wgmma_macs > gpu.mma_macs)
    terms = {
        "dram": (problem.activation_bytes + 2 * tiling.partial_bytes(problem)) / gpu.dram_bytes,
        "l2": l2_bytes(problem, tiling, gpu) / gpu.l2_bytes,
        "shared": shared / (gpu.l1_bytes * per_clock),
        "tensor": (0 if tiling.conv == "fma" else conv_macs / min(matrix, gpu.mma_macs))
        + hidden * (problem.padded_in + outputs) / matrix,
        "special": hidden * SPECIAL_FUNCTIONS[problem.activation] / (gpu.special_functions * per_clock),
        "issue": issue_slots(problem, tiling) / (gpu.lanes * per_clock),
    }
    tap_steps = tiling.tap_steps(problem.kernel_size)
    tap_steps *= len(parts(problem.in_channels, problem.conv_block, tiling.part))
    if tiling.conv == "dense":
        tap_steps *= ceil(problem.in_channels / tiling.dense_block)
    together = resident(problem, tiling, gpu)
    # Copies in flight hide each other's latency. Loads through L1, which a program issues one by one, do not, but other
    # programs on the multiprocessor continue meanwhile.
    latencies = tap_steps / max(tiling.conv_stages, together, tiling.num_warps / 4) + 2
    latencies += steps / (tiling.num_stages * tiling.tiles_each)
    if tiling.splits > 1:
        # The program that ends last reads all sums of the tile alone.
        rows = min(tiling.block_m, problem.out_pixels)
        alone = 4 * tiling.splits * rows * outputs / (ALONE_BYTES * gpu.clock_hz)
        latencies += 4 + alone / gpu.latency_seconds
    return LaunchCost(terms, tiling.programs(problem), together, latencies, tiling.tiles_each)


def _product_cost(
    problem: BlockProblem, tiling: ProductTiling, into: int, outputs: int, activation: str, added: int, gpu: GpuSpec
) -> LaunchCost:
    """Cost of a product of (pixels, into) and (into, outputs) in a launch of its own, which also reads `added` elements
    of a shortcut."""
    size, m, n = problem.itemsize, tiling.block_m, tiling.block_n
    programs = tiling.programs(problem.out_pixels, outputs)
    inner = ceil(into / tiling.block_k) * tiling.block_k
    loaded, computed = programs * inner * (m + n) * size, programs * m * n
    stored = problem.out_pixels * outputs
    per_clock = gpu.multiprocessors * gpu.clock_hz
    warp_groups = m >= 64 and size == 2 and gpu.wgmma_macs > gpu.mma_macs
    matrix = (gpu.wgmma_macs if m >= 64 else gpu.mma_macs) / (4 if size == 4 else 1)
    # Hopper's products read the second operand once for 64 rows; with older ones each warp reads its share of both.
    read = m + n * m / 64 if warp_groups else 2 * m + min(4, m // MIN_DOT) * n
    traffic = loaded + (programs * inner * read + 2 * computed) * size
    terms = {
        "dram": (_dram_bytes(problem, problem.out_pixels * into) + _dram_bytes(problem, stored)) / gpu.dram_bytes,
        "l2": (loaded + (stored + added) * size) / gpu.l2_bytes,
        "shared": traffic / (gpu.l1_bytes * per_clock),
        "tensor": computed * inner / matrix,
        "special": computed * SPECIAL_FUNCTIONS.get(activation, 0) / (gpu.special_functions * per_clock),
        "issue": (loaded / 16 * WEIGHT_SLOTS + computed * (OUT_SLOTS + ISSUE_SLOTS.get(activation, 0)))
        / (gpu.lanes * per_clock),
    }
    registers = 32 * tiling.num_warps * min(255, m * n / (32 * tiling.num_warps) + OTHER_REGISTERS)
    room = gpu.shared_bytes // (_product_shared_bytes(problem, tiling) + 1024)
    together = max(1, min(int(gpu.registers / registers), room))
    return LaunchCost(terms, programs, together, inner / (tiling.block_k * tiling.num_stages) + 2)


def _product_shared_bytes(problem: BlockProblem, tiling: ProductTiling) -> int:
    return problem.itemsize * tiling.num_stages * (tiling.block_m + tiling.block_n) * tiling.block_k


def terms(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec = H200) -> dict[str, float]:
    """Seconds of a tiling on each resource, by name, for all launches together.

    All terms include waste: places past the last pixel, and channels past the last real one, are computed, too.
    """
    launches = launch_costs(problem, tiling, gpu)
    return {name: sum(launch.terms[name] for launch in launches) for name in launches[0].terms}


def largest_term(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec = H200) -> tuple[str, float]:
    """The resource on which a tiling takes longest, and its seconds."""
    return _largest(terms(problem, tiling, gpu))


def _largest(seconds: dict[str, float]) -> tuple[str, float]:
    name = max(seconds, key=seconds.__getitem__)
    return name, seconds[name]


def least_terms(problem: BlockProblem, gpu: GpuSpec = H200) -> dict[str, float]:
    """Least seconds on each resource, by name, of any kernel that computes the block in one launch.

    - dram: input, weights and output, each byte once.
    - tensor: the real multiply-accumulates at the best rate of any product, without the zeros of dense blocks. Those of
      a depthwise convolution do not count, as other lanes can compute them meanwhile.
    - special, issue: the activation of the real hidden channels as in `ELEMENTS_PER_SPECIAL_FUNCTION` and
      `LEAST_ISSUE_SLOTS`, and half a slot for each output's conversion.

    The second-level cache and shared memory have no term. What must pass the former also passes memory, which is
    slower; how often else it is read, and all that passes the latter beside the operands of products, which take less
    time than these products, is the kernel's choice.
    """
    per_clock = gpu.multiprocessors * gpu.clock_hz
    hidden = problem.out_pixels * problem.hidden_channels
    slots = hidden * LEAST_ISSUE_SLOTS[problem.activation] + problem.out_pixels * problem.out_channels / 2
    special = hidden * SPECIAL_FUNCTIONS[problem.activation] / ELEMENTS_PER_SPECIAL_FUNCTION
    macs = problem.mlp_macs if problem.group_width == 1 else problem.macs
    return {
        "dram": (problem.activation_bytes + weight_bytes(problem)) / gpu.dram_bytes,
        "tensor": macs / best_macs(problem, gpu),
        "special": special / (gpu.special_functions * per_clock),
        "issue": slots / (gpu.lanes * per_clock),
    }


def bound(problem: BlockProblem, gpu: GpuSpec = H200) -> tuple[str, float]:
    """The resource that takes longest in any kernel (`least_terms`), and its seconds, which no kernel undercuts."""
    return _largest(least_terms(problem, gpu))


def weight_bytes(problem: BlockProblem) -> int:
    """Bytes of the block's weights, without biases and padding."""
    channels = problem.in_channels * problem.kernel_size**2 * problem.group_width
    return problem.itemsize * (channels + problem.hidden_channels * (problem.in_channels + problem.out_channels))


def best_macs(problem: BlockProblem, gpu: GpuSpec) -> float:
    """Multiply-accumulates per second of the fastest products of the problem's dtype."""
    return max(gpu.wgmma_macs, gpu.mma_macs) / (4 if problem.itemsize == 4 else 1)


def roofline(problem: BlockProblem, gpu: GpuSpec = H200) -> float:
    """Seconds by the plain roofline: necessary operations over peak, or necessary bytes over bandwidth."""
    return max(
        problem.macs / best_macs(problem, gpu), (problem.activation_bytes + weight_bytes(problem)) / gpu.dram_bytes
    )


def layer_roofline(problem: BlockProblem, gpu: GpuSpec = H200) -> float:
    """Seconds of three layers, each at its own roofline: conv; expand and activate; project and add."""
    pixels, size = problem.out_pixels, problem.itemsize
    peak = best_macs(problem, gpu)
    into, hidden, out = problem.in_channels, problem.hidden_channels, problem.out_channels
    layers = (
        (problem.conv_macs, problem.batch * problem.height * problem.width * into + pixels * into),
        (pixels * into * hidden, pixels * (into + hidden) + into * hidden),
        (pixels * hidden * out, pixels * (hidden + out) + problem.shortcut_elements + hidden * out),
    )
    return sum(max(macs / peak, elements * size / gpu.dram_bytes) for macs, elements in layers)


def shared_bytes(problem: BlockProblem, tiling: Tiling) -> int:
    """Shared memory of a program, roughly; of several launches the most.

    It holds the pipeline of weights, and the convolution's result on its way to a product.
    """
    if tiling.launches > 1:
        products = [_product_shared_bytes(problem, each) for each in product_tilings(problem)]
        return max(shared_bytes(conv_slice(problem, tiling), replace(tiling, launches=1)), *products)
    # Products in float32 use plain registers, which all of their operands reach through shared memory.
    plain = problem.itemsize == 4
    widths = problem.padded_in, problem.padded_out // tiling.out_splits
    steps = tiling.steps(problem)
    kept = tiling.tiles_each > 1
    if plain and not kept and tiling.num_stages == 1:
        weights = max(widths) * tiling.block_e * problem.itemsize
    else:
        weights = (steps if kept else tiling.num_stages) * sum(widths) * tiling.block_e * problem.itemsize
    conv = 0
    if tiling.conv != "fma":
        part = max(parts(problem.in_channels, problem.conv_block, tiling.part))
        pixels = loaded_pixels(problem, tiling) // tiling.tap_steps(problem.kernel_size)
        # One copy of pixels is in use while the others arrive. Float32 has one more, and so have weights, as products
        # read them; weights on diagonals come through registers.
        copies = max(1, tiling.conv_stages - (0 if plain else 1))
        if tiling.conv == "dense":
            conv = copies * tiling.dense_block * (pixels + part) * problem.itemsize
        else:
            block, columns = conv_shape(problem, tiling)
            each = shares(columns, part, block, tiling.num_warps)
            held = conv_weights(problem, tiling) // tiling.tap_steps(problem.kernel_size)
            held *= 1 if tiling.conv == "diagonal" else tiling.conv_stages
            conv = (copies * pixels + held * each) * part * problem.itemsize
            if tiling.conv == "pairs":
                # The results of the parts before wait in shared memory.
                conv += tiling.block_m * (problem.padded_in - part) * problem.itemsize
    result = tiling.block_m * problem.padded_in * problem.itemsize
    return weights + max(result, conv) if kept else max(weights + result, conv)


def live_registers(problem: BlockProblem, tiling: Tiling) -> float:
    """Registers per thread for the tensors of the loop over hidden channels, or right before it, without addresses."""
    words = problem.itemsize / 4
    outputs = problem.padded_out // tiling.out_splits
    step = tiling.block_e
    if problem.residual and problem.stride > 1:
        # Before the loop, the pixels of a stride are loaded for one part of the output after the other.
        step = max(step, min(outputs, max(parts(problem.out_channels, MIN_DOT, tiling.part))))
    elements = tiling.block_m * (outputs + problem.padded_in * words + step)
    steps = tiling.steps(problem)
    if tiling.tiles_each == 1 and (tiling.num_stages == 1 or steps <= tiling.num_stages):
        # If the loop is too short for its pipeline, the weights of a step come through registers.
        elements += tiling.block_e * (problem.padded_in + outputs) * words
    return elements / (32 * tiling.num_warps)


def conv_registers(problem: BlockProblem, tiling: Tiling) -> float:
    """Registers per thread for a tile's convolution: its sums, and the pixels of a tap or a column of taps."""
    if tiling.conv == "dense":
        return 0.0
    part = max(parts(problem.in_channels, problem.conv_block, tiling.part))
    words = 1 if tiling.conv == "fma" else problem.itemsize / 4
    pixels = loaded_pixels(problem, tiling) / tiling.tap_steps(problem.kernel_size)
    times = 1.0 if tiling.conv == "fma" else repeated(problem, tiling, part)
    if tiling.conv == "pairs":
        # The weights of all rows of taps, too, which are more.
        block, columns = conv_shape(problem, tiling)
        held = conv_weights(problem, tiling) / tiling.tap_steps(problem.kernel_size)
        pixels += held * shares(columns, part, block, tiling.num_warps) / times
    return times * part * (tiling.block_m + pixels * words) / (32 * tiling.num_warps)


def resident(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec) -> int:
    """Number of programs that a multiprocessor holds at once, roughly."""
    live = max(live_registers(problem, tiling), conv_registers(problem, tiling))
    registers = min(255, live + OTHER_REGISTERS) * 32 * tiling.num_warps
    return max(1, min(int(gpu.registers / registers), gpu.shared_bytes // (shared_bytes(problem, tiling) + 1024)))


# Pixels of a tile, and hidden channels of a step, that are tried.
BLOCKS_M = (16, 32, 64, 128, 256)
BLOCKS_E = (16, 32, 64, 128)
SPLITS = (1, 2, 4, 8, 16, MAX_SPLITS)
OUT_SPLITS = (1, 2, 4)
ROWS = (1, 2, 4, 8)
# Live registers per thread above which the compiler spilled, with Hopper's products, which read shared memory, and with
# the older ones, which read registers; found by compiling the blocks of `test_inspect` and samples of
# `nas.lab.kernel_sweep`.
MOST_LIVE_REGISTERS = {"wgmma": 204, "mma": 150}
OTHER_REGISTERS = 44
# The same for kept weights, where the steps of the loop are unrolled, and the most steps then.
MOST_LIVE_KEPT, MOST_KEPT_STEPS = 116, 4
# The same for tiles of several rows: with many channels; with any number, and the older products; with large kernels in
# a pipeline, by stride and including the convolution's own registers; and these with the older products.
MOST_LIVE_ROWS, MOST_LIVE_ROWS_MMA, MOST_LIVE_TAPS, MOST_LIVE_TAPS_MMA = 126, 110, {1: 304, 2: 240}, 130
# The same for large tiles of many channels with Hopper's products (`is_large`): live registers, and registers of the
# convolution of several rows, for k 3 in a pipeline and otherwise.
MOST_LIVE_LARGE, MOST_CONV_PIPELINED, MOST_CONV_LARGE = 226, 112, 150
# The same for tiles in pairs of columns with Hopper's products, and registers of their convolution with any.
MOST_LIVE_PAIRS, MOST_CONV_PAIRS = 256, 208
# The first-level cache and shared memory share one memory: the bytes that always belong to the cache, and the shared
# memory of a program from which on all the rest is shared memory.
OTHER_CACHE_BYTES, PREFER_SHARED_BYTES = 28 * 1024, 48 * 1024
# A tensor of this size or less, about half the second-level cache of the GPUs in `GPU_SPECS`, is still in the cache
# when the next launch reads it.
KEPT_IN_L2_BYTES = 24 * 2**20
# Among this many first tilings there is one with a single launch, and one with three unless that is slower by this
# factor.
OF_EITHER_KIND, BY_FAR = 3, 1.5
# Bytes per clock that one multiprocessor alone reads from the second-level cache; assumed.
ALONE_BYTES = 64
# Most channels of a program in the launch of the convolution alone.
WIDEST_CONV = 64
# Registers per thread of that convolution above which the compiler spilled.
MOST_CONV = 130
# Waves of programs that have several tiles, roughly. With a single wave, a multiprocessor that holds fewer programs
# than counted would make all others wait for a second one.
KEPT_WAVES = 2


def estimate(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec = H200) -> float:
    """Predicted seconds of the block: of its one launch, or of its layers' three one after the other."""
    return sum(launch.seconds(gpu) for launch in launch_costs(problem, tiling, gpu))


def fitting_tilings(problem: BlockProblem, gpu: GpuSpec = H200) -> list[Tiling]:
    """All tilings that fit the GPU, however slow."""
    tilings = []
    wgmma = gpu.wgmma_macs > gpu.mma_macs
    shapes = [(block_m, rows) for block_m in BLOCKS_M for rows in ROWS if block_m // rows >= MIN_DOT]
    for (block_m, rows), block_e, warps, stages in product(shapes, BLOCKS_E, (4, 8), (1, 2, 3)):
        if block_m > max(MIN_DOT, 2 * problem.out_pixels) or block_e > problem.padded_hidden:
            continue
        if rows >= 2 * problem.out_height:
            continue
        for form, conv_stages, part in product(conv_forms(problem), (1, 3), (32, 64, 128)):
            if part < 128 and max(problem.padded_in, problem.padded_out) < 2 * part:
                continue
            if part == 32 and form != "pairs":
                continue
            if form in ("fma", "pairs") and conv_stages > 1:
                continue
            if (rows > 1 and form == "dense") or (form == "pairs" and (rows == 1 or block_m // rows < PAIR * MIN_DOT)):
                continue
            one = Tiling(block_m, block_e, form, 1, warps, stages, conv_stages, part=part, rows=rows)
            if not compiles(problem, one, gpu):
                continue
            for splits, out_splits in product(SPLITS, OUT_SPLITS):
                split = replace(one, splits=splits, out_splits=out_splits)
                if splits * out_splits > 1 and split.programs(problem) > 2 * gpu.multiprocessors:
                    continue
                if split.fits(problem) and live_registers(problem, split) <= most_live_registers(problem, split, wgmma):
                    tilings.append(split)
            # A tiling that keeps its weights has no pipeline over hidden channels: one number of stages is enough.
            if stages == 2 and (kept := keeping(problem, one, gpu)):
                tilings.append(kept)
    return tilings + three_launch_tilings(problem, gpu)


def three_launch_tilings(problem: BlockProblem, gpu: GpuSpec) -> list[Tiling]:
    """The fitting tilings that give each layer a launch of its own."""
    if problem.is_dense:
        return []
    # Slices have to divide the channels evenly.
    width = min(WIDEST_CONV, problem.padded_in & -problem.padded_in)
    widths = [each for each in (width, width // 2) if each >= problem.conv_block]
    tilings = []
    for block_m, rows, form, warps, conv_stages, part in product(
        BLOCKS_M, ROWS, conv_forms(problem), (4, 8), (1, 3), widths
    ):
        tiling = Tiling(block_m, MIN_DOT, form, 1, warps, 1, conv_stages, part=part, rows=rows, launches=3)
        if block_m > max(MIN_DOT, 2 * problem.out_pixels) or rows >= 2 * problem.out_height:
            continue
        if tiling.columns < MIN_DOT or (form == "fma" and conv_stages > 1) or not tiling.fits(problem):
            continue
        one = conv_slice(problem, tiling)
        fits = shared_bytes(problem, tiling) <= most_shared_bytes(problem, gpu)
        if fits and conv_registers(one, tiling) <= MOST_CONV and compiles(one, tiling, gpu):
            tilings.append(tiling)
    return tilings


def compiles(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec) -> bool:
    """Whether shared memory and registers suffice for a tiling without splits, as far as compiling has shown."""
    wgmma = gpu.wgmma_macs > gpu.mma_macs
    if shared_bytes(problem, tiling) > most_shared_bytes(problem, gpu):
        return False
    if tiling.num_warps == 4:
        if tiling.conv in ("fma", "diagonal") and problem.padded_in > 256:
            return False
        # The compiler unrolls the taps of wide convolutions, and four warps lack the registers for their loads.
        if problem.padded_in > 128 and (problem.kernel_size > 3 or problem.conv_block > MIN_DOT):
            return False
        if problem.padded_in > 128 and tiling.conv_stages > 1 and tiling.block_m >= 64 and not wgmma:
            return False
    # The same happens with blocks of 32 channels, in a pipeline or with many pixels.
    if problem.conv_block > MIN_DOT and (tiling.conv_stages > 1 or tiling.block_m > 128):
        return False
    # Older products read registers: 64 x 64 with blocks of 32 spilled 2 instructions on sm_80, 64 rows of 320 channels
    # spilled 8.
    if not wgmma and problem.conv_block > MIN_DOT and tiling.block_m * tiling.block_e > 2048:
        return False
    if not wgmma and problem.padded_in > 256 and tiling.block_m >= 64:
        return False
    if not wgmma and problem.padded_in > 384 and tiling.block_m > MIN_DOT:
        return False
    return tiling.rows == 1 or rows_fit(problem, tiling, wgmma)


def is_large(problem: BlockProblem, tiling: Tiling, wgmma: bool) -> bool:
    """Whether a tiling has a large tile of many channels, of which more tilings were compiled than of others."""
    of_hopper = wgmma and tiling.num_warps == 8 and tiling.block_m == 128 and tiling.block_e <= 64
    return of_hopper and tiling.num_stages > 1 and 128 < problem.padded_in <= 256


def most_live_registers(problem: BlockProblem, tiling: Tiling, wgmma: bool) -> int:
    """The most live registers per thread with which the compiler did not spill."""
    if is_large(problem, tiling, wgmma):
        return MOST_LIVE_LARGE
    if wgmma and tiling.conv == "pairs" and problem.padded_in <= LARGEST_PART:
        return MOST_LIVE_PAIRS
    return MOST_LIVE_REGISTERS["wgmma" if wgmma else "mma"]


def most_shared_bytes(problem: BlockProblem, gpu: GpuSpec) -> int:
    """The most shared memory that may be counted for a program; in float32 the count is up to a quarter too low."""
    return gpu.shared_bytes * 3 // 4 if problem.itemsize == 4 else gpu.shared_bytes - 2048


def rows_fit(problem: BlockProblem, tiling: Tiling, wgmma: bool) -> bool:
    """Whether a tile of several rows has registers for its convolution, as far as compiling has shown, and enough warps
    for its blocks."""
    if tiling.conv == "pairs" and conv_registers(problem, tiling) > MOST_CONV_PAIRS:
        return False
    if tiling.conv_stages == 1 and tiling.conv not in ("fma", "pairs"):
        # Otherwise blocks on their way into shared memory lie in the same banks: see `device_functions.load_blocks`.
        widest = max(parts(problem.in_channels, problem.conv_block, tiling.part))
        if widest > problem.conv_block * tiling.num_warps:
            return False
    live = live_registers(problem, tiling)
    if not wgmma and (live > MOST_LIVE_ROWS_MMA or (problem.padded_in > 256 and tiling.num_warps == 4)):
        return False
    if problem.conv_block > MIN_DOT and tiling.block_m > 64:
        return False
    pipelined, conv = tiling.conv_stages > 1, conv_registers(problem, tiling)
    if pipelined and problem.kernel_size > 3:
        if wgmma and live + conv > MOST_LIVE_TAPS[problem.stride]:
            return False
        if not wgmma and (tiling.rows > 4 or live > MOST_LIVE_TAPS_MMA):
            return False
    if is_large(problem, tiling, wgmma):
        return conv <= (MOST_CONV_PIPELINED if pipelined and problem.kernel_size == 3 else MOST_CONV_LARGE)
    if problem.padded_in > 256 and (problem.kernel_size > 3 or tiling.block_m > 32):
        return False
    return problem.padded_in <= 128 or live <= MOST_LIVE_ROWS


def keeping(problem: BlockProblem, tiling: Tiling, gpu: GpuSpec) -> Tiling | None:
    """The tiling with as many tiles per program as fill the chip twice.

    None if that is a single tile, or if the weights do not fit shared memory.
    """
    several = replace(tiling, tiles_each=2)
    fits = several.fits(problem) and shared_bytes(problem, several) <= most_shared_bytes(problem, gpu)
    if not fits or tiling.steps(problem) > MOST_KEPT_STEPS or live_registers(problem, several) > MOST_LIVE_KEPT:
        return None
    if gpu.wgmma_macs == gpu.mma_macs and tiling.block_e > 64:
        return None
    slots = gpu.multiprocessors * resident(problem, several, gpu)
    each = ceil(tiling.tiles(problem) / (KEPT_WAVES * slots))
    return replace(tiling, tiles_each=each) if each > 1 else None


@lru_cache(maxsize=4096)
def ranked(problem: BlockProblem, gpu: GpuSpec = H200) -> tuple[Tiling, ...]:
    """The tilings that fit, ordered by their estimates, the fastest first; near relatives of earlier ones come last.

    Relatives share size, splits and form of convolution and differ in pipelining and warps, which the estimate tells
    apart worst. Of them only the likeliest that loads taps through the first-level cache and the likeliest that copies
    past it come early. The estimate hardly tells better whether one launch beats three: the likeliest of either kind is
    among the first `OF_EITHER_KIND`, unless three launches are slower by `BY_FAR`.
    """
    by_estimate = sorted(fitting_tilings(problem, gpu), key=lambda tiling: estimate(problem, tiling, gpu))
    seen: set[tuple[object, ...]] = set()
    early: list[Tiling] = []
    late: list[Tiling] = []
    for tiling in by_estimate:
        family = (
            tiling.block_m, tiling.splits, tiling.out_splits, tiling.conv, tiling.rows > 1, tiling.tiles_each > 1,
            tiling.launches,
        )  # fmt: skip
        relative = *family, tiling.conv_stages
        (late if relative in seen else early).append(tiling)
        seen.add(relative)
    best = by_estimate[0] if by_estimate else None
    other = next((tiling for tiling in early if best and tiling.launches != best.launches), None)
    near = best and other and estimate(problem, other, gpu) < BY_FAR * estimate(problem, best, gpu)
    if other and (near or other.launches == 1):
        place = min(early.index(other), OF_EITHER_KIND - 1)
        early.remove(other)
        early.insert(place, other)
    return (*early, *late)
