"""nerfacc's data structures: edges of intervals, and samples within them, of a traversal or a resampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RaySamples:
    """Samples along rays, batched or flattened.

    Attributes:
        vals: distances, `[n_rays, n_samples]`, or flattened `[m]`.
        packed_info: int64 `[n_rays, 2]`, first sample and number of samples of each ray; None if batched.
        ray_indices: int64 `[m]`, ray of each sample, never falling; None if batched.
        is_valid: bool `[m]`, False for room that was made and not used; None where all are valid.
    """

    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_valid: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device


@dataclass
class RayIntervals:
    """Edges of intervals along rays, batched or flattened. Neighbouring intervals share an edge.

    ``vals[is_left]`` are the intervals' starts and ``vals[is_right]`` their ends.

    Attributes:
        vals: distances of the edges, `[n_rays, n_intervals + 1]`, or flattened `[n_edges]`.
        packed_info: int64 `[n_rays, 2]`, first edge and number of edges of each ray; None if batched.
        ray_indices: int64 `[n_edges]`, ray of each edge, never falling; None if batched.
        is_left: bool `[n_edges]`, whether an interval begins at the edge; None if batched.
        is_right: bool `[n_edges]`, whether an interval ends at the edge; None if batched.
    """

    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_left: Tensor | None = None
    is_right: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device
