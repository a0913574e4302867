"""Scenes, and a loss that reads everything, for the tests of the streaming renderer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
from dreamfusion_fast.rendering import OccupancyGrid, Rays, RendererConfig, RenderOutput, VolumeRenderer

BOX = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
LIGHT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
STEP = 0.05
PER_RAY = ("color", "opacity", "depth", "normal")
LOSSES = ("orientation_loss", "distortion_loss", "sample_entropy_loss")
EVERYTHING = {"with_normals": True, "with_distortion": True, "with_sample_entropy": True}
# For comparisons of precisions. Rounding a position moves it by a part of a cell that grows with the resolution, and
# without smoothstep normals jump from cell to cell: with few cells and no jumps, what is left is the renderer's own.
SMOOTH = {"levels": 4, "log2_rows": 12, "base_resolution": 4, "finest_resolution": 16, "hidden": 32}


def make_field(
    backend: str = "native", dtype: torch.dtype = torch.float64, aabb: tuple[float, ...] = BOX, **changes: Any
) -> HashGridField:
    """A field whose every part matters: features of the size of the blob, biases that are not zero."""
    settings: dict[str, Any] = {
        "levels": 3,
        "log2_rows": 8,
        "base_resolution": 3,
        "finest_resolution": 9,
        "hidden": 8,
        "smoothstep": True,
        "backend": backend,
    }
    field = HashGridField(HashGridFieldConfig(**settings | changes), aabb, torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        field.table.uniform_(-0.5, 0.5, generator=draws)
        for name, parameter in field.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.3, 0.3, generator=draws)
    return field.to(dtype)


def make_rays(count: int = 41, dtype: torch.dtype = torch.float64) -> Rays:
    """From around the box towards points in and beside it: some miss."""
    generator = torch.Generator().manual_seed(5)
    origins = 3 * normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    targets = 2.4 * (torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5)
    return Rays.normalized(origins.to(dtype), (targets - origins).to(dtype))[0]


def make_occupancy(share: float, resolution: int = 8) -> OccupancyGrid:
    """A grid of which about `share` is occupied, at random."""
    occupancy = OccupancyGrid(resolution=resolution)
    draws = torch.rand((resolution,) * 3, generator=torch.Generator().manual_seed(3))
    occupancy.set_occupied(draws < share)
    return occupancy


def loss_of(output: RenderOutput) -> Tensor:
    """Reads every output that has gradients, each ray with weights of its own."""
    n = output.color.shape[0]
    mix = torch.linspace(-1, 1, n * 3, dtype=torch.float64).view(n, 3).to(output.color)
    loss = (output.color * mix).sum() + (output.opacity * (3 * mix[:, 0]).cos()).sum()
    loss = loss + (output.depth * mix[:, 1]).sum()
    if output.normal is not None:
        loss = loss + (output.normal * mix.sin()).sum()
    for value in output.channels.values():
        loss = loss + (value * torch.linspace(-2, 1, value.numel(), dtype=torch.float64).view_as(value).to(value)).sum()
    for weight, name in zip((5.0, 3.0, 0.7), LOSSES, strict=True):
        if getattr(output, name) is not None:
            loss = loss + n * weight * getattr(output, name)
    return loss


def differentiate(
    view: VolumeRenderer, render: Callable[[], RenderOutput], *extra: Tensor
) -> tuple[RenderOutput, dict[str, Tensor]]:
    """The output, and the gradients of `loss_of` it to the field's parameters and to other tensors, by name."""
    tensors = dict(view.field.named_parameters()) | {f"extra {i}": tensor for i, tensor in enumerate(extra)}
    output = render()
    gradients = torch.autograd.grad(loss_of(output), list(tensors.values()), materialize_grads=True)
    return output, dict(zip(tensors, gradients, strict=True))


def render_with_gradients(
    view: VolumeRenderer, rays: Rays, background: Tensor | None = None, **options: Any
) -> tuple[RenderOutput, dict[str, Tensor]]:
    """`differentiate` for a render with a light and a background with gradients."""
    if background is None:
        generator = torch.Generator().manual_seed(6)
        background = torch.rand(len(rays), 3, generator=generator, dtype=torch.float64).to(rays.origins)
    background.requires_grad_(True)
    options.setdefault("light", LIGHT.to(rays.origins))
    return differentiate(view, lambda: view.render(rays, background, **options), background)


def streamed(output: RenderOutput) -> bool:
    """Whether the built-in field's own path rendered it: it is one node of the graph, the other path is many."""
    seen, waiting = set(), [output.depth.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Streamed" in node.name():
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def assert_equal(
    given: tuple[RenderOutput, dict[str, Tensor]], wanted: tuple[RenderOutput, dict[str, Tensor]], tolerance: float
) -> None:
    """All outputs and gradients agree, up to `tolerance` times the largest number of each."""
    assert given[0].samples == wanted[0].samples
    for name in (*PER_RAY, *LOSSES):
        a, b = getattr(given[0], name), getattr(wanted[0], name)
        assert (a is None) == (b is None), name
        if b is not None:
            _assert_close(name, a, b, tolerance)
    assert given[0].channels.keys() == wanted[0].channels.keys()
    for name, value in wanted[0].channels.items():
        _assert_close(name, given[0].channels[name], value, tolerance)
    assert given[1].keys() == wanted[1].keys()
    for name, b in wanted[1].items():
        _assert_close(f"gradient of {name}", given[1][name], b, tolerance)


def _assert_close(name: str, a: Tensor, b: Tensor, tolerance: float) -> None:
    largest = float(b.detach().abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest, msg=lambda text: f"{name}: {text}")


def relative_errors(
    given: tuple[RenderOutput, dict[str, Tensor]], wanted: tuple[RenderOutput, dict[str, Tensor]]
) -> dict[str, float]:
    """|a - b| / |b| of colours, losses and every gradient, by name."""
    pairs = {"color": (given[0].color, wanted[0].color)}
    for name in LOSSES:
        if getattr(wanted[0], name) is not None:
            pairs[name] = (getattr(given[0], name), getattr(wanted[0], name))
    pairs |= {f"gradient of {name}": (given[1][name], wanted[1][name]) for name in wanted[1]}
    errors = {}
    for name, (a, b) in pairs.items():
        b = b.detach().double().cpu()
        errors[name] = float((a.detach().double().cpu() - b).norm() / b.norm())
    return errors


def smooth_scene(dtype: torch.dtype, device: torch.device | str = "cpu", **changes: Any) -> tuple[VolumeRenderer, Rays]:
    """The same scene in any precision: its numbers are float32 ones."""
    field = make_field(dtype=torch.float32, **SMOOTH | changes).to(device=device, dtype=dtype)
    rays = make_rays(113, torch.float32).to(device, dtype)
    return VolumeRenderer(field, config=RendererConfig(step=STEP)), rays
