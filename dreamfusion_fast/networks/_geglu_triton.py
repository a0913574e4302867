"""The Triton kernel of GEGLU; `dreamfusion_fast.networks.geglu` has the maths."""

# Compile-time constants are capitals, as everywhere in Triton, whose language has no types to annotate.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from dreamfusion_fast.networks._group_norm_triton import activated_and_slope


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
