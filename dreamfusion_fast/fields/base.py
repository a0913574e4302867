"""The field interface: density and colour as functions of position.

The renderer needs no particular class. Any callable that maps positions `[m, 3]` to `(density [m], colour [m, 3])` will
do; :func:`evaluate` and :func:`query_density` hide the differences. :class:`Field` is the base of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import lru_cache
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.ops.hash_grid import differentiable
from dreamfusion_fast.ops.sample_head import safe_normalize

Backend = Literal["native", "reference"]
BACKENDS: tuple[Backend, ...] = ("native", "reference")

UNIT_BOX = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)

# Below SHORTEST_SLOPE and this a gradient has no meaningful direction. Density logits change by 1 to 100 per scene
# unit: 1e-4 is far below anything that shapes a surface, and 1 / 1e-4 bounds how much normalising can amplify a
# gradient. A density itself may be tiny, and its gradient with it; but so is the sample's weight. 1e-15 squared is
# still a normal float32.
_SHORTEST_DENSITY_GRADIENT = 1e-15


class FieldOutput(NamedTuple):
    """A field's answer for `m` positions."""

    density: Tensor  # [m], per scene unit, >= 0
    albedo: Tensor  # [m, 3] in [0, 1]
    normal: Tensor | None = None  # [m, 3], unit length (zero where the density is flat)


# positions [m, 3] -> FieldOutput or (density [m], colour [m, 3])
FieldLike = Callable[..., Any]


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "native" or "reference"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, want one of {', '.join(BACKENDS)}")


def check_positions(positions: Tensor) -> None:
    """Raise TypeError or ValueError unless `positions` is a floating-point tensor `[m, 3]`."""
    if not isinstance(positions, Tensor) or not positions.is_floating_point():
        given = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions: got {given}, want a floating-point tensor [m, 3]")
    if positions.dim() != 2 or positions.shape[1] != 3:
        raise ValueError(f"positions: got shape {list(positions.shape)}, want [m, 3]")


def box_tensor(aabb: Tensor | tuple[float, ...] | None) -> Tensor:
    """Check a scene box and return it as a float32 tensor `[6]` = (xmin, ymin, zmin, xmax, ymax, zmax).

    `None` is the unit box [-1, 1]^3. Raises ValueError for a wrong shape, an empty or an infinite box.
    """
    box = torch.as_tensor(UNIT_BOX if aabb is None else aabb, dtype=torch.float32).detach().clone()
    if box.shape != (6,):
        raise ValueError(f"aabb: got shape {list(box.shape)}, want [6] = (xmin, ymin, zmin, xmax, ymax, zmax)")
    if not bool(box.isfinite().all() & (box[3:] > box[:3]).all()):
        raise ValueError(f"aabb: got {box.tolist()}, want finite numbers, every maximum above its minimum")
    return box


class Field(nn.Module):
    """Base of the package's fields: a scene box, density and albedo.

    Attributes:
        aabb: `[6]` buffer, the scene box; the density outside it is 0.
    """

    aabb: Tensor

    def __init__(self, aabb: Tensor | tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.register_buffer("aabb", box_tensor(aabb))

    def forward(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        """Density, albedo and, if asked for, unit normals at `positions` `[m, 3]` (scene units)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`; cheaper than `forward` where colour is not needed."""
        return self.forward(positions).density

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by the kind of learning rate that they take; `OptimConfig` has one for each kind."""
        return {"mlp": list(self.parameters())}

    def tile_source(self) -> TileSource | None:
        """The field as kernels read it, which then stand in for a call, or None: it is called.

        It says what `forward` and `density` do. The renderer does not ask it of a subclass that overrides these, or
        anything else but :meth:`parameter_groups` and `__init__`, and not of a field with hooks
        (:func:`tile_source_of`).
        """
        return None


def evaluate(field: FieldLike, positions: Tensor, with_normal: bool = False) -> FieldOutput:
    """Evaluate any field-like callable.

    A :class:`Field` computes its own normals. For everything else they are -grad(density) / |grad(density)| by
    autograd, with a graph through them when gradients are enabled, so that losses on lit colours are exact.

    Args:
        field: a :class:`Field`, or a callable returning `(density [m], colour [m, 3])`.
        positions: `[m, 3]`.
        with_normal: whether to compute normals.

    Raises:
        ValueError: the callable returned something else, or no graph from the positions to the density where normals
            need it: one computed under `torch.no_grad`, or of a constant.
    """
    if isinstance(field, Field):
        own = _checked(field(positions, with_normal=with_normal), positions)
        if with_normal and own.normal is None:
            raise ValueError(f"field: {type(field).__name__} returned no normal, want one where with_normal is True")
        return own
    if not with_normal:
        return _checked(field(positions), positions)
    keep_graph = torch.is_grad_enabled()
    with differentiable(positions) as points:
        output = _checked(field(points), points)
        normal = output.normal
        if normal is None:
            normal = _normal_from(output.density, points, keep_graph)
    if keep_graph:
        return FieldOutput(output.density, output.albedo, normal)
    return FieldOutput(output.density.detach(), output.albedo.detach(), normal.detach())


def query_density(field: FieldLike, positions: Tensor) -> Tensor:
    """Density `[m]` of any field-like callable, through the `density` method of its class if that speaks for a call.

    An attribute of an instance is no such method, whatever its name, and neither is a method of a class whose forward
    (or `__call__`) a subclass overrides: then the field is called, as for a render.

    Raises:
        ValueError: a subclass overrides such a method, but not the forward that it speaks for; or the callable returned
            something else than density and colour.
    """
    if speaks_for_call(field):
        return field.density(positions).to(positions.dtype)  # type: ignore[attr-defined]
    return _checked(field(positions), positions).density


def speaks_for_call(field: FieldLike) -> bool:
    """Whether the density that a call of `field` returns is that of a `density` method, as :func:`query_density` asks.

    Raises:
        ValueError: a subclass overrides the method, but not the forward that it speaks for.
    """
    classes = type(field).__mro__
    densities = [i for i, cls in enumerate(classes) if "density" in vars(cls)]
    call = next(i for i, cls in enumerate(classes) if "forward" in vars(cls) or "__call__" in vars(cls))
    if not densities or densities[0] > call or not isinstance(vars(classes[densities[0]])["density"], FunctionType):
        return False
    if densities[0] < call and call in densities:
        raise ValueError(
            f"field: {classes[densities[0]].__name__} overrides density of {classes[call].__name__} but not forward, "
            "which renders ask: want both, or neither"
        )
    return is_as_declared(field, {"density"})


def tile_source_of(field: FieldLike) -> TileSource | None:
    """The source of a field that has one, as long as nothing overrides what the source's class says of a call."""
    if not isinstance(field, Field):
        return None
    classes = type(field).__mro__
    owner = next(i for i, cls in enumerate(classes) if "tile_source" in vars(cls))
    asked = _asked_of(classes[owner])
    overridden = any(not asked.isdisjoint(vars(cls)) for cls in classes[:owner])
    return field.tile_source() if not overridden and is_as_declared(field, asked) else None


@lru_cache
def _asked_of(cls: type) -> frozenset[str]:
    """The methods and properties of a class of fields that decide what a call returns."""
    names = {"__call__"}
    for base in cls.__mro__[: cls.__mro__.index(Field) + 1]:
        names |= {name for name, value in vars(base).items() if isinstance(value, FunctionType | property)}
    return frozenset(names - {"__init__", "parameter_groups"})


def is_as_declared(field: FieldLike, names: Set[str]) -> bool:
    """Whether a call of `field` is one of what its class declares, as far as forward and the methods `names` go: there
    are no hooks, and no attributes of the instance in their place."""
    if isinstance(field, nn.Module) and (
        field._forward_hooks or field._forward_pre_hooks or field._backward_hooks or field._backward_pre_hooks
    ):
        return False
    return getattr(field, "__dict__", {}).keys().isdisjoint({"forward", *names})


def _checked(output: Any, positions: Tensor) -> FieldOutput:
    if not isinstance(output, tuple) or len(output) < 2:
        raise ValueError(f"field: returned {type(output).__name__}, want FieldOutput or (density [m], colour [m, 3])")
    result = output if isinstance(output, FieldOutput) else FieldOutput(*output[:2])
    count = positions.shape[0]
    if result.density.shape != (count,) or result.albedo.shape != (count, 3):
        raise ValueError(
            f"field: returned density {list(result.density.shape)} and colour {list(result.albedo.shape)} for {count} "
            f"positions, want [{count}] and [{count}, 3]"
        )
    # A field under autocast may answer in 16 bits; compositing and positions keep theirs.
    return FieldOutput(result.density.to(positions.dtype), result.albedo.to(positions.dtype), result.normal)


def _normal_from(density: Tensor, positions: Tensor, keep_graph: bool) -> Tensor:
    """Unit normals -grad(density) / |grad(density)|, `[m, 3]`, zero where the density is flat."""
    gradient = None
    if density.requires_grad:
        (gradient,) = torch.autograd.grad(
            density.sum(), positions, create_graph=keep_graph, retain_graph=keep_graph, allow_unused=True
        )
    if gradient is None:
        # As for a flat density; but also for one that is computed without gradients, and then zeros would be wrong.
        raise ValueError(
            "field: its density has no graph to the positions, and normals are its gradient: want one without no_grad, "
            "detach or comparisons on the way, or with 0 * positions.sum(dim=1) added if it is flat, or a field that "
            "returns normals"
        )
    return -safe_normalize(gradient, _SHORTEST_DENSITY_GRADIENT)
