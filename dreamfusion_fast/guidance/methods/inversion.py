"""DDIM inversion (Song et al. 2021, arXiv 2010.02502): noise that a model itself finds in an image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dreamfusion_fast.guidance.methods.method import Predictions

Ask = Callable[[Tensor, Tensor], Tensor]
"""Noisy input [B, C, h, w] and its timestep [B] to the model's output."""


def step_to(p: Predictions, noisy: Tensor, t: Tensor, to: Tensor, output: Tensor) -> Tensor:
    """The deterministic DDIM step from x_t to x_to, up or down: alpha_to x + sigma_to n, with x and n of the output.

    For a flow it is an Euler step along the velocity.
    """
    level = p.model.schedule.at(t, noisy.dtype)
    return p.model.schedule.at(to, noisy.dtype).noisy(level.clean(output, noisy), level.noise(output, noisy))


def invert(
    p: Predictions, start: Tensor, end: Tensor, end_most: int, stride: int, ask: Ask, eta: float = 0.0
) -> Tensor:
    """From an input at timestep 0 to one at `end`, by steps of `stride` timesteps and a last one that may be shorter.

    All views take as many steps as the latest `end` needs; those that have arrived stay where they are. So nothing has
    to be known of `end` on the host.

    Args:
        p: the model, the views, and the draws that `eta` needs, one per step.
        start: [B, C, h, w], taken for an input of timestep 0.
        end: [B] int64, where to go.
        end_most: no `end` is later.
        stride: of the steps, at least 1.
        ask: what predicts.
        eta: adds noise of this times sqrt(((1 - abar_s) / (1 - abar_t)) (1 - abar_t / abar_s)) after a step from s up
            to t, abar = alpha^2 (DDIM's equation 16).

    Returns:
        [B, C, h, w] at `end`.
    """
    noisy, t = start, torch.zeros_like(end)
    for step in range(math.ceil(end_most / stride)):
        to = torch.minimum(t + stride, end)
        further = step_to(p, noisy, t, to, ask(noisy, t))
        if eta:
            assert p.draws is not None
            further = further + eta * _spread(p, t, to, noisy.dtype) * p.draws[step]
        noisy = torch.where((to > t).view(-1, 1, 1, 1), further, noisy)
        t = to
    return noisy


def _spread(p: Predictions, t: Tensor, to: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard deviation of the noise of a stochastic step between two levels, the first one the less noisy."""
    near, far = (p.model.schedule.at(times, dtype) for times in (t, to))
    tiny = torch.finfo(dtype).tiny
    kept = (far.alpha / near.alpha.clamp_min(tiny)).square()
    return near.sigma / far.sigma.clamp_min(tiny) * (1 - kept).clamp_min(0).sqrt()
