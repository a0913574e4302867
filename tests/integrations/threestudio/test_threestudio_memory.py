"""Memory of a training step of 512^2 rays with analytic normals on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import threestudio_cases as cases
import torch
import torch.nn.functional as F
from threestudio_cases import RENDERER, threestudio
from torch import Tensor, nn

from dreamfusion_fast.integrations.tinycudann import Encoding

HASH_GRID = {
    "otype": "HashGrid",
    "n_levels": 16,
    "n_features_per_level": 2,
    "log2_hashmap_size": 19,
    "base_resolution": 16,
    "per_level_scale": 1.447269237440378,
}


class Grid(cases.BaseImplicitGeometry):
    """As `implicit-volume` is set up by default: a hash grid, a small MLP, normals by autograd."""

    @dataclass
    class Config(cases.BaseImplicitGeometry.Config):
        pass

    def configure(self) -> None:
        super().configure()
        self.encoding = Encoding(3, HASH_GRID, dtype=torch.float32)
        self.network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).cuda()

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(enabled or output_normal)
        if output_normal:
            points.requires_grad_(True)
        hidden = self.network(self.encoding((points / self.cfg.radius + 1) / 2))
        raw = 10.0 * (1.0 - points.norm(dim=-1, keepdim=True) / 0.5) + hidden[..., :1]
        known = {"density": F.softplus(raw), "features": hidden[..., 1:]}
        if output_normal:
            (slope,) = torch.autograd.grad(raw.sum(), points, create_graph=True)
            known["normal"] = known["shading_normal"] = -F.normalize(slope, dim=-1)
        torch.set_grad_enabled(enabled)
        return known

    def forward_density(self, points: Tensor) -> Tensor:
        return self(points)["density"]


class Lambertian(cases.BaseMaterial):
    requires_normal = True

    def forward(
        self, features: Tensor, positions: Tensor, light_positions: Tensor, shading_normal: Tensor, **others: Any
    ) -> Tensor:
        towards = F.normalize(light_positions - positions, dim=-1)
        lit = 0.1 + 0.9 * (shading_normal * towards).sum(dim=-1, keepdim=True).clamp(min=0.0)
        return torch.sigmoid(features) * lit


@pytest.mark.gpu
def test_a_step_of_512_squared_takes_less_than_a_gigabyte() -> None:
    """The stock renderer takes 7 GB for it."""
    parts = {"geometry": Grid({"radius": 1.0}), "material": Lambertian(), "background": cases.Sky().cuda()}
    renderer = threestudio.find(RENDERER)({"radius": 1.0, "prune_alpha_threshold": False}, **parts).cuda()
    renderer.train()
    renderer.update_step(0, 0)
    batch = {name: value.cuda() for name, value in cases.make_batch(512, 1, torch.float32).items()}
    for _ in range(2):
        renderer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = renderer(**batch)
        (out["comp_rgb"].square().mean() + 1e-2 * cases.stock_orientation_loss(out)).backward()
        peak = torch.cuda.max_memory_allocated() - before
    print(f"{peak / 2**20:.0f} MB above parameters, grid and rays")
    assert peak < 1e9
    assert renderer.geometry.encoding.params.grad.abs().max() > 0
