"""threestudio's volume renderer over this package's: its config, and when what is done."""

from dataclasses import dataclass
from typing import Any, Optional

import threestudio
from threestudio.models.renderers.base import VolumeRenderer
from torch import Tensor

from dreamfusion_fast.integrations.threestudio.geometry import HashGridGeometry

NAME = "dreamfusion-fast-volume-renderer"

_SQRT_3 = 1.732  # as threestudio has it


@threestudio.register(NAME)
class ThreestudioRenderer(VolumeRenderer):
    """Renders any geometry, material and background of threestudio in chunks that are recomputed in backward.

    Keys of the config and of the output are those of `nerf-volume-renderer`. Samples are handed out if `return_samples`
    asks for them: without it, no more than a chunk of them exists at a time, and `weights`, `normal` and `t_dirs` are
    stand-ins of one row, on which the orientation loss of the stock systems, as they write it, has its value and its
    gradient. A :class:`HashGridGeometry` with `no-material` and its sigmoid streams: nothing is held per sample.
    """

    @dataclass
    class Config(VolumeRenderer.Config):
        """As of `nerf-volume-renderer`, and three keys more."""

        num_samples_per_ray: int = 512
        """Samples along the box's diagonal."""
        eval_chunk_size: int = 160000
        """Samples that geometry and material see at a time when not training."""
        randomized: bool = True
        """Shift the samples of each ray in training."""
        near_plane: float = 0.0
        far_plane: float = 1e10
        return_comp_normal: bool = False
        """Composite normals in training, too."""
        return_normal_perturb: bool = False
        """Normals beside the samples, with `return_samples`."""
        estimator: str = "occgrid"
        """Only this one is served."""
        grid_prune: bool = True
        """Keep an occupancy grid, and sample where it is occupied."""
        prune_alpha_threshold: bool = True
        """With the grid: drop samples of little opacity, and those that no light reaches."""
        proposal_network_config: Optional[dict] = None  # noqa: UP045 (OmegaConf)
        prop_optimizer_config: Optional[dict] = None  # noqa: UP045
        prop_scheduler_config: Optional[dict] = None  # noqa: UP045
        num_samples_per_ray_proposal: int = 64
        num_samples_per_ray_importance: int = 64

        train_chunk_size: int = 262144
        """Samples that geometry and material see at a time in training: bounds its memory, whatever the image."""
        return_samples: bool = False
        """Hand out all samples in training, as the stock renderer does: for losses on them, at their memory."""
        return_z_variance: Optional[bool] = None  # noqa: UP045
        """The variance of distances along each ray; null: wherever samples come in chunks."""

    cfg: Any
    geometry: Any
    material: Any
    background: Any

    def configure(self, geometry: Any, material: Any, background: Any) -> None:
        """Set up the grid and what renders."""
        # Here, since the ops behind it take longer to import than a plug-in should before it is used.
        from dreamfusion_fast.integrations.threestudio.scene import SceneRenderer

        super().configure(geometry, material, background)
        self._check()
        self.render_step_size = 2.0 * _SQRT_3 * self.cfg.radius / self.cfg.num_samples_per_ray
        self.randomized = self.cfg.randomized
        self._scene = SceneRenderer(self)
        self.estimator = self._scene.grid

    def forward(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        light_positions: Tensor,
        bg_color: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Render images.

        Args:
            rays_o, rays_d: `[B, H, W, 3]`. Densities are per scene unit; distances that are given or returned are in
                lengths of a direction.
            light_positions: `[B, 3]`.
            bg_color: `[B, C]`, `[B, H, W, C]` or `[B * H * W, C]` in place of the background's colours.
            kwargs: for the material, in training.

        Returns:
            comp_rgb, comp_rgb_fg, comp_rgb_bg `[B, H, W, C]`; opacity, depth, z_variance `[B, H, W, 1]`; comp_normal
            `[B, H, W, 3]`; in training, with `return_samples`, weights, t_points, t_intervals `[m, 1]`, t_dirs, points
            `[m, 3]`, ray_indices `[m]`, and what the geometry returned; without it, the stand-ins.

        Raises:
            ValueError: a bg_color of another shape.
        """
        views, height, width = shape = rays_o.shape[:-1]
        out = self._scene.render(rays_o, rays_d, light_positions, kwargs if self.training else {})
        out["comp_rgb_bg"] = self.background(dirs=rays_d).reshape(*shape, -1)
        behind = out["comp_rgb_bg"] if bg_color is None else _per_pixel(bg_color, (views, height, width))
        out["comp_rgb"] = out["comp_rgb_fg"] + behind * (1.0 - out["opacity"])
        return out

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Refresh the grid in training, every 16 steps; not while weights are loaded, which bring theirs."""
        if self.cfg.grid_prune and self.training and not on_load_weights:
            self._scene.update(global_step)

    def train(self, mode: bool = True) -> "ThreestudioRenderer":
        """Shift samples in training only."""
        self.randomized = mode and self.cfg.randomized
        super().train(mode)
        return self

    def _check(self) -> None:
        """One clear line for what is not served."""
        cfg = self.cfg
        if cfg.estimator != "occgrid":
            raise ValueError(
                f"{NAME}: estimator: got {cfg.estimator!r}, want 'occgrid': proposal and importance sampling are not "
                "served, nerf-volume-renderer has them"
            )
        for name in ("num_samples_per_ray", "eval_chunk_size", "train_chunk_size"):
            if getattr(cfg, name) < 1:
                raise ValueError(f"{NAME}: {name}: got {getattr(cfg, name)}, want at least 1")
        if not cfg.radius > 0.0:
            raise ValueError(f"{NAME}: radius: got {cfg.radius}, want above 0")
        if isinstance(self.geometry, HashGridGeometry) and self.geometry.cfg.radius > cfg.radius:
            raise ValueError(
                f"{NAME}: radius: got {cfg.radius}, want at least the geometry's, {self.geometry.cfg.radius}"
            )
        if cfg.return_normal_perturb and not cfg.return_samples:
            raise ValueError(
                f"{NAME}: return_normal_perturb: got true without return_samples, want both: the loss on it reads the "
                "normals of all samples"
            )


def _per_pixel(color: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Colours that can be added to images `[B, H, W, C]`."""
    views, height, width = shape
    if color.dim() == 2 and color.shape[0] == views:
        return color[:, None, None]
    if color.dim() == 2 and color.shape[0] == views * height * width:
        return color.reshape(*shape, -1)
    if color.dim() not in (1, 4):
        raise ValueError(
            f"bg_color: got shape {list(color.shape)}, want [{views}, C], [{views}, {height}, {width}, C] or "
            f"[{views * height * width}, C]"
        )
    return color
