"""Stand-ins for samples that a renderer does not hold."""

from __future__ import annotations

import torch
from torch import Tensor


def orientation_stand_ins(loss: Tensor) -> dict[str, Tensor]:
    """`weights` `[1, 1]`, `normal` and `t_dirs` `[1, 3]`, for the orientation loss as threestudio's systems write it.

    Of these, the sum of weights.detach() * dot(normal, t_dirs).clamp_min(0) ** 2 is `loss`, and so is its gradient.

    Args:
        loss: 0-dim, the sum over all samples, at least 0.
    """
    # The square of a root has the slope 0 / 0 at 0; the loss of samples that all face the camera has slope 0.
    none = loss == 0.0
    root = torch.where(none, torch.ones_like(loss), loss).sqrt() * ~none
    axis = loss.new_tensor([[1.0, 0.0, 0.0]])
    return {"weights": loss.new_ones(1, 1), "normal": root * axis, "t_dirs": axis}
