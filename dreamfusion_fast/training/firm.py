"""The last stage of a run: a field whose renders are opaque or empty, so that a mesh can show what they show.

Score distillation leaves soft edges and parts through which light shines. No mesh agrees with those: it is there or it
is not. So the field as it is, the teacher, is rendered from random views, each pixel is made opaque or empty
(`OpaqueThresholds`), and the field is fitted to that. Nothing else is asked for, above all not the diffusion model, so
the stage takes seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch

from dreamfusion_fast.errors import NonFiniteError
from dreamfusion_fast.fields.hash_field import HashGridField
from dreamfusion_fast.rendering.cameras import sample_cameras
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.renderer import VolumeRenderer
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import send
from dreamfusion_fast.training.opaque import cross_entropy

# Weight of the opacity's cross entropy beside the colours' squared error.
_OPACITY_WEIGHT = 0.1


def firm_field(
    field: HashGridField,
    occupancy: OccupancyGrid,
    renderer_config: RendererConfig,
    config: Config,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Fit a field to its own renders with each pixel opaque or empty, in place.

    The loss is the squared error of colours on a random background, and the binary cross entropy of the opacity. On a
    CPU the result depends on the field and `config.seed` alone.

    Args:
        field, occupancy: what is optimised, and where it is sampled. Both are changed.
        renderer_config: of teacher and field.
        config: of the run; read are `firm`, `opaque`, `camera`, `optim`, `batch`, `schedule.render_size` and `seed`.
        stop: asked after each step; where it says so, field and grid are put back as they were.

    Returns:
        Whether it was done to its end.

    Raises:
        NonFiniteError: a parameter became infinite or NaN; field and grid are put back as they were.
    """
    device = field.table.device
    c, batch, size = config.firm, config.batch_on(device), config.schedule.render_size
    teacher_field, teacher_occupancy = copy.deepcopy(field).requires_grad_(False), copy.deepcopy(occupancy)
    teacher = VolumeRenderer(teacher_field, teacher_occupancy, renderer_config)
    renderer = VolumeRenderer(field, occupancy, renderer_config)
    generator = torch.Generator().manual_seed(config.seed)
    rates = (c.lr_table, c.lr_mlp)
    groups = [{"params": [field.table]}, {"params": list(field.layers.parameters())}]
    optimizer = torch.optim.Adam(groups, lr=c.lr_table, betas=config.optim.betas, eps=config.optim.eps, fused=True)
    done = False
    try:
        for step in range(c.steps):
            factor = 0.55 + 0.45 * math.cos(math.pi * step / c.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            occupancy.update(field, step)
            cameras = sample_cameras(config.camera, batch, generator)
            background = torch.rand(3, generator=generator)
            seeds = torch.randint(2**31 - 1, (2,), generator=generator).tolist()
            (background,) = send(device, background)
            rays = cameras.to(device).rays(size, size)
            with torch.no_grad():
                shown = teacher.render(rays, jitter=True, seed=seeds[0])
                opaque = config.opaque.wanted(shown.opacity.view(batch, size, size)).view(-1)
                color = shown.color / shown.opacity.clamp(min=1e-3)[:, None]
                wanted = torch.where(opaque[:, None], color, background)
            output = renderer.render(rays, background, jitter=True, seed=seeds[1])
            loss = (output.color - wanted).square().mean() + _OPACITY_WEIGHT * cross_entropy(
                output.opacity, opaque, 1e-4
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if stop():
                break
        else:
            for name, parameter in field.named_parameters():
                if not math.isfinite(float(parameter.detach().double().sum())):
                    raise NonFiniteError(f"the parameters field.{name} hold a NaN or an infinity after the last stage")
            done = True
    finally:
        optimizer.zero_grad(set_to_none=True)
        if not done:
            with torch.no_grad():
                for now, before in zip(field.parameters(), teacher_field.parameters(), strict=True):
                    now.copy_(before)
                occupancy.load_state_dict(teacher_occupancy.state_dict())
    return done
