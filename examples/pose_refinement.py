"""Camera poses refined by gradients through the rays, before a scene that is known.

    python examples/pose_refinement.py

Seconds on a CPU. Poses are turned by some degrees and moved by some hundredths of a unit; a turn and a move of each are
found with which renders agree with the pictures. Prints both errors before and after.
"""

import torch
from scene import BOX, COLORS, WHITE, distances, photograph

from dreamfusion_fast import Cameras, VolumeRenderer
from dreamfusion_fast.fields import volsdf_density
from dreamfusion_fast.rendering import RendererConfig

WIDTH = torch.tensor(0.03)  # of the surfaces: soft ones have gradients


def field(positions):
    """Any function will do as a field."""
    apart = distances(positions)
    return volsdf_density(apart.amin(dim=1), WIDTH), torch.softmax(-apart / WIDTH, dim=1) @ COLORS[1:]


field.aabb = BOX


def changed(poses, turn, move):
    """Poses [B, 3, 4] turned about the origin by `turn` [B, 3], radians, and moved by `move` [B, 3]."""
    x, y, z = turn.unbind(dim=1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(-1, 3, 3)
    turned = torch.linalg.matrix_exp(cross) @ poses  # position and all: about the camera itself, a turn is like a move
    return torch.cat([turned[:, :, :3], turned[:, :, 3:] + move[:, :, None]], dim=2)


def errors(poses):
    """Mean angle in degrees, and mean distance in scene units, from the true poses."""
    trace = (poses[:, :, :3] * photos.poses[:, :, :3]).sum(dim=(1, 2))
    angle = torch.rad2deg(torch.acos(((trace - 1.0) / 2.0).clamp(max=1.0)))
    return float(angle.mean()), float((poses - photos.poses)[:, :, 3].norm(dim=1).mean())


torch.manual_seed(0)
photos = photograph(views=6, seed=0)
renderer = VolumeRenderer(field, config=RendererConfig(samples_across=96), occupancy_resolution=32)
renderer.occupancy.update(field, step=0)
with torch.no_grad():
    pictures = renderer.render(photos.rays, WHITE).color

wrong = changed(photos.poses, 0.03 * torch.randn(6, 3), 0.03 * torch.randn(6, 3))
turn, move = torch.zeros(6, 3, requires_grad=True), torch.zeros(6, 3, requires_grad=True)
optimizer = torch.optim.Adam([turn, move], lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)

for step in range(250):
    refined = changed(wrong, turn, move)
    rays = Cameras.from_poses(refined, photos.intrinsics, photos.size, photos.size).rays()
    chosen = torch.randint(len(rays), (1024,))
    output = renderer.render(rays[chosen], WHITE, jitter=True, seed=step)
    loss = (output.color - pictures[chosen]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()

before, after = errors(wrong), errors(changed(wrong, turn, move).detach())
print(f"before: {before[0]:.2f} degrees, {before[1]:.3f} units; after: {after[0]:.2f} degrees, {after[1]:.3f} units")
