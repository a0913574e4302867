"""NeuS: a surface as the zero of a learned signed distance, from photographs.

    python examples/neus.py [normals.png]

Some 20 s on a CPU. The field answers with the opacity of samples in place of a density, and with its gradient as a
channel, of which the eikonal loss asks for length 1. Prints by how much distances near the surface that unseen views
show are wrong, and draws their normals.
"""

import torch
from scene import BOX, WHITE, photograph, save_if_asked, signed_distance
from torch.nn.functional import normalize

from dreamfusion_fast import OccupancyGrid, VolumeRenderer
from dreamfusion_fast.fields import Field, FieldOutput, neus_alpha
from dreamfusion_fast.integrations.gridencoder import GridEncoder
from dreamfusion_fast.rendering import RendererConfig


class SurfaceField(Field):
    needs = ("positions", "directions", "t_starts", "t_ends")

    def __init__(self):
        super().__init__(BOX)
        self.encoder = GridEncoder(num_levels=4, log2_hashmap_size=14, base_resolution=8, desired_resolution=32)
        self.geometry = torch.nn.Sequential(torch.nn.Linear(11, 32), torch.nn.Softplus(100.0), torch.nn.Linear(32, 16))
        self.color = torch.nn.Sequential(torch.nn.Linear(21, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        self.log_sharpness = torch.nn.Parameter(torch.tensor(3.0))

    def distance(self, positions):
        """Signed distance [m], at first that of a ball, and features [m, 15]."""
        outputs = self.geometry(torch.cat([positions, self.encoder(positions)], dim=1))
        return outputs[:, 0] + positions.norm(dim=1) - 0.5, outputs[:, 1:]

    def forward(self, samples, with_normal=False):
        with torch.enable_grad():
            positions = samples.positions.detach().requires_grad_()
            distance, features = self.distance(positions)
            (gradient,) = torch.autograd.grad(distance.sum(), positions, create_graph=True)
        normal = normalize(gradient, dim=1)
        cosine = (samples.directions * gradient).sum(dim=1).clamp(max=0.0)
        alpha = neus_alpha(distance, cosine, samples.t_ends - samples.t_starts, self.log_sharpness.exp())
        color = self.color(torch.cat([normal, samples.directions, features], dim=1)).sigmoid()
        return FieldOutput(alpha=alpha, color=color, normal=normal, channels={"gradient": gradient})


torch.manual_seed(0)
photos, unseen = photograph(views=64, seed=0), photograph(views=6, seed=1)
field = SurfaceField()
renderer = VolumeRenderer(field, OccupancyGrid(BOX, 32, quantity="alpha"), RendererConfig(samples_across=96))
optimizer = torch.optim.Adam(field.parameters(), lr=5e-3, eps=1e-15)


def head_on(positions):
    """Opacity of a step that goes straight in."""
    towards, length = positions.new_tensor(-1.0), positions.new_tensor(renderer.step_size)
    return neus_alpha(field.distance(positions)[0], towards, length, field.log_sharpness.exp())


@torch.no_grad()
def errors_near_surface():
    """Mean error of the distance where unseen views meet the surface, and around."""
    seen = unseen.depth.isfinite()
    surface = (unseen.rays.origins + unseen.depth[:, None] * unseen.rays.directions)[seen]
    near = surface + 0.02 * torch.randn_like(surface)
    return (field.distance(near)[0] - signed_distance(near)).abs().mean().item()


at_first = errors_near_surface()
for step in range(300):
    renderer.occupancy.update(head_on, step)
    chosen = torch.randint(len(photos.rays), (512,))
    background = torch.rand(3)
    output = renderer.render(photos.rays[chosen], background, jitter=True, seed=step, return_samples=True)
    gradient = output.ray_samples.field.channels["gradient"]
    eikonal = (gradient.norm(dim=1) - 1.0).square().mean()
    loss = (output.color - photos.before(background)[chosen]).abs().mean() + 0.1 * eikonal
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

error = errors_near_surface()
with torch.no_grad():
    output = renderer.render(unseen.rays, WHITE, with_normals=True)
print(
    f"distances near the surface are off by {error:.3f}, {at_first:.3f} at first, of a scene {BOX[3] - BOX[0]:.1f} wide"
)
save_if_asked(0.5 + 0.5 * output.normal, unseen.size)
