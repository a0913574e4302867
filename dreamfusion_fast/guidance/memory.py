"""What a guidance can say about its memory, and can do to need less. All of it is optional.

A trainer that plans its memory (`dreamfusion_fast.training.memory_plan`) looks for these methods. A guidance without
them is taken to need nothing, and has nothing to save with but smaller batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class GuidanceMemory:
    """Bytes on the guidance's device. Estimates: what matters is that they are not too small.

    Attributes:
        weights: all weights that stay while a run goes on, whether they are loaded yet or not.
        encode: per view, peak of the encoding's forward and backward above the weights, activations included.
        encode_recomputed: the same with `set_recompute(True)`.
        unet: per view, peak of predicting the guided pair above the weights and without what is kept of the encoding.
        offloadable: how much less of `weights` is on the device at the worst time with `set_offload(True)`.
    """

    weights: int = 0
    encode: int = 0
    encode_recomputed: int = 0
    unet: int = 0
    offloadable: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"GuidanceMemory.{field.name}: got {value!r}, want a whole number of bytes >= 0")
        if self.offloadable > self.weights:
            raise ValueError(
                f"GuidanceMemory.offloadable: got {self.offloadable}, want at most the weights, {self.weights}"
            )


@runtime_checkable
class StatesMemory(Protocol):
    """A guidance that can say what it needs."""

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        """Needs of one `sds_gradient` call.

        Args:
            batch: views in the call. What is given per view may depend on it.
            render_size: height and width of the images that come, pixels.
        """


@runtime_checkable
class Recomputes(Protocol):
    """A guidance whose encoding can keep less for its backward, and compute it again."""

    def set_recompute(self, on: bool) -> None:
        """From the next call on; results stay the same up to rounding."""


@runtime_checkable
class Offloads(Protocol):
    """A guidance that can keep weights in main memory while they are not in use."""

    def set_offload(self, on: bool) -> None:
        """From the next call on; results stay the same."""


@runtime_checkable
class HoldsGraphs(Protocol):
    """A guidance that captures CUDA graphs by the shape of its inputs, each with memory of its own."""

    def free_graphs(self) -> None:
        """Give them up, to be captured again when next needed: those of a larger batch are of no use to a smaller."""


@dataclass(frozen=True)
class BatchPart:
    """Which views of a batch a call is about, for a guidance whose `sds_gradient` has a parameter `part`.

    Such a guidance draws timesteps and noise for the whole batch, from the generator as it always does, and uses the
    rows `first` to `first + B - 1` of them, B the number of images it is given. Called for each part in turn, with the
    generator put back before each call, it so returns the rows that one call with the whole batch would have returned.

    Attributes:
        first: of the views, counted from 0.
        batch: views of the whole batch.
    """

    first: int
    batch: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.batch:
            raise ValueError(f"BatchPart: got first {self.first} of batch {self.batch}, want 0 <= first < batch")


def takes_part(sds_gradient: Callable[..., object]) -> bool:
    """Whether a guidance's `sds_gradient` has the parameter `part`."""
    return "part" in inspect.signature(sds_gradient).parameters
