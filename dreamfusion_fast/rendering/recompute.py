"""Run a function without keeping its activations and recompute it in backward.

torch.utils.checkpoint serves the same end, but a function that differentiates inside itself (analytic normals) makes
its non-reentrant form recompute in forward already, and its reentrant form bypasses torch.autograd.grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def recomputed(
    run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], trainable: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`run(*inputs)` with the same gradients, holding only `inputs`.

    Args:
        run: deterministic function of `inputs` and of the `trainable` tensors that it refers to.
        inputs: its arguments; None is passed on.
        trainable: leaf tensors that `run` reads besides its arguments and that may need gradients.

    Raises:
        RuntimeError: in backward, `run` turns out to read a parameter that is not among `trainable`, or one of the
            tensors was modified in between.
    """
    return _Recomputed.apply(run, len(inputs), *inputs, *trainable)


def trainable_leaves(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Leaf tensors requiring gradients in the autograd graphs of `outputs`, without repetition."""
    pending: list[Any] = [t.grad_fn for t in outputs if t is not None]
    leaves = {id(t): t for t in outputs if t is not None and t.grad_fn is None and t.requires_grad}
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        pending.extend(next_node for next_node, _ in node.next_functions)
    return list(leaves.values())


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, ...]], n_inputs: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.n_inputs = run, n_inputs
        # Saving the trainable tensors holds no extra memory and makes torch notice in-place changes before backward.
        ctx.save_for_backward(*tensors)
        ctx.autocasts = [_autocast_state(kind) for kind in _device_kinds(tensors)]
        return run(*tensors[:n_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = [
            t.detach().requires_grad_(ctx.needs_input_grad[2 + i]) if t is not None else None
            for i, t in enumerate(saved[: ctx.n_inputs])
        ]
        outputs = _run_again(ctx.run, inputs, ctx.autocasts)
        leaves = [*inputs, *saved[ctx.n_inputs :]]
        _check_complete(outputs, leaves)
        wanted = [i for i, leaf in enumerate(leaves) if leaf is not None and ctx.needs_input_grad[2 + i]]
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        results: list[Tensor | None] = [None] * len(leaves)
        if pairs and wanted:
            values = torch.autograd.grad(
                [out for out, _ in pairs],
                [leaves[i] for i in wanted],
                [grad for _, grad in pairs],
                allow_unused=True,
            )
            for i, value in zip(wanted, values, strict=True):
                results[i] = value
        return None, None, *results


def _run_again(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    autocasts: list[tuple[str, bool, torch.dtype]],
) -> tuple[Tensor, ...]:
    contexts: list[AbstractContextManager[Any]] = [
        torch.autocast(kind, enabled=enabled, dtype=dtype) for kind, enabled, dtype in autocasts
    ]
    with torch.enable_grad():
        for context in contexts:
            context.__enter__()
        try:
            return run(*inputs)
        finally:
            for context in reversed(contexts):
                context.__exit__(None, None, None)


def _check_complete(outputs: Sequence[Tensor], known: Sequence[Tensor | None]) -> None:
    known_ids = {id(t) for t in known if t is not None}
    for leaf in trainable_leaves(outputs):
        # Leaves that are no parameters are made inside `run`: the positions that normals are derivatives to.
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known_ids:
            raise RuntimeError(
                f"the field reads a parameter of shape {list(leaf.shape)} that is not among its parameters(), so its "
                "gradient would be lost: register it in the field, or raise RendererConfig.max_samples_per_chunk"
            )


def _device_kinds(tensors: Sequence[Tensor | None]) -> list[str]:
    return sorted({t.device.type for t in tensors if t is not None})


def _autocast_state(kind: str) -> tuple[str, bool, torch.dtype]:
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
