"""The occupancy grid of threestudio's renderer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.fields.revision import revision_of
from dreamfusion_fast.rendering.occupancy import OccupancyGrid

_RESOLUTION = 32
# Opacity below which threestudio prunes a sample, unless the grid's mean is lower still.
_ALPHA_THRESHOLD = 0.01


class EstimatorGrid(OccupancyGrid):
    """An :class:`OccupancyGrid` of 32 cells per side under the names of nerfacc's estimator.

    A state dict has `resolution`, `aabbs`, `occs` and `binaries`, so that checkpoints of the stock renderer load, and
    the other way round. An occupancy is density times step there.

    Args:
        radius: half the side of the box, scene units.
        step: length of a sample, scene units.
        prunes: whether the grid is in use; if not, all of it is occupied and stays so.
    """

    def __init__(self, radius: float, step: float, prunes: bool) -> None:
        box = (-radius,) * 3 + (radius,) * 3
        super().__init__(box, _RESOLUTION, alpha_threshold=_ALPHA_THRESHOLD, step_size=step)
        self.prunes = prunes
        self._limit: tuple[Any, float] | None = None
        if not prunes:
            self.set_occupied(torch.ones_like(self.grid, dtype=torch.bool))

    def least_alpha(self) -> float:
        """Opacity below which a sample is dropped: 0.01, or the mean occupancy of the cells if that is lower.

        A GPU is waited for once after each update.
        """
        revision = revision_of(self.grid)
        if self._limit is None or self._limit[0] != revision:
            self._limit = revision, min(_ALPHA_THRESHOLD, float(self.grid.mean()) * self.step_size)
        return self._limit[1]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        occupied = self.occupied()
        destination[f"{prefix}resolution"] = torch.full_like(self.aabb[:3], self.resolution, dtype=torch.int32)
        destination[f"{prefix}aabbs"] = self.aabb.detach().clone()[None]
        destination[f"{prefix}occs"] = (self.grid.detach() * self.step_size).flatten()
        destination[f"{prefix}binaries"] = occupied[None]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = {
            "resolution": torch.Size([3]),
            "aabbs": torch.Size([1, 6]),
            "occs": torch.Size([self.grid.numel()]),
            "binaries": torch.Size([1, *self.grid.shape]),
        }
        given: dict[str, Tensor] = {}
        for name, shape in wanted.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.shape != shape:
                error_msgs.append(f"{prefix}{name}: got shape {list(value.shape)}, want {list(shape)}")
            else:
                given[name] = value
        unexpected_keys += [
            key for key in state_dict if strict and key.startswith(prefix) and key[len(prefix) :] not in wanted
        ]
        if not self.prunes or len(given) != len(wanted):
            return
        with torch.no_grad():
            self.aabb.copy_(given["aabbs"][0])
            self.grid.copy_(given["occs"].view(self.grid.shape) / self.step_size)
            self.bitfield.copy_(self._pack(given["binaries"][0].to(self.grid), 0.5))
