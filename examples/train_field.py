"""The renderer in a training loop of your own: a hash-grid field learns to be green. Seconds on a CPU."""

import torch

from dreamfusion_fast import HashGridField, HashGridFieldConfig, OccupancyGrid, VolumeRenderer
from dreamfusion_fast.rendering import orbit_cameras

field = HashGridField(HashGridFieldConfig(levels=8, log2_rows=15, finest_resolution=128))
occupancy = OccupancyGrid(resolution=64)  # where there is anything to sample, learned on the way
renderer = VolumeRenderer(field, occupancy)
optimizer = torch.optim.Adam(renderer.parameters(), lr=1e-2)

rays = orbit_cameras(4, elevation_deg=15.0).rays(32, 32)  # or Rays(origins [n, 3], directions [n, 3])
green = torch.tensor([0.1, 0.6, 0.2])  # your target
for step in range(20):
    occupancy.update(field, step)
    output = renderer.render(rays, background=torch.ones(3), jitter=True, seed=step)
    loss = (output.color - green).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.4f}, {output.samples} samples for {len(rays)} rays")
