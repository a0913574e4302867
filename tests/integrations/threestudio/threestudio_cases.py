"""A scene in threestudio's terms, and a dense render of it that shares nothing with the plug-in."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAKE = Path(__file__).parent / "fake_threestudio"
sys.path.insert(0, str(FAKE))

import threestudio  # noqa: E402
from threestudio.models.background.base import BaseBackground  # noqa: E402
from threestudio.models.geometry.base import BaseImplicitGeometry  # noqa: E402
from threestudio.models.materials.base import BaseMaterial  # noqa: E402

import dreamfusion_fast.integrations.threestudio  # noqa: E402, F401
from dreamfusion_fast.rendering import orbit_cameras  # noqa: E402

RENDERER = "dreamfusion-fast-volume-renderer"
HASH_GRID = "dreamfusion-fast-hash-grid"
RADIUS = 0.875


class Blob(BaseImplicitGeometry):
    """A ball with a network on top, in float64; normals by autograd, from the points that it is given."""

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        n_feature_dims: int = 3
        height: float = 12.0

    def configure(self) -> None:
        super().configure()
        generator = torch.Generator().manual_seed(1)
        widths = (3, 7), (7, 2 + self.cfg.n_feature_dims)
        self.first, self.second = (
            nn.Parameter(torch.randn(w, generator=generator, dtype=torch.float64)) for w in widths
        )
        self.asked = 0

    def _outputs(self, points: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(points.to(self.first) @ self.first) @ self.second
        raw = self.cfg.height * (1.0 - points.norm(dim=-1, keepdim=True) / 0.6) + hidden[..., :1]
        return raw, hidden

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        self.asked = max(self.asked, len(points))
        enabled = torch.is_grad_enabled()
        if output_normal:
            torch.set_grad_enabled(True)
            points.requires_grad_(True)
        raw, hidden = self._outputs(points)
        known = {
            "density": F.softplus(raw),
            "features": hidden[..., 2:],
            "roughness": torch.sigmoid(hidden[..., 1:2]),
            "scale": self.second.sum(),
        }
        if output_normal:
            (slope,) = torch.autograd.grad(raw.sum(), points, create_graph=True)
            known["normal"] = known["shading_normal"] = -F.normalize(slope, dim=-1)
        torch.set_grad_enabled(enabled)
        return known

    def forward_density(self, points: Tensor) -> Tensor:
        return F.softplus(self._outputs(points)[0])


class Flat(BaseMaterial):
    """Colours without normals, of as many channels as there are features."""

    def forward(self, features: Tensor, roughness: Tensor, **others: Any) -> Tensor:
        return torch.sigmoid(features) * roughness


class Lit(BaseMaterial):
    """Light, gloss and a choice for the whole image, drawn as the stock material draws it; reads all that it gets."""

    requires_normal = True

    def configure(self) -> None:
        self.tint = nn.Parameter(torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64))

    def forward(
        self,
        features: Tensor,
        viewdirs: Tensor,
        positions: Tensor,
        light_positions: Tensor,
        shading_normal: Tensor,
        roughness: Tensor,
        ambient: float | Tensor = 0.1,
        **others: Any,
    ) -> Tensor:
        towards = F.normalize(light_positions - positions, dim=-1)
        lit = ambient + (shading_normal * towards).sum(dim=-1, keepdim=True).clamp(min=0.0)
        gloss = roughness * (shading_normal * viewdirs).sum(dim=-1, keepdim=True).square()
        albedo = torch.sigmoid(features) * self.tint
        return lit * (albedo if random.random() < 0.5 else 1.0 + 0.0 * albedo) + gloss


class Sky(BaseBackground):
    def configure(self) -> None:
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))

    def forward(self, dirs: Tensor) -> Tensor:
        return torch.sigmoid(dirs @ self.weight.to(dirs.dtype))


def make(material: str = "lit", geometry: dict[str, Any] | None = None, **cfg: Any) -> Any:
    """A renderer in training, without jitter and pruning unless asked for."""
    parts = {
        "geometry": Blob({"radius": RADIUS, **(geometry or {})}),
        "material": {"lit": Lit, "flat": Flat}[material](),
        "background": Sky(),
    }
    given = {"radius": RADIUS, "num_samples_per_ray": 41, "randomized": False, "grid_prune": False}
    return threestudio.find(RENDERER)({**given, **cfg}, **parts)


def make_batch(size: int = 5, views: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rays `[B, H, W, 3]` and a light `[B, 3]` for each view."""
    rays = orbit_cameras(views, elevation_deg=20, start_deg=30).rays(size, size + 1)
    lights = torch.tensor([[1.0, 2.0, 3.0], [-2.0, 1.0, 0.5]], dtype=dtype)[:views]
    origins, directions = (value.to(dtype).view(views, size, size + 1, 3) for value in (rays.origins, rays.directions))
    return {"rays_o": origins, "rays_d": F.normalize(directions, dim=-1), "light_positions": lights}


def leaves(renderer: Any) -> list[Tensor]:
    """All that gradients are for."""
    parts = (renderer.geometry, renderer.material, renderer.background)
    return [parameter for part in parts for parameter in part.parameters()]


def dense(
    renderer: Any,
    rays_o: Tensor,
    rays_d: Tensor,
    light_positions: Tensor,
    keeps: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    **arguments: Any,
) -> dict[str, Tensor]:
    """Every step of every ray, in float64, with weights by a cumulative product.

    `keeps` says which samples stay, of positions `[..., n, 3]`, opacities and light that arrives `[..., n]`.
    """
    geometry, material = renderer.geometry, renderer.material
    radius, step = renderer.cfg.radius, 2.0 * 1.732 * renderer.cfg.radius / renderer.cfg.num_samples_per_ray
    with torch.no_grad():  # the first step begins where the ray enters the box
        ends = torch.stack([(side * radius - rays_o) / rays_d for side in (-1.0, 1.0)])
        enters = ends.amin(dim=0).amax(dim=-1, keepdim=True).clamp(min=0.0)
        t = enters + (torch.arange(int(4.0 * radius / step), dtype=torch.float64) + 0.5) * step
    points = rays_o[..., None, :] + rays_d[..., None, :] * t[..., None]
    inside = (points.abs() <= radius).all(dim=-1)
    if keeps is not None:
        with torch.no_grad():
            alpha = (1.0 - torch.exp(-geometry.forward_density(points)[..., 0] * step)) * inside
            light = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1.0 - alpha[..., :-1]], dim=-1), dim=-1)
            inside = inside & keeps(points, alpha, light)
    flat = points[inside]
    known = geometry(flat, output_normal=material.requires_normal)

    def spread(value: Tensor) -> Tensor:
        return torch.zeros(*inside.shape, value.shape[-1], dtype=value.dtype).index_put((inside,), value)

    views = rays_d[..., None, :].expand_as(points)[inside]
    lights = light_positions[:, None, None, None, :].expand_as(points)[inside]
    color = spread(material(viewdirs=views, positions=flat, light_positions=lights, **known, **arguments))
    alpha = 1.0 - torch.exp(-spread(known["density"])[..., 0] * step)
    through = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1.0 - alpha[..., :-1]], dim=-1), dim=-1)
    weights = alpha * through

    opacity = weights.sum(dim=-1, keepdim=True)
    share = weights / opacity.clamp(min=1e-5)
    middle = (share * t).sum(dim=-1, keepdim=True)
    out = {
        "comp_rgb_fg": (weights[..., None] * color).sum(dim=-2),
        "comp_rgb_bg": renderer.background(dirs=rays_d),
        "opacity": opacity,
        "depth": (weights * t).sum(dim=-1, keepdim=True),
        "z_variance": (share * (t - middle) ** 2).sum(dim=-1, keepdim=True) * (opacity > 0.5),
    }
    out["comp_rgb"] = out["comp_rgb_fg"] + out["comp_rgb_bg"] * (1.0 - opacity)
    if "normal" in known:
        normal = spread(known["normal"])
        mean = F.normalize((weights[..., None] * normal).sum(dim=-2), dim=-1)
        out["comp_normal"] = (mean + 1.0) / 2.0 * opacity
        facing = (normal * rays_d[..., None, :]).sum(dim=-1).clamp(min=0.0)
        out["orientation"] = (weights.detach() * facing**2).sum() / (opacity > 0).sum()
    return out


def stock_orientation_loss(out: dict[str, Tensor]) -> Tensor:
    """What threestudio's systems compute."""
    facing = (out["normal"] * out["t_dirs"]).sum(dim=-1, keepdim=True)
    return (out["weights"].detach() * facing.clamp_min(0.0) ** 2).sum() / (out["opacity"] > 0).sum()
