"""Proposal networks: samples where cheap fields have found density (mip-NeRF 360, Barron et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc.data_specs import RayIntervals
from dreamfusion_fast.integrations.nerfacc.estimators.base import AbstractEstimator
from dreamfusion_fast.integrations.nerfacc.pdf import importance_sampling, searchsorted
from dreamfusion_fast.integrations.nerfacc.volrend import render_transmittance_from_density


class PropNetEstimator(AbstractEstimator):
    """Samples rays by the densities of proposal networks, and trains these.

    Args:
        optimizer: of the networks' parameters; needed by `update_every_n_steps`.
        scheduler: of its learning rate; one step at each call of `update_every_n_steps`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        # Intervals of each network with the distribution that it made of them, and last those of the field, with None.
        self.prop_cache: list[tuple[RayIntervals, Tensor | None]] = []

    @torch.no_grad()
    def sampling(
        self,
        prop_sigma_fns: Sequence[Callable[[Tensor, Tensor], Tensor]],
        prop_samples: Sequence[int],
        num_samples: int,
        n_rays: int,
        near_plane: float,
        far_plane: float,
        sampling_type: Literal["uniform", "lindisp"] = "lindisp",
        stratified: bool = False,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Intervals of each ray, from equal ones on refined by one network after the other.

        Args:
            prop_sigma_fns: functions of `t_starts, t_ends [n_rays, n]` that return densities `[n_rays, n]`.
            prop_samples: number of intervals that each of them is asked for.
            num_samples: number of intervals in the end.
            n_rays: number of rays.
            near_plane, far_plane: where rays begin and end; above 0 for "lindisp".
            sampling_type: what equal intervals are equal in: distance, or its inverse ("lindisp").
            stratified: random places.
            requires_grad: keep the networks' graphs for `compute_loss` or `update_every_n_steps`.

        Returns:
            t_starts and t_ends, `[n_rays, num_samples]`.

        Raises:
            TypeError, ValueError: an argument of the wrong type or range, or densities of the wrong shape.
        """
        if len(prop_sigma_fns) != len(prop_samples):
            raise ValueError(
                f"PropNetEstimator: prop_samples must have a number for each of {len(prop_sigma_fns)} prop_sigma_fns, "
                f"got {len(prop_samples)}"
            )
        cdfs = torch.tensor([0.0, 1.0], device=self.device).repeat(n_rays, 1)
        intervals = RayIntervals(cdfs)
        for function, n in zip(prop_sigma_fns, prop_samples, strict=True):
            intervals, _ = importance_sampling(intervals, cdfs, n, stratified)
            t_vals = _transform_stot(sampling_type, intervals.vals, near_plane, far_plane)
            t_starts, t_ends = t_vals[..., :-1], t_vals[..., 1:]
            with torch.set_grad_enabled(requires_grad):
                sigmas = function(t_starts, t_ends)
                trans, _ = render_transmittance_from_density(t_starts, t_ends, sigmas)
                cdfs = _at_edges(trans)
            if requires_grad:
                self.prop_cache.append((intervals, cdfs))
        intervals, _ = importance_sampling(intervals, cdfs, num_samples, stratified)
        if requires_grad:
            self.prop_cache.append((intervals, None))
        t_vals = _transform_stot(sampling_type, intervals.vals, near_plane, far_plane)
        return t_vals[..., :-1], t_vals[..., 1:]

    @torch.enable_grad()
    def compute_loss(self, trans: Tensor, loss_scaler: float = 1.0) -> Tensor:
        """How far the networks' distributions fail to bound that of the field, for backward; uses up what was kept.

        Args:
            trans: transmittance of the field's samples, `[n_rays, num_samples]`; it gets no gradient.
            loss_scaler: factor.

        Returns:
            `[]`: sum over networks of the mean over intervals; 0 where nothing was kept.
        """
        loss = torch.zeros((), device=self.device)
        if not self.prop_cache:
            return loss
        kept, self.prop_cache = self.prop_cache, []
        intervals, _ = kept.pop()
        cdfs = _at_edges(trans).detach()
        for network_intervals, network_cdfs in reversed(kept):
            assert network_cdfs is not None
            loss = loss + _pdf_loss(intervals, cdfs, network_intervals, network_cdfs).mean()
        return loss * loss_scaler

    @torch.enable_grad()
    def update_every_n_steps(self, trans: Tensor, requires_grad: bool = False, loss_scaler: float = 1.0) -> float:
        """Train the networks if `requires_grad`, as in `sampling`; the scheduler makes a step in any case.

        Args:
            trans, loss_scaler: see `compute_loss`.
            requires_grad: whether this step trains the networks.

        Returns:
            The loss, or 0 if nothing was trained.

        Raises:
            RuntimeError: there is no optimizer, or nothing was kept in `sampling`.
        """
        if not requires_grad:
            if self.scheduler is not None:
                self.scheduler.step()
            return 0.0
        return self._update(trans, loss_scaler)

    @torch.enable_grad()
    def _update(self, trans: Tensor, loss_scaler: float = 1.0) -> float:
        if self.optimizer is None:
            raise RuntimeError("PropNetEstimator: want an optimizer to train with, got None when it was made")
        if not self.prop_cache:
            raise RuntimeError("PropNetEstimator: nothing to train: call sampling with requires_grad=True first")
        loss = self.compute_loss(trans, loss_scaler)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return float(loss.detach())


def get_proposal_requires_grad_fn(target: float = 5.0, num_steps: int = 1000) -> Callable[[int], bool]:
    """When to train the networks: in each step at first, later after every `target` steps.

    Args:
        target: steps between, from `num_steps` on.
        num_steps: training steps during which the distance grows from 0 to that.

    Returns:
        A function to be called with each training step, which returns whether to train in it.
    """
    since = 0

    def requires_grad(step: int) -> bool:
        nonlocal since
        due = since > min(step / num_steps, 1.0) * target
        since = 1 if due else since + 1
        return due

    return requires_grad


def _transform_stot(transform_type: Literal["uniform", "lindisp"], s_vals: Tensor, t_min: Any, t_max: Any) -> Tensor:
    """Distances of places s in [0, 1] between two planes, linear in the distance or in its inverse."""
    if transform_type == "uniform":
        return s_vals * t_max + (1 - s_vals) * t_min
    if transform_type == "lindisp":
        return 1 / (s_vals / t_max + (1 - s_vals) / t_min)
    raise ValueError(f"PropNetEstimator: sampling_type must be 'uniform' or 'lindisp', got {transform_type!r}")


def _at_edges(trans: Tensor) -> Tensor:
    """The distribution at the edges of intervals, of which the last ends with no light."""
    return 1 - torch.nn.functional.pad(trans, (0, 1))


def _pdf_loss(
    segments_query: RayIntervals,
    cdfs_query: Tensor,
    segments_key: RayIntervals,
    cdfs_key: Tensor,
    eps: float = 1e-7,
) -> Tensor:
    """The part of a fine distribution that a coarse one fails to bound, per interval (mip-NeRF 360, eq. 13)."""
    left, right = searchsorted(segments_key, segments_query)
    if segments_query.vals.dim() > 1:
        weights = cdfs_query.diff(dim=-1)
        left, right = left[..., :-1], right[..., 1:]
    else:
        is_left, is_right = segments_query.is_left, segments_query.is_right
        if is_left is None or is_right is None:
            raise ValueError("_pdf_loss: flattened segments_query must have is_left and is_right")
        weights = cdfs_query[is_right] - cdfs_query[is_left]
        left, right = left[is_left], right[is_right]
    return _exceeding(weights, cdfs_key.gather(-1, right) - cdfs_key.gather(-1, left), eps)


def _lossfun_outer(t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor) -> Tensor:
    """`_pdf_loss` of batched weights.

    Args:
        t, w: edges `[..., n + 1]` and weights `[..., n]` of the fine histogram.
        t_env, w_env: those of the coarse one, which should bound it.
    """
    cdfs = torch.nn.functional.pad(w_env.cumsum(dim=-1), (1, 0))
    # Of the coarse intervals those that overlap: from the last one that begins at or before the fine one's start, to
    # the first one that ends behind its end.
    last = w_env.shape[-1] - 1
    first = torch.searchsorted(t_env[..., :-1].contiguous(), t[..., :-1].contiguous(), right=True) - 1
    end = torch.searchsorted(t_env[..., 1:].contiguous(), t[..., 1:].contiguous(), right=True)
    bound = cdfs[..., 1:].gather(-1, end.clamp(0, last)) - cdfs[..., :-1].gather(-1, first.clamp(0, last))
    return _exceeding(w, bound, torch.finfo(t.dtype).eps)


def _exceeding(weights: Tensor, bound: Tensor, eps: float) -> Tensor:
    return (weights - bound).clamp(min=0).square() / (weights + eps)
