"""Triton kernels of the fused MLP: one that goes forward, with the input gradient if wanted, and one that goes back.

A program takes BLOCK rows at a time through all layers and keeps every activation in registers and shared memory:
what it reads and writes are the rows of the arguments. The notation is that of `dreamfusion_fast.ops.mlp`; a row is a
row of a matrix here, so that a layer is ``h @ W^T`` and its transpose ``g @ W``.

Operands of forward products have the type OPERAND, those of products with a gradient GRADIENT; accumulators are
float32. A layer's weights are named by their number, the last layer's end in ``_last``; layers that the network does
not have are None. What is kept of a hidden layer, ``kept``, is what its activation's derivatives are computed from: a
ReLU's output, or a smooth activation's argument. `_mlp_torch` has the same passes as torch products, and
tests/ops/test_mlp.py holds both to the twin.
"""

# Compile-time constants are capitals, as everywhere in Triton, whose language has no types to annotate.
# ruff: noqa: N803, N806, SIM108
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter multiplies the bits of bfloat16 numbers as if they were integers: it gets them widened.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LAST_LAYER = tl.constexpr(16)
"""The bit of GRADIENTS that stands for the last layer; hidden layer i has bit ``1 << (i - 1)``."""


@triton.jit
def _dot(a, b, accumulator):
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _product(a, b):
    """[M, K] and [K, N], of one type, give [M, N] in float32."""
    return _dot(a, b, tl.zeros((a.shape[0], b.shape[1]), dtype=tl.float32))


@triton.jit
def _load_weight(
    pointer,
    ROWS: tl.constexpr,
    D_ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D_COLS: tl.constexpr,
    VOLATILE: tl.constexpr = False,
):
    """A contiguous matrix [D_ROWS, D_COLS], padded with zeros to [ROWS, COLS]."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    return tl.load(pointer + rows * D_COLS + cols, mask=(rows < D_ROWS) & (cols < D_COLS), other=0.0, volatile=VOLATILE)


@triton.jit
def _weight(
    resident,
    pointer,
    ROWS: tl.constexpr,
    D_ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D_COLS: tl.constexpr,
    TYPE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """The matrix loaded before the loop over blocks, or where that would fill the multiprocessor, loaded again."""
    if RESIDENT:
        weight = resident
    else:
        # Volatile, or the compiler would move it out of the loop after all.
        weight = _load_weight(pointer, ROWS, D_ROWS, COLS, D_COLS, VOLATILE=True)
    return weight.to(TYPE)


@triton.jit
def _tile(pointer, row_stride, col_stride, start, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of BLOCK rows from `start`, [BLOCK, COLS]."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, COLS)[None, :].to(tl.int64)
    return pointer + tl.cast(start, tl.int64) * row_stride + rows * row_stride + cols * col_stride


@triton.jit
def _load_rows(
    pointer, row_stride, col_stride, start, end, COLS: tl.constexpr, D_COLS: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows from `start`, zeros from `end` on. A block inside takes loads without a mask, which can be wide."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    addresses = _tile(pointer, row_stride, col_stride, start, COLS, BLOCK)
    if start + BLOCK <= end:
        if COLS == D_COLS:
            tile = tl.load(addresses)
        else:
            tile = tl.load(addresses, mask=cols < D_COLS, other=0.0)
    else:
        tile = tl.load(addresses, mask=(rows < end - start) & (cols < D_COLS), other=0.0)
    return tile


@triton.jit
def _store_rows(
    pointer, row_stride, col_stride, start, end, tile, COLS: tl.constexpr, D_COLS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    addresses = _tile(pointer, row_stride, col_stride, start, COLS, BLOCK)
    tile = tile.to(pointer.dtype.element_ty)
    if start + BLOCK <= end:
        if COLS == D_COLS:
            tl.store(addresses, tile)
        else:
            tl.store(addresses, tile, mask=cols < D_COLS)
    else:
        tl.store(addresses, tile, mask=(rows < end - start) & (cols < D_COLS))


@triton.jit
def _end(n, count, COUNT: tl.constexpr):
    end = n
    if COUNT:
        end = tl.minimum(n, tl.load(count))
    return end


@triton.jit
def _kept(z, ACTIVATION: tl.constexpr, OPERAND: tl.constexpr):
    kept = z
    if ACTIVATION == "relu":
        kept = tl.where(z < 0.0, 0.0, z)  # not a maximum, which would drop a NaN
    return kept.to(OPERAND)


@triton.jit
def _hidden(kept, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """a(z)."""
    if ACTIVATION == "relu":
        hidden = kept
    elif ACTIVATION == "silu":
        z = kept.to(tl.float32)
        hidden = z * tl.sigmoid(z)
    else:
        z = kept.to(tl.float32)
        # max(z, 0) + log(1 + e), where (1 + e) - 1 instead of e undoes the rounding of 1 + e (Kahan).
        e = tl.exp(tl.where(z < 0.0, z, -z))
        above = 1.0 + e
        rounded = tl.where(above == 1.0, 1.0, above - 1.0)
        hidden = tl.where(z < 0.0, 0.0, z) + tl.where(above == 1.0, e, tl.log(above) * (e / rounded))
    return hidden.to(TYPE)


@triton.jit
def _times_slope(value, kept, ACTIVATION: tl.constexpr):
    """value * a'(z), float32."""
    if ACTIVATION == "relu":
        result = tl.where(kept <= 0.0, 0.0, value)
    else:
        z = kept.to(tl.float32)
        s = tl.sigmoid(z)
        if ACTIVATION == "silu":
            s = s * (1.0 + z * (1.0 - s))
        result = value * s
    return result


@triton.jit
def _times_curvature(value, kept, ACTIVATION: tl.constexpr):
    """value * a''(z), float32, of a smooth activation."""
    z = kept.to(tl.float32)
    s = tl.sigmoid(z)
    curvature = s * (1.0 - s)
    if ACTIVATION == "silu":
        curvature = curvature * (2.0 + z * (1.0 - 2.0 * s))
    return value * curvature


@triton.jit
def _layer(h, weight, bias, D_OUT: tl.constexpr, BIAS: tl.constexpr):
    """h W^T + b. The bias is loaded for each block: it lies in the cache, and held would cost 16 registers a layer."""
    z = _product(h, tl.trans(weight))
    if BIAS:
        index = tl.arange(0, weight.shape[0])
        z += tl.load(bias + index, mask=index < D_OUT, other=0.0)[None, :]
    return z


@triton.jit
def _add_row_sums(sums, g, BLOCK: tl.constexpr):
    """Adds the sum of the rows of g [BLOCK, M] to each row of sums [16, M].

    As a product with ones: a sum across threads would cost more than the products around it. All ones, because a matrix
    of one number takes no registers.
    """
    return _dot(tl.full((16, BLOCK), 1.0, dtype=tl.float32).to(g.dtype), g, sums)


@triton.jit
def _add_outer(sums, g, h):
    """sums [M, K] plus g^T h, of g [BLOCK, M] and h [BLOCK, K]."""
    return _dot(tl.trans(g), h, sums)


@triton.jit
def _add_to_slice(pointer, sums, ROWS: tl.constexpr, D_ROWS: tl.constexpr, COLS: tl.constexpr, D_COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (rows < D_ROWS) & (cols < D_COLS)
    addresses = pointer + rows * D_COLS + cols
    tl.store(addresses, tl.load(addresses, mask=mask, other=0.0) + sums, mask=mask)


@triton.jit
def _add_row_to_slice(pointer, sums, SIZE: tl.constexpr, D_SIZE: tl.constexpr):
    """Adds one row of sums [16, SIZE], of equal rows, to a vector [D_SIZE]."""
    index = tl.arange(0, SIZE)
    mask = index < D_SIZE
    total = tl.sum(sums, 0) * (1.0 / 16.0)
    tl.store(pointer + index, tl.load(pointer + index, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    x, x_row, x_col, y, y_row, y_col, v, v_row, v_col,
    weight_1, weight_2, weight_3, weight_4, weight_last, bias_1, bias_2, bias_3, bias_4, bias_last,
    n, count,
    D_IN: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, LAYERS: tl.constexpr, D_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, OPERAND: tl.constexpr, RESIDENT: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y and, with INPUT_GRADIENT, v. COLS is D_IN padded; LAYERS counts the hidden ones."""
    end = _end(n, count, COUNT)
    w1 = _load_weight(weight_1, WIDTH, WIDTH, COLS, D_IN).to(OPERAND)
    w_last = _load_weight(weight_last, 16, D_OUT, WIDTH, WIDTH).to(OPERAND)
    if LAYERS > 1:
        w2 = _load_weight(weight_2, WIDTH, WIDTH, WIDTH, WIDTH).to(OPERAND)
    if LAYERS > 2:
        w3 = _load_weight(weight_3, WIDTH, WIDTH, WIDTH, WIDTH).to(OPERAND)
    if LAYERS > 3:
        w4 = _load_weight(weight_4, WIDTH, WIDTH, WIDTH, WIDTH).to(OPERAND)

    for start in range(tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        h = _load_rows(x, x_row, x_col, start, end, COLS, D_IN, BLOCK).to(OPERAND)
        weight = _weight(w1, weight_1, WIDTH, WIDTH, COLS, D_IN, OPERAND, RESIDENT)
        kept_1 = _kept(_layer(h, weight, bias_1, WIDTH, BIAS), ACTIVATION, OPERAND)
        h = _hidden(kept_1, ACTIVATION, OPERAND)
        if LAYERS > 1:
            weight = _weight(w2, weight_2, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
            kept_2 = _kept(_layer(h, weight, bias_2, WIDTH, BIAS), ACTIVATION, OPERAND)
            h = _hidden(kept_2, ACTIVATION, OPERAND)
        if LAYERS > 2:
            weight = _weight(w3, weight_3, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
            kept_3 = _kept(_layer(h, weight, bias_3, WIDTH, BIAS), ACTIVATION, OPERAND)
            h = _hidden(kept_3, ACTIVATION, OPERAND)
        if LAYERS > 3:
            weight = _weight(w4, weight_4, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
            kept_4 = _kept(_layer(h, weight, bias_4, WIDTH, BIAS), ACTIVATION, OPERAND)
            h = _hidden(kept_4, ACTIVATION, OPERAND)
        weight = _weight(w_last, weight_last, 16, D_OUT, WIDTH, WIDTH, OPERAND, RESIDENT)
        _store_rows(y, y_row, y_col, start, end, _layer(h, weight, bias_last, D_OUT, BIAS), 16, D_OUT, BLOCK)

        if INPUT_GRADIENT:
            q = tl.zeros((BLOCK, WIDTH), dtype=tl.float32) + tl.load(weight_last + tl.arange(0, WIDTH))[None, :]
            if LAYERS > 3:
                weight = _weight(w4, weight_4, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
                q = _product(_times_slope(q, kept_4, ACTIVATION).to(OPERAND), weight)
            if LAYERS > 2:
                weight = _weight(w3, weight_3, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
                q = _product(_times_slope(q, kept_3, ACTIVATION).to(OPERAND), weight)
            if LAYERS > 1:
                weight = _weight(w2, weight_2, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
                q = _product(_times_slope(q, kept_2, ACTIVATION).to(OPERAND), weight)
            weight = _weight(w1, weight_1, WIDTH, WIDTH, COLS, D_IN, OPERAND, RESIDENT)
            q = _product(_times_slope(q, kept_1, ACTIVATION).to(OPERAND), weight)
            _store_rows(v, v_row, v_col, start, end, q, COLS, D_IN, BLOCK)


@triton.jit(do_not_specialize=["n", "partials_stride"])
def backward_kernel(
    x, x_row, x_col, grad_y, gy_row, gy_col, u, u_row, u_col, grad_x, gx_row, gx_col,
    weight_1, weight_2, weight_3, weight_4, weight_last, bias_1, bias_2, bias_3, bias_4,
    partials, partials_stride, n, count,
    D_IN: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, LAYERS: tl.constexpr, D_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, COUNT: tl.constexpr, OPERAND: tl.constexpr, RESIDENT: tl.constexpr,
    GRADIENT: tl.constexpr, SECOND: tl.constexpr, SECOND_SUMS: tl.constexpr, GRAD_X: tl.constexpr,
    GRADIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x, with GRAD_X, and sums over this program's rows of gradients of weights and biases.

    GRADIENTS and SECOND_SUMS are sets of layers: of the first, what grad_y and u send to them is summed up, of the
    second, what u sends on its way up. SECOND: there is a u. What neither grad_x nor a sum needs, the compiler drops.
    """
    SMOOTH: tl.constexpr = ACTIVATION != "relu"
    end = _end(n, count, COUNT)
    w1 = _load_weight(weight_1, WIDTH, WIDTH, COLS, D_IN)
    w_last = _load_weight(weight_last, 16, D_OUT, WIDTH, WIDTH)
    sums_1 = tl.zeros((WIDTH, COLS), dtype=tl.float32)
    sums_last = tl.zeros((16, WIDTH), dtype=tl.float32)
    row_sums = tl.zeros((16, WIDTH), dtype=tl.float32)
    bias_sums_1 = row_sums
    bias_sums_last = tl.zeros((16, 16), dtype=tl.float32)
    if LAYERS > 1:
        w2 = _load_weight(weight_2, WIDTH, WIDTH, WIDTH, WIDTH)
        sums_2 = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
        bias_sums_2 = row_sums
    if LAYERS > 2:
        w3 = _load_weight(weight_3, WIDTH, WIDTH, WIDTH, WIDTH)
        sums_3 = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
        bias_sums_3 = row_sums
    if LAYERS > 3:
        w4 = _load_weight(weight_4, WIDTH, WIDTH, WIDTH, WIDTH)
        sums_4 = tl.zeros((WIDTH, WIDTH), dtype=tl.float32)
        bias_sums_4 = row_sums

    for start in range(tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        # Forward again.
        x_tile = _load_rows(x, x_row, x_col, start, end, COLS, D_IN, BLOCK)
        weight = _weight(w1, weight_1, WIDTH, WIDTH, COLS, D_IN, OPERAND, RESIDENT)
        kept_1 = _kept(_layer(x_tile.to(OPERAND), weight, bias_1, WIDTH, BIAS), ACTIVATION, OPERAND)
        kept_last = kept_1
        if LAYERS > 1:
            weight = _weight(w2, weight_2, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
            kept_2 = _kept(
                _layer(_hidden(kept_1, ACTIVATION, OPERAND), weight, bias_2, WIDTH, BIAS), ACTIVATION, OPERAND
            )
            kept_last = kept_2
        if LAYERS > 2:
            weight = _weight(w3, weight_3, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
            kept_3 = _kept(
                _layer(_hidden(kept_2, ACTIVATION, OPERAND), weight, bias_3, WIDTH, BIAS), ACTIVATION, OPERAND
            )
            kept_last = kept_3
        if LAYERS > 3:
            weight = _weight(w4, weight_4, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
            kept_4 = _kept(
                _layer(_hidden(kept_3, ACTIVATION, OPERAND), weight, bias_4, WIDTH, BIAS), ACTIVATION, OPERAND
            )
            kept_last = kept_4

        if SECOND:
            # v's way down again, then the way of u up through the transposes of its layers.
            q = tl.zeros((BLOCK, WIDTH), dtype=tl.float32) + tl.load(weight_last + tl.arange(0, WIDTH))[None, :]
            if LAYERS > 3:
                q_4 = q.to(OPERAND)
                weight = _weight(w4, weight_4, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
                q = _product(_times_slope(q_4, kept_4, ACTIVATION).to(OPERAND), weight)
            if LAYERS > 2:
                q_3 = q.to(OPERAND)
                weight = _weight(w3, weight_3, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
                q = _product(_times_slope(q_3, kept_3, ACTIVATION).to(OPERAND), weight)
            if LAYERS > 1:
                q_2 = q.to(OPERAND)
                weight = _weight(w2, weight_2, WIDTH, WIDTH, WIDTH, WIDTH, OPERAND, RESIDENT)
                q = _product(_times_slope(q_2, kept_2, ACTIVATION).to(OPERAND), weight)
            q_1 = q.to(OPERAND)

            d = _load_rows(u, u_row, u_col, start, end, COLS, D_IN, BLOCK).to(GRADIENT)
            if SECOND_SUMS & 1:
                sums_1 = _add_outer(sums_1, _times_slope(q_1, kept_1, ACTIVATION).to(GRADIENT), d)
            weight = _weight(w1, weight_1, WIDTH, WIDTH, COLS, D_IN, GRADIENT, RESIDENT)
            dp = _product(d, tl.trans(weight))
            if SMOOTH:
                bend_1 = _times_curvature(q_1.to(tl.float32) * dp, kept_1, ACTIVATION)
            d = _times_slope(dp, kept_1, ACTIVATION).to(GRADIENT)
            if LAYERS > 1:
                if SECOND_SUMS & 2:
                    sums_2 = _add_outer(sums_2, _times_slope(q_2, kept_2, ACTIVATION).to(GRADIENT), d)
                weight = _weight(w2, weight_2, WIDTH, WIDTH, WIDTH, WIDTH, GRADIENT, RESIDENT)
                dp = _product(d, tl.trans(weight))
                if SMOOTH:
                    bend_2 = _times_curvature(q_2.to(tl.float32) * dp, kept_2, ACTIVATION)
                d = _times_slope(dp, kept_2, ACTIVATION).to(GRADIENT)
            if LAYERS > 2:
                if SECOND_SUMS & 4:
                    sums_3 = _add_outer(sums_3, _times_slope(q_3, kept_3, ACTIVATION).to(GRADIENT), d)
                weight = _weight(w3, weight_3, WIDTH, WIDTH, WIDTH, WIDTH, GRADIENT, RESIDENT)
                dp = _product(d, tl.trans(weight))
                if SMOOTH:
                    bend_3 = _times_curvature(q_3.to(tl.float32) * dp, kept_3, ACTIVATION)
                d = _times_slope(dp, kept_3, ACTIVATION).to(GRADIENT)
            if LAYERS > 3:
                if SECOND_SUMS & 8:
                    sums_4 = _add_outer(sums_4, _times_slope(q_4, kept_4, ACTIVATION).to(GRADIENT), d)
                weight = _weight(w4, weight_4, WIDTH, WIDTH, WIDTH, WIDTH, GRADIENT, RESIDENT)
                dp = _product(d, tl.trans(weight))
                if SMOOTH:
                    bend_4 = _times_curvature(q_4.to(tl.float32) * dp, kept_4, ACTIVATION)
                d = _times_slope(dp, kept_4, ACTIVATION).to(GRADIENT)
            if LAST_LAYER & SECOND_SUMS:
                row_sums = _add_row_sums(row_sums, d, BLOCK)

        # The gradient of y, down.
        g = _load_rows(grad_y, gy_row, gy_col, start, end, 16, D_OUT, BLOCK).to(GRADIENT)
        if LAST_LAYER & GRADIENTS:
            sums_last = _add_outer(sums_last, g, _hidden(kept_last, ACTIVATION, GRADIENT).to(GRADIENT))
            if BIAS:
                bias_sums_last = _add_row_sums(bias_sums_last, g, BLOCK)
        d = _product(g, _weight(w_last, weight_last, 16, D_OUT, WIDTH, WIDTH, GRADIENT, RESIDENT))
        if LAYERS > 3:
            d = _times_slope(d, kept_4, ACTIVATION)
            if SECOND and SMOOTH:
                d += bend_4
            g = d.to(GRADIENT)
            if GRADIENTS & 8:
                sums_4 = _add_outer(sums_4, g, _hidden(kept_3, ACTIVATION, GRADIENT).to(GRADIENT))
                if BIAS:
                    bias_sums_4 = _add_row_sums(bias_sums_4, g, BLOCK)
            d = _product(g, _weight(w4, weight_4, WIDTH, WIDTH, WIDTH, WIDTH, GRADIENT, RESIDENT))
        if LAYERS > 2:
            d = _times_slope(d, kept_3, ACTIVATION)
            if SECOND and SMOOTH:
                d += bend_3
            g = d.to(GRADIENT)
            if GRADIENTS & 4:
                sums_3 = _add_outer(sums_3, g, _hidden(kept_2, ACTIVATION, GRADIENT).to(GRADIENT))
                if BIAS:
                    bias_sums_3 = _add_row_sums(bias_sums_3, g, BLOCK)
            d = _product(g, _weight(w3, weight_3, WIDTH, WIDTH, WIDTH, WIDTH, GRADIENT, RESIDENT))
        if LAYERS > 1:
            d = _times_slope(d, kept_2, ACTIVATION)
            if SECOND and SMOOTH:
                d += bend_2
            g = d.to(GRADIENT)
            if GRADIENTS & 2:
                sums_2 = _add_outer(sums_2, g, _hidden(kept_1, ACTIVATION, GRADIENT).to(GRADIENT))
                if BIAS:
                    bias_sums_2 = _add_row_sums(bias_sums_2, g, BLOCK)
            d = _product(g, _weight(w2, weight_2, WIDTH, WIDTH, WIDTH, WIDTH, GRADIENT, RESIDENT))
        d = _times_slope(d, kept_1, ACTIVATION)
        if SECOND and SMOOTH:
            d += bend_1
        g = d.to(GRADIENT)
        if GRADIENTS & 1:
            # Through OPERAND, as the forward product saw it.
            sums_1 = _add_outer(sums_1, g, x_tile.to(OPERAND).to(GRADIENT))
            if BIAS:
                bias_sums_1 = _add_row_sums(bias_sums_1, g, BLOCK)
        if GRAD_X:
            d = _product(g, _weight(w1, weight_1, WIDTH, WIDTH, COLS, D_IN, GRADIENT, RESIDENT))
            _store_rows(grad_x, gx_row, gx_col, start, end, d, COLS, D_IN, BLOCK)

    # The slice holds all weights, then all biases.
    out = partials
    if GRADIENTS | SECOND_SUMS:
        out = partials + tl.program_id(0).to(tl.int64) * partials_stride
    LAST: tl.constexpr = WIDTH * D_IN + (LAYERS - 1) * WIDTH * WIDTH
    BIASES: tl.constexpr = LAST + D_OUT * WIDTH
    if (GRADIENTS | SECOND_SUMS) & 1:
        _add_to_slice(out, sums_1, WIDTH, WIDTH, COLS, D_IN)
    if (GRADIENTS | SECOND_SUMS) & 2:
        _add_to_slice(out + WIDTH * D_IN, sums_2, WIDTH, WIDTH, WIDTH, WIDTH)
    if (GRADIENTS | SECOND_SUMS) & 4:
        _add_to_slice(out + WIDTH * D_IN + WIDTH * WIDTH, sums_3, WIDTH, WIDTH, WIDTH, WIDTH)
    if (GRADIENTS | SECOND_SUMS) & 8:
        _add_to_slice(out + WIDTH * D_IN + 2 * WIDTH * WIDTH, sums_4, WIDTH, WIDTH, WIDTH, WIDTH)
    if LAST_LAYER & GRADIENTS:
        _add_to_slice(out + LAST, sums_last, 16, D_OUT, WIDTH, WIDTH)
    if LAST_LAYER & SECOND_SUMS:
        tl.debug_barrier()  # the same addresses, by other threads
        _add_row_to_slice(out + LAST, row_sums, WIDTH, WIDTH)
    if BIAS:
        if GRADIENTS & 1:
            _add_row_to_slice(out + BIASES, bias_sums_1, WIDTH, WIDTH)
        if GRADIENTS & 2:
            _add_row_to_slice(out + BIASES + WIDTH, bias_sums_2, WIDTH, WIDTH)
        if GRADIENTS & 4:
            _add_row_to_slice(out + BIASES + 2 * WIDTH, bias_sums_3, WIDTH, WIDTH)
        if GRADIENTS & 8:
            _add_row_to_slice(out + BIASES + 3 * WIDTH, bias_sums_4, WIDTH, WIDTH)
        if LAST_LAYER & GRADIENTS:
            _add_row_to_slice(out + BIASES + LAYERS * WIDTH, bias_sums_last, 16, D_OUT)
