"""The memory that a guidance needs, and ways to need less."""

from __future__ import annotations

from dataclasses import dataclass, fields


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


class UsesMemory:
    """Base of what holds weights: its needs of memory, and ways to need less. Defaults are those of `inner`, if any.

    `dreamfusion_fast.training.memory_plan` asks.

    Attributes:
        inner: the model inside a guidance.
    """

    inner: UsesMemory | None = None

    def load(self) -> None:
        """Load weights that are not loaded yet; without this, their first use does. May be called more than once."""
        if self.inner is not None:
            self.inner.load()

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        """Needs of one call with `batch` views of `render_size` pixels a side. What is per view may depend on both."""
        return GuidanceMemory() if self.inner is None else self.inner.memory_needs(batch, render_size)

    def set_recompute(self, on: bool) -> None:
        """Let the encoding keep less for its backward, and compute it again. Results stay the same up to rounding.

        Asked of those whose `memory_needs` say that it saves something.
        """
        if self.inner is not None:
            self.inner.set_recompute(on)

    def set_offload(self, on: bool) -> None:
        """Keep weights in main memory while they are not in use. Asked of those whose `memory_needs` have any."""
        if self.inner is not None:
            self.inner.set_offload(on)

    def free_graphs(self) -> None:
        """Give up captured CUDA graphs and their memory; they are captured again when next needed."""
        if self.inner is not None:
            self.inner.free_graphs()
