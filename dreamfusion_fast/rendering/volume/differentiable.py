"""Streamed renders as one differentiable function, whichever way forward and backward are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dreamfusion_fast.ops.tiles.mlp import MlpGradients
from dreamfusion_fast.ops.tiles.ray_sums import COLOR, DEPTH, LOSSES, N_SUMS, NORMAL, OPTICAL_DEPTH
from dreamfusion_fast.rendering.volume.prepared import RenderOutput


class FieldRender(Protocol):
    """One render: `StreamedRender` says what its members are."""

    normals: bool
    distortion: bool
    entropy: bool
    samples: int | Tensor
    overflowed: Tensor | None

    @property
    def channels(self) -> Mapping[str, int]: ...

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    @property
    def guarded(self) -> tuple[Tensor | None, ...]: ...

    def forward(self, training: bool) -> Tensor: ...

    def zero_grad_sums(self) -> Tensor: ...

    def backward(
        self, sums: Tensor, grad_sums: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, MlpGradients | None]: ...


def differentiable_output(render: FieldRender) -> RenderOutput:
    """Run a render, differentiable to the field's parameters. Raises what its `forward` does."""
    # Inside forward, gradients are always off.
    training = torch.is_grad_enabled()
    color, opacity, depth, normal, losses, channels = _Streamed.apply(render, training, *render.parameters)
    orientation, distortion, entropy = (None, None, None) if losses is None else (losses / max(len(color), 1)).unbind()
    named = {}
    if channels is not None:
        named = dict(zip(render.channels, channels.split([*render.channels.values()], dim=1), strict=True))
    return RenderOutput(
        color=color,
        opacity=opacity,
        depth=depth,
        normal=normal,
        orientation_loss=orientation if render.normals else None,
        distortion_loss=distortion if render.distortion else None,
        sample_entropy_loss=entropy if render.entropy else None,
        samples=render.samples,
        overflowed=render.overflowed,
        channels=named,
    )


class _Streamed(torch.autograd.Function):
    """Colour `[n, 3]`, opacity `[n]`, depth `[n]`, normal `[n, 3]`, losses `[3]` and channels `[n, c]`; the last three
    None unless wanted."""

    @staticmethod
    def forward(ctx: Any, render: FieldRender, training: bool, *parameters: Tensor) -> tuple[Tensor | None, ...]:
        ctx.render = render
        sums = render.forward(training and any(ctx.needs_input_grad))
        # Torch tells if any of this was changed in between.
        ctx.save_for_backward(sums, *render.guarded, *parameters)
        ctx.set_materialize_grads(False)
        losses = render.normals or render.distortion or render.entropy
        return (
            sums[:, COLOR],
            -torch.expm1(-sums[:, OPTICAL_DEPTH]),
            sums[:, DEPTH],
            sums[:, NORMAL] if render.normals else None,
            sums[:, LOSSES].sum(dim=0) if losses else None,
            sums[:, N_SUMS:] if render.channels else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sums = ctx.saved_tensors[0]
        color, opacity, depth, normal, losses, channels = grads
        grad_sums = ctx.render.zero_grad_sums()
        if color is not None:
            grad_sums[:, COLOR] = color
        if opacity is not None:
            torch.mul(opacity, torch.exp(-sums[:, OPTICAL_DEPTH]), out=grad_sums[:, OPTICAL_DEPTH])
        if depth is not None:
            grad_sums[:, DEPTH] = depth
        if normal is not None:
            grad_sums[:, NORMAL] = normal
        if losses is not None:
            grad_sums[:, LOSSES] = losses
        if channels is not None:
            grad_sums[:, N_SUMS:] = channels
        needs = (ctx.needs_input_grad[2], any(ctx.needs_input_grad[3:]))
        grad_table, gradients = ctx.render.backward(sums, grad_sums, needs)
        layers: Sequence[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        if gradients is not None:
            weights, biases = gradients.result()
            assert biases is not None
            layers = [*weights, *biases]
        return None, None, grad_table, *layers
