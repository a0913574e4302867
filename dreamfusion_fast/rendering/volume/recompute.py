"""Run functions without keeping their activations, and recompute those in backward.

torch.utils.checkpoint serves the same end, but a function that differentiates inside itself (analytic normals) makes
its non-reentrant form recompute in forward already, and its reentrant form bypasses torch.autograd.grad.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils.weak import TensorWeakRef

Run = Callable[..., tuple[Tensor, ...]]
Autocasts = Sequence[tuple[str, bool, torch.dtype]]

# The node of a leaf tensor.
_AccumulateGrad = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


class Recomputation:
    """Calls of functions of which one at most has its activations at any time.

    What a function reads besides its arguments is not asked, but looked up in the graph of its results, which is then
    thrown away. Mostly this graph ends in leaf tensors. But weights that another network makes have a graph of their
    own, for which backward must come when all calls are through. So there the function's graph has to stay, without
    what its nodes have saved; which costs another pass in forward.
    """

    def __init__(self) -> None:
        self._filled: list[weakref.ref[_Saved]] = []

    def __call__(self, run: Run, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """`run(*inputs)` with the same gradients, to `inputs` and all else that it reads, holding only what it reads.

        Args:
            run: deterministic function.
            inputs: its arguments; None is passed on.

        Raises:
            RuntimeError: in backward, a leaf tensor that `run` reads was modified in between, or `run` does not do the
                same as before.
        """
        own = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        autocasts = _autocasts(inputs)
        # On one thread, nodes are numbered in the order in which they are made, also those of derivatives inside `run`.
        # Backward takes them in the opposite order, call by call.
        with torch.autograd.set_multithreading_enabled(False):
            first = _number(torch.zeros((), requires_grad=True).clone())
            results = _run(run, own, autocasts)
            leaves, goes_on = _ends(results, first)
            if goes_on:
                del results
                return self._emptied(run, inputs, leaves, autocasts)
        outputs = tuple(result.detach() for result in results)
        given = {id(t) for t in own}
        found = [TensorWeakRef(leaf) for leaf in leaves if id(leaf) not in given]
        # Without the graph, leaves that `run` made itself are gone: the positions that normals are derivatives to.
        del results, leaves
        outer = [leaf for leaf in (ref() for ref in found) if leaf is not None]
        return _Recomputed.apply(partial(_run, run, autocasts=autocasts), outputs, len(inputs), *inputs, *outer)

    def _emptied(
        self, run: Run, inputs: Sequence[Tensor | None], leaves: Sequence[Tensor], autocasts: Autocasts
    ) -> tuple[Tensor, ...]:
        """`run(*inputs)` with its graph, whose saved tensors are let go and made again once backward wants one."""
        saved: list[weakref.ref[_Saved]] = []
        versions = [leaf._version for leaf in leaves]

        def pack(tensor: Tensor) -> _Saved:
            item = _Saved(tensor.detach())
            saved.append(weakref.ref(item))
            return item

        def unpack(item: _Saved) -> Tensor:
            if item.tensor is None:
                fill()
            assert item.tensor is not None
            return item.tensor

        def fill() -> None:
            self._empty()
            for leaf, version in zip(leaves, versions, strict=True):
                if leaf._version != version:
                    raise RuntimeError(
                        f"a tensor {list(leaf.shape)} that the field reads has been modified by an inplace operation "
                        "between forward and backward"
                    )
            again: list[Tensor] = []
            own = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]

            def keep(tensor: Tensor) -> Tensor:
                again.append(tensor.detach())
                return again[-1]

            with saved_tensors_hooks(keep, lambda tensor: tensor):
                _run(run, own, autocasts)
            if len(again) != len(saved):
                raise RuntimeError(
                    f"field: saved {len(again)} tensors when it was recomputed and {len(saved)} before, want a field "
                    "that does the same at each call"
                )
            for ref, tensor in zip(saved, again, strict=True):
                if (item := ref()) is not None:
                    item.tensor = tensor
            self._filled = saved

        with saved_tensors_hooks(pack, unpack):
            outputs = _run(run, inputs, autocasts)
        self._filled = saved
        self._empty()
        return outputs

    def _empty(self) -> None:
        for ref in self._filled:
            if (item := ref()) is not None:
                item.tensor = None
        self._filled = []


class _Saved:
    """A tensor that a node of a graph has saved, while there is one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


def _number(tensor: Tensor) -> int:
    assert tensor.grad_fn is not None
    return tensor.grad_fn._sequence_nr()


def _ends(outputs: Sequence[Tensor], first: int) -> tuple[list[Tensor], bool]:
    """Leaf tensors in the part of the graph of `outputs` that was made since node number `first`, without repetition,
    and whether the graph goes on beyond that part."""
    pending: list[Any] = [t.grad_fn for t in outputs]
    leaves: list[Tensor] = []
    goes_on = False
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, _AccumulateGrad):
            leaves.append(node.variable)  # type: ignore[attr-defined]
        elif node._sequence_nr() < first:
            goes_on = True
        else:
            pending.extend(next_node for next_node, _ in node.next_functions)
    return leaves, goes_on


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Run, outputs: tuple[Tensor, ...], n_inputs: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.n_inputs = run, n_inputs
        # Saving the leaves holds no extra memory and makes torch notice in-place changes before backward.
        ctx.save_for_backward(*tensors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        inputs = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(saved[: ctx.n_inputs], needed, strict=False)
        ]
        outputs = ctx.run(inputs)
        leaves = [*inputs, *saved[ctx.n_inputs :]]
        wanted = [i for i, need in enumerate(needed) if need]
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
        return None, None, None, *results


def _run(run: Run, inputs: Sequence[Tensor | None], autocasts: Autocasts) -> tuple[Tensor, ...]:
    """`run(*inputs)` with gradients and these autocasts."""
    torch.clear_autocast_cache()  # in it are nodes of the graph of another call
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for kind, enabled, dtype in autocasts:
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
        return run(*inputs)


def _autocasts(tensors: Sequence[Tensor | None]) -> Autocasts:
    """Device kind, whether autocast is on there, and its type, where there are tensors."""
    kinds = sorted({t.device.type for t in tensors if t is not None})
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
