"""The regularisers beside the score distillation gradient, by the names that `LossConfig` has for their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.rendering import RenderOutput
from dreamfusion_fast.training.opaque import OpaqueThresholds, cross_entropy

_OPACITY_EPS = 0.01  # under the root of the opacity loss (DreamFusion, appendix A.2)


@dataclass(frozen=True, eq=False)
class RenderedViews:
    """A render and its layout, from which losses are computed.

    Attributes:
        output: of the render, for `batch * size * size` rays, views one after another.
        batch: number of views.
        size: height and width, pixels.
        opaque: the run's thresholds.
        own: the views that were rendered; the others' rays meet nothing.
    """

    output: RenderOutput
    batch: int
    size: int
    opaque: OpaqueThresholds
    own: slice

    @property
    def opacity(self) -> Tensor:
        """Of the pixels of the own views, `[n, size, size]`."""
        return self.output.opacity.view(self.batch, self.size, self.size)[self.own]

    @property
    def share(self) -> float:
        """Of the own views in the batch."""
        return (self.own.stop - self.own.start) / self.batch


@dataclass(frozen=True)
class Loss:
    """One regulariser.

    Attributes:
        of: its value, 0-dim, or None where the render did not compute what it needs.
        option: of `VolumeRenderer.render`, set where the loss has a weight.
        shown: whether it is computed, without a graph, where it has no weight, for the curves.
        of_own_views: whether `of` is a mean over the own views.
    """

    of: Callable[[RenderedViews], Tensor | None]
    option: str | None = None
    shown: bool = False
    of_own_views: bool = False


def _opacity(views: RenderedViews) -> Tensor:
    return (views.opacity.square() + _OPACITY_EPS).sqrt().mean()


def _ray_entropy(views: RenderedViews) -> Tensor:
    opacity = views.opacity.clamp(1e-5, 1.0 - 1e-5)
    return -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log()).mean()


def _binary(views: RenderedViews) -> Tensor:
    opacity = views.opacity
    return cross_entropy(opacity.reshape(-1), views.opaque.wanted(opacity).view(-1), 1e-5)


LOSSES: Mapping[str, Loss] = {
    "opacity": Loss(_opacity, shown=True, of_own_views=True),
    "ray_entropy": Loss(_ray_entropy, shown=True, of_own_views=True),
    "binary": Loss(_binary, of_own_views=True),
    "sample_entropy": Loss(lambda views: views.output.sample_entropy_loss, option="with_sample_entropy"),
    "distortion": Loss(lambda views: views.output.distortion_loss, option="with_distortion"),
    # Of the normals, in steps whose shading has computed them.
    "orientation": Loss(lambda views: views.output.orientation_loss, shown=True),
}


def render_options(weights: Mapping[str, float]) -> dict[str, bool]:
    """The options of `VolumeRenderer.render` that losses with a weight need."""
    return {loss.option: True for name, loss in LOSSES.items() if loss.option is not None and weights[name]}


def regularisers(views: RenderedViews, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Values by name, with a graph where they have a weight: sums over the rays of the own views, over all rays."""
    values = {}
    for name, loss in LOSSES.items():
        if not weights[name] and not loss.shown:
            continue
        with torch.set_grad_enabled(weights[name] != 0):
            value = loss.of(views)
            if value is not None and loss.of_own_views and views.share < 1:
                value = value * views.share
        if value is not None:
            values[name] = value
    return values
