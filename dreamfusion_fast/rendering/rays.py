"""Rays: where they start and where they go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import FLOATS

# Directions off unit length by more than this would visibly scale distances, and with them opacity.
_UNIT_TOLERANCE = 1e-3
SQUARED_TOLERANCE = 2 * _UNIT_TOLERANCE  # of the squared length


class InvalidRaysError(ValueError):
    """Rays that cannot be rendered: not finite, of zero length, or not of unit length."""


@dataclass(frozen=True)
class Rays:
    """A batch of rays.

    Attributes:
        origins: `[n_rays, 3]`, scene units, float32 or float64.
        directions: `[n_rays, 3]`, unit length, the same dtype.
    """

    origins: Tensor
    directions: Tensor

    def __post_init__(self) -> None:
        for name in ("origins", "directions"):
            value = getattr(self, name)
            given = value.dtype if isinstance(value, Tensor) else type(value).__name__
            # 16 bits place a sample no better than to a few thousandths of a scene unit.
            if given not in FLOATS:
                raise TypeError(f"rays.{name}: got {given}, want a tensor [n_rays, 3] of float32 or float64")
            if value.dim() != 2 or value.shape[1] != 3:
                raise ValueError(f"rays.{name}: got shape {list(value.shape)}, want [n_rays, 3]")
        if self.origins.shape != self.directions.shape:
            raise ValueError(
                f"rays: got {self.origins.shape[0]} origins and {self.directions.shape[0]} directions, want as many"
            )
        if self.origins.dtype != self.directions.dtype or self.origins.device != self.directions.device:
            raise ValueError(
                f"rays: got origins {self.origins.dtype} on {self.origins.device} and directions "
                f"{self.directions.dtype} on {self.directions.device}, want one dtype and device"
            )

    def __len__(self) -> int:
        return self.origins.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Rays:
        """The rays chosen by a slice, a mask or an index tensor."""
        return Rays(self.origins[index], self.directions[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Rays:
        """The same rays on another device or in another dtype."""
        return Rays(self.origins.to(device=device, dtype=dtype), self.directions.to(device=device, dtype=dtype))

    def normalized(self) -> Rays:
        """The same rays with directions of unit length (zero directions stay zero)."""
        return Rays(self.origins, torch.nn.functional.normalize(self.directions, dim=1))

    def validate(self) -> None:
        """Raise :class:`InvalidRaysError` naming the first ray that cannot be rendered."""
        with torch.no_grad():
            squared = self.directions.square().sum(dim=1)
            # NaN and infinity fail the comparison, so one reduction (one wait for a GPU) covers every case.
            good = ((squared - 1.0).abs() <= SQUARED_TOLERANCE) & torch.isfinite(self.origins).all(dim=1)
            if bool(good.all()):
                return
            bad = int((~good).nonzero()[0])
        origin, direction = self.origins[bad].tolist(), self.directions[bad].tolist()
        if not bool(torch.isfinite(self.origins[bad]).all() and torch.isfinite(self.directions[bad]).all()):
            problem = "is not finite"
        elif float(squared[bad]) == 0.0:
            problem = "has a direction of zero length"
        else:
            problem = "has a direction that is not of unit length (Rays.normalized() scales them)"
        raise InvalidRaysError(f"rays: ray {bad} {problem}: origin {origin}, direction {direction}")
