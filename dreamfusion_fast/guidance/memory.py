"""The memory that a guidance needs, and the part of a batch that a call is about."""

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


@dataclass(frozen=True)
class BatchPart:
    """Which views of a batch a call of `Guidance.sds_gradient` is about.

    The guidance draws timesteps and noise for the whole batch, from the generator as it always does, and uses the
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
