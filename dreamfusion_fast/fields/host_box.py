"""A scene box as numbers on the host."""

from __future__ import annotations

from torch import Tensor


class HostBox:
    """The numbers of a box `[6]` on any device, read again only when it was changed: then a GPU is waited for."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._state: tuple[int, int] | None = None
        self._numbers: tuple[float, ...] = ()

    def read(self, aabb: Tensor) -> tuple[float, ...]:
        """The six numbers of `aabb`."""
        # Tensors made in inference mode do not count their changes: they are read each time.
        state = None if aabb.is_inference() else (aabb.data_ptr(), aabb._version)
        # The tensor is kept, because the address of one that is gone can come again.
        if state is None or self._of is not aabb or self._state != state:
            self._of, self._state, self._numbers = aabb, state, tuple(aabb.tolist())
        return self._numbers
