"""From the ray of each sample to the samples of each ray."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc._packing import offsets_of_indices, remember_offsets


@torch.no_grad()
def pack_info(ray_indices: Tensor, n_rays: int | None = None) -> Tensor:
    """First sample and number of samples of each ray.

    Args:
        ray_indices: int64 `[n_samples]`, never falling.
        n_rays: number of rays; None = up to the last one that has a sample, for which a GPU is waited for.

    Returns:
        int64 `[n_rays, 2]`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range.
    """
    offsets = offsets_of_indices("pack_info", ray_indices, n_rays)
    packed_info = torch.stack([offsets[:-1], offsets.diff()], dim=1).long()
    remember_offsets(packed_info, packed_info.shape[0], offsets)
    return packed_info
