"""Functions that the Triton kernels share: products, activations, the convolution of a tile, and the store of a tile.

Channels are computed in parts, each a power of two (see `problem.parts`): tuples hold one tensor for each part.

Set `TRITON_INTERPRET=1` before triton is imported to run the kernels on a CPU. The interpreter gets bfloat16 products
wrong and knows no inline assembly, so both have a second form for it.
"""

from __future__ import annotations

import os
from contextvars import ContextVar

import triton
import triton.language as tl

from kernels import problem

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRET = tl.constexpr(INTERPRETED)
# True within `emulated` of `kernels.lab.emulator`, and `stub_driver` of `kernels.lab.stub`.
EMULATED: ContextVar[bool] = ContextVar("EMULATED", default=False)


def run_on_cpu() -> bool:
    """Whether kernels take CPU tensors now."""
    return INTERPRETED or EMULATED.get()


# gelu(x) = x/2 (1 + tanh(x (a + b x^2 + c x^4))), fitted to the exact one: the error is 2.6e-5 at most, a twentieth of
# the usual tanh form's, and less than float16 resolves for any value above 0.06.
GELU_A = tl.constexpr(0.797507884)
GELU_B = tl.constexpr(0.0370056462)
GELU_C = tl.constexpr(-0.000351516806)


@triton.jit
def dot(a, b, acc):
    """Compute acc + a @ b, with exact products and a sum in float32."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    # The default would drop 13 bits of float32 operands.
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round float32 values to another dtype, to nearest, ties to even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        # The interpreter's own conversion truncates. Infinities stay as they are; a NaN's payload may change.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def tanh(x):
    """tanh of float32 to some 11 bits: one special-function result, where the exact form takes two and a division."""
    if INTERPRET:
        return 2 * tl.sigmoid(2 * x) - 1
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Apply the activation to float32 values; `EXACT` if they stay float32."""
    if ACTIVATION == "silu":
        if EXACT:
            return x * tl.sigmoid(x)
        half = 0.5 * x
        return half + half * tanh(half)
    elif ACTIVATION == "gelu":
        half = 0.5 * x
        if EXACT:
            return half + half * tl.erf(0.7071067811865476 * x)
        # Clamped, as the fifth power would turn round where tanh has long been 1.
        u = tl.minimum(x * x, 64.0)
        return half + half * tanh(x * (GELU_A + u * (GELU_B + u * GELU_C)))
    elif ACTIVATION == "hard_swish":
        return x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666)
    elif ACTIVATION == "relu":
        # The default drops NaN.
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return x


@triton.constexpr_function
def size(parts, index):
    """Channels of a part."""
    return parts[index]


@triton.constexpr_function
def start(parts, index):
    """The first channel of a part."""
    return sum(parts[:index])


@triton.constexpr_function
def total_size(parts):
    """Channels of all parts."""
    return sum(parts)


@triton.jit
def tap_zero(row, height, width, out_height, out_width, KERNEL: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr):
    """Tap (0, 0) of output pixels: its index among all input pixels, and its coordinates, which may be outside."""
    image, within = row // (out_height * out_width), row % (out_height * out_width)
    top = within // out_width * STRIDE - KERNEL // 2
    left = within % out_width * STRIDE - KERNEL // 2
    if WIDE:
        image = image.to(tl.int64)
    return (image * height + top) * width + left, top, left


shares = triton.constexpr_function(problem.shares)
pair_steps = triton.constexpr_function(problem.pair_steps)
PAIR = tl.constexpr(problem.PAIR)
PAIR_BLOCK = tl.constexpr(problem.PAIR_BLOCK)
PAIR_SPAN = tl.constexpr(problem.PAIR_SPAN)
MIN_DOT = tl.constexpr(problem.MIN_DOT)


@triton.jit
def tile_of_rows(
    tile, pixels, height, width, out_height, out_width, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Place a tile of ROWS rows and COLUMNS columns, which continue from image to image.

    Args:
        EACH: columns that stay together in one image, 1 or 2.

    Returns:
        Indices of the tile's output pixels, a column's rows side by side, and a mask of those that exist; of tap (0, 0)
        of the first pixel of each column, or pair of columns, the index among all input pixels and the coordinates; and
        a mask of the columns or pairs that exist.
    """
    tiles_down = (out_height + ROWS - 1) // ROWS
    first = tile % tiles_down * ROWS
    column = tile // tiles_down * COLUMNS + EACH * tl.arange(0, COLUMNS // EACH)
    pitch = out_width
    if EACH > 1:
        pitch = (out_width + EACH - 1) // EACH * EACH
    image, left = column // pitch, column % pitch * STRIDE - KERNEL // 2
    top = first * STRIDE - KERNEL // 2
    if WIDE:
        image = image.to(tl.int64)
    pixel = (image * height + top) * width + left
    within = tl.arange(0, COLUMNS * ROWS)
    own = tile // tiles_down * COLUMNS + within // ROWS
    down = first + within % ROWS
    of_image, across = own // pitch, own % pitch
    if WIDE:
        of_image = of_image.to(tl.int64)
    row = (of_image * out_height + down) * out_width + across
    columns = pixels // out_height
    there = down < out_height
    # Without pairs there is no such column, and the check takes registers that some tilings lack.
    if EACH > 1:
        columns = columns // out_width * pitch
        there = there & (across < out_width)
    return row, there & (own < columns), pixel, top, left, column < columns


@triton.jit
def place(
    tile, pixels, height, width, out_height, out_width, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Place a tile of consecutive pixels, or of several rows; returns what `tile_of_rows` does."""
    if ROWS > 1:
        EACH: tl.constexpr = PAIR if FORM == "pairs" else 1
        row, valid, pixel, top, left, inside = tile_of_rows(
            tile, pixels, height, width, out_height, out_width, KERNEL, STRIDE, BLOCK_M // ROWS, ROWS, EACH, WIDE
        )
    else:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < pixels
        inside = valid
        if WIDE:
            row = row.to(tl.int64)
        pixel, top, left = tap_zero(row, height, width, out_height, out_width, KERNEL, STRIDE, WIDE)
    return row, valid, pixel, top, left, inside


@triton.jit
def as_blocks(tile, BLOCK: tl.constexpr, SHARES: tl.constexpr):
    """Turn rows of channels, [rows, channels], into [channels / BLOCK * SHARES, rows / SHARES, BLOCK].

    They are loaded as rows and turned round afterwards: loaded as blocks, a row's channels would go to as many places
    in shared memory, all of them in the same banks.
    """
    ROWS: tl.constexpr = tile.shape[0] // SHARES
    BLOCKS: tl.constexpr = tile.shape[1] // BLOCK
    blocks = tl.permute(tl.reshape(tile, [SHARES, ROWS, BLOCKS, BLOCK]), (2, 0, 1, 3))
    return tl.reshape(blocks, [BLOCKS * SHARES, ROWS, BLOCK])


@triton.jit
def load_blocks(
    x, pixel, inside, first, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    """Load channels first to first + WIDTH of pixels, zero where they are not inside, for `turned`.

    What passes registers on its way into shared memory is stored there as blocks of pixels. With this order of
    dimensions, [TOGETHER pixels, blocks, groups of pixels by share, BLOCK], a warp loads and stores one block of as
    many pixels, side by side, as its threads can hold. If it loaded whole pixels, it would store many blocks of few
    pixels, all in the same banks. This holds as long as there are no more blocks than warps.
    """
    TOGETHER: tl.constexpr = 32 * 16 * 8 // (BLOCK * x.dtype.element_ty.primitive_bitwidth)
    block = first + tl.arange(0, WIDTH // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    pixel, inside = grouped(pixel, TOGETHER, SHARES), grouped(inside, TOGETHER, SHARES)
    mask = inside[:, None, :, None] & (block < CHANNELS)[None, :, None, :]
    return tl.load(x + pixel[:, None, :, None] * CHANNELS + block[None, :, None, :], mask=mask, other=0.0)


@triton.jit
def grouped(values, TOGETHER: tl.constexpr, SHARES: tl.constexpr):
    """Arrange the pixels of a vector as [TOGETHER, groups], the shares of a group side by side."""
    EACH: tl.constexpr = values.shape[0] // (TOGETHER * SHARES)
    values = tl.permute(tl.reshape(values, [SHARES, EACH, TOGETHER]), (2, 1, 0))
    return tl.reshape(values, [TOGETHER, EACH * SHARES])


@triton.jit
def turned(tile, SHARES: tl.constexpr):
    """Turn what `load_blocks` loads into [blocks * SHARES, pixels / SHARES, BLOCK]."""
    TOGETHER: tl.constexpr = tile.shape[0]
    BLOCKS: tl.constexpr = tile.shape[1]
    EACH: tl.constexpr = tile.shape[2] // SHARES
    BLOCK: tl.constexpr = tile.shape[3]
    tile = tl.permute(tl.reshape(tile, [TOGETHER, BLOCKS, EACH, SHARES, BLOCK]), (1, 3, 2, 0, 4))
    return tl.reshape(tile, [BLOCKS * SHARES, EACH * TOGETHER, BLOCK])


@triton.jit
def tap_weights(
    conv, tap, first, WIDTH: tl.constexpr, PADDED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Load the weights of a tap from channel `first` on, for `on_blocks`.

    They are rows of dense blocks, each block SHARES times, or with "diagonal" one weight for each channel.
    """
    BLOCKS: tl.constexpr = WIDTH // BLOCK * SHARES
    lane = tl.arange(0, BLOCK)
    if FORM == "diagonal":
        channel = first + tl.arange(0, BLOCKS)[:, None] // SHARES * BLOCK + lane[None, :]
        weights = tl.load(conv + tap * PADDED + channel)
    else:
        # As rows: a pipeline would copy pieces of blocks to as many places, all of them in the same banks.
        row = tl.arange(0, BLOCKS * BLOCK)
        row = tap * PADDED + first + row // (BLOCK * SHARES) * BLOCK + row % BLOCK
        weights = tl.load(conv + row[:, None] * BLOCK + lane[None, :])
    return weights


@triton.jit
def on_blocks(weights, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Turn what `tap_weights` loads into dense blocks, [blocks, BLOCK in, BLOCK out]."""
    if FORM == "diagonal":
        # Weights are put on the diagonal here: in memory, zeros would be most of the traffic.
        lane = tl.arange(0, BLOCK)
        blocks = tl.where(lane[None, :, None] == lane[None, None, :], weights[:, None, :], 0.0)
    else:
        blocks = tl.reshape(weights, [weights.shape[0] // BLOCK, BLOCK, BLOCK])
    return blocks


@triton.constexpr_function
def levels(count):
    """Levels of a binary tree over `count` leaves, a power of two."""
    return count.bit_length() - 1


@triton.jit
def joined(pieces):
    """Join 1, 2, 4 ... tensors of one shape: new last dimensions of 2 are the bits of their index, highest first."""
    for _ in tl.static_range(levels(len(pieces))):
        halves = ()
        for i in tl.static_range(len(pieces) // 2):
            halves = halves + (tl.join(pieces[i], pieces[i + len(pieces) // 2]),)
        pieces = halves
    return pieces[0]


@triton.constexpr_function
def elements(shape):
    """Elements of a tensor."""
    count = 1
    for size in shape:
        count *= size
    return count


@triton.jit
def loaded(x, WARPS: tl.constexpr):
    """Return x unchanged, and keep the compiler from converting it before this place.

    Otherwise the compiler moves the conversion, which goes through shared memory and waits, right behind each load, and
    no two loads are ever in flight together (seen in the machine code for sm_90).
    """
    if INTERPRET:
        return x
    if x.dtype.primitive_bitwidth > 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    if elements(x.shape) < 64 * WARPS:
        # A thread may hold a single element.
        return tl.inline_asm_elementwise("mov.b16 $0, $1;", "=h,h", [x], dtype=x.dtype, is_pure=False, pack=1)
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def convolve(
    x, conv, conv_bias, pixel, top, left, valid, height, width, taps,
    first, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, KERNEL: tl.constexpr,
    FORM: tl.constexpr, BLOCK: tl.constexpr, DENSE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute channels first to first + WIDTH of the convolution with bias, tap by tap: [BLOCK_M, WIDTH] in DTYPE.

    Args:
        pixel: index of tap (0, 0) of each output pixel.
        top, left: coordinates of that tap.
        taps: number of taps.
    """
    columns = first + tl.arange(0, WIDTH)
    # If the compiler knew the number of taps, it would unroll them all, and spill for want of registers. The
    # interpreter takes only constants as loop bounds.
    if FORM == "fma":
        total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        for tap in tl.range(0, KERNEL * KERNEL if INTERPRET else taps, num_stages=STAGES):
            dy, dx = tap // KERNEL, tap % KERNEL
            inside = valid & (top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width)
            address = x + (pixel + dy * width + dx)[:, None] * CHANNELS + columns[None, :]
            tile = tl.load(address, mask=inside[:, None] & (columns < CHANNELS)[None, :], other=0.0)
            total += tile.to(tl.float32) * tl.load(conv + tap * PADDED + columns).to(tl.float32)[None, :]
    elif FORM == "mma" or FORM == "diagonal":
        SHARES: tl.constexpr = shares(BLOCK_M, WIDTH, BLOCK, WARPS)
        BLOCKS: tl.constexpr = WIDTH // BLOCK
        sums = tl.zeros([BLOCKS * SHARES, BLOCK_M // SHARES, BLOCK], tl.float32)
        for tap in tl.range(0, KERNEL * KERNEL if INTERPRET else taps, num_stages=STAGES):
            dy, dx = tap // KERNEL, tap % KERNEL
            inside = valid & (top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width)
            # The weights come first, so that they are under way while the pixels are waited for.
            weights = tap_weights(conv, tap, first, WIDTH, PADDED, FORM, BLOCK, SHARES)
            address = x + (pixel + dy * width + dx)[:, None] * CHANNELS + columns[None, :]
            tile = tl.load(address, mask=inside[:, None] & (columns < CHANNELS)[None, :], other=0.0)
            tile = as_blocks(tile, BLOCK, SHARES)
            sums = dot(tile, on_blocks(loaded(weights, WARPS), FORM, BLOCK), sums)
        channel = tl.arange(0, BLOCKS * SHARES)[:, None] // SHARES * BLOCK + tl.arange(0, BLOCK)[None, :]
        # Rounded before it is turned round, as that goes through shared memory.
        total = round_to(sums + tl.load(conv_bias + first + channel)[:, None, :], DTYPE)
        total = tl.permute(tl.reshape(total, [BLOCKS, SHARES, BLOCK_M // SHARES, BLOCK]), (1, 2, 0, 3))
        total = tl.reshape(total, [BLOCK_M, WIDTH])
    else:
        CHUNKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
        lane = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        for step in tl.range(0, (KERNEL * KERNEL if INTERPRET else taps) * CHUNKS, num_stages=STAGES):
            tap, channel = step // CHUNKS, step % CHUNKS * BLOCK + lane
            dy, dx = tap // KERNEL, tap % KERNEL
            inside = valid & (top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width)
            address = x + (pixel + dy * width + dx)[:, None] * CHANNELS + channel[None, :]
            tile = tl.load(address, mask=inside[:, None] & (channel < CHANNELS)[None, :], other=0.0)
            weights = tl.load(conv + (tap * DENSE_ROWS + channel)[:, None] * PADDED + columns[None, :])
            if STAGES == 1:
                tile, weights = loaded(tile, WARPS), loaded(weights, WARPS)
            total = dot(tile, weights, total)
    if FORM == "fma" or FORM == "dense":
        total = round_to(total + tl.load(conv_bias + columns)[None, :], DTYPE)
    return total


@triton.jit
def convolve_rows(
    x, conv, conv_bias, pixel, top, left, valid, height, width, taps,
    first, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute the same as `convolve` for ROWS output rows: [COLUMNS * ROWS, WIDTH], a column's rows side by side.

    A row of the input is loaded once for each column of taps, and serves all rows of the output that it reaches.

    Args:
        pixel: index of tap (0, 0) of each column's first output pixel.
        top, left: coordinates of that tap; `top` is a scalar.
        taps: number of columns of taps.
    """
    INPUT_ROWS: tl.constexpr = (ROWS - 1) * STRIDE + KERNEL
    SHARES: tl.constexpr = shares(COLUMNS, WIDTH, BLOCK, WARPS)
    columns = first + tl.arange(0, WIDTH)
    sums = ()
    for _ in tl.static_range(ROWS):
        if FORM == "fma":
            sums = sums + (tl.zeros([COLUMNS, WIDTH], tl.float32),)
        else:
            sums = sums + (tl.zeros([WIDTH // BLOCK * SHARES, COLUMNS // SHARES, BLOCK], tl.float32),)
    for dx in tl.range(0, KERNEL if INTERPRET else taps, num_stages=STAGES):
        inside = valid & (left + dx >= 0) & (left + dx < width)
        # All loads of a column come first, so that they are in flight together.
        rows = ()
        for i in tl.static_range(INPUT_ROWS):
            mask = inside & (top + i >= 0) & (top + i < height)
            if FORM == "fma" or STAGES > 1:
                address = x + (pixel + i * width + dx)[:, None] * CHANNELS + columns[None, :]
                rows = rows + (tl.load(address, mask=mask[:, None] & (columns < CHANNELS)[None, :], other=0.0),)
            else:
                row = load_blocks(x, pixel + i * width + dx, mask, first, WIDTH, CHANNELS, BLOCK, SHARES)
                rows = rows + (row,)
        weights = ()
        for dy in tl.static_range(KERNEL):
            tap = dy * KERNEL + dx
            if FORM == "fma":
                weights = weights + (tl.load(conv + tap * PADDED + columns),)
            else:
                weights = weights + (tap_weights(conv, tap, first, WIDTH, PADDED, FORM, BLOCK, SHARES),)
        tiles, taps_of = (), ()
        for i in tl.static_range(INPUT_ROWS):
            if FORM == "fma":
                tiles = tiles + (rows[i].to(tl.float32),)
            elif STAGES > 1:
                tiles = tiles + (as_blocks(rows[i], BLOCK, SHARES),)
            else:
                tiles = tiles + (turned(loaded(rows[i], WARPS), SHARES),)
        for dy in tl.static_range(KERNEL):
            if FORM == "fma":
                taps_of = taps_of + (weights[dy].to(tl.float32)[None, :],)
            else:
                taps_of = taps_of + (on_blocks(loaded(weights[dy], WARPS), FORM, BLOCK),)
        for dy in tl.static_range(KERNEL):
            more = ()
            for i in tl.static_range(ROWS):
                if FORM == "fma":
                    more = more + (sums[i] + tiles[i * STRIDE + dy] * taps_of[dy],)
                else:
                    more = more + (dot(tiles[i * STRIDE + dy], taps_of[dy], sums[i]),)
            sums = more
    if FORM == "fma":
        bias = tl.load(conv_bias + columns)[None, :]
    else:
        channel = tl.arange(0, WIDTH // BLOCK * SHARES)[:, None] // SHARES * BLOCK + tl.arange(0, BLOCK)[None, :]
        bias = tl.load(conv_bias + first + channel)[:, None, :]
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (round_to(sums[i] + bias, DTYPE),)
    # A thread has a column's rows in registers: side by side, it stores them at once on their way to a product.
    if FORM == "fma":
        tile = tl.permute(tl.reshape(joined(rows), [COLUMNS, WIDTH, ROWS]), (0, 2, 1))
    else:
        tile = tl.reshape(joined(rows), [WIDTH // BLOCK, SHARES, COLUMNS // SHARES, BLOCK, ROWS])
        tile = tl.permute(tile, (1, 2, 4, 0, 3))
    return tl.reshape(tile, [COLUMNS * ROWS, WIDTH])


@triton.jit
def place_pairs(
    x, pixel, left, inside, width, step, first, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, KERNEL: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Place span `step` of a row of the input: addresses, and a mask of those inside, as `turned_pairs` takes values.

    The order of dimensions is [PAIR_SPAN columns, pairs, two blocks, other blocks, other pairs by share, PAIR_BLOCK]. A
    warp then loads whole sectors of 32 bytes, which neighbouring pairs share, and stores without bank conflicts.

    Args:
        pixel, left: index and coordinate of the first column of the input that each pair needs.
        inside: mask of the pairs that exist.
        first: first channel.
    """
    NEXT: tl.constexpr = 2
    TOGETHER: tl.constexpr = 32 // (PAIR_SPAN * NEXT)
    BLOCKS: tl.constexpr = WIDTH // PAIR_BLOCK
    column = step * PAIR_SPAN + tl.arange(0, PAIR_SPAN)
    pixel, left = grouped(pixel, TOGETHER, SHARES)[None, :, :], grouped(left, TOGETHER, SHARES)[None, :, :]
    pixel, left = pixel + column[:, None, None], left + column[:, None, None]
    mask = grouped(inside, TOGETHER, SHARES)[None, :, :] & (left >= 0) & (left < width)
    mask = mask & (column < KERNEL + PAIR - 1)[:, None, None]
    block = tl.arange(0, BLOCKS // NEXT)[None, :] * NEXT + tl.arange(0, NEXT)[:, None]
    block = first + block[:, :, None] * PAIR_BLOCK + tl.arange(0, PAIR_BLOCK)[None, None, :]
    mask = mask[:, :, None, None, :, None] & (block < CHANNELS)[None, None, :, :, None, :]
    return x + pixel[:, :, None, None, :, None] * CHANNELS + block[None, None, :, :, None, :], mask


@triton.jit
def turned_pairs(tile, SHARES: tl.constexpr):
    """Turn what is loaded as `place_pairs` says into [blocks * SHARES, pairs / SHARES, PAIR_SPAN * PAIR_BLOCK]."""
    TOGETHER: tl.constexpr = tile.shape[1]
    NEXT: tl.constexpr = tile.shape[2]
    MORE: tl.constexpr = tile.shape[3]
    EACH: tl.constexpr = tile.shape[4] // SHARES
    tile = tl.reshape(tile, [PAIR_SPAN, TOGETHER, NEXT, MORE, EACH, SHARES, PAIR_BLOCK])
    tile = tl.permute(tile, (3, 2, 5, 4, 1, 0, 6))
    return tl.reshape(tile, [MORE * NEXT * SHARES, EACH * TOGETHER, PAIR_SPAN * PAIR_BLOCK])


@triton.jit
def pair_weights(
    conv, dy, step, first, WIDTH: tl.constexpr, PADDED: tl.constexpr, KERNEL: tl.constexpr, SHARES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Load the weights of a row of taps for a span, each block SHARES times, for `turned_weights`.

    As rows of [other blocks, halves of a block, a block a warp, rows of a half]: if a thread had rows of several blocks
    before it had several of one, the compiler would interleave the blocks in shared memory, with bank conflicts.
    """
    INNER: tl.constexpr = PAIR_SPAN * PAIR_BLOCK
    ACROSS: tl.constexpr = PAIR * PAIR_BLOCK
    BLOCKS: tl.constexpr = WIDTH // PAIR_BLOCK * SHARES
    SIDE: tl.constexpr = min(BLOCKS, WARPS)
    row = tl.arange(0, BLOCKS * INNER)
    block = row // (SIDE * INNER) * SIDE + row // MIN_DOT % SIDE
    row = block // SHARES * INNER + row // (SIDE * MIN_DOT) % (INNER // MIN_DOT) * MIN_DOT + row % MIN_DOT
    row += ((dy * pair_steps(KERNEL) + step) * PADDED + first) // PAIR_BLOCK * INNER
    # They lie behind those of the other form.
    conv += KERNEL * KERNEL * PADDED * MIN_DOT
    return tl.load(conv + row[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :])


@triton.jit
def turned_weights(weights, WARPS: tl.constexpr):
    """Turn what `pair_weights` loads into [blocks, PAIR_SPAN * PAIR_BLOCK, PAIR * PAIR_BLOCK]."""
    INNER: tl.constexpr = PAIR_SPAN * PAIR_BLOCK
    ACROSS: tl.constexpr = PAIR * PAIR_BLOCK
    BLOCKS: tl.constexpr = weights.shape[0] // INNER
    SIDE: tl.constexpr = min(BLOCKS, WARPS)
    weights = tl.reshape(weights, [BLOCKS // SIDE, INNER // MIN_DOT, SIDE, MIN_DOT, ACROSS])
    return tl.reshape(tl.permute(weights, (0, 2, 1, 3, 4)), [BLOCKS, INNER, ACROSS])


@triton.jit
def convolve_pairs(
    x, conv, conv_bias, pixel, top, left, valid, height, width, taps,
    first, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, KERNEL: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute the same as `convolve_rows`, with stride 1, in products for pairs of columns.

    A pair of pixels by a block of channels is one row of a product's result, and the columns of the input that either
    needs, by their channels, one row of its first operand.

    Args:
        pixel, left: index and coordinate of tap (0, 0) of each pair's first output pixel.
        taps: number of spans of input columns.
    """
    INPUT_ROWS: tl.constexpr = ROWS - 1 + KERNEL
    PAIRS: tl.constexpr = COLUMNS // PAIR
    SHARES: tl.constexpr = shares(PAIRS, WIDTH, PAIR_BLOCK, WARPS)
    BLOCKS: tl.constexpr = WIDTH // PAIR_BLOCK
    ACROSS: tl.constexpr = PAIR * PAIR_BLOCK
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCKS * SHARES, PAIRS // SHARES, ACROSS], tl.float32),)
    for step in tl.range(0, pair_steps(KERNEL) if INTERPRET else taps, num_stages=1):
        # All loads of a span come first, so that they are in flight together.
        address, mask = place_pairs(x, pixel, left, valid, width, step, first, WIDTH, CHANNELS, KERNEL, SHARES)
        rows = ()
        for i in tl.static_range(INPUT_ROWS):
            inside = (top + i >= 0) & (top + i < height)
            rows = rows + (tl.load(address + i * width * CHANNELS, mask=mask & inside, other=0.0),)
        weights = ()
        for dy in tl.static_range(KERNEL):
            weights = weights + (pair_weights(conv, dy, step, first, WIDTH, PADDED, KERNEL, SHARES, WARPS),)
        tiles, taps_of = (), ()
        for i in tl.static_range(INPUT_ROWS):
            tiles = tiles + (turned_pairs(loaded(rows[i], WARPS), SHARES),)
        for dy in tl.static_range(KERNEL):
            taps_of = taps_of + (turned_weights(loaded(weights[dy], WARPS), WARPS),)
        for dy in tl.static_range(KERNEL):
            more = ()
            for i in tl.static_range(ROWS):
                more = more + (dot(tiles[i + dy], taps_of[dy], sums[i]),)
            sums = more
    channel = tl.arange(0, BLOCKS * SHARES)[:, None] // SHARES * PAIR_BLOCK + tl.arange(0, ACROSS)[None, :] % PAIR_BLOCK
    bias = tl.load(conv_bias + first + channel)[:, None, :]
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (round_to(sums[i] + bias, DTYPE),)
    tile = tl.reshape(joined(rows), [BLOCKS, SHARES, PAIRS // SHARES, PAIR, PAIR_BLOCK, ROWS])
    return tl.reshape(tl.permute(tile, (1, 2, 3, 5, 0, 4)), [COLUMNS * ROWS, WIDTH])


@triton.jit
def convolve_tile(
    x, conv, conv_bias, pixel, top, left, inside, height, width, taps,
    first, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, DENSE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute channels first to first + WIDTH of the convolution of a tile placed by `place`, [BLOCK_M, WIDTH]."""
    if FORM == "pairs":
        y = convolve_pairs(
            x, conv, conv_bias, pixel, top, left, inside, height, width, taps, first, WIDTH, CHANNELS, PADDED, KERNEL,
            BLOCK_M // ROWS, ROWS, DTYPE, WARPS,
        )  # fmt: skip
    elif ROWS > 1:
        y = convolve_rows(
            x, conv, conv_bias, pixel, top, left, inside, height, width, taps, first, WIDTH, CHANNELS, PADDED, KERNEL,
            STRIDE, FORM, BLOCK, BLOCK_M // ROWS, ROWS, STAGES, DTYPE, WARPS,
        )  # fmt: skip
    else:
        y = convolve(
            x, conv, conv_bias, pixel, top, left, inside, height, width, taps, first, WIDTH, CHANNELS, PADDED, KERNEL,
            FORM, BLOCK, DENSE_ROWS, BLOCK_M, STAGES, DTYPE, WARPS,
        )  # fmt: skip
    return y


@triton.jit
def add_pooled(
    total, x, row, valid, columns, height, width, out_height, out_width, CHANNELS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Add the input to [rows, columns] of the output, in float32: the mean of a stride's pixels, its channels or zeros.

    Args:
        row: indices of output pixels.
        columns: output channels.
        CHANNELS: channels of the input.
    """
    mask = valid[:, None] & (columns < CHANNELS)[None, :]
    image, within = row // (out_height * out_width), row % (out_height * out_width)
    top, left = within // out_width * STRIDE, within % out_width * STRIDE
    pixel = (image * height + top) * width + left
    # At the lower and the right edge of odd sizes there are fewer pixels.
    share = 1.0 / (tl.minimum(height - top, STRIDE) * tl.minimum(width - left, STRIDE)).to(tl.float32)
    for each in tl.static_range(STRIDE * STRIDE):
        dy, dx = each // STRIDE, each % STRIDE
        inside = (top + dy < height) & (left + dx < width)
        address = x + (pixel + dy * width + dx)[:, None] * CHANNELS + columns[None, :]
        tile = tl.load(address, mask=mask & inside[:, None], other=0.0)
        total += tile.to(tl.float32) * share[:, None]
    return total


@triton.jit
def finish(
    out, total, partial, bias, x, row, valid, pixels, first_out,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, RESIDUAL: tl.constexpr,
    IN: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Store WIDTH output channels from first_out + FIRST on: all splits' sums, the bias, and the input if RESIDUAL.

    The input has IN channels, and an output pixel the index of its input pixel.
    """
    columns = first_out + FIRST + tl.arange(0, WIDTH)
    if SPLITS > 1:
        total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        for split in tl.static_range(SPLITS):
            address = partial + (split * pixels + row)[:, None] * PADDED + columns[None, :]
            # The load bypasses L1, which may hold another launch's values.
            total += tl.load(address, mask=valid[:, None], other=0.0, cache_modifier=".cg")
    total += tl.load(bias + columns)[None, :]
    offset = row[:, None] * CHANNELS + columns[None, :]
    mask = valid[:, None] & (columns < CHANNELS)[None, :]
    if RESIDUAL:
        there = mask & (columns < IN)[None, :]
        total += tl.load(x + row[:, None] * IN + columns[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + offset, round_to(total, out.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(
    out, totals, partial, counters, bias, shortcut, row, valid, pixels, counter, split, first_out,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, RESIDUAL: tl.constexpr,
    IN: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Store a tile's output from channel first_out on; of splits that share the tile, the last to end does it."""
    last = True
    if SPLITS > 1:
        for i in tl.static_range(len(PARTS)):
            columns = first_out + start(PARTS, i) + tl.arange(0, size(PARTS, i))
            address = partial + (split * pixels + row)[:, None] * PADDED + columns[None, :]
            tl.store(address, totals[i], mask=valid[:, None])
        # One thread counts for the whole program, so all threads must have stored before.
        tl.debug_barrier()
        last = tl.atomic_add(counters + counter, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            # The next launch needs a zero.
            tl.store(counters + counter, 0)
        for i in tl.static_range(len(PARTS)):
            finish(
                out, totals[i], partial, bias, shortcut, row, valid, pixels, first_out,
                start(PARTS, i), size(PARTS, i), CHANNELS, PADDED, RESIDUAL, IN, BLOCK_M, SPLITS,
            )  # fmt: skip
