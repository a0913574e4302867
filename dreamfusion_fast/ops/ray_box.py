"""Where rays enter and leave an axis-aligned box."""

import math

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_number, check_same_length, check_tensor
from dreamfusion_fast.ops._native import call, pointer


def ray_box(
    origins: Tensor, directions: Tensor, aabb: Tensor, near: float = 0.0, far: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Distances along rays between which they are inside a box (slab method, Kay and Kajiya 1986).

    All six faces belong to the box here. The cells of `march` are half-open, so that each position lies in one: of two
    boxes side by side, the upper one has the samples of a ray within the face between them. So a ray that lies exactly
    in a lower face of the box is sampled, and one in an upper face is not.

    Args:
        origins: ``[n_rays, 3]``, float32 or float64.
        directions: ``[n_rays, 3]``, same dtype; distances are in units of their length.
        aabb: ``[6]``, (xmin, ymin, zmin, xmax, ymax, zmax), same dtype.
        near: no ray enters before this distance.
        far: no ray leaves after this distance.

    Returns:
        ``t_near [n_rays], t_far [n_rays]``, both +inf where the ray misses the box or touches it in one point only.
        No gradient flows through them (that of the twin, `ray_box_reference`, does).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        RuntimeError: the native core for this device was not built.
    """
    _check("ray_box", origins, directions, aabb, near, far)
    return _ray_box(origins.detach(), directions.detach(), aabb.detach(), near, far)


def _check(op: str, origins: Tensor, directions: Tensor, aabb: Tensor, near: float, far: float) -> None:
    check_tensor(op, "origins", origins, ["n_rays", 3])
    check_tensor(op, "directions", directions, ["n_rays", 3], like=origins, same_dtype=True)
    check_same_length(op, "directions", directions, "origins", origins)
    check_tensor(op, "aabb", aabb, [6], like=origins, same_dtype=True)
    for name, value in (("near", near), ("far", far)):
        check_number(op, name, value, "a number", lambda number: not math.isnan(number))


@torch.library.custom_op("dreamfusion_fast::ray_box", mutates_args=())
def _ray_box(origins: Tensor, directions: Tensor, aabb: Tensor, near: float, far: float) -> tuple[Tensor, Tensor]:
    return native_ray_box(origins, directions, aabb, near, far)


def native_ray_box(
    origins: Tensor, directions: Tensor, aabb: Tensor, near: float = 0.0, far: float = math.inf
) -> tuple[Tensor, Tensor]:
    """`ray_box` without checks and without the time that torch takes to dispatch an op, for callers in this package."""
    origins, directions, aabb = origins.contiguous(), directions.contiguous(), aabb.contiguous()
    n_rays = origins.shape[0]
    t_near, t_far = origins.new_empty(n_rays), origins.new_empty(n_rays)
    if n_rays > 0:
        tensors = (pointer(origins), pointer(directions), pointer(aabb))
        call("ray_box", origins, *tensors, near, far, pointer(t_near), pointer(t_far), n_rays)
    return t_near, t_far


@_ray_box.register_fake
def _(origins: Tensor, directions: Tensor, aabb: Tensor, near: float, far: float) -> tuple[Tensor, Tensor]:
    return origins.new_empty(origins.shape[0]), origins.new_empty(origins.shape[0])


def ray_box_reference(
    origins: Tensor, directions: Tensor, aabb: Tensor, near: float = 0.0, far: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `ray_box`: any dtype, any device, differentiable where the ray hits."""
    _check("ray_box_reference", origins, directions, aabb, near, far)
    # What lies beyond the type is infinite in it.
    near, far = torch.tensor([float(near), float(far)], dtype=origins.dtype, device="cpu").tolist()
    low, high = aabb[:3], aabb[3:]
    parallel = directions == 0
    # Parallel to a slab: inside for ever or never. The divisor 1 only keeps 0 / 0 out of the other branch.
    divisor = torch.where(parallel, torch.ones_like(directions), directions)
    t_low, t_high = (low - origins) / divisor, (high - origins) / divisor
    hit = torch.where(parallel, (low <= origins) & (origins <= high), (t_low == t_low) & (t_high == t_high)).all(dim=-1)
    enter = torch.where(parallel, -math.inf, torch.minimum(t_low, t_high)).amax(dim=-1).clamp(min=near)
    leave = torch.where(parallel, math.inf, torch.maximum(t_low, t_high)).amin(dim=-1).clamp(max=far)
    hit = hit & (enter < leave)
    return torch.where(hit, enter, math.inf), torch.where(hit, leave, math.inf)


native_ray_box_reference = ray_box_reference
