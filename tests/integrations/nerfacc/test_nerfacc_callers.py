"""Renderers that call nerfacc's names in the ways of known projects: they train, and their images are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.integrations import nerfacc
from dreamfusion_fast.integrations.nerfacc.estimators.base import AbstractEstimator
from dreamfusion_fast.integrations.nerfacc.estimators.prop_net import _transform_stot

STEP = 0.05


def rays_at(device: torch.device, n: int = 15) -> tuple[Tensor, Tensor]:
    """Parallel rays along -z over [-1.2, 1.2]^2, of unit length."""
    line = torch.linspace(-1.2, 1.2, n)
    x, y = torch.meshgrid(line, line, indexing="ij")
    origins = torch.stack([x, y, torch.full_like(x, 3.0)], dim=-1).view(-1, 3)
    return origins.to(device), torch.tensor([0.0, 0.0, -1.0]).expand(n * n, 3).to(device)


class Ball(nn.Module):
    """A ball of a size and density that can be learnt, with a colour."""

    def __init__(self, radius: float, density: float) -> None:
        super().__init__()
        self.radius = nn.Parameter(torch.tensor(radius))
        self.log_density = nn.Parameter(torch.tensor(math.log(density)))
        self.color = nn.Parameter(torch.tensor([0.2, 0.5, 0.8]))

    def sdf(self, x: Tensor) -> Tensor:
        return x.norm(dim=-1, keepdim=True) - self.radius

    def density(self, x: Tensor) -> Tensor:
        return self.log_density.exp() * torch.sigmoid(-20 * self.sdf(x))

    def alpha(self, x: Tensor) -> Tensor:
        before, after = (torch.sigmoid(60 * (self.sdf(x) + sign * 0.5 * STEP)) for sign in (1, -1))
        return ((before - after + 1e-5) / (before + 1e-5)).clip(0, 1)


def rendered(
    ball: Ball, estimator: nerfacc.OccGridEstimator, rays: tuple[Tensor, Tensor], by: str
) -> dict[str, Tensor]:
    """The calls of a threestudio renderer: samples pruned by a function, weights, sums of several widths."""
    rays_o, rays_d = rays
    n_rays = rays_o.shape[0]

    def positions(t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor) -> Tensor:
        return rays_o[ray_indices] + rays_d[ray_indices] * (t_starts + t_ends)[..., None] / 2.0

    def opaqueness(t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor) -> Tensor:
        x = positions(t_starts, t_ends, ray_indices)
        return (ball.density(x) if by == "sigma" else ball.alpha(x))[..., 0]

    with torch.no_grad():
        ray_indices, t_starts, t_ends = estimator.sampling(
            rays_o, rays_d, **{f"{by}_fn": opaqueness}, render_step_size=STEP, alpha_thre=0.01,
            stratified=estimator.training, cone_angle=0.0,
        )  # fmt: skip
    ray_indices = ray_indices.long()
    middles = (t_starts + t_ends)[:, None] / 2
    given = opaqueness(t_starts, t_ends, ray_indices)
    if by == "sigma":
        weights, _, _ = nerfacc.render_weight_from_density(
            t_starts, t_ends, given, ray_indices=ray_indices, n_rays=n_rays
        )
    else:
        weights, _ = nerfacc.render_weight_from_alpha(given, ray_indices=ray_indices, n_rays=n_rays)

    def accumulated(values: Tensor | None) -> Tensor:
        return nerfacc.accumulate_along_rays(weights, values=values, ray_indices=ray_indices, n_rays=n_rays)

    depth = accumulated(middles)
    return {
        "opacity": accumulated(None),
        "depth": depth,
        "color": accumulated(ball.color.expand(weights.shape[0], 3)),
        "variance": accumulated((middles - depth[ray_indices]) ** 2),
    }


@torch.no_grad()
def summed(ball: Ball, rays: tuple[Tensor, Tensor], by: str) -> Tensor:
    """Opacity of each ray, `[n, 1]`: all its steps through the box, without those that are all but empty."""
    t = 2.0 + STEP * (torch.arange(40, device=rays[0].device) + 0.5)
    x = rays[0][:, None] + rays[1][:, None] * t[:, None]
    alphas = ball.alpha(x)[..., 0] if by == "alpha" else 1 - torch.exp(-STEP * ball.density(x)[..., 0])
    alphas = torch.where(alphas < 0.01, 0.0, alphas) * (rays[0][:, :2].abs().amax(dim=1) < 1)[:, None]
    return 1 - (1 - alphas.double()).prod(dim=1, keepdim=True)


@pytest.mark.parametrize("by", ["sigma", "alpha"])
def test_a_renderer_like_those_of_threestudio_trains(by: str, device: torch.device) -> None:
    rays = rays_at(device)
    estimator = nerfacc.OccGridEstimator(roi_aabb=torch.tensor([-1.0] * 3 + [1.0] * 3), resolution=32, levels=1)
    estimator.to(device)
    target, ball = Ball(0.7, 20.0).to(device), Ball(0.4, 20.0).to(device)
    opacity = summed(target, rays, by)
    color = opacity.float() * 0.6
    optimizer = torch.optim.Adam([ball.radius, ball.color], lr=0.03)
    for step in range(60):
        estimator.update_every_n_steps(
            step=step, occ_eval_fn=lambda x: ball.density(x) * STEP if by == "sigma" else ball.alpha(x), n=4
        )
        outputs = rendered(ball, estimator, rays, by)
        loss = (outputs["opacity"] - opacity.float()).square().mean() + (outputs["color"] - color).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ball.radius.item() == pytest.approx(0.7, abs=0.03)
    assert ball.color.tolist() == pytest.approx([0.6] * 3, abs=0.05)

    estimator.binaries.fill_(True)
    estimator.eval()
    with torch.no_grad():
        outputs = rendered(target, estimator, rays, by)
    torch.testing.assert_close(outputs["opacity"].double(), opacity, rtol=0, atol=2e-4)
    assert outputs["variance"].min() >= 0


def test_a_sampler_like_that_of_nerfstudio(device: torch.device) -> None:
    rays_o, rays_d = rays_at(device)
    estimator = nerfacc.OccGridEstimator(roi_aabb=[-1.0, -1.0, -1.0, 1.0, 1.0, 1.0], resolution=16, levels=4).to(device)
    estimator.binaries.fill_(True)
    ball = Ball(0.7, 20.0).to(device)
    near, far = torch.full((225, 1), 1.5, device=device), torch.full((225, 1), 4.5, device=device)
    ray_indices, starts, ends = estimator.sampling(
        rays_o=rays_o.contiguous(),
        rays_d=rays_d.contiguous(),
        t_min=near.contiguous().reshape(-1),
        t_max=far.contiguous().reshape(-1),
        sigma_fn=lambda a, b, i: ball.density(rays_o[i] + rays_d[i] * (a + b)[:, None] / 2).squeeze(-1),
        render_step_size=0.01,
        near_plane=0.05,
        far_plane=1e3,
        stratified=True,
        cone_angle=0.004,
        alpha_thre=0.01,
    )
    assert starts.shape[0] > 1000
    assert starts.min() >= 1.5
    assert (0.5 * (starts + ends)).max() < 4.5
    x = rays_o[ray_indices] + rays_d[ray_indices] * (starts + ends)[:, None] / 2
    packed_info = nerfacc.pack_info(ray_indices, 225)
    weights = nerfacc.render_weight_from_density(
        t_starts=starts, t_ends=ends, sigmas=ball.density(x)[..., 0], packed_info=packed_info
    )[0][..., None]
    rgb = nerfacc.accumulate_along_rays(
        weights[..., 0], values=ball.color.expand(x.shape[0], 3), ray_indices=ray_indices, n_rays=225
    )
    rgb.sum().backward()
    assert ball.radius.grad.item() > 0
    middle = rgb.view(15, 15, 3)[7, 7]
    torch.testing.assert_close(middle, ball.color, rtol=0, atol=0.02)


def test_steps_grow_from_a_near_plane_of_zero(device: torch.device) -> None:
    """nerfacc and instant-ngp start at the camera, where the cone has no width."""
    estimator = nerfacc.OccGridEstimator([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0], 8, 2).to(device)
    estimator.binaries.fill_(True)
    origin, direction = torch.zeros(1, 3, device=device), torch.tensor([[1.0, 0.0, 0.0]], device=device)
    _, t_starts, t_ends = estimator.sampling(origin, direction, render_step_size=0.01, cone_angle=0.1)
    expected, t = [], 0.0
    while t + 0.5 * max(0.01, 0.1 * t) < 2.0:
        expected.append((t, t + max(0.01, 0.1 * t)))
        t = expected[-1][1]
    assert t_starts.tolist() == pytest.approx([a for a, _ in expected], abs=1e-5)
    assert t_ends.tolist() == pytest.approx([b for _, b in expected], abs=1e-5)


class Importance(AbstractEstimator):
    """Coarse and fine samples sorted into one list, as threestudio's estimator returns them."""

    @torch.no_grad()
    def sampling(self, function, n_rays: int, near: float, far: float) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        cdfs = torch.tensor([0.0, 1.0], device=self.device).repeat(n_rays, 1)
        coarse, _ = nerfacc.importance_sampling(nerfacc.RayIntervals(vals=cdfs), cdfs, 32, True)
        t = _transform_stot("uniform", coarse.vals, near, far)
        trans, _ = nerfacc.render_transmittance_from_density(t[:, :-1], t[:, 1:], function(t[:, :-1], t[:, 1:]))
        cdfs = 1.0 - torch.cat([trans, torch.zeros_like(trans[:, :1])], dim=-1)
        fine, _ = nerfacc.importance_sampling(coarse, cdfs, 32, True)
        both = torch.cat([t, _transform_stot("uniform", fine.vals, near, far)], dim=-1).sort(dim=-1).values
        return both[:, :-1], both[:, 1:]


def test_an_estimator_whose_intervals_may_be_empty(device: torch.device) -> None:
    rays_o, rays_d = rays_at(device)
    ball = Ball(0.7, 20.0).to(device)

    def density(t_starts: Tensor, t_ends: Tensor) -> Tensor:
        middle = 0.5 * (t_starts + t_ends)[..., None]
        return ball.density(rays_o[:, None] + rays_d[:, None] * middle)[..., 0]

    t_starts, t_ends = Importance().to(device).sampling(density, 225, 1.0, 5.0)
    assert (t_starts == t_ends).any()
    ray_indices = torch.arange(225, device=device).unsqueeze(-1).expand(-1, 65).flatten()
    sigmas = density(t_starts, t_ends).flatten()
    weights, _, _ = nerfacc.render_weight_from_density(
        t_starts.flatten(), t_ends.flatten(), sigmas, ray_indices=ray_indices, n_rays=225
    )
    opacity = nerfacc.accumulate_along_rays(weights, values=None, ray_indices=ray_indices, n_rays=225)
    assert opacity.view(15, 15)[7, 7].item() == pytest.approx(1.0, abs=1e-3)
    assert opacity.view(15, 15)[0, 0].item() < 0.01
    opacity.sum().backward()
    assert torch.isfinite(ball.radius.grad)
    assert ball.radius.grad.item() > 0
