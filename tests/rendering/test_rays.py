"""Rays: shapes, limits, what is converted, and the errors for rays that cannot be rendered."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.rendering import InvalidRaysError, Rays


def rays(count: int = 5) -> Rays:
    return Rays(torch.zeros(count, 3), torch.nn.functional.normalize(torch.randn(count, 3), dim=1))


@pytest.mark.parametrize("count", [0, 1, 113])
def test_good_rays_pass(count: int) -> None:
    rays(count).validate()
    assert len(rays(count)) == count


@pytest.mark.parametrize(
    ("origin", "direction", "message"),
    [
        ((0, 0, float("nan")), (0, 0, 1), "ray 3 is not finite"),
        ((0, 0, 0), (float("inf"), 0, 1), "ray 3 is not finite"),
        ((0, 0, 0), (0, 0, 0), "ray 3 has a direction of zero length"),
        ((0, 0, 0), (0, 0, 2), "ray 3 has a direction that is not of unit length"),
    ],
)
def test_bad_rays_are_named(origin: tuple, direction: tuple, message: str) -> None:
    bad = rays()
    bad.origins[3] = torch.tensor(origin)
    bad.directions[3] = torch.tensor(direction)
    with pytest.raises(InvalidRaysError, match=message):
        bad.validate()


SHAPES = [(), (0,), (1,), (113,), (2, 3, 5), (2, 0, 5)]


def of_shape(shape: tuple[int, ...], limits: bool = True) -> Rays:
    generator = torch.Generator().manual_seed(4)
    origins, directions = torch.randn(2, *shape, 3, generator=generator)
    near, far = torch.rand(2, *shape, generator=generator) if limits else (None, None)
    return Rays(origins, torch.nn.functional.normalize(directions, dim=-1), near, far)


def parts(given: Rays) -> list[Tensor]:
    return [value for value in vars(given).values() if value is not None]


@pytest.mark.parametrize("limits", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_leading_shape(shape: tuple[int, ...], limits: bool) -> None:
    given = of_shape(shape, limits)
    given.validate()
    assert given.shape == shape
    flat = given.flat()
    assert flat.shape == (math.prod(shape),)
    assert len(flat) == math.prod(shape)
    for back in (flat.reshape(*shape), flat.reshape(shape)):
        for one, other in zip(parts(given), parts(back), strict=True):
            assert torch.equal(one, other)
    if shape:
        assert len(given) == shape[0]
    else:
        with pytest.raises(TypeError, match="rays: a single ray has no length"):
            len(given)


def test_flat_rays_run_as_pixels_do() -> None:
    given = of_shape((2, 3, 5))
    assert torch.equal(given.flat().origins[1 * 15 + 2 * 5 + 4], given.origins[1, 2, 4])
    assert torch.equal(given.flat().far[1 * 15 + 2 * 5 + 4], given.far[1, 2, 4])


@pytest.mark.parametrize(
    "index", [1, slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True]), (slice(None), 2), (0, 1)]
)
def test_indexing(index: object) -> None:
    given = of_shape((3, 4))
    for value, chosen in zip(parts(given), parts(given[index]), strict=True):
        assert torch.equal(chosen, value[index])


def test_moving_keeps_the_limits() -> None:
    given = of_shape((7,))
    assert all(value.dtype == torch.float64 for value in parts(given.to(dtype=torch.float64)))
    assert all(value.device.type == "meta" for value in parts(given.to("meta")))
    assert len(parts(of_shape((7,), limits=False).to("meta"))) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("near", -0.5, "ray {} has near -0.5, want at least 0"),
        ("near", math.nan, "ray {} has near nan, want at least 0"),
        ("far", math.nan, "ray {} has a far that is not a number"),
    ],
)
@pytest.mark.parametrize(("shape", "ray"), [((5,), (3,)), ((2, 3), (1, 0))])
def test_bad_limits_are_named(name: str, value: float, message: str, shape: tuple, ray: tuple) -> None:
    bad = of_shape(shape)
    getattr(bad, name)[ray] = value
    where = ray[0] if len(ray) == 1 else list(ray)
    with pytest.raises(InvalidRaysError) as caught:
        bad.validate()
    assert str(caught.value).startswith(f"rays: {message.format(where)}: origin")


def test_limits_that_leave_nothing_are_good() -> None:
    """Other projects mark a ray that misses the box by the largest number in both."""
    most = torch.finfo(torch.float32).max
    for near, far in ((most, most), (2.0, 1.0), (math.inf, math.inf), (0.0, math.inf), (0.0, -1.0)):
        replace(rays(), near=torch.full((5,), near), far=torch.full((5,), far)).validate()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_become_float32(dtype: torch.dtype) -> None:
    given = of_shape((7,))
    made = Rays.from_tensors(*(value.to(dtype) for value in parts(given)))
    for value, wanted in zip(parts(made), parts(given), strict=True):
        assert torch.equal(value, wanted.to(dtype).float())
    mixed = Rays.from_tensors(given.origins.double(), given.directions.to(dtype), 0.5, given.far)
    assert all(value.dtype == torch.float64 for value in parts(mixed))


def test_one_origin_goes_with_many_directions() -> None:
    given = of_shape((4, 5))
    origin = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    made = Rays.from_tensors(origin, given.directions, near=0.25, far=torch.arange(5))
    assert made.shape == (4, 5)
    assert torch.equal(made.origins, origin.expand(4, 5, 3))
    assert torch.equal(made.near, torch.full((4, 5), 0.25))
    assert torch.equal(made.far, torch.arange(5.0).expand(4, 5))
    made.origins.sum().backward()
    assert origin.grad.tolist() == [20.0] * 3


@pytest.mark.parametrize("count", [0, 1, 113])
def test_normalized_scales_distances_with_the_directions(count: int) -> None:
    generator = torch.Generator().manual_seed(6)
    origins, directions = 5 * torch.randn(2, count, 3, dtype=torch.float64, generator=generator)
    near = torch.rand(count, dtype=torch.float64, generator=generator)
    made, scale = Rays.normalized(origins, directions, near, 7.0)
    made.validate()
    torch.testing.assert_close(made.directions * directions.norm(dim=1, keepdim=True), directions)
    torch.testing.assert_close(made.near * scale, near)
    torch.testing.assert_close(made.far * scale, torch.full_like(near, 7.0))
    point = made.origins + made.near[:, None] * made.directions
    torch.testing.assert_close(point, origins + near[:, None] * directions)


def test_normalized_is_differentiable() -> None:
    origins, directions = torch.randn(2, 5, 3, dtype=torch.float64)

    def values(directions: Tensor) -> tuple[Tensor, ...]:
        made, scale = Rays.normalized(origins, directions, 1.0, 2.0)
        return made.directions, made.near, made.far, scale

    assert torch.autograd.gradcheck(values, directions.requires_grad_())


def test_normalized_leaves_a_zero_direction_to_validate() -> None:
    with pytest.raises(InvalidRaysError, match="not of unit length"):
        Rays(torch.zeros(4, 3), torch.full((4, 3), 5.0)).validate()
    made, scale = Rays.normalized(torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
    assert scale.tolist() == [1.0, 0.25]
    assert made.directions.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    with pytest.raises(InvalidRaysError, match="ray 0 has a direction of zero length"):
        made.validate()


def test_wrong_shapes_and_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"rays.directions: got shape \[5, 2\], want \[..., 3\]"):
        Rays(torch.zeros(5, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"rays.origins: got shape \[\]"):
        Rays(torch.zeros(()), torch.zeros(3))
    with pytest.raises(ValueError, match=r"got origins \[4, 3\] and directions \[5, 3\], want one shape"):
        Rays(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(
        TypeError, match=r"rays.origins: got torch.int64, want a tensor \[..., 3\] of float32 or float64$"
    ):
        Rays(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"rays.origins: got torch.float16.*; Rays.from_tensors makes it float32"):
        Rays(torch.zeros(4, 3, dtype=torch.float16), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"torch.float64"):
        Rays(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (2.0, TypeError, r"got float, want a tensor \[4, 5\]; Rays.from_tensors takes numbers"),
        (torch.ones(5), ValueError, r"got shape \[5\], want \[4, 5\]"),
        (torch.ones(4, 5, 1), ValueError, r"got shape \[4, 5, 1\], want \[4, 5\]"),
        (torch.ones(4, 5).double(), ValueError, "got torch.float64 on cpu, want torch.float32 on cpu"),
        (torch.ones(4, 5, device="meta"), ValueError, "got torch.float32 on meta, want torch.float32 on cpu"),
    ],
)
@pytest.mark.parametrize("name", ["near", "far"])
def test_wrong_limits_are_named(name: str, limit: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^rays.{name}: {message}"):
        replace(of_shape((4, 5)), **{name: limit})


def test_what_cannot_be_converted_is_named() -> None:
    origins, directions = torch.zeros(2, 5, 3)
    with pytest.raises(TypeError, match=r"rays.directions: got list, want a floating-point tensor"):
        Rays.from_tensors(origins, [[0.0, 0.0, 1.0]])
    with pytest.raises(TypeError, match=r"rays.origins: got torch.int64, want a floating-point tensor"):
        Rays.from_tensors(origins.long(), directions)
    with pytest.raises(TypeError, match=r"rays.near: got str, want a tensor or a number"):
        Rays.from_tensors(origins, directions, near="close")
    with pytest.raises(ValueError, match=r"rays: got \[5, 3\], \[4, 3\].*want shapes that can be broadcast"):
        Rays.from_tensors(origins, directions[:4])
    with pytest.raises(ValueError, match=r"rays: got \[5, 3\], \[5, 3\], \[4, 3\] \(near and far with a 3\)"):
        Rays.from_tensors(origins, directions, far=torch.ones(4))


def test_an_index_never_chooses_among_coordinates() -> None:
    rays = of_shape((3, 3), limits=True)
    last = rays[..., 2]
    assert last.shape == (3,)
    for one, other in zip(parts(last), parts(rays[:, 2]), strict=True):
        assert torch.equal(one, other)
    assert rays[torch.tensor([0, 2]), ..., torch.tensor([1, 1])].shape == (2,)
    for index in ((0, 1, 2), (slice(None), slice(None), 0), (..., 0, 1, 2)):
        with pytest.raises(IndexError, match="too many indices"):
            rays[index]
