"""A field of one's own that asks for more than positions: viewing directions, and an exposure that the caller gives."""

import torch

from dreamfusion_fast import Cameras, VolumeRenderer
from dreamfusion_fast.fields import FieldOutput


class Ball(torch.nn.Module):
    needs = ("positions", "directions", "exposure")  # then a call gets FieldSamples; without, positions [m, 3]

    def forward(self, samples):
        inside = samples.positions.norm(dim=1) < 0.5
        color = (0.5 + 0.5 * samples.directions) * samples.extras["exposure"][:, None]
        return FieldOutput(50.0 * inside, color, channels={"height": samples.positions[:, 2]})  # or alpha=..., for NeuS


pose = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -2]]])  # looking along +z, as OpenCV has it
rays = Cameras.from_poses(pose, (30.0, 30.0, 16.0, 16.0), width=32, height=32).rays()
output = VolumeRenderer(Ball()).render(rays, extras={"exposure": torch.full((len(rays),), 0.8)}, return_samples=True)
print(output.color.shape, output.channels["height"].shape, output.ray_samples.weights.shape)  # [n, 3], [n, 1], [m]
