"""Rays: where they start, where they go, and between which distances they are looked along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import FLOATS

# Directions off unit length by more than this would visibly scale distances, and with them opacity.
_UNIT_TOLERANCE = 1e-3
SQUARED_TOLERANCE = 2 * _UNIT_TOLERANCE  # of the squared length
_HALVES = (torch.float16, torch.bfloat16)

# Of the leading dimensions: one index, or one for each of the first few.
Index = int | slice | EllipsisType | Tensor | tuple[int | slice | EllipsisType | Tensor, ...]


class InvalidRaysError(ValueError):
    """Rays that cannot be rendered: not finite, of zero length, not of unit length, or with a limit that is none."""


@dataclass(frozen=True)
class Rays:
    """Rays of any leading shape, such as `[n_rays]`, or `[B, H, W]` for the pixels of views.

    Shapes, dtypes and devices are checked here (TypeError, ValueError), values by :meth:`validate`. Tensors of 16 bits
    or of several dtypes are for :meth:`from_tensors`, directions of any length for :meth:`normalized`.

    Attributes:
        origins: `[..., 3]`, scene units, float32 or float64.
        directions: `[..., 3]`, unit length, the same dtype.
        near: `[...]`, distance along each ray before which nothing is sampled, at least 0, the same dtype; None: the
            renderer's setting. A ray whose near is not below its far has no samples.
        far: `[...]`, distance beyond which nothing is sampled, infinite for no limit; None: the renderer's setting.
            Both only narrow the renderer's settings, and neither gets a gradient.
    """

    origins: Tensor
    directions: Tensor
    near: Tensor | None = None
    far: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("origins", "directions"):
            value = getattr(self, name)
            given = value.dtype if isinstance(value, Tensor) else type(value).__name__
            # 16 bits place a sample no better than to a few thousandths of a scene unit.
            if given not in FLOATS:
                hint = "; Rays.from_tensors makes it float32" if given in _HALVES else ""
                raise TypeError(f"rays.{name}: got {given}, want a tensor [..., 3] of float32 or float64{hint}")
            if value.dim() < 1 or value.shape[-1] != 3:
                raise ValueError(f"rays.{name}: got shape {list(value.shape)}, want [..., 3]")
        if self.origins.shape != self.directions.shape:
            raise ValueError(
                f"rays: got origins {list(self.origins.shape)} and directions {list(self.directions.shape)}, want one "
                "shape; Rays.from_tensors broadcasts"
            )
        if self.origins.dtype != self.directions.dtype or self.origins.device != self.directions.device:
            raise ValueError(
                f"rays: got origins {self.origins.dtype} on {self.origins.device} and directions "
                f"{self.directions.dtype} on {self.directions.device}, want one dtype and device"
            )
        for name in ("near", "far"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"rays.{name}: got {type(value).__name__}, want a tensor {list(self.shape)}; Rays.from_tensors "
                    "takes numbers"
                )
            if value.shape != self.shape:
                raise ValueError(f"rays.{name}: got shape {list(value.shape)}, want {list(self.shape)}")
            if value.dtype != self.origins.dtype or value.device != self.origins.device:
                raise ValueError(
                    f"rays.{name}: got {value.dtype} on {value.device}, want {self.origins.dtype} on "
                    f"{self.origins.device}, as origins are"
                )

    @classmethod
    def from_tensors(
        cls,
        origins: Tensor,
        directions: Tensor,
        near: Tensor | float | None = None,
        far: Tensor | float | None = None,
    ) -> Rays:
        """Rays from what other code holds: 16 bits become float32, mixed dtypes the widest, and shapes are broadcast.

        So one origin `[3]` goes with directions `[H, W, 3]`, and one `near` with all rays. What is converted or
        broadcast is so differentiably.

        Args:
            origins: `[..., 3]`, scene units, any floating-point dtype.
            directions: `[..., 3]`, unit length.
            near: `[...]` or a number, as in the class.
            far: likewise.

        Raises:
            TypeError: origins or directions that are no floating-point tensor.
            ValueError: shapes that cannot be broadcast; several devices.
        """
        for name, value in (("origins", origins), ("directions", directions)):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"rays.{name}: got {given}, want a floating-point tensor [..., 3]")
        dtype = torch.promote_types(torch.promote_types(origins.dtype, directions.dtype), torch.float32)
        limits = [_as_tensor(name, value, origins.device, dtype) for name, value in (("near", near), ("far", far))]
        shapes = [list(value.shape) for value in (origins, directions)]
        shapes += [[*value.shape, 3] for value in limits if value is not None]
        try:
            shape = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            listed = ", ".join(map(str, shapes))
            raise ValueError(f"rays: got {listed} (near and far with a 3), want shapes that can be broadcast") from None
        origins, directions = (value.to(dtype).expand(shape) for value in (origins, directions))
        return cls(origins, directions, *(None if value is None else value.expand(shape[:-1]) for value in limits))

    @classmethod
    def normalized(
        cls,
        origins: Tensor,
        directions: Tensor,
        near: Tensor | float | None = None,
        far: Tensor | float | None = None,
    ) -> tuple[Rays, Tensor]:
        """Rays of unit length from directions d of any length, for which a distance t means the point o + t d.

        Args:
            origins, directions: as in :meth:`from_tensors`, but of any length. A direction of zero length stays, for
                :meth:`validate` to name.
            near, far: in the caller's t, that is, in lengths of the direction.

        Returns:
            The rays, whose distances are in scene units, near and far among them; and the scale `[...]`, 1 / |d|, by
            which such a distance is multiplied to get the caller's t back. Densities are per scene unit.
        """
        given = cls.from_tensors(origins, directions, near, far)
        length = torch.linalg.vector_norm(given.directions, dim=-1)
        length = torch.where(length > 0.0, length, torch.ones_like(length))
        limits = (None if value is None else value * length for value in (given.near, given.far))
        return cls(given.origins, given.directions / length[..., None], *limits), 1.0 / length

    @property
    def shape(self) -> torch.Size:
        """The leading shape, such as `[n_rays]` or `[B, H, W]`."""
        return self.origins.shape[:-1]

    def __len__(self) -> int:
        """Size of the first dimension: the number of rays, if there is but one."""
        if not self.shape:
            raise TypeError("rays: a single ray has no length, want a leading dimension: rays.flat()")
        return self.origins.shape[0]

    def __getitem__(self, index: Index) -> Rays:
        """The rays chosen by an index, slice, mask or index tensor, or one of them for each leading dimension.

        Raises:
            IndexError: more indices than leading dimensions, or one out of range.
        """
        parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
        if not any(part is ... for part in parts):
            parts = (*parts, ...)
        # None of them may choose among the three coordinates.
        return self._each(lambda value, tail: value[parts + (slice(None),) * len(tail)])

    def flat(self) -> Rays:
        """The same rays as one list, `[n_rays, 3]`, the last leading dimension the fastest."""
        return self.reshape(-1)

    def reshape(self, *shape: int | Sequence[int]) -> Rays:
        """The same rays with another leading shape, sizes or one sequence of them; one size may be -1."""
        sizes: tuple[Any, ...] = shape
        if len(shape) == 1 and isinstance(shape[0], Sequence):
            sizes = tuple(shape[0])
        return self._each(lambda value, tail: value.reshape(sizes + tail))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Rays:
        """The same rays on another device or in another dtype."""
        return self._each(lambda value, _: value.to(device=device, dtype=dtype))

    def validate(self) -> None:
        """Raise :class:`InvalidRaysError` naming the first ray that cannot be rendered. Waits once for a GPU."""
        with torch.no_grad():
            squared = self.directions.square().sum(dim=-1)
            # NaN and infinity fail the comparison, so one reduction (one wait for a GPU) covers every case.
            good = ((squared - 1.0).abs() <= SQUARED_TOLERANCE) & torch.isfinite(self.origins).all(dim=-1)
            if self.near is not None:
                good = good & (self.near >= 0.0)
            if self.far is not None:
                good = good & ~self.far.isnan()
            if bool(good.all()):
                return
            bad = tuple((~good).nonzero()[0].tolist())
        ray = self[bad]
        origin, direction = ray.origins.tolist(), ray.directions.tolist()
        if not bool(torch.isfinite(ray.origins).all() and torch.isfinite(ray.directions).all()):
            problem = "is not finite"
        elif float(squared[bad]) == 0.0:
            problem = "has a direction of zero length"
        elif not abs(float(squared[bad]) - 1.0) <= SQUARED_TOLERANCE:
            problem = "has a direction that is not of unit length (Rays.normalized(origins, directions) scales them)"
        elif ray.near is not None and not float(ray.near) >= 0.0:
            problem = f"has near {float(ray.near)}, want at least 0"
        else:
            problem = "has a far that is not a number"
        name = bad[0] if len(bad) == 1 else list(bad)
        raise InvalidRaysError(f"rays: ray {name} {problem}: origin {origin}, direction {direction}")

    def _each(self, change: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Rays:
        """The rays whose tensors are `change(tensor, shape behind the leading one)` of these."""
        limits = (None if value is None else change(value, ()) for value in (self.near, self.far))
        return Rays(change(self.origins, (3,)), change(self.directions, (3,)), *limits)


def _as_tensor(name: str, value: Tensor | float | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.to(dtype)
    try:
        return torch.full((), float(value), device=device, dtype=dtype)
    except (TypeError, ValueError):
        raise TypeError(f"rays.{name}: got {type(value).__name__}, want a tensor or a number") from None
