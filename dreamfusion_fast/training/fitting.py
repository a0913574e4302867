"""Fit one field to another, so that a run can start from whatever was made as another kind of field."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.fields.base import Field, FieldOutput, evaluate, query_density
from dreamfusion_fast.training.device import send

STEPS = 200
_POINTS = 2**14  # in a step
_ANYWHERE = 0.25  # share of them that is drawn from the whole box, and not near the object
_CELLS = 32  # along a side of the box, to find what is near it
_OPACITY = 0.01  # of a step through the middle of a cell, from which it belongs to the object
_RATES = {"table": 0.03, "planes": 0.03, "mlp": 0.005}


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
    box, device = field.aabb.cpu(), field.aabb.device
    size = box[3:] - box[:3]
    corners = _occupied(source, step_size)
    groups = field.parameter_groups()
    rates = [_RATES[kind] for kind in groups]
    optimizer = torch.optim.Adam(
        [{"params": group} for group in groups.values()], betas=(0.9, 0.99), eps=1e-15, fused=True
    )
    anywhere = round(_ANYWHERE * _POINTS) if len(corners) else _POINTS
    for step in range(steps):
        factor = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        points = torch.rand(_POINTS, 3, generator=generator)
        if anywhere < _POINTS:
            cell = torch.randint(len(corners), (_POINTS - anywhere,), generator=generator)
            points[anywhere:] = (corners[cell] + points[anywhere:]) / _CELLS
        (points,) = send(device, box[:3] + size * points)
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
    assert output.density is not None  # as of a field of alphas, which no run has
    return output.density


def _opacity(density: Tensor, step_size: float) -> Tensor:
    return -torch.expm1(-density * step_size)


@torch.no_grad()
def _occupied(field: Field, step_size: float) -> Tensor:
    """The corners `[n, 3]` of the cells of the box that the object is in or next to, in cells, on the CPU."""
    axis = torch.arange(_CELLS, dtype=torch.float32)
    corners = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)
    low, high = field.aabb[:3], field.aabb[3:]
    middles = low + (high - low) * (corners.to(low) + 0.5) / _CELLS
    opaque = _opacity(query_density(field, middles), step_size) > _OPACITY
    near = F.max_pool3d(opaque.to(low.dtype).view(1, 1, _CELLS, _CELLS, _CELLS), 3, 1, 1).view(-1) > 0
    return corners[near.cpu()]
