"""The last stage of a run: a field whose renders are opaque or empty, so that a mesh can show what they show.

Score distillation leaves soft edges and parts through which light shines. No mesh agrees with those: it is there or it
is not. So the field as it is, the teacher, is rendered from random views, each pixel is made opaque or empty
(`OpaqueThresholds`), and the field is fitted to that. Pieces that have come apart are joined by rods (`struts`).
Nothing else is asked for, above all not the diffusion model, so the stage takes seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dreamfusion_fast.export.density import sample_density
from dreamfusion_fast.fields.base import Field, evaluate, query_density
from dreamfusion_fast.rendering.orbits import sample_cameras
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import send
from dreamfusion_fast.training.opaque import cross_entropy
from dreamfusion_fast.training.rates import cosine, rated, set_rates
from dreamfusion_fast.training.struts import Struts, find_struts

# Share of the steps after which it can be seen what is torn, and points along the box's side to see it.
_JOINED_AFTER, _RESOLUTION = 0.25, 128
# The learning rates' last share of their peaks.
_LAST_RATE = 0.1
# Points in rods whose density is asked for in a step.
_POINTS = 256
# Weight of the opacity's cross entropy beside the colours' squared error.
_OPACITY_WEIGHT = 0.1


def firm_field(scene: Scene, config: Config, stop: Callable[[], bool] = lambda: False) -> bool:
    """Fit a field to its own renders with each pixel opaque or empty, in place.

    The loss is the squared error of colours on a random background, the binary cross entropy of the opacity, and where
    rods are needed the -log of their opacity. On a CPU the result depends on the field and `config.seed` alone.

    Args:
        scene: its field is optimised, and its grid follows.
        config: of the run; read are `firm`, `opaque`, `camera`, `optim`, `batch`, `schedule.render_size` and `seed`.
        stop: asked after each step; where it says so, field and grid are put back as they were.

    Returns:
        Whether it was done to its end.

    Raises:
        NonFiniteError: a parameter became infinite or NaN; field and grid are put back as they were.
    """
    field, occupancy, device = scene.field, scene.occupancy, scene.device
    c, batch, size = config.firm, config.batch_on(device), config.schedule.render_size
    teacher_field, teacher_occupancy = copy.deepcopy(field).requires_grad_(False), copy.deepcopy(occupancy)
    teacher = VolumeRenderer(teacher_field, teacher_occupancy, scene.renderer.config)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(
        rated(field.parameter_groups(), c), betas=config.optim.betas, eps=config.optim.eps, fused=True
    )
    torn: tuple[Struts, Tensor] | None = None
    rods: Struts | None = None
    done = False
    try:
        for step in range(c.steps):
            if step == round(_JOINED_AFTER * c.steps) and c.join > 0:
                torn = _torn(field, c.join)
                rods = None if torn is None else torn[0].to(device)  # once: a copy would wait in each step
            set_rates(optimizer, cosine(step / c.steps, _LAST_RATE))
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
                if torn is not None and rods is not None:
                    opaque, color = _with_rods(rods, torn[1], rays, opaque, color)
                wanted = torch.where(opaque[:, None], color, background)
            output = scene.renderer.render(rays, background, jitter=True, seed=seeds[1])
            loss = (output.color - wanted).square().mean() + _OPACITY_WEIGHT * cross_entropy(
                output.opacity, opaque, 1e-4
            )
            if torn is not None:
                loss = loss + _OPACITY_WEIGHT * _fill_loss(field, torn[0], generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if stop():
                break
        else:
            scene.check_parameters("after the last stage")
            done = True
    finally:
        optimizer.zero_grad(set_to_none=True)
        if not done:
            with torch.no_grad():
                for now, before in zip(field.parameters(), teacher_field.parameters(), strict=True):
                    now.copy_(before)
                occupancy.load_state_dict(teacher_occupancy.state_dict())
    return done


def _torn(field: Field, longest: float) -> tuple[Struts, Tensor] | None:
    """The rods that a field needs to be in one piece, and the colours of their ends `[2, k, 3]`."""
    grid = sample_density(lambda positions: query_density(field, positions), field.aabb, _RESOLUTION)
    struts = find_struts(grid, longest)
    if struts is None:
        return None
    with torch.no_grad():
        colors = evaluate(field, torch.cat([struts.start, struts.end]).to(field.aabb)).color
    return struts, colors.view(2, -1, 3)


def _with_rods(struts: Struts, ends: Tensor, rays: Rays, opaque: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
    """Rods where pixels are empty: opaque, in a colour between those of their ends `[2, k, 3]`."""
    rod, share = struts.hit(rays)
    new = (rod >= 0) & ~opaque
    first, last = ends[:, rod.clamp(min=0)]
    return opaque | new, torch.where(new[:, None], torch.lerp(first, last, share[:, None]), color)


def _fill_loss(field: Field, struts: Struts, generator: torch.Generator) -> Tensor:
    """Mean over points in rods of -log(opacity) of a way as long as the rod is thick."""
    points, radius = send(field.aabb.device, *struts.points(_POINTS, generator))
    opacity = -torch.expm1(-2.0 * radius * query_density(field, points))
    return -opacity.clamp(min=1e-30).log().mean()
