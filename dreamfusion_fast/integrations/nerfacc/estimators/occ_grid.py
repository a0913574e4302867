"""Occupancy grids: samples where a grid has seen density (instant-ngp, Mueller et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc import _lazy
from dreamfusion_fast.integrations.nerfacc._cells import PackedCells
from dreamfusion_fast.integrations.nerfacc._packing import remember_offsets
from dreamfusion_fast.integrations.nerfacc.estimators.base import AbstractEstimator
from dreamfusion_fast.integrations.nerfacc.grid import _enlarge_aabb
from dreamfusion_fast.integrations.nerfacc.volrend import render_visibility_from_alpha, render_visibility_from_density

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SampleFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class OccGridEstimator(AbstractEstimator):
    """Grids of decayed maxima of a field's occupancy, and samples of rays in their occupied cells.

    Level l spans the box grown 2^l times about its centre. At first no cell is occupied. State dicts are those of
    nerfacc, and load both ways. Float buffers stay float32 after `.half()`, `.double()` and the like.

    Args:
        roi_aabb: box of the first level, six numbers (xmin, ymin, zmin, xmax, ymax, zmax) or a tensor `[6]`.
        resolution: cells along each axis, a number or three.
        levels: number of grids.

    Attributes:
        resolution: int32 `[3]`.
        aabbs: float32 `[levels, 6]`.
        occs: float32 `[levels * X * Y * Z]`, occupancies; -1 marks a cell that no camera sees.
        binaries: bool `[levels, X, Y, Z]`, which cells are occupied. It may be written to, or replaced.
        cells_per_lvl: X * Y * Z.
        levels: number of grids.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """

    DIM: int = 3
    resolution: Tensor
    aabbs: Tensor
    occs: Tensor
    binaries: Tensor

    def __init__(
        self,
        roi_aabb: Sequence[float] | Tensor,
        resolution: int | Sequence[int] | Tensor = 128,
        levels: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if "contraction_type" in kwargs:
            raise ValueError("OccGridEstimator: contraction_type is one of nerfacc 0.3; since 0.4 there are levels")
        box = torch.as_tensor(roi_aabb, dtype=torch.float32)
        if box.shape != (6,):
            raise ValueError(f"OccGridEstimator: roi_aabb must have shape [6], got {list(box.shape)}")
        sizes = torch.as_tensor([resolution] * 3 if isinstance(resolution, int) else resolution, dtype=torch.int32)
        if sizes.shape != (3,) or int(sizes.min()) < 1:
            raise ValueError(
                f"OccGridEstimator: resolution must be one or three numbers above 0, got {_lazy.shown(resolution)}"
            )
        _lazy.check_number("OccGridEstimator", "levels", levels, "at least 1", lambda number: number >= 1, whole=True)
        x, y, z = sizes.tolist()
        self.levels, self.cells_per_lvl = levels, x * y * z
        self.register_buffer("resolution", sizes)
        self.register_buffer("aabbs", torch.stack([_enlarge_aabb(box, 2.0**level) for level in range(levels)]))
        self.register_buffer("occs", torch.zeros(levels * self.cells_per_lvl, dtype=torch.float32))
        self.register_buffer("binaries", torch.zeros(levels, x, y, z, dtype=torch.bool))
        self._cells = PackedCells()

    @property
    def grid_indices(self) -> Tensor:
        """Numbers of a level's cells, int64 `[cells_per_lvl]`."""
        return torch.arange(self.cells_per_lvl, device=self.device)

    @property
    def grid_coords(self) -> Tensor:
        """Integer coordinates of a level's cells, int64 `[cells_per_lvl, 3]`."""
        return self._coords(self.grid_indices)

    @torch.no_grad()
    def sampling(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        sigma_fn: SampleFunction | None = None,
        alpha_fn: SampleFunction | None = None,
        near_plane: float = 0.0,
        far_plane: float = 1e10,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        render_step_size: float = 1e-3,
        early_stop_eps: float = 1e-4,
        alpha_thre: float = 0.0,
        stratified: bool = False,
        cone_angle: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Intervals of rays whose middles lie in occupied cells.

        A GPU is waited for once, and once more where a function prunes.

        Args:
            rays_o, rays_d: `[n_rays, 3]`; distances are in units of a direction's length.
            sigma_fn: of `t_starts, t_ends, ray_indices [m]`, returns densities `[m]`, by which samples are pruned:
                those that light does not reach, and those of little opacity. Not called without samples.
            alpha_fn: the same with opacities; of both, `sigma_fn` is used.
            near_plane, far_plane: where a ray's first interval begins, and none goes on.
            t_min, t_max: `[n_rays]`, the same for each ray; the narrower ones count.
            render_step_size: length of an interval; 0 or below: one interval for each crossed cell.
            early_stop_eps: least light that reaches a sample that is kept.
            alpha_thre: least opacity of a sample that is kept, or the mean occupancy of the grid if that is lower.
            stratified: shift the intervals of each ray by a random part of a step.
            cone_angle: length per distance where that is longer than the step.

        Returns:
            ray_indices int64 `[m]`, t_starts `[m]`, t_ends `[m]`, in the order of the rays and along each ray. No
            gradients.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        """
        op = "OccGridEstimator.sampling"
        _lazy.check_tensor(op, "rays_o", rays_o, ["n_rays", 3], _FLOATS, like=self.binaries)
        n_rays = rays_o.shape[0]
        _lazy.check_tensor(op, "rays_d", rays_d, [n_rays, 3], _FLOATS, like=self.binaries)
        rays_o, rays_d = rays_o.detach().float(), rays_d.detach().float()
        near, far = rays_o.new_full((n_rays,), near_plane), rays_o.new_full((n_rays,), far_plane)
        if t_min is not None:
            _lazy.check_tensor(op, "t_min", t_min, [n_rays], _FLOATS, like=rays_o)
            near = torch.maximum(near, t_min.detach().float())
        if t_max is not None:
            _lazy.check_tensor(op, "t_max", t_max, [n_rays], _FLOATS, like=rays_o)
            far = torch.minimum(far, t_max.detach().float())
        if stratified:
            near = near + torch.rand_like(near) * render_step_size
        ray_indices, t_starts, t_ends, offsets = self._march(rays_o, rays_d, near, far, render_step_size, cone_angle)
        remember_offsets(ray_indices, n_rays, offsets)

        function = sigma_fn if sigma_fn is not None else alpha_fn
        if function is None or not (alpha_thre > 0 or early_stop_eps > 0) or ray_indices.shape[0] == 0:
            return ray_indices, t_starts, t_ends
        # On the device: nothing waits for the mean.
        threshold = self.occs.mean().clamp(max=alpha_thre) if alpha_thre > 0 else 0.0
        given = function(t_starts, t_ends, ray_indices)
        name = "sigma_fn" if sigma_fn is not None else "alpha_fn"
        _lazy.check_tensor(op, f"what {name} returns", given, list(t_starts.shape), _FLOATS, like=t_starts)
        rest = (None, ray_indices, n_rays, early_stop_eps, threshold)
        if sigma_fn is not None:
            visible = render_visibility_from_density(t_starts, t_ends, given, *rest)
        else:
            visible = render_visibility_from_alpha(given, *rest)
        kept = visible.nonzero()[:, 0]
        return ray_indices[kept], t_starts[kept], t_ends[kept]

    def _march(
        self, rays_o: Tensor, rays_d: Tensor, near: Tensor, far: Tensor, step: float, cone_angle: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ray indices int64, starts and ends of the intervals, and the rays' offsets."""
        binaries, aabbs = self.binaries, self.aabbs
        if step > 0 and cone_angle == 0 and self._cells.cascaded(binaries, aabbs):
            bits, size = self._cells.bits(binaries), binaries.shape[1]
            offsets, middles, rays = _lazy.march(
                rays_o, rays_d, near, far, aabbs[0], bits, size, step, cascades=binaries.shape[0]
            )
            return rays.long(), middles - 0.5 * step, middles + 0.5 * step, offsets
        offsets, t_starts, t_ends, rays, _ = _lazy.traverse(
            rays_o, rays_d, near, far, aabbs, binaries, step, cone_angle
        )
        return rays.long(), t_starts, t_ends, offsets

    @torch.no_grad()
    def update_every_n_steps(
        self,
        step: int,
        occ_eval_fn: Callable[[Tensor], Tensor],
        occ_thre: float = 1e-2,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
        n: int = 16,
    ) -> None:
        """Update the grid if `step` is due.

        Each chosen cell becomes max(decay * old, occupancy at a random point in it): all cells during the warm-up,
        later a quarter of them at random and of the occupied ones as many or all. Cells at -1 stay so. A cell is
        occupied where it exceeds min(mean of the cells from 0 on, `occ_thre`).

        Args:
            step: training step.
            occ_eval_fn: occupancies `[m, 1]` or `[m]` at positions `[m, 3]`, such as density times step. A NaN is left
                out.
            occ_thre: highest threshold.
            ema_decay: factor per update, in [0, 1].
            warmup_steps: training steps during which all cells are updated.
            n: period in steps.

        Raises:
            RuntimeError: the estimator is not in training mode; `_update` works in any.
            TypeError, ValueError: the function returns something else.
        """
        if not self.training:
            raise RuntimeError(
                "OccGridEstimator.update_every_n_steps: want training mode, got eval(); _update works in both"
            )
        if step % n == 0:
            self._update(step, occ_eval_fn, occ_thre, ema_decay, warmup_steps)

    @torch.no_grad()
    def _update(
        self,
        step: int,
        occ_eval_fn: Callable[[Tensor], Tensor],
        occ_thre: float = 0.01,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
    ) -> None:
        """`update_every_n_steps` in this step."""
        op = "OccGridEstimator"
        if step < warmup_steps:
            cells = self._get_all_cells()
        else:
            cells = self._sample_uniform_and_occupied_cells(self.cells_per_lvl // 4)
        occs = self.occs.view(self.levels, self.cells_per_lvl)
        for level, indices in enumerate(cells):
            if indices.shape[0] == 0:
                continue
            points = self._points_in(level, indices)
            given = occ_eval_fn(points)
            if isinstance(given, Tensor) and given.dim() == 2:
                given = given.squeeze(-1)
            _lazy.check_tensor(op, "what occ_eval_fn returns", given, [indices.shape[0]], _FLOATS, like=points)
            _lazy.occupancy_update(occs[level].view(-1, 1, 1, 1), indices, given.float(), ema_decay)
        known = self.occs >= 0
        mean = self.occs.clamp(min=0).sum() / known.sum()
        self.binaries = (self.occs > mean.clamp(max=occ_thre)).view(self.binaries.shape)

    @torch.no_grad()
    def mark_invisible_cells(
        self,
        K: Tensor,  # noqa: N803 (the interface's name)
        c2w: Tensor,
        width: int,
        height: int,
        near_plane: float = 0.0,
        chunk: int = 32**3,
    ) -> None:
        """Set cells to -1 that no camera sees, or that are too near to one, and all others to 0. To be called once.

        A cell stands for the point at its coordinates divided by the resolution less 1, within its level's box.

        Args:
            K: `[n, 3, 3]` or `[1, 3, 3]`, from camera space, x right, y down, z ahead, to pixels.
            c2w: `[n, 3, 4]` or `[n, 4, 4]`, from camera space to the world.
            width, height: pixels of an image.
            near_plane: least depth; what lies before it in a camera's view is too near.
            chunk: cells that are looked at together.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape.
        """
        op = "OccGridEstimator.mark_invisible_cells"
        _lazy.check_tensor(op, "c2w", c2w, ["n", "3 or 4", 4])
        _lazy.check_tensor(op, "K", K, ["n", 3, 3])
        if c2w.shape[1] not in (3, 4) or K.shape[0] not in (1, c2w.shape[0]):
            raise ValueError(
                f"{op}: K must have shape [n or 1, 3, 3] and c2w [n, 3 or 4, 4], got {list(K.shape)} and "
                f"{list(c2w.shape)}"
            )
        rotation, position, to_pixels = c2w[:, :3, :3].float(), c2w[:, :3, 3].float(), K.transpose(1, 2).float()
        occs = self.occs.view(self.levels, self.cells_per_lvl)
        for level, indices in enumerate(self._get_all_cells()):
            low, high = self.aabbs[level, :3], self.aabbs[level, 3:]
            for part in indices.split(chunk):
                points = low + self._coords(part) / (self.resolution - 1).clamp(min=1) * (high - low)
                # Camera space, of each camera and cell: products with the rotations' columns.
                seen_from = (points[None] - position[:, None]) @ rotation
                x, y, depth = (seen_from @ to_pixels).unbind(dim=-1)
                u, v = x / depth, y / depth
                in_image = (depth >= 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                seen = (in_image & (depth >= near_plane)).any(dim=0)
                too_near = (in_image & (depth < near_plane)).any(dim=0)
                occs[level, part] = torch.where(seen & ~too_near, 0.0, -1.0)

    def _get_all_cells(self) -> list[Tensor]:
        """Of each level the numbers of the cells that are not marked. Waits for a GPU."""
        visible = (self.occs >= 0).view(self.levels, self.cells_per_lvl)
        level, cell = visible.nonzero().unbind(dim=1)
        return list(cell.split(torch.bincount(level, minlength=self.levels).tolist()))

    def _sample_uniform_and_occupied_cells(self, n: int) -> list[Tensor]:
        """Of each level n cells at random that are not marked, and n of the occupied ones, or all. Waits for a GPU."""
        chosen = []
        occs = self.occs.view(self.levels, self.cells_per_lvl)
        for level in range(self.levels):
            uniform = torch.randint(self.cells_per_lvl, (n,), device=self.device)
            uniform = uniform[occs[level, uniform] >= 0]
            occupied = self.binaries[level].flatten().nonzero()[:, 0]
            if occupied.shape[0] > n:
                occupied = occupied[torch.randint(occupied.shape[0], (n,), device=self.device)]
            chosen.append(torch.cat([uniform, occupied]))
        return chosen

    def _coords(self, cells: Tensor) -> Tensor:
        """Integer coordinates `[n, 3]` of a level's cells."""
        _, y, z = self.binaries.shape[1:]
        return torch.stack([cells // (y * z), cells // z % y, cells % z], dim=1)

    def _points_in(self, level: int, cells: Tensor) -> Tensor:
        """One random position in each cell, `[n, 3]`."""
        coords = self._coords(cells)
        low, high = self.aabbs[level, :3], self.aabbs[level, 3:]
        inside = torch.rand(coords.shape, dtype=torch.float32, device=coords.device)
        return torch.addcmul(low, coords + inside, (high - low) / self.resolution)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OccGridEstimator:
        """Change devices, and no types, in `.to`, `.double` and the like."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)
