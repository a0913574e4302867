"""Triplane encoding (Chan et al. 2022, "Efficient Geometry-aware 3D Generative Adversarial Networks", section 4.1).

A scene is three planes of features, over (x, y), (x, z) and (y, z); the features at a position are those of its three
projections, interpolated. As for the hash grid there are four ops, each the derivative of one before, connected by
autograd, and none stores anything per vertex.

Features are the last dimension of the planes, so that a vertex is one run of memory: a position then costs 4 or 9 reads
of whole sectors a plane, where planes of channels as images have them would cost as many for each channel.
"""

from typing import Any, Sequence  # noqa: UP035 - the one that custom_op of torch 2.4 reads

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import INTEGERS, check_number, check_tensor, check_transforms
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.hash_grid import differentiable

PLANES = 3
SHAPE: tuple[int | str, ...] = ("n_scenes", PLANES, "height", "width", "n_features")
MAX_SIDE, MAX_FEATURES = 2**14, 2**12
# The axes along the columns and across the rows of each plane.
PLANE_AXES = ((0, 1), (0, 2), (1, 2))


def triplane(positions: Tensor, planes: Tensor, scenes: Tensor | None = None, degree: int = 1) -> Tensor:
    """Encodes positions by interpolating three planes of features.

    A plane is the tensor product of uniform B-splines with its vertices as coefficients. Along an axis with N vertices
    there are N - degree cells on [0, 1], and a position in cell c is a weighted sum of the vertices c to c + degree.
    Of degree 1 that is bilinear interpolation with vertices from edge to edge: the derivative along an axis jumps at
    the vertices. Of degree 2 it is continuous, for 9 vertices in place of 4.

    Args:
        positions: ``[n_samples, 3]``, float32 or float64; clamped to [0, 1], with no gradient outside. NaN gives NaN in
            the planes that it lies in.
        planes: ``[n_scenes, 3, height, width, n_features]``, same dtype: the planes (x, y), (x, z) and (y, z), the
            first axis of each along the rows, which have width vertices. Sides of degree + 1 to 2^14, up to 2^12
            features, of which multiples of 4 are fast on a GPU.
        scenes: ``[n_samples]`` int32 or int64, of which scene each position is; None: all are of the first.
        degree: 1 or 2.

    Returns:
        ``[n_samples, 3 * n_features]``: the features of the planes, one after another. Differentiable twice to
        positions and planes. On the CPU the result and the gradients are the same bits for any number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device. A scene that there is not is found on
            the CPU only; on a GPU, where the check would wait, its features are NaN.
        RuntimeError: the native core for this device was not built, or torch.func differentiates an argument.
    """
    check_triplane("triplane", positions, planes, scenes, degree)
    check_transforms("triplane", positions, planes)
    return _forward(positions, planes, scenes, int(degree))


def triplane_position_gradient(
    grad_output: Tensor, positions: Tensor, planes: Tensor, scenes: Tensor | None = None, degree: int = 1
) -> Tensor:
    """The gradient of ``sum(grad_output * triplane(positions, ...))`` by the positions, itself differentiable.

    This is what `torch.autograd.grad(..., create_graph=True)` computes, without a graph of the encoding: normals take
    grad_output from a hand-derived backward of the network behind the encoding and call this.

    Args:
        grad_output: ``[n_samples, 3 * n_features]``, same dtype as positions.
        positions, planes, scenes, degree: as in `triplane`.

    Returns:
        ``[n_samples, 3]``, differentiable once to grad_output, positions and planes, in a pass that recomputes the
        interpolation: nothing but the arguments is held for it.

    Raises:
        TypeError, ValueError, RuntimeError: as `triplane`.
    """
    op = "triplane_position_gradient"
    check_triplane(op, positions, planes, scenes, degree)
    shape = [positions.shape[0], PLANES * planes.shape[4]]
    check_tensor(op, "grad_output", grad_output, shape, like=positions, same_dtype=True)
    check_transforms(op, grad_output, positions, planes)
    return _backward_positions(grad_output, positions, planes, scenes, int(degree))


def check_triplane(op: str, positions: Tensor, planes: Tensor, scenes: Tensor | None, degree: int) -> None:
    """The checks that the functions share."""
    check_tensor(op, "positions", positions, ["n_samples", 3])
    check_tensor(op, "planes", planes, SHAPE, like=positions, same_dtype=True)
    if scenes is not None:
        check_tensor(op, "scenes", scenes, [positions.shape[0]], dtypes=INTEGERS, like=positions)
    check_degree(op, degree)
    check_sides(op, planes.shape, degree)


def check_degree(op: str, degree: int) -> None:
    """Raises TypeError or ValueError unless it is one of B-splines that there are."""
    check_number(op, "degree", degree, "1 or 2", lambda number: number in (1, 2), whole=True)


def check_sides(op: str, shape: Sequence[int], degree: int, name: str = "planes") -> None:
    """Raises ValueError unless planes of this shape have a cell each way, features, and a scene."""
    n_scenes, height, width, n_features = shape[0], *shape[2:]
    sides_fit = degree < min(height, width) and max(height, width) <= MAX_SIDE
    if n_scenes < 1 or not sides_fit or not 1 <= n_features <= MAX_FEATURES:
        raise ValueError(
            f"{op}: {name} must have at least one scene, {degree + 1} to 2^14 vertices a side and 1 to 2^12 features, "
            f"got {list(shape)}"
        )


def check_scenes(scenes: Tensor | None, n_scenes: int) -> None:
    """On the CPU alone, and inside the ops, where tensors have values."""
    if scenes is None or scenes.device.type != "cpu" or scenes.numel() == 0:
        return
    low, high = int(scenes.min()), int(scenes.max())
    if low < 0 or high >= n_scenes:
        raise ValueError(f"triplane: scenes must lie in [0, {n_scenes - 1}], got {low if low < 0 else high}")


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and aligned for the widest loads, which a view into a buffer need not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def shape_arguments(scenes: Tensor | None, n_samples: int, shape: Sequence[int], degree: int) -> tuple[int, ...]:
    """The first argument of every native function; scenes are int32 and contiguous."""
    n_scenes, height, width, n_features = shape[0], *shape[2:]
    return pointer(scenes), n_scenes, n_samples, height, width, n_features, degree


def _narrow(scenes: Tensor | None, n_scenes: int) -> Tensor | None:
    """As the native core reads them. To be kept until it has been called."""
    if scenes is None:
        return None
    check_scenes(scenes, n_scenes)
    if scenes.dtype == torch.int64:  # not so that a large number becomes one of a scene
        scenes = scenes.clamp(-1, n_scenes)
    return scenes.to(torch.int32).contiguous()


@torch.library.custom_op("dreamfusion_fast::triplane", mutates_args=())
def _forward(positions: Tensor, planes: Tensor, scenes: Tensor | None, degree: int) -> Tensor:
    scenes = _narrow(scenes, planes.shape[0])
    positions, planes = positions.contiguous(), _aligned(planes)
    output = positions.new_empty(positions.shape[0], PLANES * planes.shape[4])
    shape = shape_arguments(scenes, positions.shape[0], planes.shape, degree)
    call("triplane_encode", positions, shape, 0, pointer(positions), pointer(planes), pointer(output))
    return output


@_forward.register_fake
def _(positions: Tensor, planes: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(positions.shape[0], PLANES * planes.shape[4])


@torch.library.custom_op("dreamfusion_fast::triplane_backward_planes", mutates_args=())
def _backward_planes(
    grad_output: Tensor, positions: Tensor, shape: Sequence[int], scenes: Tensor | None, degree: int
) -> Tensor:
    scenes = _narrow(scenes, shape[0])
    positions, grad_output = positions.contiguous(), _aligned(grad_output)
    grad_planes = positions.new_zeros(list(shape))
    tensors = (pointer(grad_output), pointer(positions), pointer(grad_planes))
    arguments = shape_arguments(scenes, positions.shape[0], shape, degree)
    call("triplane_planes_gradient", positions, arguments, 0, *tensors)
    return grad_planes


@_backward_planes.register_fake
def _(grad_output: Tensor, positions: Tensor, shape: Sequence[int], *_: Any) -> Tensor:
    return positions.new_empty(list(shape))


@torch.library.custom_op("dreamfusion_fast::triplane_backward_positions", mutates_args=())
def _backward_positions(
    grad_output: Tensor, positions: Tensor, planes: Tensor, scenes: Tensor | None, degree: int
) -> Tensor:
    scenes = _narrow(scenes, planes.shape[0])
    positions, planes, grad_output = positions.contiguous(), _aligned(planes), _aligned(grad_output)
    grad_positions = positions.new_empty(positions.shape)
    tensors = (pointer(grad_output), pointer(positions), pointer(planes), pointer(grad_positions))
    shape = shape_arguments(scenes, positions.shape[0], planes.shape, degree)
    call("triplane_position_gradient", positions, shape, 0, *tensors)
    return grad_positions


@_backward_positions.register_fake
def _(grad_output: Tensor, positions: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(positions.shape)


@torch.library.custom_op("dreamfusion_fast::triplane_backward_backward", mutates_args=())
def _backward_backward(
    direction: Tensor,
    grad_output: Tensor,
    positions: Tensor,
    planes: Tensor,
    scenes: Tensor | None,
    degree: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(direction * _backward_positions(...))``; empty where `needs` says that one is not needed."""
    scenes = _narrow(scenes, planes.shape[0])
    direction, positions = direction.contiguous(), positions.contiguous()
    grad_output, planes = _aligned(grad_output), _aligned(planes)
    to_output, to_planes, to_positions = _empty_where_not(needs, grad_output, planes, positions)
    to_planes.zero_()
    shape = shape_arguments(scenes, positions.shape[0], planes.shape, degree)
    d, g, p, w = pointer(direction), pointer(grad_output), pointer(positions), pointer(planes)
    if needs[0]:
        call("triplane_encode", positions, shape, d, p, w, pointer(to_output))
    if needs[1]:
        call("triplane_planes_gradient", positions, shape, d, g, p, pointer(to_planes))
    if needs[2]:
        call("triplane_position_gradient", positions, shape, d, g, p, w, pointer(to_positions))
    return to_output, to_planes, to_positions


def _empty_where_not(needs: Sequence[bool], *like: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(like, needs, strict=True))


@_backward_backward.register_fake
def _(direction: Tensor, *tensors_and_needs: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, positions, planes, *_, needs = tensors_and_needs
    to_output, to_planes, to_positions = _empty_where_not(needs, grad_output, planes, positions)
    return to_output, to_planes, to_positions


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    positions, planes, scenes, ctx.degree = inputs
    # The encoding is linear in the planes: their own gradient does not need them, and need not keep them alive.
    kept = planes if ctx.needs_input_grad[0] else None
    ctx.shape = list(planes.shape)
    ctx.save_for_backward(positions, kept, scenes)


def _forward_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    positions, planes, scenes = ctx.saved_tensors
    to_positions = to_planes = None
    if ctx.needs_input_grad[0]:
        to_positions = _backward_positions(grad_output, positions, planes, scenes, ctx.degree)
    if ctx.needs_input_grad[1]:
        to_planes = _backward_planes(grad_output, positions, ctx.shape, scenes, ctx.degree)
    return to_positions, to_planes, None, None


_forward.register_autograd(_forward_backward, setup_context=_save_forward)


def _save_backward_planes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, positions, _, scenes, ctx.degree = inputs
    ctx.save_for_backward(grad_output, positions, scenes)


def _backward_planes_backward(ctx: Any, grad_planes: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient to the planes is the transpose of the encoding, so that its own backward is the encoding again."""
    grad_output, positions, scenes = ctx.saved_tensors
    to_output = to_positions = None
    if ctx.needs_input_grad[0]:
        to_output = _forward(positions, grad_planes, scenes, ctx.degree)
    if ctx.needs_input_grad[1]:
        to_positions = _backward_positions(grad_output, positions, grad_planes, scenes, ctx.degree)
    return to_output, to_positions, None, None, None


_backward_planes.register_autograd(_backward_planes_backward, setup_context=_save_backward_planes)


def _save_backward_positions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.degree = inputs
    ctx.save_for_backward(*tensors)


def _backward_positions_backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    wanted = [needs[0], needs[2], needs[1]]
    to_output, to_planes, to_positions = _backward_backward(direction, *ctx.saved_tensors, ctx.degree, wanted)
    chosen = (x if need else None for x, need in zip((to_output, to_positions, to_planes), needs, strict=True))
    return *chosen, None, None


_backward_positions.register_autograd(_backward_positions_backward, setup_context=_save_backward_positions)


def triplane_reference(positions: Tensor, planes: Tensor, scenes: Tensor | None = None, degree: int = 1) -> Tensor:
    """The PyTorch twin of `triplane`: any float dtype, any device, differentiable any number of times."""
    n_scenes, height, width, n_features = planes.shape[0], *planes.shape[2:]
    scene = torch.zeros_like(positions[:, 0], dtype=torch.int64) if scenes is None else scenes.long()
    features = []
    for plane, axes in enumerate(PLANE_AXES):
        flat = planes[:, plane].reshape(n_scenes * height * width, n_features)
        (column, across), (row, down) = (
            _weighted(positions[:, axis], side, degree) for axis, side in zip(axes, (width, height), strict=True)
        )
        encoded = planes.new_zeros(positions.shape[0], n_features)
        for j in range(degree + 1):
            for i in range(degree + 1):
                texels = (scene * height + row + j) * width + column + i
                encoded = encoded + (across[i] * down[j]).unsqueeze(1) * flat[texels]
        features.append(encoded)
    return torch.cat(features, 1)


def _weighted(positions: Tensor, vertices: int, degree: int) -> tuple[Tensor, list[Tensor]]:
    """The cells of positions ``[n]`` along an axis, int64, and the weights of the vertices from there on."""
    cells = vertices - degree
    # Not clamp alone, which cuts off the gradient of a NaN.
    scaled = torch.where(positions.isnan(), positions, positions.clamp(0, 1)) * cells
    cell = scaled.detach().floor().clamp(max=cells - 1).nan_to_num()
    u = scaled - cell
    if degree == 1:
        return cell.long(), [1 - u, u]
    return cell.long(), [(1 - u) * (1 - u) / 2, 0.5 + u * (1 - u), u * u / 2]


def triplane_position_gradient_reference(grad_output: Tensor, positions: Tensor, *planes: Any) -> Tensor:
    """The PyTorch twin of `triplane_position_gradient`: differentiable any number of times."""
    if torch._C._are_functorch_transforms_active():  # of which autograd's own functions take no part
        return torch.func.vjp(lambda positions: triplane_reference(positions, *planes), positions)[1](grad_output)[0]
    keep_graph = torch.is_grad_enabled()
    # Not by torch.func, which refuses saved tensor hooks of the caller.
    with differentiable(positions) as points:
        features = triplane_reference(points, *planes)
        (gradient,) = torch.autograd.grad(features, points, grad_output, create_graph=keep_graph)
    return gradient
