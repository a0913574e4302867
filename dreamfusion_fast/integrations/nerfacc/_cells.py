"""The estimator's grids as the march takes them, made anew only when they have changed."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc import _lazy

_MAX_CASCADES, _MAX_RESOLUTION = 16, 1290  # of ops.march
# Corners of a nested box may be off by roundings, relative to its width.
_NESTED = 1e-5


class PackedCells:
    """Caches of an estimator. Threads may share it: what one makes is put in place at once, and as good as another's.

    What changed is told by a tensor's identity and version. Writes that torch does not count, through ``.data`` or
    NumPy, are not seen.
    """

    def __init__(self) -> None:
        self._bits: tuple[Tensor, Hashable, Tensor] | None = None
        self._nested: tuple[Tensor, Hashable, bool] | None = None

    def bits(self, binaries: Tensor) -> Tensor:
        """The bitfield of occupied cells, for ops.march."""
        revision, known = _lazy.revision_of(binaries), self._bits
        if known is None or known[0] is not binaries or known[1] != revision:
            known = binaries, revision, _lazy.occupancy_pack(binaries.float(), 0.5)
            self._bits = known
        return known[2]

    def cascaded(self, binaries: Tensor, aabbs: Tensor) -> bool:
        """Whether the grids are cubes, each box twice as wide as the one before: what ops.march takes."""
        levels, *sizes = binaries.shape
        if len(set(sizes)) != 1 or levels > _MAX_CASCADES or sizes[0] > _MAX_RESOLUTION:
            return False
        if levels == 1:
            return True
        if sizes[0] % 2 != 0 or binaries.numel() >= 2**31:
            return False
        revision, known = _lazy.revision_of(aabbs), self._nested
        if known is None or known[0] is not aabbs or known[1] != revision:
            known = aabbs, revision, _nested(aabbs)
            self._nested = known
        return known[2]


def _nested(aabbs: Tensor) -> bool:
    """Whether each box is the first one grown to twice the width of the one before. Waits for a GPU."""
    boxes = aabbs.detach().double().cpu()
    centre, half = 0.5 * (boxes[0, :3] + boxes[0, 3:]), 0.5 * (boxes[0, 3:] - boxes[0, :3])
    halves = 2.0 ** torch.arange(len(boxes), dtype=torch.float64)[:, None] * half
    wanted = torch.cat([centre - halves, centre + halves], dim=1)
    return bool(((boxes - wanted).abs() <= _NESTED * torch.cat([halves, halves], dim=1)).all())
