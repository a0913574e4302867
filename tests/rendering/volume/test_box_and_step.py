"""One scene box and one step for field, grid and renderer, whatever is loaded, moved or left at its default."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from streaming_cases import make_field, make_rays
from torch import Tensor, nn

from dreamfusion_fast.rendering import OccupancyGrid, RendererConfig, VolumeRenderer, orbit_cameras

SMALL, LARGE = (-1.0,) * 3 + (1.0,) * 3, (-1.9, -2.0, -1.8, 2.0, 1.9, 2.1)


class Boxed(nn.Module):
    """A fog of density 0.8 with a box, which is not a `Field`."""

    aabb: Tensor

    def __init__(self, box: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("aabb", torch.tensor(box))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        inside = ((positions > self.aabb[:3].to(positions)) & (positions < self.aabb[3:].to(positions))).all(dim=1)
        return 0.8 * inside.to(positions), positions.sigmoid()


@pytest.mark.parametrize("kind", ["streamed", "chunked"])
@pytest.mark.parametrize("with_grid", [False, True])
@pytest.mark.parametrize("chunk", [37, None])
def test_a_box_that_is_loaded_is_the_renderers(kind: str, with_grid: bool, chunk: int | None) -> None:
    def make(box: tuple[float, ...]) -> VolumeRenderer:
        field = make_field(aabb=box, blob_radius=0.8) if kind == "streamed" else Boxed(box)
        grid = OccupancyGrid(box, resolution=7) if with_grid else None
        return VolumeRenderer(field, grid, RendererConfig(samples_across=45, max_samples_per_chunk=chunk))

    view, expected, rays = make(SMALL), make(LARGE), make_rays()
    before = view.render(rays)
    view.load_state_dict(expected.state_dict())
    assert view.step_size == expected.step_size == pytest.approx(math.dist(LARGE[:3], LARGE[3:]) / 45, rel=1e-6)
    assert torch.equal(view.aabb, torch.tensor(LARGE))
    output, wanted = view.render(rays), expected.render(rays)
    assert output.samples == wanted.samples
    for name in ("color", "opacity", "depth"):
        torch.testing.assert_close(getattr(output, name), getattr(wanted, name), rtol=1e-12, atol=1e-12)
    assert float((output.color - before.color).detach().abs().max()) > 0.05
    assert copy.deepcopy(view).step_size == expected.step_size


def test_a_box_that_is_replaced_is_noticed() -> None:
    """Also where its memory is that of an earlier one."""
    field = make_field()
    view = VolumeRenderer(field)
    for reach in (1.5, 2.0, 2.5, 3.0):
        field.aabb = torch.tensor((-reach,) * 3 + (reach,) * 3)
        assert view.step_size == pytest.approx(2 * reach * math.sqrt(3) / 512)
        assert field.tile_source().box == (-reach,) * 3 + (reach,) * 3


def test_a_box_changed_before_backward_is_noticed() -> None:
    view = VolumeRenderer(make_field(), OccupancyGrid(resolution=5), RendererConfig(samples_across=23))
    loss = view.render(make_rays()).color.sum()
    view.occupancy.load_state_dict(OccupancyGrid(LARGE, resolution=5).state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("made", [True, False])
def test_a_grid_that_leaves_out_a_part_of_the_field_is_refused(made: bool) -> None:
    """When the renderer is made, and when a box is loaded later."""
    message = (
        r"occupancy: got the box \[-1.0, -1.0, -1.0, 1.0, 1.0, 1.0\], cascades 1, want one that holds the field's, "
        r"\[-1.89999\d+, -2.0, "
    )
    if made:
        with pytest.raises(ValueError, match=message):
            VolumeRenderer(Boxed(LARGE), OccupancyGrid())
        return
    view = VolumeRenderer(make_field(), OccupancyGrid(resolution=5))
    view.field.load_state_dict(make_field(aabb=LARGE).state_dict())
    with pytest.raises(ValueError, match=message):
        view.render(make_rays())


def test_a_grid_may_be_larger_than_the_field() -> None:
    rounded = (-1.0 + 1e-6, *SMALL[1:])
    for grid in (OccupancyGrid(LARGE), OccupancyGrid(SMALL, cascades=3, resolution=8), OccupancyGrid(rounded)):
        VolumeRenderer(Boxed(SMALL), grid)
    with pytest.raises(ValueError, match="cascades 2, want one that holds"):
        VolumeRenderer(Boxed(LARGE), OccupancyGrid(cascades=2, resolution=8))
    VolumeRenderer(lambda x: (x[:, 0], x), OccupancyGrid((0.0, 0.0, 0.0, 1.0, 1.0, 1.0)))  # has no box


def fog(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Dense in the middle, so that the threshold is not the mean; thin fog around."""
    distance = positions.norm(dim=1)
    return 1e3 * (distance < 0.3) + 0.5 * (distance < 0.8), positions.sigmoid()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("grid_first", [True, False])
@pytest.mark.parametrize("box", [SMALL, LARGE])
def test_the_threshold_follows_the_step(backend: str, grid_first: bool, box: tuple[float, ...]) -> None:
    """Steps are eight times as long as the default ones, for which the fog is not worth a sample."""
    grid = OccupancyGrid(box, resolution=33, backend=backend)
    if grid_first:
        grid.update(fog, 0)
        assert grid.occupied_fraction() < 0.03
    view = VolumeRenderer(fog, grid, RendererConfig(samples_across=64, backend=backend))
    if not grid_first:
        assert grid.occupied_fraction() == 1.0
        grid.update(fog, 0)
    assert grid.step_size == view.step_size
    assert grid.density_threshold == pytest.approx(-math.log1p(-0.01) / view.step_size)
    assert grid.occupied_fraction() > 0.03
    rays = orbit_cameras(2, distance=5.0).rays(13, 13)
    output = view.render(rays)
    whole = VolumeRenderer(fog, OccupancyGrid(box), view.config).render(rays)
    # Cells at the rim may have been asked for at a point outside of the fog.
    assert float((whole.opacity - output.opacity).abs().mean()) < 0.01
    assert output.samples < 0.5 * whole.samples


def test_a_grid_that_was_made_for_another_step_says_so() -> None:
    for step in (0.01, 0.03):
        grid = OccupancyGrid(resolution=3, step_size=0.02)
        with pytest.warns(UserWarning, match=f"occupancy: was made for steps of 0.02, the renderer's are {step}"):
            VolumeRenderer(fog, grid, RendererConfig(step=step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VolumeRenderer(fog, OccupancyGrid(resolution=3, step_size=0.02), RendererConfig(step=0.02))
        VolumeRenderer(fog, OccupancyGrid(resolution=3), RendererConfig(step=0.02))
        VolumeRenderer(fog, config=RendererConfig(step=0.02), occupancy_resolution=3)


def test_the_longest_step_decides() -> None:
    grid = OccupancyGrid(resolution=3)
    default = VolumeRenderer(fog, grid)
    assert grid.step_size == default.step_size  # of RendererConfig as it is
    for step in (0.01, 0.2, 0.05):
        VolumeRenderer(fog, grid, RendererConfig(step=step))
    assert grid.step_size == 0.2
    assert OccupancyGrid((0.0, 0.0, 0.0, 3.0, 4.0, 12.0)).step_size == pytest.approx(13 / 512)
    assert OccupancyGrid(step_size=0.3).step_size == 0.3
