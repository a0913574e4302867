"""The hash grid of `hash_grid` over one tile of samples, in place: what a renderer that streams samples is made of.

Nothing is allocated and nothing recorded for autograd. The caller owns every buffer, and gives the number of samples
as a tensor that is never read on the host of a GPU, so that a tile can be captured into a CUDA graph. With
``E(p) = W(p) table`` the encoding of a position p, and J = dE/dp:

- `encode` writes E;
- `position_gradient` writes J^T g, the gradient of ``g . E`` by the position, which makes normals;
- `directional_derivative` writes J d, which is what the backward of `position_gradient` gives to g;
- `scatter` adds to the table's gradient, from E and from J d at once.

All tensors over samples are logically ``[n_samples, n_channels]`` with any strides. On a GPU, where successive threads
take successive samples, planes are fast: allocate ``[n_channels, n_samples]``, with n_samples a multiple of 8, and pass
``.t()``. On a CPU, contiguous ``[n_samples, n_channels]`` is used as it is and anything else copied.

Types. On a GPU positions, direction and gradient are float32; the table is float16 or float32 (a float16 table is half
the traffic; its float32 master stays with the caller); everything over channels is float16, bfloat16 or float32 (mind
that gradients of score distillation underflow float16); grad_table is float32, and so is all arithmetic. Or everything
is float64. On a CPU everything has one type, float32 or float64.

Source: Müller et al. 2022, "Instant Neural Graphics Primitives", sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_tensor
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.hash_grid import FEATURES, check_levels, hash_grid_reference
from dreamfusion_fast.ops.hash_grid_placement import check_placements
from dreamfusion_fast.ops.tiles.buffers import (
    ELEMENT_TYPES,
    array,
    check_channels,
    check_positions,
    check_table_layout,
    check_vectors,
    live,
    on_gpu,
    rows,
    table_dtypes,
    write_back,
)
from dreamfusion_fast.ops.tiles.twins import (
    derivative_before_scatter_reference,
    directional_derivative_reference,
    encode_reference,
    position_gradient_reference,
    scatter_reference,
)

__all__ = [
    "HashGridTileLayout",
    "derivative_before_scatter",
    "derivative_before_scatter_reference",
    "directional_derivative",
    "directional_derivative_reference",
    "encode",
    "encode_reference",
    "position_gradient",
    "position_gradient_reference",
    "scatter",
    "scatter_reference",
]

_CHANNELS = "levels * n_features"

# Levels that one thread of `encode` and `directional_derivative` goes through, at most 16. More reuse position and cell
# arithmetic; the tables of so many levels, 2 MB each at 2^19 rows of 2 float16, should stay in L2. Of 2^19 samples and
# 16 levels on an H100: 8 take 138 us, 16 take 126.
LEVELS_PER_THREAD = 16
# A smaller launch takes fewer levels per thread, until there are so many threads: 132 multiprocessors hold 270,000.
ENOUGH_THREADS = 2**18
# The same for `position_gradient`, which has to bring the levels of a sample together: so many at a time in registers,
# at most 16, the rest in further launches: 4 take 165 us, 8 take 154, 16 take 134.
LEVELS_PER_LAUNCH = 16
# Successive samples that one thread of `scatter` takes, a multiple of 4. Along a ray, up to 18 share a cell of the
# coarsest level, and atomics are spent once for each cell that a thread meets; more samples leave fewer threads. All
# levels one by one on an H100: 4 take 1033 us, 8 take 849, 16 take 771. The coarsest levels take more (kCoarseRuns):
# with them, all levels at once, 8 take 526 us, 16 take 486, 32 take 501.
SAMPLES_PER_THREAD = 16
SAMPLES_PER_THREAD_OF_FEW = 8  # in a tile too small for so many threads


@dataclass(frozen=True, eq=False)
class HashGridTileLayout:
    """The levels of a hash grid.

    Attributes:
        level_offsets: ``[n_levels + 1]`` int64, contiguous, on the samples' device; see `hash_grid_layout`.
        resolutions: ``[n_levels]`` int32, likewise.
        smoothstep: as in `hash_grid`.
        placements: as in `hash_grid`. Those of two dimensions ignore the third coordinate of positions.
    """

    level_offsets: Tensor
    resolutions: Tensor
    smoothstep: bool = False
    placements: Tensor | None = None

    def __post_init__(self) -> None:
        op, offsets = "HashGridTileLayout", self.level_offsets
        check_tensor(op, "resolutions", self.resolutions, ["n_levels"], dtypes=[torch.int32])
        n_levels = self.resolutions.shape[0]
        check_tensor(op, "level_offsets", offsets, [n_levels + 1], dtypes=[torch.int64], like=self.resolutions)
        check_placements(op, self.placements, n_levels, self.resolutions)
        for name in ("level_offsets", "resolutions", "placements"):
            if (tensor := getattr(self, name)) is not None and not tensor.is_contiguous():
                raise ValueError(f"{op}: {name} must be contiguous")
        if n_levels < 1:
            raise ValueError(f"{op}: resolutions: got none, want at least one level")

    @property
    def levels(self) -> int:
        """How many there are."""
        return self.resolutions.shape[0]

    def encoding(self, table: Tensor, n: int) -> Callable[[Tensor], Tensor]:
        """The twin of the encoding of `n` samples, as a function of their positions."""
        dims = 3 if self.placements is None else int(self.placements[0, 7])
        levels = (self.level_offsets, self.resolutions, self.smoothstep, self.placements)
        return lambda p: hash_grid_reference(p[:, :dims], table.to(p.dtype), *levels)


def encode(
    positions: Tensor,
    table: Tensor,
    layout: HashGridTileLayout,
    features: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Writes the encoding of each position.

    Args:
        positions: ``[n_samples, 3]``, clamped to [0, 1]; NaN gives NaN. At most 2^24 samples.
        table: ``[n_rows, n_features]``, contiguous, n_features one of 1, 2, 4, 8; on a GPU aligned to 16 bytes.
        layout: the levels.
        features: ``[n_samples, at least levels * n_features]``, out: the features of level 0, then of level 1, ...
        count: ``[1]`` int32: samples from this one on are left alone; None: all are meant.
        checked: the caller has passed these very shapes, types and layouts before, and saves the time to check them.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or layout. A level that does not lie inside
            the table is found on the CPU only; on a GPU its features are NaN.
        RuntimeError: the native core for this device was not built.
    """
    if not checked:
        op = "hash_grid_tile.encode"
        _check(op, positions, table, layout, count)
        check_channels(op, "features", features, positions, layout.levels * table.shape[1], _CHANNELS)
    run = _encode_on_gpu if on_gpu(positions) else _encode_on_cpu
    run(None, positions, table, layout, features, count)


def directional_derivative(
    direction: Tensor,
    positions: Tensor,
    table: Tensor,
    layout: HashGridTileLayout,
    derivative: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Writes J d, the directional derivative of the encoding.

    It is the gradient of ``d . position_gradient(g, ...)`` by g.

    Args:
        direction: ``[n_samples, 3]``, of the positions' dtype. No component counts where the position was clamped.
        positions, table, layout, count, checked: as in `encode`.
        derivative: ``[n_samples, at least levels * n_features]``, out.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`.
    """
    if not checked:
        op = "hash_grid_tile.directional_derivative"
        _check(op, positions, table, layout, count)
        check_vectors(op, "direction", direction, positions)
        check_channels(op, "derivative", derivative, positions, layout.levels * table.shape[1], _CHANNELS)
    run = _encode_on_gpu if on_gpu(positions) else _encode_on_cpu
    run(direction, positions, table, layout, derivative, count)


def derivative_before_scatter(
    direction: Tensor,
    grad_of_features: Tensor,
    grad_table: Tensor,
    positions: Tensor,
    table: Tensor,
    layout: HashGridTileLayout,
    derivative: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """`directional_derivative`, and what comes cheaper with it of the second-order `scatter` that is to follow.

    On a CPU that is all of it, since both find the same cells; on a GPU nothing, since there `scatter` takes both
    orders in one pass.

    Args:
        direction, positions, table, layout, derivative, count, checked: as in `directional_derivative`.
        grad_of_features, grad_table: as in `scatter`.

    Returns:
        The direction and grad_of_features that `scatter` still has to be given.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`.
    """
    if on_gpu(positions):
        directional_derivative(direction, positions, table, layout, derivative, count, checked)
        return direction, grad_of_features
    if not checked:
        _check_scatter(grad_table, positions, layout, derivative, count, direction, grad_of_features)
        _check("hash_grid_tile.derivative_before_scatter", positions, table, layout, count)
    n, channels = live(positions, count), layout.levels * table.shape[1]
    p, d, v = rows(positions, n, 3), rows(direction, n, 3), rows(grad_of_features, n, channels)
    out, levels = rows(derivative, n, channels), _levels(layout, table.shape[0], n, table.shape[1])
    call("hash_grid_encode", p, levels, pointer(d), pointer(p), pointer(table), pointer(out))
    call("hash_grid_table_gradient", p, levels, pointer(d), pointer(v), pointer(p), pointer(grad_table))
    write_back(out, derivative)
    return None, None


def position_gradient(
    grad_features: Tensor,
    positions: Tensor,
    table: Tensor,
    layout: HashGridTileLayout,
    gradient: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Writes J^T g, the gradient of ``g . encoding`` by the position. The sum over levels has a fixed order.

    Args:
        grad_features: g, ``[n_samples, at least levels * n_features]``.
        positions, table, layout, count, checked: as in `encode`.
        gradient: ``[n_samples, 3]``, of the positions' dtype, out. Zero where a position was clamped.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`. A level that does not lie inside the table adds nothing.
    """
    channels = layout.levels * table.shape[1]
    if not checked:
        op = "hash_grid_tile.position_gradient"
        _check(op, positions, table, layout, count)
        check_channels(op, "grad_features", grad_features, positions, channels, _CHANNELS)
        check_vectors(op, "gradient", gradient, positions)
    if not on_gpu(positions):
        n = live(positions, count)
        p, g = rows(positions, n, 3), rows(grad_features, n, channels)
        out = rows(gradient, n, 3)
        levels = _levels(layout, table.shape[0], n, table.shape[1])
        call("hash_grid_position_gradient", p, levels, 0, pointer(g), pointer(p), pointer(table), pointer(out))
        write_back(out, gradient)
        return
    table_arguments = (pointer(table), ELEMENT_TYPES[table.dtype])
    at_once = min(layout.levels, LEVELS_PER_LAUNCH)
    tile = _tile(positions, layout, count, *table.shape)
    arrays = (*table_arguments, array(grad_features), array(gradient))
    call("hash_grid_tile_position_gradient", positions, tile, *arrays, at_once)


def scatter(
    grad_table: Tensor,
    positions: Tensor,
    layout: HashGridTileLayout,
    grad_features: Tensor,
    count: Tensor | None = None,
    direction: Tensor | None = None,
    grad_of_features: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Adds the table's gradient of ``grad_features . E + grad_of_features . (J direction)``, in one pass.

    The second term is the table's share of the backward of `position_gradient`: grad_of_features is what that function
    was given, direction the gradient of what it wrote. On a GPU a sample whose gradients are all zero costs nothing and
    adds nothing, not even NaN where its position is NaN; the order of the sums is not fixed.

    Args:
        grad_table: ``[n_rows, n_features]``, float32 (float64 if the positions are), contiguous, added to; on a GPU
            aligned to 16 bytes.
        positions, layout, count, checked: as in `encode`.
        grad_features: ``[n_samples, at least levels * n_features]``.
        direction: ``[n_samples, 3]``, of the positions' dtype.
        grad_of_features: ``[n_samples, at least levels * n_features]``; with direction, or neither.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`. A level that does not lie inside the table adds nothing.
    """
    channels = layout.levels * grad_table.shape[1]
    if not checked:
        _check_scatter(grad_table, positions, layout, grad_features, count, direction, grad_of_features)
    if not on_gpu(positions):
        n = live(positions, count)
        p, g = rows(positions, n, 3), rows(grad_features, n, channels)
        levels = _levels(layout, grad_table.shape[0], n, grad_table.shape[1])
        call("hash_grid_table_gradient", p, levels, 0, pointer(g), pointer(p), pointer(grad_table))
        if direction is not None and grad_of_features is not None:
            d, v = rows(direction, n, 3), rows(grad_of_features, n, channels)
            call("hash_grid_table_gradient", p, levels, pointer(d), pointer(v), pointer(p), pointer(grad_table))
        return
    tile = _tile(positions, layout, count, *grad_table.shape)
    arrays = (array(grad_features), array(direction), array(grad_of_features), pointer(grad_table))
    many = positions.shape[0] * layout.levels > ENOUGH_THREADS * SAMPLES_PER_THREAD
    run = SAMPLES_PER_THREAD if many else SAMPLES_PER_THREAD_OF_FEW
    call("hash_grid_tile_scatter", positions, tile, *arrays, run)


def _check_scatter(
    grad_table: Tensor,
    positions: Tensor,
    layout: HashGridTileLayout,
    grad_features: Tensor,
    count: Tensor | None,
    direction: Tensor | None,
    grad_of_features: Tensor | None,
) -> None:
    op = "hash_grid_tile.scatter"
    _check(op, positions, grad_table, layout, count, "grad_table", [positions.dtype])
    channels = layout.levels * grad_table.shape[1]
    check_channels(op, "grad_features", grad_features, positions, channels, _CHANNELS)
    if (direction is None) != (grad_of_features is None):
        raise ValueError(f"{op}: direction and grad_of_features go together")
    if direction is not None and grad_of_features is not None:
        check_vectors(op, "direction", direction, positions)
        check_channels(op, "grad_of_features", grad_of_features, positions, channels, _CHANNELS)


def _check(
    op: str,
    positions: Tensor,
    table: Tensor,
    layout: HashGridTileLayout,
    count: Tensor | None,
    table_name: str = "table",
    dtypes: list[torch.dtype] | None = None,
) -> None:
    """The checks that the functions share; `table` is the table or its gradient."""
    check_positions(op, positions, count)
    if dtypes is None:
        dtypes = table_dtypes(positions)
    check_tensor(op, table_name, table, ["n_rows", "n_features"], dtypes=dtypes, like=positions)
    if table.shape[1] not in FEATURES:
        raise ValueError(f"{op}: {table_name} must have 1, 2, 4 or 8 columns, got {list(table.shape)}")
    check_table_layout(op, table_name, table)
    if layout.resolutions.device != positions.device:
        raise ValueError(
            f"{op}: layout is on {layout.resolutions.device}, the other arguments are on {positions.device}"
        )
    if not on_gpu(positions):
        check_levels(layout.level_offsets, layout.resolutions, table.shape[0], layout.placements)


def _levels(layout: HashGridTileLayout, n_rows: int, n_samples: int, n_features: int) -> tuple[int, ...]:
    """The first argument of the native functions without tiles."""
    sizes = (n_rows, n_samples, layout.levels, n_features, layout.smoothstep)
    return pointer(layout.level_offsets), pointer(layout.resolutions), pointer(layout.placements), *sizes


def _tile(
    positions: Tensor, layout: HashGridTileLayout, count: Tensor | None, n_rows: int, n_features: int
) -> tuple[int | tuple[int, ...], ...]:
    """The first argument of every native function of tiles."""
    return _levels(layout, n_rows, positions.shape[0], n_features), pointer(count), array(positions)


def _levels_per_thread(n_samples: int, levels: int) -> int:
    per_thread = min(levels, LEVELS_PER_THREAD)
    while per_thread > 1 and n_samples * -(-levels // per_thread) < ENOUGH_THREADS:
        per_thread = -(-per_thread // 2)
    return per_thread


def _encode_on_gpu(
    direction: Tensor | None,
    positions: Tensor,
    table: Tensor,
    layout: HashGridTileLayout,
    output: Tensor,
    count: Tensor | None,
) -> None:
    at_once = _levels_per_thread(positions.shape[0], layout.levels)
    tile = _tile(positions, layout, count, *table.shape)
    arrays = (pointer(table), ELEMENT_TYPES[table.dtype], array(direction), array(output))
    call("hash_grid_tile_encode", positions, tile, *arrays, at_once)


def _encode_on_cpu(
    direction: Tensor | None,
    positions: Tensor,
    table: Tensor,
    layout: HashGridTileLayout,
    output: Tensor,
    count: Tensor | None,
) -> None:
    n = live(positions, count)
    p, out = rows(positions, n, 3), rows(output, n, layout.levels * table.shape[1])
    d = None if direction is None else rows(direction, n, 3)
    levels = _levels(layout, table.shape[0], n, table.shape[1])
    call("hash_grid_encode", p, levels, pointer(d), pointer(p), pointer(table), pointer(out))
    write_back(out, output)
