"""The triplane of `triplane` over one tile of samples, in place: what a renderer that streams samples is made of.

The functions, their arguments and the types that these may have are those of `ops.tiles.hash_grid`, so that a renderer
takes either. In place of its table are the planes ``[n_scenes, 3, height, width, n_features]``, float16 on a GPU if the
caller wants half the traffic, and the encoding has 3 * n_features channels.

Source: Chan et al. 2022, "Efficient Geometry-aware 3D Generative Adversarial Networks", section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_tensor
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.tiles.buffers import (
    ELEMENT_TYPES,
    array,
    check_channels,
    check_positions,
    check_table_layout,
    check_vectors,
    live,
    on_gpu,
    rows,
    table_dtypes,
    write_back,
)
from dreamfusion_fast.ops.tiles.twins import (
    derivative_before_scatter_reference,
    directional_derivative_reference,
    encode_reference,
    position_gradient_reference,
    scatter_reference,
)
from dreamfusion_fast.ops.triplane import (
    PLANES,
    SHAPE,
    check_degree,
    check_scenes,
    check_sides,
    shape_arguments,
    triplane_reference,
)

__all__ = [
    "TriplaneTileLayout",
    "derivative_before_scatter",
    "derivative_before_scatter_reference",
    "directional_derivative",
    "directional_derivative_reference",
    "encode",
    "encode_reference",
    "position_gradient",
    "position_gradient_reference",
    "scatter",
    "scatter_reference",
]

# Successive samples that one thread of `scatter` takes, a multiple of 4: atomics are spent once for each cell that it
# meets on its way along a ray. As for the hash grid's finer levels.
SAMPLES_PER_THREAD = 16

_CHANNELS = "3 * n_features"


@dataclass(frozen=True, eq=False)
class TriplaneTileLayout:
    """How planes are read.

    Attributes:
        degree: as in `triplane`.
        scenes: ``[n_samples]`` int32, contiguous, on the samples' device, or None: all are of the first scene.
    """

    degree: int = 1
    scenes: Tensor | None = None

    def __post_init__(self) -> None:
        op = "TriplaneTileLayout"
        check_degree(op, self.degree)
        if self.scenes is not None:
            check_tensor(op, "scenes", self.scenes, ["n_samples"], dtypes=[torch.int32])
            if not self.scenes.is_contiguous():
                raise ValueError(f"{op}: scenes must be contiguous")

    def encoding(self, planes: Tensor, n: int) -> Callable[[Tensor], Tensor]:
        """The twin of the encoding of `n` samples, as a function of their positions."""
        scenes = None if self.scenes is None else self.scenes[:n]
        return lambda p: triplane_reference(p, planes.to(p.dtype), scenes, self.degree)


def encode(
    positions: Tensor,
    planes: Tensor,
    layout: TriplaneTileLayout,
    features: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Writes the encoding of each position.

    Args:
        positions: ``[n_samples, 3]``, clamped to [0, 1]; NaN gives NaN in its planes. At most 2^24 samples.
        planes: ``[n_scenes, 3, height, width, n_features]``, contiguous; on a GPU aligned to 16 bytes.
        layout: the degree, and the samples' scenes.
        features: ``[n_samples, at least 3 * n_features]``, out: the features of the planes, one after another.
        count: ``[1]`` int32: samples from this one on are left alone; None: all are meant.
        checked: the caller has passed these very shapes, types and layouts before, and saves the time to check them.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or layout. A scene that there is not is
            found on the CPU only; on a GPU its features are NaN.
        RuntimeError: the native core for this device was not built.
    """
    if not checked:
        op = "triplane_tile.encode"
        _check(op, positions, planes, layout, count)
        check_channels(op, "features", features, positions, _channels(planes), _CHANNELS)
    run = _encode_on_gpu if on_gpu(positions) else _encode_on_cpu
    run(None, positions, planes, layout, features, count)


def directional_derivative(
    direction: Tensor,
    positions: Tensor,
    planes: Tensor,
    layout: TriplaneTileLayout,
    derivative: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Writes J d, the directional derivative of the encoding.

    It is the gradient of ``d . position_gradient(g, ...)`` by g.

    Args:
        direction: ``[n_samples, 3]``, of the positions' dtype. No component counts where the position was clamped.
        positions, planes, layout, count, checked: as in `encode`.
        derivative: ``[n_samples, at least 3 * n_features]``, out.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`.
    """
    if not checked:
        op = "triplane_tile.directional_derivative"
        _check(op, positions, planes, layout, count)
        check_vectors(op, "direction", direction, positions)
        check_channels(op, "derivative", derivative, positions, _channels(planes), _CHANNELS)
    run = _encode_on_gpu if on_gpu(positions) else _encode_on_cpu
    run(direction, positions, planes, layout, derivative, count)


def derivative_before_scatter(
    direction: Tensor,
    grad_of_features: Tensor,
    grad_planes: Tensor,
    positions: Tensor,
    planes: Tensor,
    layout: TriplaneTileLayout,
    derivative: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """`directional_derivative`, and what comes cheaper with it of the second-order `scatter` that is to follow.

    On a CPU that is all of it, on a GPU nothing, since there `scatter` takes both orders in one pass.

    Args:
        direction, positions, planes, layout, derivative, count, checked: as in `directional_derivative`.
        grad_of_features, grad_planes: as in `scatter`.

    Returns:
        The direction and grad_of_features that `scatter` still has to be given.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`.
    """
    if not checked:
        _check_scatter(grad_planes, positions, layout, derivative, count, direction, grad_of_features)
    directional_derivative(direction, positions, planes, layout, derivative, count, checked)
    if on_gpu(positions):
        return direction, grad_of_features
    _scatter_on_cpu(direction, grad_of_features, grad_planes, positions, layout, count)
    return None, None


def position_gradient(
    grad_features: Tensor,
    positions: Tensor,
    planes: Tensor,
    layout: TriplaneTileLayout,
    gradient: Tensor,
    count: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Writes J^T g, the gradient of ``g . encoding`` by the position. The sum over planes has a fixed order.

    Args:
        grad_features: g, ``[n_samples, at least 3 * n_features]``.
        positions, planes, layout, count, checked: as in `encode`.
        gradient: ``[n_samples, 3]``, of the positions' dtype, out. Zero where a position was clamped.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`. A scene that there is not gives zeros on a GPU.
    """
    if not checked:
        op = "triplane_tile.position_gradient"
        _check(op, positions, planes, layout, count)
        check_channels(op, "grad_features", grad_features, positions, _channels(planes), _CHANNELS)
        check_vectors(op, "gradient", gradient, positions)
    if not on_gpu(positions):
        n = live(positions, count)
        p, g, out = rows(positions, n, 3), rows(grad_features, n, _channels(planes)), rows(gradient, n, 3)
        shape = shape_arguments(layout.scenes, n, planes.shape, layout.degree)
        call("triplane_position_gradient", p, shape, 0, pointer(g), pointer(p), pointer(planes), pointer(out))
        write_back(out, gradient)
        return
    tile = _tile(positions, layout, count, planes)
    arrays = (pointer(planes), ELEMENT_TYPES[planes.dtype], array(grad_features), array(gradient))
    call("triplane_tile_position_gradient", positions, tile, *arrays)


def scatter(
    grad_planes: Tensor,
    positions: Tensor,
    layout: TriplaneTileLayout,
    grad_features: Tensor,
    count: Tensor | None = None,
    direction: Tensor | None = None,
    grad_of_features: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Adds the planes' gradient of ``grad_features . E + grad_of_features . (J direction)``, in one pass.

    The second term is the planes' share of the backward of `position_gradient`: grad_of_features is what that function
    was given, direction the gradient of what it wrote. On a GPU a sample whose gradients are all zero costs nothing and
    adds nothing, not even NaN where its position is NaN; the order of the sums is not fixed.

    Args:
        grad_planes: ``[n_scenes, 3, height, width, n_features]``, float32 (float64 if the positions are), contiguous,
            added to; on a GPU aligned to 16 bytes.
        positions, layout, count, checked: as in `encode`.
        grad_features: ``[n_samples, at least 3 * n_features]``.
        direction: ``[n_samples, 3]``, of the positions' dtype.
        grad_of_features: ``[n_samples, at least 3 * n_features]``; with direction, or neither.

    Raises:
        TypeError, ValueError, RuntimeError: as `encode`. A scene that there is not adds nothing on a GPU.
    """
    if not checked:
        _check_scatter(grad_planes, positions, layout, grad_features, count, direction, grad_of_features)
    if not on_gpu(positions):
        _scatter_on_cpu(None, grad_features, grad_planes, positions, layout, count)
        if direction is not None and grad_of_features is not None:
            _scatter_on_cpu(direction, grad_of_features, grad_planes, positions, layout, count)
        return
    tile = _tile(positions, layout, count, grad_planes)
    arrays = (array(grad_features), array(direction), array(grad_of_features), pointer(grad_planes))
    call("triplane_tile_scatter", positions, tile, *arrays, SAMPLES_PER_THREAD)


def _check_scatter(
    grad_planes: Tensor,
    positions: Tensor,
    layout: TriplaneTileLayout,
    grad_features: Tensor,
    count: Tensor | None,
    direction: Tensor | None,
    grad_of_features: Tensor | None,
) -> None:
    op = "triplane_tile.scatter"
    _check(op, positions, grad_planes, layout, count, "grad_planes", [positions.dtype])
    channels = _channels(grad_planes)
    check_channels(op, "grad_features", grad_features, positions, channels, _CHANNELS)
    if (direction is None) != (grad_of_features is None):
        raise ValueError(f"{op}: direction and grad_of_features go together")
    if direction is not None and grad_of_features is not None:
        check_vectors(op, "direction", direction, positions)
        check_channels(op, "grad_of_features", grad_of_features, positions, channels, _CHANNELS)


def _check(
    op: str,
    positions: Tensor,
    planes: Tensor,
    layout: TriplaneTileLayout,
    count: Tensor | None,
    name: str = "planes",
    dtypes: list[torch.dtype] | None = None,
) -> None:
    """The checks that the functions share; `planes` are the planes or their gradient."""
    check_positions(op, positions, count)
    if dtypes is None:
        dtypes = table_dtypes(positions)
    check_tensor(op, name, planes, SHAPE, dtypes=dtypes, like=positions)
    check_sides(op, planes.shape, layout.degree, name)
    check_table_layout(op, name, planes)
    if layout.scenes is not None:
        check_tensor(op, "scenes", layout.scenes, [positions.shape[0]], dtypes=[torch.int32], like=positions)
        check_scenes(layout.scenes[: live(positions, count)] if not on_gpu(positions) else None, planes.shape[0])


def _channels(planes: Tensor) -> int:
    return PLANES * planes.shape[4]


def _tile(
    positions: Tensor, layout: TriplaneTileLayout, count: Tensor | None, planes: Tensor
) -> tuple[int | tuple[int, ...], ...]:
    """The first argument of every native function of tiles."""
    shape = shape_arguments(layout.scenes, positions.shape[0], planes.shape, layout.degree)
    return shape, pointer(count), array(positions)


def _encode_on_gpu(
    direction: Tensor | None,
    positions: Tensor,
    planes: Tensor,
    layout: TriplaneTileLayout,
    output: Tensor,
    count: Tensor | None,
) -> None:
    tile = _tile(positions, layout, count, planes)
    arrays = (pointer(planes), ELEMENT_TYPES[planes.dtype], array(direction), array(output))
    call("triplane_tile_encode", positions, tile, *arrays)


def _encode_on_cpu(
    direction: Tensor | None,
    positions: Tensor,
    planes: Tensor,
    layout: TriplaneTileLayout,
    output: Tensor,
    count: Tensor | None,
) -> None:
    n = live(positions, count)
    p, out = rows(positions, n, 3), rows(output, n, _channels(planes))
    d = None if direction is None else rows(direction, n, 3)
    shape = shape_arguments(layout.scenes, n, planes.shape, layout.degree)
    call("triplane_encode", p, shape, pointer(d), pointer(p), pointer(planes), pointer(out))
    write_back(out, output)


def _scatter_on_cpu(
    direction: Tensor | None,
    grad: Tensor,
    grad_planes: Tensor,
    positions: Tensor,
    layout: TriplaneTileLayout,
    count: Tensor | None,
) -> None:
    n = live(positions, count)
    p, g = rows(positions, n, 3), rows(grad, n, _channels(grad_planes))
    d = None if direction is None else rows(direction, n, 3)
    shape = shape_arguments(layout.scenes, n, grad_planes.shape, layout.degree)
    call("triplane_planes_gradient", p, shape, pointer(d), pointer(g), pointer(p), pointer(grad_planes))
