"""How the parts of a threestudio scene are rendered: streamed, or in chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.integrations.threestudio.field import GeometryField, Wanted
from dreamfusion_fast.integrations.threestudio.geometry import HashGridGeometry, is_sigmoid
from dreamfusion_fast.integrations.threestudio.grid import EstimatorGrid
from dreamfusion_fast.integrations.threestudio.stand_ins import orientation_stand_ins
from dreamfusion_fast.rendering import Rays, RendererConfig, VolumeRenderer
from dreamfusion_fast.rendering.volume.prepared import RenderOutput

# Samples that less light reaches are dropped, and rays of less opacity have no mean distance: threestudio's numbers.
_EARLY_STOP = 1e-4
_NOTHING = 1e-5


class SceneRenderer:
    """Renders what a :class:`ThreestudioRenderer` has at the time: its parts, its config, training or not.

    No module, so that the geometry is no part of the renderer's parameters.

    Args:
        owner: whose scene it is.

    Attributes:
        grid: where samples are taken.
    """

    def __init__(self, owner: Any) -> None:
        cfg = owner.cfg
        self._owner = owner
        self.grid = EstimatorGrid(cfg.radius, owner.render_step_size, cfg.grid_prune)
        self._config = RendererConfig(step=owner.render_step_size, near=cfg.near_plane, far=cfg.far_plane)
        self._chunked = VolumeRenderer(GeometryField(owner), self.grid, self._config)
        self._streamed: VolumeRenderer | None = None

    def update(self, step: int) -> None:
        """Refresh the grid, if it is due."""
        self.grid.update(GeometryField(self._owner), step)

    def render(
        self, rays_o: Tensor, rays_d: Tensor, light_positions: Tensor, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """The output of the scene without its background.

        Args:
            rays_o, rays_d: `[B, H, W, 3]`.
            light_positions: `[B, 3]`.
            arguments: further ones of the material.
        """
        owner = self._owner
        with torch.no_grad():  # distances do not change with a ray, and so neither does their scale
            _, scale = Rays.normalized(rays_o, rays_d)
        rays = Rays.from_tensors(rays_o, rays_d * scale[..., None])
        seed = int(torch.randint(2**62, ())) if owner.randomized else 0
        if self._streams():
            out = self._stream(rays, seed)
        else:
            out = self._in_chunks(rays, rays_d, light_positions, scale, seed, arguments)
        out["depth"] = out["depth"] * scale[..., None]
        return out

    def _streams(self) -> bool:
        """Whether kernels can stand in for geometry and material."""
        owner = self._owner
        return (
            isinstance(owner.geometry, HashGridGeometry)
            and is_sigmoid(owner.geometry, owner.material)
            and not (owner.training and owner.cfg.return_samples)
            and owner.cfg.return_z_variance is not True
        )

    def _stream(self, rays: Rays, seed: int) -> dict[str, Any]:
        field = self._owner.geometry.field
        if self._streamed is None or self._streamed.field is not field:
            self._streamed = VolumeRenderer(field, self.grid, self._config)
        self._streamed.config = self._pruning(None)
        output = self._streamed.render(rays, jitter=self._owner.randomized, seed=seed)
        return {"comp_rgb_fg": output.color, "opacity": output.opacity[..., None], "depth": output.depth[..., None]}

    def _in_chunks(
        self,
        rays: Rays,
        rays_d: Tensor,
        light_positions: Tensor,
        scale: Tensor,
        seed: int,
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        owner, cfg, renderer = self._owner, self._owner.cfg, self._chunked
        samples = owner.training and cfg.return_samples
        wanted = Wanted(
            normal=cfg.return_comp_normal or not owner.training,
            orientation=owner.training and not samples,
            spread=cfg.return_z_variance is not False,
            samples=samples,
        )
        lights = light_positions.reshape(-1, 1, 1, 3).expand(*rays.shape, 3)
        field, idle = GeometryField(owner, wanted, arguments), renderer.field
        renderer.field = field
        renderer.config = self._pruning(cfg.train_chunk_size if owner.training else cfg.eval_chunk_size)
        try:
            output = renderer.render(
                rays,
                jitter=owner.randomized,
                seed=seed,
                extras={"viewdirs": rays_d, "light_positions": lights},
                return_samples=samples,
            )
        finally:
            renderer.field = idle
        out = self._composited(output, field, scale)
        if samples:
            out |= self._samples(output, field, rays_d, scale)
        return out

    @staticmethod
    def _composited(output: RenderOutput, field: GeometryField, scale: Tensor) -> dict[str, Any]:
        """The outputs per ray."""
        channels = output.channels
        color = output.color if field.color_channels >= 3 else channels["more"]
        if field.color_channels > 3:
            color = torch.cat([color, channels["more"]], dim=-1)
        opacity = output.opacity[..., None]
        out = {"comp_rgb_fg": color, "opacity": opacity, "depth": output.depth[..., None]}
        if "spread" in channels:
            variance = channels["spread"] / opacity.clamp(min=_NOTHING) * (opacity > 0.5)
            out["z_variance"] = variance * scale[..., None] ** 2
        if "normal" in channels:
            out["comp_normal"] = (F.normalize(channels["normal"], dim=-1) + 1.0) / 2.0 * opacity
        if "away" in channels:
            fixed = channels["away_fixed"]
            out |= orientation_stand_ins((channels["away"] - fixed + fixed.detach()).sum())
        return out

    def _samples(self, output: RenderOutput, field: GeometryField, rays_d: Tensor, scale: Tensor) -> dict[str, Any]:
        """The outputs per sample."""
        held = output.ray_samples
        assert held is not None
        rows = held.ray_indices
        scales = scale.reshape(-1)[rows]
        known = field.samples()
        out = {
            "weights": held.weights[:, None],
            "t_points": (held.t * scales)[:, None],
            "t_intervals": ((held.t_ends - held.t_starts) * scales)[:, None],
            "t_dirs": rays_d.reshape(-1, 3)[rows],
            "ray_indices": rows,
            "points": held.positions,
            **known,
        }
        if "normal" in known and self._owner.cfg.return_normal_perturb:
            beside = held.positions + torch.randn_like(held.positions) * 1e-2
            out["normal_perturb"] = self._owner.geometry(beside, output_normal=True)["normal"]
        return out

    def _pruning(self, chunk: int | None) -> RendererConfig:
        cfg = self._owner.cfg
        if not (cfg.grid_prune and cfg.prune_alpha_threshold):
            return _configured(self._config, chunk, 0.0, 0.0)
        return _configured(self._config, chunk, _EARLY_STOP, self.grid.least_alpha())


@lru_cache(maxsize=32)
def _configured(base: RendererConfig, chunk: int | None, early_stop: float, alpha_threshold: float) -> RendererConfig:
    return replace(base, max_samples_per_chunk=chunk, early_stop=early_stop, alpha_threshold=alpha_threshold)
