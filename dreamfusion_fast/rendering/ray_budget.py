"""How many rays a training step takes so that it has about as many samples as intended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Factor by which one update may raise the number of rays: a step that saw next to nothing says little of the next one.
_MOST_GROWTH = 2.0


class RayBudget:
    """Keeps the samples of a training step near a target by the number of its rays.

    As the occupancy grid empties, a ray has fewer samples, and a step can afford more rays. As in instant-ngp (Müller
    et al. 2022, its dynamic batch size), the next number of rays is the target over the samples per ray seen; here of
    a moving average, and at most twice the last one.

    Example:
        >>> from dreamfusion_fast.rendering import RayBudget
        >>> budget = RayBudget(target_samples=100_000, initial_rays=1024)
        >>> for step in range(3):
        ...     n_rays = budget.n_rays  # draw so many rays and render them
        ...     budget.update(n_rays, n_samples=50 * n_rays)
        >>> budget.n_rays
        1920

    Args:
        target_samples: of a step, at least 1.
        initial_rays: of the first step.
        min_rays: fewest rays of a step; None: `multiple`.
        max_rays: most rays of a step.
        multiple: what the number of rays is a multiple of, and so have to be the three before.
        smoothing: share of the moving average that stays in an update, 0 (none) to below 1.

    Attributes:
        n_rays: of the next step.

    Raises:
        TypeError, ValueError: an argument that is no number of its kind, or out of its range.
    """

    def __init__(
        self,
        target_samples: int,
        initial_rays: int = 4096,
        min_rays: int | None = None,
        max_rays: int = 2**18,
        multiple: int = 128,
        smoothing: float = 0.5,
    ) -> None:
        min_rays = multiple if min_rays is None else min_rays
        for name, value in (
            ("target_samples", target_samples),
            ("multiple", multiple),
            ("min_rays", min_rays),
            ("max_rays", max_rays),
            ("initial_rays", initial_rays),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, want a whole number")
            if value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1")
            if name.endswith("_rays") and value % multiple:
                raise ValueError(f"{name}: got {value}, want a multiple of {multiple}")
        if not min_rays <= initial_rays <= max_rays:
            raise ValueError(f"initial_rays: got {initial_rays}, want {min_rays} to {max_rays}")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing: got {smoothing}, want 0 to below 1")
        self.target_samples, self.min_rays, self.max_rays = target_samples, min_rays, max_rays
        self.multiple, self.smoothing = multiple, smoothing
        self.n_rays = initial_rays
        self._per_ray: float | None = None
        self._awaited: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def update(self, n_rays: int, n_samples: int | Tensor) -> None:
        """Learn from a step, and set `n_rays` for the next one.

        A number counts at once. What a tensor holds is copied now, and counts in the next update, on a CPU and on a
        GPU alike: by then a GPU has most likely got there, and it is waited for only if not. So `n_rays` never depends
        on which of them was faster.

        Args:
            n_rays: of the step, at least 0; a step without rays changes nothing.
            n_samples: of the step, at least 0; a 0-dim tensor of integers for what only the device knows.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range.
        """
        for name, value in (("n_rays", n_rays), ("n_samples", n_samples)):
            if name == "n_samples" and isinstance(value, Tensor):
                if value.dim() or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                    raise TypeError(
                        f"n_samples: got {value.dtype} {list(value.shape)}, want a 0-dim tensor of integers"
                    )
            elif not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, want a whole number")
            elif value < 0:
                raise ValueError(f"{name}: got {value}, want at least 0")
        self._settle()
        if isinstance(n_samples, Tensor):
            self._awaited = (n_rays, *_sent_to_host(n_samples))
        else:
            self._learn(n_rays, n_samples)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same numbers; waits for a GPU that has a number still to give."""
        awaited = None if self._awaited is None else (self._awaited[0], self._read())
        return {"n_rays": self.n_rays, "samples_per_ray": self._per_ray, "awaited": awaited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, within the limits of this one.

        Raises:
            ValueError: other keys.
        """
        wanted = {"n_rays", "samples_per_ray", "awaited"}
        if set(state) != wanted:
            raise ValueError(f"state: got the keys {sorted(state)}, want {sorted(wanted)}")
        self.n_rays = self._bounded(float(state["n_rays"]))
        self._per_ray = None if state["samples_per_ray"] is None else float(state["samples_per_ray"])
        self._awaited = None
        if state["awaited"] is not None:
            n_rays, n_samples = state["awaited"]
            self._awaited = (int(n_rays), torch.tensor(int(n_samples)), None)

    def _settle(self) -> None:
        """Learn what an earlier update left open."""
        if self._awaited is not None:
            n_rays, n_samples = self._awaited[0], self._read()
            self._awaited = None
            self._learn(n_rays, n_samples)

    def _read(self) -> int:
        assert self._awaited is not None
        _, on_host, event = self._awaited
        if event is not None:
            event.synchronize()
        return int(on_host)

    def _learn(self, n_rays: int, n_samples: int) -> None:
        if n_rays == 0:
            return
        seen = n_samples / n_rays
        self._per_ray = seen if self._per_ray is None else seen + self.smoothing * (self._per_ray - seen)
        most = _MOST_GROWTH * self.n_rays
        self.n_rays = self._bounded(min(self.target_samples / self._per_ray, most) if self._per_ray > 0.0 else most)

    def _bounded(self, n_rays: float) -> int:
        """Rounded down, so as not to be over the target."""
        rounded = math.floor(n_rays / self.multiple) * self.multiple
        return max(self.min_rays, min(rounded, self.max_rays))


def _sent_to_host(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on its way to the host, where the caller may write to the tensor again, and the event of its arrival."""
    if not value.is_cuda:
        return value.detach().clone(), None
    on_host = torch.empty((), dtype=value.dtype, pin_memory=True)
    on_host.copy_(value.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(value.device))
    return on_host, event
