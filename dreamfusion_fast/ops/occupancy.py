"""The occupancy grid's two operations: a decaying maximum of the density per cell, and its threshold as a bitfield."""

import math

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import INTEGERS, check_number, check_same_length, check_tensor
from dreamfusion_fast.ops._native import call, pointer


def occupancy_update(grid: Tensor, cells: Tensor | None, density: Tensor, decay: float) -> None:
    """Lets the listed cells decay and raises them to the density seen now: ``max(grid * decay, density)``, in place.

    A cell listed several times decays once and takes the largest of its densities. A NaN is a value that is not known:
    one of the grid gives way to any density, and stays where there is none but NaN. The rule is that of the occupancy
    grids of instant-ngp (Mueller et al. 2022). A cell below 0, as those that no camera sees are marked (-1), stays as
    it is; a density below 0 counts as 0, so that none marks a cell. No waiting for the GPU.

    Args:
        grid: ``[R, R, R]`` or, with C cascades, ``[C, R, R, R]`` float32, contiguous; changed in place.
        cells: ``[n]`` int32 or int64, flat indices ``((c * R + x) * R + y) * R + z``; None = all cells in order.
        density: ``[n]`` float32. A NaN in it is left out. An infinite one never decays: clamp them first.
        decay: factor in [0, 1].

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or a decay out of range.
        IndexError: a cell out of range (CPU; on a GPU, where telling would mean to wait, such cells are left out).
        RuntimeError: the native core for this device was not built.
    """
    _check_update("occupancy_update", grid, cells, density, decay)
    if not grid.is_contiguous():
        raise ValueError("occupancy_update: grid must be contiguous, since it is changed in place")
    _occupancy_update(grid, cells, density.detach(), decay)


def occupancy_pack(grid: Tensor, threshold: float | Tensor) -> Tensor:
    """One bit per cell: bit i of byte b tells whether cell ``8 b + i`` is above the threshold.

    Args:
        grid: ``[R, R, R]`` or, with C cascades, ``[C, R, R, R]`` float32.
        threshold: a number, or a 0-dim tensor on the grid's device (then nothing waits for the GPU).

    Returns:
        uint8 ``[ceil(C * R^3 / 8)]``; the bits past the last cell are 0.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        RuntimeError: the native core for this device was not built.
    """
    threshold = _check_pack("occupancy_pack", grid, threshold)
    return mark_order(_occupancy_pack(grid.detach(), threshold), "linear")


def mark_order(bitfield: Tensor, order: str) -> Tensor:
    """The same tensor, which now says in which order its cells are: "linear", as here, or "morton".

    A bitfield has as many bytes in either order, and in the wrong one it gives other samples without an error. So what
    makes one marks it, and what reads one asks `check_order`. The mark is an attribute of the tensor: what is copied
    from it (`clone`, `to`) has none, and is believed.
    """
    if not torch.compiler.is_compiling():
        bitfield.cell_order = order  # type: ignore[attr-defined]
    return bitfield


def check_order(op: str, bitfield: Tensor, order: str) -> None:
    """Raises ValueError if a bitfield is marked as in another order than is wanted."""
    marked = order if torch.compiler.is_compiling() else getattr(bitfield, "cell_order", order)
    if marked != order:
        maker = {"linear": "occupancy_pack", "morton": "raymarching's packbits"}[order]
        raise ValueError(
            f"{op}: bitfield must have its cells in {order} order, as {maker} makes it, got one in {marked} order"
        )


def check_cells(op: str, resolution: int, cascades: int, most: int = 2**31 - 1) -> None:
    """Raises TypeError or ValueError unless there can be so many grids, `most` or fewer, of this resolution."""
    check_number(op, "resolution", resolution, "between 1 and 1290", lambda number: 1 <= number <= 1290, whole=True)
    check_number(op, "cascades", cascades, f"between 1 and {most}", lambda number: 1 <= number <= most, whole=True)
    if cascades * resolution**3 >= 2**31:
        raise ValueError(
            f"{op}: cascades must be of less than 2^31 cells together, got {cascades} of resolution {resolution}"
        )


def bitfield_size(resolution: int, cascades: int) -> int:
    """Bytes of the bitfield of so many grids."""
    return (cascades * resolution**3 + 7) // 8


def _check_grid(op: str, grid: Tensor, dtypes: tuple[torch.dtype, ...]) -> int:
    dims = grid.dim() if isinstance(grid, Tensor) and not grid.is_nested else 0  # check_tensor says what else it is
    cascaded = dims == 4
    size = grid.shape[-3] if dims in (3, 4) else 0
    shape: list[int | str] = [size, size, size] if size > 0 else ["R", "R", "R >= 1"]
    if cascaded:
        shape = ["C", *shape]
    check_tensor(op, "grid", grid, shape, dtypes)
    count = grid.numel()
    if not 0 < count < 2**31:
        raise ValueError(f"{op}: grid must have 1 to 2^31 - 1 cells, got {list(grid.shape)}")
    return count


def _check_update(op: str, grid: Tensor, cells: Tensor | None, density: Tensor, decay: float) -> None:
    dtypes = (torch.float32,) if op == "occupancy_update" else (torch.float32, torch.float64)
    n_cells = _check_grid(op, grid, dtypes)
    if cells is None:
        check_tensor(op, "density", density, [n_cells], like=grid, same_dtype=True)
    else:
        check_tensor(op, "cells", cells, ["n"], INTEGERS, like=grid)
        check_tensor(op, "density", density, ["n"], like=grid, same_dtype=True)
        check_same_length(op, "density", density, "cells", cells)
    check_number(op, "decay", decay, "between 0 and 1", lambda number: 0 <= number <= 1)


def _check_pack(op: str, grid: Tensor, threshold: float | Tensor) -> Tensor:
    """The threshold as a tensor like the grid's elements."""
    dtypes = (torch.float32,) if op == "occupancy_pack" else (torch.float32, torch.float64)
    _check_grid(op, grid, dtypes)
    if isinstance(threshold, Tensor):
        check_tensor(op, "threshold", threshold, [], like=grid)
        return threshold.detach().to(grid.dtype)
    most = torch.finfo(grid.dtype).max
    wanted = "a number that the grid's type holds"
    check_number(op, "threshold", threshold, wanted, lambda number: math.isinf(number) or abs(number) <= most)
    return grid.new_full((), float(threshold))


def _check_cells(op: str, cells: Tensor, grid: Tensor) -> None:
    """On the CPU alone, and inside the op, where tensors have values."""
    if cells.device.type == "cpu" and cells.numel() > 0:
        lowest, highest = (int(bound) for bound in cells.aminmax())
        if lowest < 0 or highest >= grid.numel():
            raise IndexError(f"{op}: cells must be in [0, {grid.numel()}), got {lowest} to {highest}")


@torch.library.custom_op("dreamfusion_fast::occupancy_update", mutates_args=("grid",))
def _occupancy_update(grid: Tensor, cells: Tensor | None, density: Tensor, decay: float) -> None:
    density = density.contiguous()
    decayed = grid
    if cells is not None:
        cells = cells.to(torch.int64).contiguous()
        _check_cells("occupancy_update", cells, grid)
        decayed = torch.empty_like(density)
    if density.numel() > 0:
        addresses = (pointer(grid), pointer(cells), pointer(density), pointer(decayed))
        call("occupancy_update", grid, *addresses, decay, density.numel(), grid.numel())


@_occupancy_update.register_fake
def _(grid: Tensor, cells: Tensor | None, density: Tensor, decay: float) -> None:
    return None


@torch.library.custom_op("dreamfusion_fast::occupancy_pack", mutates_args=())
def _occupancy_pack(grid: Tensor, threshold: Tensor) -> Tensor:
    grid = grid.contiguous()
    bits = grid.new_empty((grid.numel() + 7) // 8, dtype=torch.uint8)
    call("occupancy_pack", grid, pointer(grid), pointer(threshold), pointer(bits), grid.numel())
    return bits


@_occupancy_pack.register_fake
def _(grid: Tensor, threshold: Tensor) -> Tensor:
    return grid.new_empty((grid.numel() + 7) // 8, dtype=torch.uint8)


def occupancy_update_reference(grid: Tensor, cells: Tensor | None, density: Tensor, decay: float) -> None:
    """The PyTorch twin of `occupancy_update`: float32 or float64, any device."""
    _check_update("occupancy_update_reference", grid, cells, density, decay)
    flat, density = grid.detach().view(-1), density.detach()
    if cells is None:
        flat.copy_(torch.where(flat < 0, flat, torch.fmax(density.clamp(min=0), flat * decay)))
        return
    cells = cells.long()
    _check_cells("occupancy_update_reference", cells, grid)
    old = flat[cells]
    new = torch.where(old < 0, old, torch.fmax(density.clamp(min=0), old * decay))
    known = ~new.isnan()
    flat[cells] = math.nan
    flat.scatter_reduce_(0, cells[known], new[known], "amax", include_self=False)


def occupancy_pack_reference(grid: Tensor, threshold: float | Tensor) -> Tensor:
    """The PyTorch twin of `occupancy_pack`: float32 or float64, any device."""
    above = (grid > _check_pack("occupancy_pack_reference", grid, threshold)).reshape(-1)
    above = torch.nn.functional.pad(above, (0, -above.numel() % 8)).view(-1, 8)
    bit_values = 2 ** torch.arange(8, device=grid.device)
    return (above * bit_values).sum(dim=-1).to(torch.uint8)


def occupancy_unpack(bitfield: Tensor, resolution: int, cascades: int = 1) -> Tensor:
    """The bool grid of a bitfield made by `occupancy_pack`: ``[R, R, R]``, of several cascades ``[C, R, R, R]``.

    Args:
        bitfield: uint8 ``[ceil(C * R^3 / 8)]``.
        resolution: R, 1 to 1290.
        cascades: C, of less than 2^31 cells together.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range.
    """
    check_cells("occupancy_unpack", resolution, cascades)
    check_tensor("occupancy_unpack", "bitfield", bitfield, [bitfield_size(resolution, cascades)], (torch.uint8,))
    bits = (bitfield[:, None] >> torch.arange(8, dtype=torch.uint8, device=bitfield.device)) & 1
    shape = (cascades, resolution, resolution, resolution)
    return bits.reshape(-1)[: cascades * resolution**3].bool().view(shape if cascades > 1 else shape[1:])
