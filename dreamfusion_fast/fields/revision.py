"""Host-side knowledge of tensors that may change: their revision, and a scene box as numbers."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor


def revision_of(tensor: Tensor) -> Hashable:
    """Equal to an earlier one as long as the tensor is the same and was not changed in place.

    Tensors made in inference mode do not count their changes: no two revisions of them are equal. The address of a
    tensor that is gone can come again, so the tensor has to be kept as long as its revision.
    """
    return object() if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


class HostBox:
    """The numbers of a box `[6]` on any device, read again only when it was changed: then a GPU is waited for."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._revision: Hashable = None
        self._numbers: tuple[float, ...] = ()

    def read(self, aabb: Tensor) -> tuple[float, ...]:
        """The six numbers of `aabb`."""
        revision = revision_of(aabb)
        if self._of is not aabb or self._revision != revision:
            self._of, self._revision, self._numbers = aabb, revision, tuple(aabb.tolist())
        return self._numbers
