"""Planes that a network makes: from a code per object, two objects at once, in one render. Seconds on a CPU."""

import torch

from dreamfusion_fast import TriplaneField, TriplaneFieldConfig, VolumeRenderer
from dreamfusion_fast.rendering import RendererConfig, orbit_cameras

torch.manual_seed(0)
field = TriplaneField(TriplaneFieldConfig(resolution=16, features=8, hidden=16))  # of it only the MLP is used
codes = torch.eye(2)
network = torch.nn.Linear(2, 3 * 16 * 16 * 8)  # in place of yours; vertices hold their features last
optimizer = torch.optim.Adam([*network.parameters(), *field.layers.parameters()], lr=2e-2)

rays = orbit_cameras(4, elevation_deg=15.0).rays(24, 24)
scene = torch.arange(len(rays)) % 2  # every other ray sees the other object
colors = torch.tensor([[0.1, 0.6, 0.2], [0.7, 0.2, 0.1]])[scene]  # a green one and a red one
for step in range(30):
    planes = network(codes).view(2, 3, 16, 16, 8)
    renderer = VolumeRenderer(field.with_planes(planes), None, RendererConfig(samples_across=32))
    output = renderer.render(rays, jitter=True, seed=step, extras={"scene": scene})
    loss = (output.color - output.opacity[:, None].detach() * colors).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0:
        at_first = loss.item()
print(f"loss {at_first:.4f}, then {loss.item():.4f}")
