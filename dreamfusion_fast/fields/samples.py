"""The samples at which a field is evaluated, and which of their properties it asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# What `needs` may name besides the extras of a render.
SAMPLE_NAMES = ("positions", "directions", "ray_indices", "t_starts", "t_ends")

_UNKNOWN = (
    "samples.{}: the field is asked at positions that lie on no rays, as by an occupancy grid or for a mesh: want a "
    "method density(positions [m, 3]) -> [m] that does without"
)


@dataclass(frozen=True, eq=False)
class FieldSamples:
    """Samples along rays, as a field is given them that asks for more than positions (:func:`needs_of`).

    What is per ray is spread over its samples when it is read, and not before: a field pays for what it uses.

    Attributes:
        positions: `[m, 3]`, scene units.
        ray_directions: `[n, 3]`, unit length, of the rays that the samples lie on, or None: see `directions`.
        rows: int32 or int64 `[m]`, rows of these rays, or None.
        bounds: `[m]` each, where along its ray a sample begins and ends, or None: see `t_starts` and `t_ends`.
        ray_extras: what the caller of a render gave per ray, `[n, ...]` each.
        first_ray: number of the first of these rays in the render.
    """

    positions: Tensor
    ray_directions: Tensor | None = None
    rows: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    ray_extras: Mapping[str, Tensor] | None = None
    first_ray: int = 0

    def __len__(self) -> int:
        return self.positions.shape[0]

    @cached_property
    def directions(self) -> Tensor:
        """Directions of the samples' rays, `[m, 3]`, unit length, away from the camera."""
        if self.ray_directions is None or self.rows is None:
            raise ValueError(_UNKNOWN.format("directions"))
        return self.ray_directions.index_select(0, self.rows)

    @cached_property
    def ray_indices(self) -> Tensor:
        """The samples' rays by their numbers in the render, as a flat list, int64 `[m]`."""
        if self.rows is None:
            raise ValueError(_UNKNOWN.format("ray_indices"))
        return self.rows.long() + self.first_ray

    @property
    def t_starts(self) -> Tensor:
        """Where along its ray each sample begins, `[m]`, scene units."""
        return self._bounds("t_starts")[0]

    @property
    def t_ends(self) -> Tensor:
        """Where along its ray each sample ends, `[m]`, scene units."""
        return self._bounds("t_ends")[1]

    @cached_property
    def extras(self) -> Mapping[str, Tensor]:
        """The extras that the caller of the render gave per ray, spread over the samples: `[m, ...]` each."""
        return _PerSample(self.ray_extras or {}, self.rows)

    def at(self, positions: Tensor) -> FieldSamples:
        """The same samples at other positions `[m, 3]`, such as ones with a graph of their own."""
        bounds = self.bounds
        if bounds is not None and not torch.is_inference_mode_enabled():
            # A graph may save no tensor of the inference mode that was left to make it.
            bounds = (_outside_inference(bounds[0]), _outside_inference(bounds[1]))
        return replace(self, positions=positions, bounds=bounds)

    def _bounds(self, name: str) -> tuple[Tensor, Tensor]:
        if self.bounds is None:
            raise ValueError(_UNKNOWN.format(name))
        return self.bounds


def _outside_inference(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


class _PerSample(Mapping[str, Tensor]):
    def __init__(self, per_ray: Mapping[str, Tensor], rows: Tensor | None) -> None:
        self._per_ray, self._rows = per_ray, rows
        self._spread: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._spread:
            if self._rows is None:
                raise ValueError(_UNKNOWN.format(f"extras[{name!r}]"))
            if name not in self._per_ray:
                given = ", ".join(sorted(self._per_ray)) or "none"
                raise KeyError(
                    f"extras: the field reads {name!r}, got {given}: want render(..., extras={{{name!r}: ...}})"
                )
            self._spread[name] = self._per_ray[name].index_select(0, self._rows)
        return self._spread[name]

    def __contains__(self, name: object) -> bool:
        return name in self._per_ray  # without a look at the value, which may be unknown here

    def __iter__(self) -> Iterator[str]:
        return iter(self._per_ray)

    def __len__(self) -> int:
        return len(self._per_ray)


def needs_of(field: Callable[..., Any]) -> tuple[str, ...]:
    """The properties of samples that a field asks for: its attribute `needs`, by default positions alone.

    A field whose `needs` name more is called with :class:`FieldSamples`, every other one with positions `[m, 3]`. Names
    other than `positions`, `directions`, `ray_indices`, `t_starts` and `t_ends` are extras, which each render has to
    be given.

    Raises:
        TypeError: `needs` is no sequence of names.
    """
    needs = getattr(field, "needs", ("positions",))
    if isinstance(needs, str) or not isinstance(needs, tuple | list) or not all(isinstance(n, str) for n in needs):
        raise TypeError(f"field.needs: got {needs!r}, want a tuple of names, such as ('positions', 'directions')")
    return tuple(needs)


def needed_extras(field: Callable[..., Any]) -> tuple[str, ...]:
    """The extras that each render of this field has to be given."""
    return tuple(name for name in needs_of(field) if name not in SAMPLE_NAMES)


def takes_samples(field: Callable[..., Any]) -> bool:
    """Whether the field is called with :class:`FieldSamples`."""
    return any(name != "positions" for name in needs_of(field))


def check_extras(
    field: Callable[..., Any], extras: Mapping[str, Tensor] | None, shape: Sequence[int]
) -> dict[str, Tensor]:
    """The extras of a render of rays of this leading shape, checked, as `[n_rays, ...]`.

    Raises:
        TypeError: extras that are no tensors by name.
        ValueError: one is missing that the field needs, there are any for a field that is given none, or one has
            another number of rows than there are rays.
    """
    if extras is not None and not isinstance(extras, Mapping):
        raise TypeError(f"extras: got {type(extras).__name__}, want tensors [n_rays, ...] by name")
    checked = dict(extras or {})
    if checked and not takes_samples(field):
        raise ValueError(
            f"extras: got {', '.join(sorted(checked))} for a field that is given positions alone, want a field with "
            "`needs` that name them"
        )
    for name in needed_extras(field):
        if name not in checked:
            given = ", ".join(sorted(checked)) or "none"
            raise ValueError(f"extras: got {given}, want {name!r}, which the field needs")
    for name, value in checked.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"extras[{name!r}]: got {type(value).__name__}, want a tensor [n_rays, ...]")
        if value.shape[: len(shape)] != tuple(shape):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"extras[{name!r}]: got shape {list(value.shape)}, want [{wanted}, ...], a row per ray")
        checked[name] = value.reshape(math.prod(shape), *value.shape[len(shape) :])
    return checked
