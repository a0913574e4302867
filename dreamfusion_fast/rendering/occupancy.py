"""Occupancy grid: where in the scene box samples are worth taking."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.base import Backend, FieldLike, box_tensor, check_backend, query_density
from dreamfusion_fast.fields.revision import revision_of
from dreamfusion_fast.fields.samples import needs_of, takes_samples
from dreamfusion_fast.ops.occupancy import (
    mark_order,
    occupancy_pack,
    occupancy_pack_reference,
    occupancy_unpack,
    occupancy_update,
    occupancy_update_reference,
)
from dreamfusion_fast.rendering.config import RendererConfig

Quantity = Literal["density", "alpha"]

# Cells whose density is asked for at once: bounds the memory of an update whatever the resolution.
_CELLS_PER_QUERY = 1 << 17
# Share of the cells that an update chooses after the warm-up: at random, and as many again of the occupied ones.
_CHOSEN = 0.25
# The mean alone would empty a grid of equal densities, for which "above the mean" holds nowhere.
_BELOW_MEAN = 0.99
# Optical depth of a step through which no light comes that a float32 opacity could tell. Cells hold no higher density:
# an infinite one would never decay, and a huge one takes as long as a run to do so.
_OPAQUE_DEPTH = 17.0


class OccupancyGrid(nn.Module):
    """A grid of decayed density maxima, and the bitfield of occupied cells made from it.

    As in instant-ngp and nerfacc: every `every` steps each chosen cell becomes max(decay * old, density at a random
    point in it): all cells during the warm-up, later a random quarter and about as many of the occupied ones. A cell is
    occupied where its value exceeds min(mean, density at which one step has `alpha_threshold` opacity). Until the first
    update everything is occupied. The draws depend on (seed, step) only, so a resumed run repeats them.

    For scenes larger than an object, several cascades of the grid: cascade c has as many cells and spans the box grown
    2^c times about its centre. A place is looked up in the first cascade whose box holds it, so the middle of the later
    ones is never used. The mean above is that of all cascades.

    A surface given by a signed distance has no density, but an opacity per step (alpha). With `quantity="alpha"` the
    grid holds alphas in place of densities, and `update` takes a function of positions that returns them.

    The buffers are float32 whatever the default dtype is, and stay so after `.double()`, `.half()` and the like.

    Args:
        aabb: scene box `[6]`; [-1, 1]^3 if None. Has to hold the field's: nothing is rendered outside the last
            cascade's. With several cascades, the first one's; the field is asked in the boxes of all.
        resolution: cells per side.
        decay: factor per update.
        every: update period in training steps.
        warmup_steps: training steps during which all cells are updated.
        alpha_threshold: opacity of one step below which a cell counts as empty.
        step_size: length of that step in scene units; None: a 512th of the box's diagonal, as for the default
            :class:`RendererConfig`. A renderer with longer steps raises it (`keep_for_step`). Alphas are taken as they
            are, whatever it is: they should be those of the renderer's steps.
        seed: of the sample points.
        backend: native core or pure-PyTorch twins.
        cascades: number of grids C; `resolution` must be even if above 1.
        quantity: what the grid holds: densities, or opacities of a step.

    Attributes:
        grid: `[R, R, R]`, or `[C, R, R, R]` with C > 1, float32 buffer, index order x, y, z: densities, those at which
            a step is opaque and above as one value; or alphas, at most 1.
        bitfield: `[ceil(C R^3 / 8)]` uint8 buffer; bit i of byte b is cell 8 b + i.
        step_is_given: whether `step_size` was given, and not left to the grid.
    """

    aabb: Tensor
    grid: Tensor
    bitfield: Tensor

    def __init__(
        self,
        aabb: Tensor | tuple[float, ...] | None = None,
        resolution: int = 64,
        decay: float = 0.95,
        every: int = 16,
        warmup_steps: int = 256,
        alpha_threshold: float = 0.01,
        step_size: float | None = None,
        seed: int = 0,
        backend: Backend = "native",
        cascades: int = 1,
        quantity: Quantity = "density",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("resolution", resolution, 1),
            ("every", every, 1),
            ("warmup_steps", warmup_steps, 0),
            ("cascades", cascades, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}, want at least {least}")
        if cascades > 1 and resolution % 2 != 0:
            raise ValueError(f"resolution: got {resolution}, want an even number with {cascades} cascades")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay: got {decay}, want 0 to 1")
        if not 0.0 < alpha_threshold < 1.0:
            raise ValueError(f"alpha_threshold: got {alpha_threshold}, want between 0 and 1")
        if quantity not in get_args(Quantity):
            raise ValueError(f"quantity: got {quantity!r}, want {' or '.join(get_args(Quantity))}")
        box = box_tensor(aabb)
        self.step_is_given = step_size is not None
        if step_size is None:
            corners = box.tolist()
            step_size = math.dist(corners[:3], corners[3:]) / RendererConfig.samples_across
        if not 0.0 < step_size < math.inf:
            raise ValueError(f"step_size: got {step_size}, want above 0")
        check_backend(backend)
        self.resolution, self.decay, self.every, self.warmup_steps, self.seed = (
            resolution,
            decay,
            every,
            warmup_steps,
            seed,
        )
        self.cascades, self.quantity = cascades, quantity
        self.alpha_threshold = alpha_threshold
        self.step_size = step_size
        native = backend == "native"
        self._update = occupancy_update if native else occupancy_update_reference
        self._pack = occupancy_pack if native else occupancy_pack_reference
        self.register_buffer("aabb", box)
        shape = (resolution,) * 3 if cascades == 1 else (cascades, *(resolution,) * 3)
        self.register_buffer("grid", torch.zeros(shape, dtype=torch.float32))
        bitfield = torch.full(((cascades * resolution**3 + 7) // 8,), 255, dtype=torch.uint8)
        self.register_buffer("bitfield", mark_order(bitfield, "linear"))

    @property
    def outer_aabb(self) -> Tensor:
        """Box of the last cascade, `[6]`: outside it nothing is occupied."""
        return self._grown_box(2.0 ** (self.cascades - 1))

    @property
    def density_threshold(self) -> float:
        """Density at which a step of `step_size` has `alpha_threshold` opacity: the threshold is not above it."""
        return -math.log1p(-self.alpha_threshold) / self.step_size

    @property
    def threshold(self) -> Tensor:
        """Value of the grid above which a cell is occupied, 0-dim."""
        return (_BELOW_MEAN * self.grid.mean()).clamp(max=self._most_threshold)

    @property
    def _most_threshold(self) -> float:
        return self.alpha_threshold if self.quantity == "alpha" else self.density_threshold

    @property
    def _opaque(self) -> float:
        return 1.0 if self.quantity == "alpha" else _OPAQUE_DEPTH / self.step_size

    @property
    def revision(self) -> Hashable:
        """Equal to an earlier one as long as the same cells in the same box are occupied."""
        return revision_of(self.bitfield), revision_of(self.aabb), self.cascades

    def occupied(self) -> Tensor:
        """The bitfield as booleans, `[R, R, R]`, or `[C, R, R, R]` with C > 1."""
        return occupancy_unpack(self.bitfield, self.resolution, self.cascades)

    def occupied_fraction(self) -> float:
        """Share of occupied cells, 0 to 1. Waits for the GPU."""
        return float(self.occupied().float().mean())

    def keep_for_step(self, step_size: float) -> None:
        """Keep the cells that matter to a renderer whose steps are this long.

        :class:`VolumeRenderer` calls it. If several renderers share the grid, the longest step decides, since a cell
        that is empty for it is empty for all. Nothing waits for a GPU.

        Args:
            step_size: scene units.
        """
        if step_size > self.step_size:
            self.step_size = step_size
            # Cells are added only: before the first update all are occupied, whatever the grid holds.
            self.bitfield.bitwise_or_(self._pack(self.grid, self.threshold))

    @torch.no_grad()
    def update(self, field: FieldLike, step: int) -> bool:
        """Refresh the grid if `step` is due.

        A density or alpha of NaN is left out; one that is infinite, or an alpha above 1, counts as opaque.

        Args:
            field: anything with a density (see :func:`dreamfusion_fast.fields.query_density`). A module with float64
                parameters is asked in float64, everything else in float32. With `quantity="alpha"`, a callable from
                positions `[m, 3]` to alphas `[m]` or `[m, 1]`.
            step: training step, from 0.

        Returns:
            Whether the grid was updated.

        Raises:
            TypeError, ValueError: the callable returned something else than alphas `[m]` or needs more than positions,
                or a field returned something else than a density and a colour.
        """
        if step % self.every:
            return False
        generator = torch.Generator(device=self.grid.device)
        generator.manual_seed((self.seed * 0x9E3779B1 + step) & 0x7FFFFFFFFFFFFFFF)
        everything = step < self.warmup_steps
        cells = self._choose_cells(generator, everything)
        dtype = _dtype_of(field)
        query = _query_alpha if self.quantity == "alpha" else query_density
        seen = [query(field, self._points_in(part, generator).to(dtype)) for part in cells.split(_CELLS_PER_QUERY)]
        self._update(self.grid, None if everything else cells, torch.cat(seen).float(), self.decay)
        # All cells, also those that were loaded. What is not known is opaque, until it has decayed.
        self.grid.nan_to_num_(nan=math.inf).clamp_(max=self._opaque)
        self.bitfield.copy_(self._pack(self.grid, self.threshold))
        return True

    def set_occupied(self, occupied: Tensor) -> None:
        """Fix the grid to `occupied`, bool of the grid's shape: for static scenes and tests."""
        if occupied.shape != self.grid.shape:
            raise ValueError(f"occupied: got shape {list(occupied.shape)}, want {list(self.grid.shape)}")
        value = 1.0 if self.quantity == "alpha" else 2.0 * self.density_threshold
        self.grid.copy_(occupied.to(self.grid) * value)
        self.bitfield.copy_(self._pack(self.grid, 0.0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OccupancyGrid:
        """Change devices, and no types, in `.to`, `.double` and the like."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        mark_order(self.bitfield, "linear")
        return self

    def _choose_cells(self, generator: torch.Generator, everything: bool) -> Tensor:
        """Flat indices of the cells to update, without repetition, int64.

        On a GPU, so as not to wait for their number, as many as there can be: the last ones are -1, which the native
        update leaves out.
        """
        count, device = self.grid.numel(), self.grid.device
        if everything:
            return torch.arange(count, device=device)
        occupied = self.occupied().flatten()
        draws = torch.rand(2, count, generator=generator, device=device, dtype=torch.float32)
        wanted_share = _CHOSEN * count / occupied.sum().clamp(min=1)
        chosen = (draws[0] < _CHOSEN) | (occupied & (draws[1] < wanted_share))
        if self._update is occupancy_update and chosen.is_cuda:
            return torch.nonzero_static(chosen, size=_most_chosen(count))[:, 0]
        return chosen.nonzero()[:, 0]

    def _points_in(self, cells: Tensor, generator: torch.Generator) -> Tensor:
        """One uniformly random point in each cell, `[n, 3]`, scene units."""
        size = self.resolution
        corner = torch.stack([cells // (size * size) % size, cells // size % size, cells % size], dim=1)
        inside = torch.rand(cells.shape[0], 3, generator=generator, device=cells.device, dtype=torch.float32)
        box = self._grown_box(1.0 if self.cascades == 1 else 2.0 ** (cells // size**3)[:, None])
        extent = (box[..., 3:] - box[..., :3]) / size
        return box[..., :3] + (corner + inside) * extent

    def _grown_box(self, times: float | Tensor) -> Tensor:
        """The scene box grown about its centre, `[6]`, or with times `[n, 1]`, `[n, 6]`."""
        margin = (times - 1.0) * 0.5 * (self.aabb[3:] - self.aabb[:3])
        return torch.cat([self.aabb[:3] - margin, self.aabb[3:] + margin], dim=-1)


def _query_alpha(field: FieldLike, positions: Tensor) -> Tensor:
    """Alphas `[m]` of a callable."""
    if takes_samples(field):
        raise TypeError(
            f"field: got {type(field).__name__}, which needs {', '.join(needs_of(field))}, for a grid of alphas: want "
            "a function of positions [m, 3] alone that returns alphas [m]"
        )
    alpha: Any = field(positions)
    if not isinstance(alpha, Tensor):
        raise TypeError(f"field: returned {type(alpha).__name__}, want a tensor of alphas [m] for a grid of alphas")
    count = positions.shape[0]
    if alpha.shape not in ((count,), (count, 1)):
        raise ValueError(f"field: returned alphas {list(alpha.shape)}, want [{count}]")
    return alpha.reshape(count)


def _dtype_of(field: FieldLike) -> torch.dtype:
    """The dtype of a field's positions. Modules with 16-bit parameters take float32 and convert it themselves."""
    parameters = field.parameters() if isinstance(field, nn.Module) else ()
    wide = any(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if wide else torch.float32


def _most_chosen(count: int) -> int:
    """A number of cells that an update after the warm-up does not exceed: the largest mean, and eight deviations."""
    return min(count, math.ceil(_CHOSEN * (2.0 - _CHOSEN) * count + 4.0 * math.sqrt(count)))
