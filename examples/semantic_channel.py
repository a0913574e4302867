"""A channel beside the colour: class scores, composited as it is, and trained on the pixels of a few labelled views.

    python examples/semantic_channel.py [classes.png]

Seconds on a CPU. Prints the share of the pixels of unseen views whose class is right, and draws the classes.
"""

import torch
from scene import BOX, COLORS, WHITE, photograph, save_if_asked
from torch.nn.functional import cross_entropy

from dreamfusion_fast import HashGridField, HashGridFieldConfig, VolumeRenderer
from dreamfusion_fast.rendering import RendererConfig

torch.manual_seed(0)
photos, unseen = photograph(views=32, seed=0), photograph(views=6, seed=1)
labelled = photos.size**2 * 8  # pixels of the first eight views; of the others there are colours alone

config = HashGridFieldConfig(
    levels=5, log2_rows=14, base_resolution=8, finest_resolution=64, bound="box", blob_scale=0.0, channels=len(COLORS)
)
field = HashGridField(config, BOX)
renderer = VolumeRenderer(field, config=RendererConfig(samples_across=96), occupancy_resolution=32)
optimizer = torch.optim.Adam(field.parameters(), lr=1e-2, eps=1e-15)
nothing = torch.tensor([5.0, 0.0, 0.0, 0.0])  # scores of what is behind everything


def scores(output):
    return output.channels["features"] + (1.0 - output.opacity)[:, None] * nothing


for step in range(200):
    renderer.occupancy.update(field, step)
    chosen = torch.randint(len(photos.rays), (512,))
    background = torch.rand(3)
    output = renderer.render(photos.rays[chosen], background, jitter=True, seed=step)
    known = chosen < labelled
    loss = (output.color - photos.before(background)[chosen]).square().mean()
    loss = loss + 0.02 * cross_entropy(scores(output)[known], photos.label[chosen][known])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    found = scores(renderer.render(unseen.rays, WHITE)).argmax(dim=1)
accuracy = float((found == unseen.label).float().mean())
print(f"{100 * accuracy:.1f} % of the pixels are classified right, {photos.size**2 * 8 // 1000}k pixels were labelled")
save_if_asked(COLORS[found], unseen.size)
