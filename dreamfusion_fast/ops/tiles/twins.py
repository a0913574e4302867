"""PyTorch twins of the functions of an encoding over a tile of samples, the same for every encoding.

They serve any float dtypes and any device, and wait for a GPU. What differs, the layout knows: its `encoding` is a
function of positions. `ops.tiles.hash_grid` and `ops.tiles.triplane` describe the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dreamfusion_fast.ops.tiles.buffers import live, write_back


class TileLayout(Protocol):
    """How a table is read."""

    def encoding(self, table: Tensor, n: int, /) -> Callable[[Tensor], Tensor]: ...


def encode_reference(
    positions: Tensor, table: Tensor, layout: TileLayout, features: Tensor, count: Tensor | None = None
) -> None:
    """The PyTorch twin of `encode`."""
    n = live(positions, count)
    write_back(layout.encoding(table, n)(positions[:n]), features)


def directional_derivative_reference(
    direction: Tensor,
    positions: Tensor,
    table: Tensor,
    layout: TileLayout,
    derivative: Tensor,
    count: Tensor | None = None,
) -> None:
    """The PyTorch twin of `directional_derivative`."""
    n = live(positions, count)
    write_back(torch.func.jvp(layout.encoding(table, n), (positions[:n],), (direction[:n],))[1], derivative)


def derivative_before_scatter_reference(
    direction: Tensor, grad_of_features: Tensor, grad_table: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `derivative_before_scatter`: it leaves all of the second order to `scatter`."""
    directional_derivative_reference(direction, *others)
    return direction, grad_of_features


def position_gradient_reference(
    grad_features: Tensor,
    positions: Tensor,
    table: Tensor,
    layout: TileLayout,
    gradient: Tensor,
    count: Tensor | None = None,
) -> None:
    """The PyTorch twin of `position_gradient`."""
    n = live(positions, count)
    encoding, backward = torch.func.vjp(layout.encoding(table, n), positions[:n])[:2]
    write_back(backward(grad_features[:n, : encoding.shape[1]].to(encoding.dtype))[0], gradient)


def scatter_reference(
    grad_table: Tensor,
    positions: Tensor,
    layout: TileLayout,
    grad_features: Tensor,
    count: Tensor | None = None,
    direction: Tensor | None = None,
    grad_of_features: Tensor | None = None,
) -> None:
    """The PyTorch twin of `scatter`. Encodings are linear in the table, so that any table has the gradient."""
    n, tangent = live(positions, count), positions if direction is None else direction

    def both_orders(table: Tensor) -> Tensor:
        encoding, derivative = torch.func.jvp(layout.encoding(table, n), (positions[:n],), (tangent[:n],))[:2]
        total = (encoding * grad_features[:n, : encoding.shape[1]]).sum()
        if grad_of_features is not None:
            total = total + (derivative * grad_of_features[:n, : derivative.shape[1]]).sum()
        return total

    grad_table += torch.func.grad(both_orders)(grad_table)
