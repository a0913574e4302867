"""A grid and the MLP behind it in one piece, in half precision on a GPU: what most training steps are made of.

The grid is read from a float16 copy, features go to the MLP in float16, and their gradients come back in bfloat16, as
in the streaming renderer: half of the memory, and no gradient of score distillation is lost. A gradient that is to have
one of its own goes through the ops, which are differentiable twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.integrations.tinycudann.encodings import Grid, InputEncoding
from dreamfusion_fast.integrations.tinycudann.grid import encode_grid, tile_layout
from dreamfusion_fast.integrations.tinycudann.network import Mlp, fused_mlp
from dreamfusion_fast.ops.tiles import hash_grid as hash_grid_tile
from dreamfusion_fast.ops.tiles.buffers import MAX_SAMPLES
from dreamfusion_fast.ops.tiles.mlp import MlpGradients, prepared_backward, prepared_forward

_ALIGNED = 8  # samples: planes of so many times 16 bits begin at 16 bytes


def serves(encoding: InputEncoding, network: Mlp, x: Tensor) -> bool:
    """Whether :func:`grid_and_mlp` takes these inputs: its gradients reach the parameters, and not the inputs."""
    return (
        isinstance(encoding, Grid)
        and encoding.width == encoding.n_output
        and encoding.levels.n_dims == 3
        and network.fused_activation is not None
        and x.is_cuda
        and x.dtype == torch.float32
        and 0 < x.shape[0] <= MAX_SAMPLES
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def grid_and_mlp(encoding: Grid, network: Mlp, x: Tensor, of_encoding: Tensor, of_network: Tensor) -> Tensor:
    """The network's results before its last activation, ``[n, n_output]`` float32.

    Args:
        encoding, network, x: what :func:`serves` says yes to.
        of_encoding, of_network: their parameters, float32.
    """
    table = of_encoding.view(-1, encoding.levels.n_features)
    return _GridAndMlp.apply(x, table, encoding, network.fused_activation, *network.weights(of_network))


class _GridAndMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, encoding: Grid, activation: str, *weights: Tensor) -> Tensor:
        ctx.encoding, ctx.activation = encoding, activation
        points = _planes(x, 3, torch.float32)
        points.copy_(x)
        features = _planes(x, encoding.n_output, torch.float16)
        hash_grid_tile.encode(points, table.to(torch.float16), _layout(encoding, x), features)
        y = x.new_empty(x.shape[0], weights[-1].shape[0])
        prepared_forward(features, weights, None, activation, "float16", y, counted=False)(None)
        ctx.save_for_backward(points, features, table, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        points, features, table, *weights = ctx.saved_tensors
        encoding, activation = ctx.encoding, ctx.activation
        to_table, to_weights = ctx.needs_input_grad[1], any(ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():  # the gradient is to have one
            y = fused_mlp(_encoded(encoding, points, table), weights, activation, "float16")
            wanted = [tensor for tensor in (table, *weights) if tensor.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
            of_table, *of_weights = (next(found) if t.requires_grad else None for t in (table, *weights))
            return None, of_table, None, None, *of_weights
        grad_features = _planes(points, encoding.n_output, torch.bfloat16) if to_table else None
        gradients = MlpGradients(weights, None) if to_weights else None
        back = prepared_backward(
            features, weights, None, activation, "float16", grad_y, grad_features, gradients, counted=False
        )
        back(None)
        grad_table = None
        if grad_features is not None:
            grad_table = torch.zeros_like(table, memory_format=torch.contiguous_format)
            hash_grid_tile.scatter(grad_table, points, _layout(encoding, points), grad_features)
        to_layers: Sequence[Tensor | None] = [None] * len(weights) if gradients is None else gradients.result()[0]
        return None, grad_table, None, None, *to_layers


def _encoded(encoding: Grid, points: Tensor, table: Tensor) -> Tensor:
    return encode_grid(points, table, encoding.levels, encoding.smoothstep)


def _layout(encoding: Grid, like: Tensor) -> hash_grid_tile.HashGridTileLayout:
    return tile_layout(encoding.levels, encoding.smoothstep, like.device)


def _planes(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised ``[n, channels]``, a plane per channel, as the kernels of a GPU like it."""
    n = like.shape[0]
    return like.new_empty(channels, -(-n // _ALIGNED) * _ALIGNED, dtype=dtype)[:, :n].t()
