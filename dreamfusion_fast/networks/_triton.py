"""Triton kernels of group normalisation, channels last, of GEGLU and of softmax.

An image is a matrix of pixels by channels. A group's channels need not be a power of two, so tiles take whole channels
and sum up per channel; a small kernel brings a group's channels and an image's tiles together. A program takes TILES
tiles of ROWS pixels by COLS channels, one after the other.
"""

# Compile-time constants are capitals, as everywhere in Triton, whose language has no types to annotate.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated_and_slope(z, ACTIVATION: tl.constexpr):
    """ACTIVATION: its place in `group_norm.ACTIVATIONS`, not that of "none"."""
    if ACTIVATION == 1:
        gate = 1.0 / (1.0 + tl.exp(-z))
        slope = gate * (1.0 + z * (1.0 - gate))
    else:
        gate = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        slope = gate + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return z * gate, slope


@triton.jit
def moments_kernel(
    x,
    offset,
    offset_stride,
    residual,
    total,
    partials,
    pixels,
    channels,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel in a chunk of pixels: partials ``[n, chunks, channels, 2]``.

    What is measured is x + offset + residual, which is written to `total` unless that is None. Sums are of differences
    to the first tile's mean, each thread's own until the last tile: to bring threads together costs more than to read.
    """
    chunk, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = block * COLS + tl.arange(0, COLS)
    live_cols = cols < channels
    base = image.to(tl.int64) * pixels * channels
    shift = tl.zeros((COLS,), dtype=tl.float32)
    if offset is not None:
        shift += tl.load(offset + image * offset_stride + cols, mask=live_cols, other=0.0).to(tl.float32)
    pivot = tl.zeros((COLS,), dtype=tl.float32)
    sums = tl.zeros((ROWS, COLS), dtype=tl.float32)
    squares = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for tile in range(TILES):
        rows = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        live = (rows < pixels)[:, None] & live_cols[None, :]
        at = base + rows[:, None].to(tl.int64) * channels + cols[None, :]
        value = tl.load(x + at, mask=live, other=0.0).to(tl.float32) + shift[None, :]
        if residual is not None:
            value += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
        if total is not None:
            stored = value.to(total.dtype.element_ty)
            tl.store(total + at, stored, mask=live)
            value = stored.to(tl.float32)
        if tile == 0:
            here = tl.minimum(pixels - chunk * TILES * ROWS, ROWS).to(tl.float32)
            pivot = tl.sum(tl.where(live, value, 0.0), 0) / here
        deviation = tl.where(live, value - pivot[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    count = tl.minimum(pixels - chunk * TILES * ROWS, TILES * ROWS).to(tl.float32)
    drift = tl.sum(sums, 0) / count
    to = partials + ((image.to(tl.int64) * tl.num_programs(0) + chunk) * channels + cols) * 2
    tl.store(to, pivot + drift, mask=live_cols)
    tl.store(to + 1, tl.maximum(tl.sum(squares, 0) - drift * drift * count, 0.0), mask=live_cols)


@triton.jit
def groups_kernel(
    partials,
    result,
    pixels,
    channels,
    chunks,
    chunk_pixels,
    eps,
    GROUP: tl.constexpr,
    GROUP_COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Two numbers per group, ``[n, groups, 2]``, from the partials of its channels.

    With `chunk_pixels`, from moments of as many pixels each: mean and 1 / standard deviation. Without, from sums: their
    means over the group.
    """
    group, image = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, GROUP_COLS)
    from_ = partials + (image.to(tl.int64) * chunks * channels + group * GROUP) * 2
    first = tl.zeros((CHUNKS, GROUP_COLS), dtype=tl.float32)
    second = tl.zeros((CHUNKS, GROUP_COLS), dtype=tl.float32)
    pivot = tl.load(from_)  # of the same size as the mean, which is all that it is for
    for start in range(0, chunks, CHUNKS):
        k = start + tl.arange(0, CHUNKS)
        live = (k < chunks)[:, None] & (cols < GROUP)[None, :]
        at = (k[:, None].to(tl.int64) * channels + cols[None, :]) * 2
        one = tl.load(from_ + at, mask=live, other=0.0)
        other = tl.load(from_ + at + 1, mask=live, other=0.0)
        if chunk_pixels is not None:
            count = tl.minimum(pixels - k * chunk_pixels, chunk_pixels).to(tl.float32)[:, None]
            delta = tl.where(live, one - pivot, 0.0)
            one = delta * count
            other += delta * delta * count
        first += one
        second += other
    size = 1.0 * pixels * GROUP
    mean, other_mean = tl.sum(first) / size, tl.sum(second) / size
    if chunk_pixels is not None:
        other_mean = 1.0 / tl.sqrt(tl.maximum(other_mean - mean * mean, 0.0) + eps)
        mean += pivot
    to = result + (image * tl.num_programs(0) + group) * 2
    tl.store(to, mean)
    tl.store(to + 1, other_mean)


@triton.jit
def sum_kernel(
    x,
    offset,
    residual,
    y,
    height,
    width,
    to_height,
    to_width,
    channels,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y ``[n, to_height, to_width, channels]``: x + offset + residual, and zeros beyond x's height and width."""
    chunk, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = block * COLS + tl.arange(0, COLS)
    live_cols = cols < channels
    shift = tl.zeros((COLS,), dtype=tl.float32)
    if offset is not None:
        shift += tl.load(offset + cols, mask=live_cols, other=0.0).to(tl.float32)
    pixels = chunk * ROWS + tl.arange(0, ROWS)
    row, column = pixels // to_width, pixels % to_width
    live = (pixels < to_height * to_width)[:, None] & live_cols[None, :]
    inside = live & ((row < height) & (column < width))[:, None]
    of = ((image * height + row).to(tl.int64) * width + column)[:, None] * channels + cols[None, :]
    value = tl.load(x + of, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
    if residual is not None:
        value += tl.load(residual + of, mask=inside, other=0.0).to(tl.float32)
    to = (image.to(tl.int64) * to_height * to_width + pixels)[:, None] * channels + cols[None, :]
    tl.store(y + to, tl.where(inside, value, 0.0).to(y.dtype.element_ty), mask=live)


@triton.jit
def _channels(offset, offset_stride, statistics, weight, bias, image, channels, cols, live_cols, GROUP: tl.constexpr):
    """Per channel: what is added to x, the group's mean and 1 / deviation, weight and bias."""
    at = statistics + (image * (channels // GROUP) + cols // GROUP) * 2
    mean = tl.load(at, mask=live_cols, other=0.0)
    scale = tl.load(at + 1, mask=live_cols, other=0.0)
    if offset is not None:
        mean -= tl.load(offset + image * offset_stride + cols, mask=live_cols, other=0.0).to(tl.float32)
    w = tl.load(weight + cols, mask=live_cols, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=live_cols, other=0.0).to(tl.float32)
    return mean, scale, w, b


@triton.jit
def normalise_kernel(
    x,
    offset,
    offset_stride,
    statistics,
    weight,
    bias,
    modulation,
    modulation_stride,
    y,
    pixels,
    channels,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y from x + offset; `modulation` holds scales and then shifts of each image's channels, or is None."""
    chunk, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = block * COLS + tl.arange(0, COLS)
    live_cols = cols < channels
    mean, inverse, w, b = _channels(
        offset, offset_stride, statistics, weight, bias, image, channels, cols, live_cols, GROUP
    )
    if modulation is not None:
        of = modulation + image * modulation_stride + cols
        times = 1.0 + tl.load(of, mask=live_cols, other=0.0).to(tl.float32)
        w *= times
        b = b * times + tl.load(of + channels, mask=live_cols, other=0.0).to(tl.float32)
    rows = chunk * ROWS + tl.arange(0, ROWS)
    live = (rows < pixels)[:, None] & live_cols[None, :]
    at = image.to(tl.int64) * pixels * channels + rows[:, None].to(tl.int64) * channels + cols[None, :]
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    z = (value - mean[None, :]) * (inverse * w)[None, :] + b[None, :]
    if ACTIVATION != 0:
        z, _ = activated_and_slope(z, ACTIVATION)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=live)


@triton.jit
def gradient_kernel(
    grad_y,
    x,
    offset,
    offset_stride,
    statistics,
    weight,
    bias,
    means,
    skip,
    result,
    pixels,
    channels,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """With g the gradient of x_hat: without `means` its sums over a chunk, with them the gradient of x.

    The sums are those of g and g * x_hat, result ``[n, chunks, channels, 2]``; `means` are theirs over each group,
    ``[n, groups, 2]``. To the gradient, result like x, `skip` is added unless it is None.
    """
    chunk, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = block * COLS + tl.arange(0, COLS)
    live_cols = cols < channels
    mean, scale, w, b = _channels(
        offset, offset_stride, statistics, weight, bias, image, channels, cols, live_cols, GROUP
    )
    base = image.to(tl.int64) * pixels * channels
    if means is None:
        first = tl.zeros((ROWS, COLS), dtype=tl.float32)
        second = tl.zeros((ROWS, COLS), dtype=tl.float32)
    else:
        at_means = means + (image * (channels // GROUP) + cols // GROUP) * 2
        mean_g = tl.load(at_means, mask=live_cols, other=0.0)
        mean_gx = tl.load(at_means + 1, mask=live_cols, other=0.0)
    for tile in range(TILES):
        rows = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        live = (rows < pixels)[:, None] & live_cols[None, :]
        at = base + rows[:, None].to(tl.int64) * channels + cols[None, :]
        x_hat = (tl.load(x + at, mask=live, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
        g = tl.load(grad_y + at, mask=live, other=0.0).to(tl.float32)
        if ACTIVATION != 0:
            _, slope = activated_and_slope(x_hat * w[None, :] + b[None, :], ACTIVATION)
            g *= slope
        g *= w[None, :]
        if means is None:
            first += g
            second += g * x_hat
        else:
            g = scale[None, :] * (g - mean_g[None, :] - x_hat * mean_gx[None, :])
            if skip is not None:
                g += tl.load(skip + at, mask=live, other=0.0).to(tl.float32)
            tl.store(result + at, g.to(result.dtype.element_ty), mask=live)
    if means is None:
        to = result + ((image.to(tl.int64) * tl.num_programs(0) + chunk) * channels + cols) * 2
        tl.store(to, tl.sum(first, 0), mask=live_cols)
        tl.store(to + 1, tl.sum(second, 0), mask=live_cols)


@triton.jit
def geglu_kernel(x, y, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """A row, or a part of it: y ``[n, columns]`` from x ``[n, 2 columns]``."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    live = cols < columns
    a = tl.load(x + row * 2 * columns + cols, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x + (row * 2 + 1) * columns + cols, mask=live, other=0.0).to(tl.float32)
    gate, _ = activated_and_slope(b, ACTIVATION)
    tl.store(y + row * columns + cols, (a * gate).to(y.dtype.element_ty), mask=live)


@triton.jit
def softmax_kernel(scores, shares, columns, scale, BLOCK: tl.constexpr):
    """A row: shares ``[n, columns]`` from scores ``[n, columns]``."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    live = cols < columns
    x = tl.load(scores + row * columns + cols, mask=live, other=float("-inf")).to(tl.float32) * scale
    powers = tl.exp(x - tl.max(x, 0))
    tl.store(shares + row * columns + cols, (powers / tl.sum(powers, 0)).to(shares.dtype.element_ty), mask=live)


@triton.jit
def softmax_backward_kernel(shares, grad_shares, grad_scores, columns, scale, BLOCK: tl.constexpr):
    """A row: the gradient of scores ``[n, columns]`` from that of shares ``[n, columns]``."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    live = cols < columns
    p = tl.load(shares + row * columns + cols, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad_shares + row * columns + cols, mask=live, other=0.0).to(tl.float32)
    found = p * (g - tl.sum(p * g, 0)) * scale
    tl.store(grad_scores + row * columns + cols, found.to(grad_scores.dtype.element_ty), mask=live)
