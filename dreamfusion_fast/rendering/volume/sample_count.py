"""The number of samples on its way from the GPU to the host, which goes on meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.ops.march import MAX_SAMPLES
from dreamfusion_fast.ops.tiles.march import MarchedRays, march_totals
from dreamfusion_fast.rendering.rays import SQUARED_TOLERANCE, InvalidRaysError


class SampleCount:
    """The number of samples, and of invalid rays, on their way to the host."""

    def __init__(self, rays: MarchedRays, counts: Tensor) -> None:
        self.totals = march_totals(rays, counts, SQUARED_TOLERANCE)
        self.on_device = self.totals[0]
        self.captured = counts.is_cuda and torch.cuda.is_current_stream_capturing()
        self._host = self.totals
        self._event: torch.cuda.Event | None = None
        if counts.is_cuda and not self.captured:
            self.send()

    def send(self) -> None:
        """Start the copy to the host, to memory of its own: other renders may come before it is read."""
        self._host = torch.empty(2, dtype=torch.int64, pin_memory=True)
        self._host.copy_(self.totals, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(self.totals.device))

    def read(self) -> int:
        """Wait for the count, not for what was enqueued since.

        Raises:
            InvalidRaysError: a ray is invalid (which one, `Rays.validate` says).
            RuntimeError: more samples than 32-bit offsets can hold.
        """
        if self._event is not None:
            self._event.synchronize()
        number, invalid = self._host.tolist()
        if invalid:
            raise InvalidRaysError(f"rays: {invalid} are not finite, or their directions not of unit length")
        if number > MAX_SAMPLES:
            raise RuntimeError(f"rays: {number} samples, more than 2^31 - 1: render fewer rays at once")
        return number
