"""The NeRF of nerf.py as a project renders that uses nerfacc: `nerfacc` is ours, its calls are as there.

    python examples/nerf_nerfacc.py [views.png]

Seconds on a CPU. Prints the PSNR of views that it was not trained on, and draws them.
"""

import math

import torch
from scene import BOX, WHITE, photograph, psnr, save_if_asked

import dreamfusion_fast.integrations.nerfacc as nerfacc  # import nerfacc
from dreamfusion_fast.fields import FieldSamples, SceneField, SceneFieldConfig

STEP = math.dist(BOX[:3], BOX[3:]) / 96


def render(rays, background, stratified=False):
    def samples(t_starts, t_ends, ray_indices):
        middles = rays.origins[ray_indices] + 0.5 * (t_starts + t_ends)[:, None] * rays.directions[ray_indices]
        output = field(FieldSamples(middles, rays.directions, ray_indices))
        return output.color, output.density

    ray_indices, t_starts, t_ends = estimator.sampling(
        rays.origins, rays.directions, render_step_size=STEP, stratified=stratified
    )
    color, *_ = nerfacc.rendering(t_starts, t_ends, ray_indices, len(rays), samples, render_bkgd=background)
    return color, len(t_starts)


torch.manual_seed(0)
photos, unseen = photograph(views=64, seed=0), photograph(views=6, seed=1)
config = SceneFieldConfig(
    levels=5, log2_rows=14, base_resolution=8, finest_resolution=64, hidden=32, color_layers=1, view_degree=3
)
field, estimator = SceneField(config, BOX), nerfacc.OccGridEstimator(BOX, resolution=32)
optimizer = torch.optim.Adam(field.parameters(), lr=1e-2, eps=1e-15)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [250, 350], 0.3)

n_rays = 256
for step in range(400):
    estimator.update_every_n_steps(step, lambda positions: field.density(positions) * STEP, ema_decay=0.7)
    chosen = torch.randint(len(photos.rays), (n_rays,))
    background = torch.rand(3)
    color, samples = render(photos.rays[chosen], background, stratified=True)
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
