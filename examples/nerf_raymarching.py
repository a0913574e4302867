"""The NeRF of nerf.py as forks of torch-ngp and stable-dreamfusion render: `raymarching` is ours, its calls theirs.

    python examples/nerf_raymarching.py [views.png]

Seconds on a CPU. Prints the PSNR of views that it was not trained on, and draws them.
"""

import torch
from scene import BOX, WHITE, photograph, psnr, save_if_asked

from dreamfusion_fast.fields import FieldSamples, SceneField, SceneFieldConfig
from dreamfusion_fast.integrations import raymarching  # import raymarching

BOUND, CELLS, MAX_STEPS = 0.9, 32, 120  # half of the cube's size, cells along it, samples across [-1, 1]^3


@torch.no_grad()
def update_extra_state():
    cells = raymarching.morton3D_invert(torch.arange(CELLS**3))
    density = field.density(BOUND * (2.0 * (cells + torch.rand(CELLS**3, 3)) / CELLS - 1.0))
    torch.maximum(0.7 * density_grid, density, out=density_grid)
    raymarching.packbits(density_grid, min(0.4, density_grid.mean().item()), density_bitfield)


def render(rays, background, perturb=False):
    nears, fars = raymarching.near_far_from_aabb(rays.origins, rays.directions, torch.tensor(BOX), min_near=0.2)
    positions, directions, ts, of_rays = raymarching.march_rays_train(
        rays.origins, rays.directions, BOUND, density_bitfield, 1, CELLS, nears, fars, perturb, 0.0, MAX_STEPS
    )
    middles = positions + 0.5 * ts[:, 1:] * directions  # positions are where steps begin, and these are long
    output = field(FieldSamples(middles, directions, torch.arange(len(middles))))
    _, opacity, _, image = raymarching.composite_rays_train(output.density, output.color, ts, of_rays)
    return image + (1.0 - opacity)[:, None] * background, len(positions)


torch.manual_seed(0)
photos, unseen = photograph(views=64, seed=0), photograph(views=6, seed=1)
config = SceneFieldConfig(
    levels=5, log2_rows=14, base_resolution=8, finest_resolution=64, hidden=32, color_layers=1, view_degree=3
)
field = SceneField(config, BOX)
density_grid, density_bitfield = torch.zeros(1, CELLS**3), torch.zeros(CELLS**3 // 8, dtype=torch.uint8)
optimizer = torch.optim.Adam(field.parameters(), lr=1e-2, eps=1e-15)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [250, 350], 0.3)

n_rays = 256
for step in range(400):
    if step % 16 == 0:
        update_extra_state()
    chosen = torch.randint(len(photos.rays), (n_rays,))
    background = torch.rand(3)
    color, samples = render(photos.rays[chosen], background, perturb=True)
    loss = (color - photos.before(background)[chosen]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    n_rays = n_rays * 2**14 // max(samples, 2**13)

with torch.no_grad():
    picture, _ = render(unseen.rays, WHITE)
quality = psnr(picture, unseen.before(WHITE))
print(f"PSNR {quality:.2f} dB")
save_if_asked(picture, unseen.size)
