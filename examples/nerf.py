"""A NeRF of photographs with known cameras, whose colours depend on the viewing direction.

    python examples/nerf.py [views.png]

Seconds on a CPU. Prints the PSNR of views that it was not trained on, and draws them.
"""

import torch
from scene import BOX, WHITE, photograph, psnr, save_if_asked

from dreamfusion_fast import Cameras, OccupancyGrid, VolumeRenderer
from dreamfusion_fast.fields import SceneField, SceneFieldConfig
from dreamfusion_fast.rendering import RayBudget, RendererConfig

torch.manual_seed(0)
photos, unseen = photograph(views=64, seed=0), photograph(views=6, seed=1)
rays = Cameras.from_poses(photos.poses, photos.intrinsics, photos.size, photos.size).rays()

config = SceneFieldConfig(
    levels=5, log2_rows=14, base_resolution=8, finest_resolution=64, hidden=32, color_layers=1, view_degree=3
)
field = SceneField(config, BOX)
occupancy = OccupancyGrid(BOX, resolution=32, decay=0.7)  # forgets quickly, for a short run
renderer = VolumeRenderer(field, occupancy, RendererConfig(samples_across=96))
budget = RayBudget(target_samples=2**14, initial_rays=256)  # more rays, as empty cells are found
optimizer = torch.optim.Adam(field.parameters(), lr=1e-2, eps=1e-15)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [250, 350], 0.3)

for step in range(400):
    occupancy.update(field, step)
    chosen = torch.randint(len(rays), (budget.n_rays,))
    background = torch.rand(3)  # what is empty shows every colour
    output = renderer.render(rays[chosen], background, jitter=True, seed=step)
    loss = (output.color - photos.before(background)[chosen]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    budget.update(len(chosen), output.samples)

with torch.no_grad():
    picture = renderer.render(unseen.rays, WHITE).color
quality = psnr(picture, unseen.before(WHITE))
print(f"PSNR {quality:.2f} dB")
save_if_asked(picture, unseen.size)
