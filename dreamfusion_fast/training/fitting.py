"""Fit one field to another, so that a run can start from whatever was made as another kind of field."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.export.density import sample_density
from dreamfusion_fast.fields.base import Field, FieldOutput, evaluate, query_density
from dreamfusion_fast.training.device import send
from dreamfusion_fast.training.rates import cosine, rated, set_rates
from dreamfusion_fast.training.sections import OptimConfig

STEPS = 200
_POINTS = 2**14  # in a step
_ANYWHERE = 0.25  # share of them that is drawn from the whole box, and not near the object
_CELLS = 32  # along the longest side of the box, to find what is near it
_OPACITY = 0.01  # of a step, from which a point belongs to the object
_OPTIM = OptimConfig(lr_planes=0.03)


def fit_field(field: Field, source: Field, step_size: float, seed: int, steps: int = STEPS) -> None:
    """Fit a field to the opacities and colours of another with the same box, in place.

    Points are drawn in the box, most of them near the object. The loss is the squared error of their opacities over a
    render's step, and that of their colours times the source's opacity. On a CPU the result depends on the arguments
    alone.

    Args:
        field: to be fitted.
        source: what it shall look like, on the same device; its parameters stay as they are.
        step_size: of the renders, scene units.
        seed: of the points.
        steps: of Adam.
    """
    generator = torch.Generator().manual_seed(seed)
    box = field.aabb.cpu()
    corners, edge = _occupied(source, step_size)
    optimizer = torch.optim.Adam(
        rated(field.parameter_groups(), _OPTIM), betas=_OPTIM.betas, eps=_OPTIM.eps, fused=True
    )
    near = round((1 - _ANYWHERE) * _POINTS) if len(corners) else 0
    for step in range(steps):
        set_rates(optimizer, cosine(step / steps, _OPTIM.final_lr_factor))
        anywhere = torch.rand(_POINTS - near, 3, generator=generator)
        points = box[:3] + (box[3:] - box[:3]) * anywhere
        if near:
            cell = torch.randint(len(corners), (near,), generator=generator)
            points = torch.cat([points, corners[cell] + edge * torch.rand(near, 3, generator=generator)])
        (points,) = send(field.aabb.device, points)
        with torch.no_grad():
            wanted = evaluate(source, points)
            opacity = _opacity(_density(wanted), step_size)
        made = evaluate(field, points)
        loss = (_opacity(_density(made), step_size) - opacity).square().mean()
        loss = loss + (opacity[:, None] * (made.color - wanted.color).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _density(output: FieldOutput) -> Tensor:
    assert output.density is not None  # it is of a field of alphas, which no run has
    return output.density


def _opacity(density: Tensor, step_size: float) -> Tensor:
    return -torch.expm1(-density * step_size)


def _occupied(field: Field, step_size: float) -> tuple[Tensor, float]:
    """The lower corners `[n, 3]` of the cells that the object is in or next to, on the CPU, and a cell's edge."""
    grid = sample_density(lambda positions: query_density(field, positions), field.aabb, _CELLS)
    opaque = _opacity(torch.from_numpy(grid.values), step_size) > _OPACITY
    near = F.max_pool3d(opaque.float()[None], 4, stride=1, padding=1)[0]  # a cell's eight points and those around
    return torch.from_numpy(grid.low).float() + grid.voxel * near.nonzero(), grid.voxel
