"""Which samples belong to which ray: from ray indices or packed info to the int32 offsets that ops take.

Offsets are remembered for the tensor that they were made of, since a caller passes the same ray indices to each
function of a render. A tensor that was changed in place has other ones.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dreamfusion_fast.integrations.nerfacc import _lazy

_lock = threading.RLock()
_known: Any = WeakTensorKeyDictionary()  # tensor -> (revision, number of rays, offsets)


def remember_offsets(of: Tensor, n_rays: int, offsets: Tensor) -> Tensor:
    """Keeps the offsets of ray indices, or of packed info, for as long as the tensor exists. Returns them."""
    revision: Hashable = _lazy.revision_of(of)
    with _lock:
        _known[of] = revision, n_rays, offsets
    return offsets


def known_offsets(of: Tensor, n_rays: int) -> Tensor | None:
    """The offsets that are remembered for this tensor and number of rays."""
    with _lock:
        entry = _known.get(of)
    if entry is None or entry[1] != n_rays or entry[0] != _lazy.revision_of(of):
        return None
    return entry[2]


def offsets_of_indices(op: str, ray_indices: Tensor, n_rays: int | None) -> Tensor:
    """Offsets int32 `[n_rays + 1]` of ray indices that never fall. Without their number, a GPU is waited for."""
    _lazy.check_tensor(op, "ray_indices", ray_indices, ["n_samples"], (torch.int64, torch.int32))
    if n_rays is None:
        n_rays = int(ray_indices[-1]) + 1 if ray_indices.numel() > 0 else 0
    _lazy.check_number(op, "n_rays", n_rays, "at least 0", lambda number: number >= 0, whole=True)
    offsets = known_offsets(ray_indices, n_rays)
    if offsets is None:
        rays = torch.arange(n_rays + 1, dtype=ray_indices.dtype, device=ray_indices.device)
        offsets = torch.searchsorted(ray_indices, rays, out_int32=True)
        remember_offsets(ray_indices, n_rays, offsets)
    return offsets


def offsets_of_packed(op: str, packed_info: Tensor) -> Tensor:
    """Offsets int32 `[n_rays + 1]` of packed info whose rays follow each other without gaps."""
    _lazy.check_tensor(op, "packed_info", packed_info, ["n_rays", 2], (torch.int64, torch.int32))
    n_rays = packed_info.shape[0]
    offsets = known_offsets(packed_info, n_rays)
    if offsets is None:
        offsets = torch.nn.functional.pad(packed_info[:, 1].cumsum(0, dtype=torch.int32), (1, 0))
        remember_offsets(packed_info, n_rays, offsets)
    return offsets


def offsets_for(
    op: str, samples: Tensor, packed_info: Tensor | None, ray_indices: Tensor | None, n_rays: int | None
) -> Tensor:
    """Offsets of samples that are packed, `[m]`, if their rays are given, and else of rays of equal length, `[..., S]`.

    Raises:
        TypeError, ValueError: the samples are not what the rays say.
    """
    if packed_info is None and ray_indices is None:
        if samples.dim() == 0:
            raise ValueError(f"{op}: samples must have shape [..., n_samples], got a number")
        each = samples.shape[-1]
        rays = samples.numel() // each if each > 0 else 0
        return torch.arange(rays + 1, dtype=torch.int32, device=samples.device) * each
    if samples.dim() != 1:
        raise ValueError(f"{op}: packed samples must have shape [n_samples], got {list(samples.shape)}")
    if packed_info is not None:
        return offsets_of_packed(op, packed_info)
    assert ray_indices is not None
    if ray_indices.shape != samples.shape:
        raise ValueError(f"{op}: ray_indices has shape {list(ray_indices.shape)}, the samples {list(samples.shape)}")
    return offsets_of_indices(op, ray_indices, n_rays)


def segment_starts(op: str, packed_info: Tensor | None, indices: Tensor | None, n_samples: int) -> tuple[Tensor, int]:
    """First sample of the ray of each packed sample, int64 `[m]`, and the most samples of a ray. Waits for a GPU."""
    if packed_info is not None:
        counts = packed_info[:, 1].long()
        zero = counts.new_zeros(1)
        longest, total = torch.stack([torch.cat([counts, zero]).max(), counts.sum()]).tolist()
        if total != n_samples:
            raise ValueError(f"{op}: packed_info must have the rays of all {n_samples} samples, got {total}")
        return torch.repeat_interleave(packed_info[:, 0].long(), counts, output_size=n_samples), longest
    assert indices is not None
    starts = torch.searchsorted(indices, indices)
    inside = torch.arange(n_samples, device=indices.device) - starts
    return starts, int(inside.max()) + 1 if n_samples > 0 else 0
