"""Where rays are sampled."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from dreamfusion_fast.ops.march import MAX_STEPS


def cone_distances(
    near: float,
    far: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Distances for `march_lattice` whose steps grow with the distance, as a pixel's cone does.

    ``d_0 = near``, ``d_{k+1} = d_k + clamp(d_k * cone_angle, min_step, max_step)``, in float64, until `far` is reached
    (Mueller et al. 2022, appendix E.1; nerfacc's ``cone_angle``, raymarching's ``dt_gamma``). A table with another
    `far` begins with the same numbers.

    Args:
        near: where the first sample begins.
        far: the last sample ends there or behind it.
        min_step: least length of a sample, > 0.
        max_step: largest length, may be infinite.
        cone_angle: growth of the length per distance, >= 0; 0.004 is 1/256.
        dtype: of the result, float32 or float64.
        device: of the result.

    Returns:
        ``[n + 1]``, rising.

    Raises:
        ValueError: an argument out of range, more than 2^24 samples, or steps too short for the dtype.
    """
    if not (-math.inf < near < far < math.inf):
        raise ValueError(f"cone_distances: near and far must be numbers, near < far, got {near} and {far}")
    if not (0.0 < min_step <= max_step and min_step < math.inf):
        raise ValueError(f"cone_distances: want 0 < min_step <= max_step, got {min_step} and {max_step}")
    if not 0.0 <= cone_angle < math.inf:
        raise ValueError(f"cone_distances: cone_angle must be at least 0, got {cone_angle}")
    edges = [near]
    while edges[-1] < far:
        if len(edges) > MAX_STEPS:
            raise ValueError(f"cone_distances: more than 2^24 samples between {near} and {far}, min_step is {min_step}")
        edges.append(edges[-1] + min(max(edges[-1] * cone_angle, min_step), max_step))
    distances = torch.tensor(edges, dtype=torch.float64).to(dtype)
    if not bool((distances.diff() > 0).all()):
        raise ValueError(f"cone_distances: min_step {min_step} is below what {dtype} can tell apart at {far}")
    return distances.to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def cached_cone_distances(
    near: float,
    far: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`cone_distances`, kept: it takes milliseconds, and a copy to the GPU. Not to be changed in place."""
    return cone_distances(near, far, min_step, max_step, cone_angle, dtype, device)


def covering_distance(t_far: Tensor, near: float) -> float:
    """A distance that no finite t_far `[n_rays]` exceeds: one of `near` * 2, 4, 8, ..., so that tables made for it are
    few. Waits for the GPU. `near` > 0."""
    reach = float(torch.where(t_far.isfinite(), t_far, near).amax()) if t_far.shape[0] > 0 else near
    return near * 2.0 ** max(math.ceil(math.log2(max(reach / near, 1.0))), 1)
