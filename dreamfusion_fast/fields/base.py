"""The field interface: density, or the opacity of samples, and colour.

The renderer needs no particular class. Any callable that maps positions `[m, 3]` to `(density [m], colour [m, 3])` will
do, and one that asks for more by `needs` is called with :class:`FieldSamples`; :func:`evaluate` and
:func:`query_density` hide the differences. :class:`Field` is the base of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.samples import FieldSamples, needs_of, takes_samples
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


@dataclass(frozen=True, eq=False)
class FieldOutput:
    """A field's answer for `m` samples.

    Attributes:
        density: `[m]` or `[m, 1]`, per scene unit, >= 0; None with `alpha`.
        color: `[m, 3]`; of what is lit, the albedo in [0, 1].
        normal: `[m, 3]`, unit length (zero where the density is flat), or None.
        alpha: `[m]` or `[m, 1]` in [0, 1], the opacity of each sample, in place of a density: surfaces given by signed
            distances make it of both ends of a sample (`neus_alpha`).
        channels: whatever else is to be composited: `[m]` or `[m, c]` by name, any number of them.

    Raises:
        ValueError: neither density nor alpha, or both; no colour.
    """

    density: Tensor | None = None
    color: Tensor = None  # type: ignore[assignment]  # asked for below, as a density may be left out before it
    normal: Tensor | None = None
    _: KW_ONLY
    alpha: Tensor | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.density is None) == (self.alpha is None):
            given = "neither density nor alpha" if self.density is None else "density and alpha"
            raise ValueError(f"FieldOutput: got {given}, want one of them")
        if self.color is None:
            raise ValueError("FieldOutput.color: got None, want a tensor [m, 3]")


# FieldOutput or (density [m], colour [m, 3]) of positions [m, 3] or FieldSamples
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
        needs: what a call is given of the samples (:func:`dreamfusion_fast.fields.samples.needs_of`).
    """

    aabb: Tensor
    needs: tuple[str, ...] = ("positions",)

    def __init__(self, aabb: Tensor | tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.register_buffer("aabb", box_tensor(aabb))

    def forward(self, positions: Any, with_normal: bool = False) -> FieldOutput:
        """Density, albedo and, if asked for, unit normals at `positions` `[m, 3]` (scene units).

        A class whose `needs` name more gets :class:`FieldSamples` in their place.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`; cheaper than `forward` where colour is not needed."""
        return _density_of(self.forward(_asked(self, FieldSamples(positions))), positions)

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


def evaluate(field: FieldLike, samples: FieldSamples | Tensor, with_normal: bool = False) -> FieldOutput:
    """Evaluate any field-like callable.

    A :class:`Field` computes its own normals. For everything else they are -grad(density) / |grad(density)| by
    autograd, with a graph through them when gradients are enabled, so that losses on lit colours are exact. Only the
    position is moved for that gradient: directions and extras stay as they are.

    Args:
        field: a :class:`Field`, or a callable returning a :class:`FieldOutput` or `(density [m], colour [m, 3])`.
        samples: of `m` samples; positions `[m, 3]` alone do for a field that needs no more.
        with_normal: whether to compute normals.

    Returns:
        density or alpha `[m]`, colour and normal `[m, 3]`, channels `[m, c]`, all in the dtype of the positions.

    Raises:
        TypeError: the callable returned what are no tensors.
        ValueError: the callable returned something else, or no graph from the positions to the density where normals
            need it: one computed under `torch.no_grad`, or of a constant.
    """
    samples = samples if isinstance(samples, FieldSamples) else FieldSamples(samples)
    positions = samples.positions
    if isinstance(field, Field):
        own = _checked(field(_asked(field, samples), with_normal=with_normal), positions)
        if with_normal and own.normal is None:
            raise ValueError(f"field: {type(field).__name__} returned no normal, want one where with_normal is True")
        return own
    if not with_normal:
        return _checked(field(_asked(field, samples)), positions)
    keep_graph = torch.is_grad_enabled()
    with differentiable(positions) as points:
        output = _checked(field(_asked(field, samples.at(points))), points)
        if output.normal is None:
            if output.density is None:
                raise ValueError("field: returned alpha and no normal, want one where normals are asked for")
            output = replace(output, normal=_normal_from(output.density, points, keep_graph))
    return output if keep_graph else _detached(output)


def query_density(field: FieldLike, positions: Tensor) -> Tensor:
    """Density `[m]` of any field-like callable, through the `density` method of its class if that speaks for a call.

    An attribute of an instance is no such method, whatever its name, and neither is a method of a class whose forward
    (or `__call__`) a subclass overrides: then the field is called, as for a render. One that asks for more than
    positions is called with these alone.

    Raises:
        ValueError: a subclass overrides such a method, but not the forward that it speaks for; or the callable returned
            no density, or reads what only samples on rays have.
    """
    if speaks_for_call(field):
        density = field.density(positions)  # type: ignore[attr-defined]
        return _per_sample(density, "density", positions)
    return _density_of(field(_asked(field, FieldSamples(positions))), positions)


def _density_of(output: Any, positions: Tensor) -> Tensor:
    density = _checked(output, positions).density
    if density is None:
        raise ValueError(
            "field: returned alpha where the density at positions is asked for, as by an occupancy grid: want a method "
            "density(positions [m, 3]) -> [m]"
        )
    return density


def _asked(field: FieldLike, samples: FieldSamples) -> FieldSamples | Tensor:
    """The argument of a call of the field: its samples, or their positions."""
    return samples if takes_samples(field) else samples.positions


def _detached(output: FieldOutput) -> FieldOutput:
    def detached(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()

    return FieldOutput(
        detached(output.density),
        output.color.detach(),
        detached(output.normal),
        alpha=detached(output.alpha),
        channels={name: value.detach() for name, value in output.channels.items()},
    )


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
    if overridden or not is_as_declared(field, asked):
        return None
    source = field.tile_source()
    # Kernels know of a sample its position, and at most of which scene it is.
    known = {"positions"} if source is None or source.scene is None else {"positions", source.scene}
    return source if known.issuperset(needs_of(field)) else None


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
    """The answer of a field in one form. Under autocast it may come in 16 bits; compositing keeps its own."""
    if not isinstance(output, FieldOutput):
        if not isinstance(output, tuple):
            raise ValueError(f"field: returned {type(output).__name__}, want FieldOutput or (density, colour)")
        if len(output) != 2:
            raise ValueError(
                f"field: returned a tuple of {len(output)}, want (density [m], colour [m, 3]), or a FieldOutput, whose "
                "members say what they are"
            )
        output = FieldOutput(*output)
    density = None if output.density is None else _per_sample(output.density, "density", positions)
    alpha = None if output.alpha is None else _per_sample(output.alpha, "alpha", positions)
    count, dtype = positions.shape[0], positions.dtype
    for name, value in (("colour", output.color), ("normal", output.normal)):
        if value is not None and _is_tensor(name, value).shape != (count, 3):
            raise ValueError(f"field: returned {name} {list(value.shape)} for {count} positions, want [{count}, 3]")
    if not isinstance(output.channels, Mapping):
        raise TypeError(f"field: returned channels {type(output.channels).__name__}, want tensors by name")
    normal = None if output.normal is None else output.normal.to(dtype)
    channels = {}
    for name, value in output.channels.items():
        if _is_tensor(f"channels[{name!r}]", value).dim() not in (1, 2) or value.shape[0] != count:
            raise ValueError(
                f"field: returned channels[{name!r}] {list(value.shape)} for {count} positions, want [{count}, c]"
            )
        channels[name] = (value[:, None] if value.dim() == 1 else value).to(dtype)
    return FieldOutput(density, output.color.to(dtype), normal, alpha=alpha, channels=channels)


def _per_sample(value: Tensor, name: str, positions: Tensor) -> Tensor:
    """Density or alpha as `[m]` in the dtype of the positions."""
    count = positions.shape[0]
    if _is_tensor(name, value).shape not in ((count,), (count, 1)):
        raise ValueError(f"field: returned {name} {list(value.shape)} for {count} positions, want [{count}]")
    return value.reshape(count).to(positions.dtype)


def _is_tensor(name: str, value: Tensor) -> Tensor:
    """The value; raises TypeError unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"field: returned {name} {type(value).__name__}, want a tensor")
    return value


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
