"""Networks as CUDA graphs, with and without a gradient: one launch in place of hundreds.

A diffusion model's U-Net at the batch of one guided view is bound by the time that the CPU takes to launch its
kernels. A captured graph replays them all at once, with the same results.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Runs before a capture: libraries choose their algorithms and allocate their workspaces in the first ones.
_WARM_UPS = 3


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """`torch.cuda.graph` without its wait for the GPU and its garbage collection.

    Args:
        graph: what is captured, on the current stream, which must not be the default one.
        pool: memory to share with other graphs.
    """
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()


class CapturedFunction:
    """`function(*tensors) -> tensor` without gradients, replayed from a CUDA graph per signature of its inputs.

    On other devices, and while somebody else captures, the function is called as it is.

    Args:
        function: launches the same kernels for inputs of the same shapes, dtypes and strides, whatever their values,
            and reads nothing on the host. Whatever else it reads (weights) must stay at its address.
        enabled: False: call it as it is; may be set at any time.
    """

    def __init__(self, function: Callable[..., Tensor], enabled: bool = True) -> None:
        self._function, self.enabled = function, enabled
        self._graphs: dict[tuple[object, ...], _Captured] = {}
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, in memory of its own. All inputs have to be on one device."""
        if not self.enabled or not inputs[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return self._function(*inputs)
        signature = tuple((x.device, x.dtype, x.shape, x.stride()) for x in inputs)
        captured = self._graphs.get(signature)
        if captured is None:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            _warm_up(inputs[0].device, lambda: self._function(*inputs))
            captured = self._graphs[signature] = _Captured(self._function, inputs, self._pool)
        return captured.replay(inputs)

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._pool = None


class _Captured:
    """One graph of a warm function, with the memory that it reads its inputs from and leaves its output in."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any) -> None:
        self._inputs = [torch.empty_like(x).copy_(x) for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=_capture_stream(inputs[0].device)):
            self.output = function(*self._inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        return self.output.clone()


class CapturedPair:
    """A function and its gradient, each replayed from a CUDA graph per signature of the input: one differentiable call.

    On other devices, while somebody else captures, and for a second call before the first one went backward, both are
    called as they are.

    Args:
        forward: `x -> (y, kept)`; both without gradients of their own, and captured as `CapturedFunction` says.
        backward: `(grad_y, kept) -> grad_x`; may use up what is kept.
    """

    def __init__(
        self, forward: Callable[[Tensor], tuple[Tensor, Any]], backward: Callable[[Tensor, Any], Tensor]
    ) -> None:
        self.forward, self.backward = forward, backward
        self._graphs: dict[tuple[object, ...], _CapturedPair] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """y in memory of its own, differentiable to x once."""
        graphs = None
        if x.is_cuda and not torch.cuda.is_current_stream_capturing() and x.requires_grad and torch.is_grad_enabled():
            signature = (x.device, x.dtype, x.shape, x.stride())
            if signature not in self._graphs:
                self._graphs[signature] = _CapturedPair(self, x.detach())
            graphs = self._graphs[signature]
            if graphs.waiting:
                graphs = None
        return _Pair.apply(x, self, graphs)

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()


class _CapturedPair:
    """Two graphs, of which the second one reads what the first one left.

    Attributes:
        waiting: whether a forward was replayed whose backward is yet to come.
    """

    def __init__(self, pair: CapturedPair, x: Tensor) -> None:
        self._user: weakref.ref[Any] | None = None
        pool = torch.cuda.graph_pool_handle()
        left: list[Any] = []

        def there(x: Tensor) -> Tensor:
            y, kept = pair.forward(x)
            left.append(kept)
            return y

        def back(grad_y: Tensor) -> Tensor:
            return pair.backward(grad_y, left.pop())

        with torch.no_grad():
            _warm_up(x.device, lambda: back(torch.ones_like(there(x))))
            self._forward = _Captured(there, (x,), pool)
            self._backward = _Captured(back, (self._forward.output,), pool)

    @property
    def waiting(self) -> bool:
        return self._user is not None and self._user() is not None

    def forward(self, x: Tensor, user: object) -> Tensor:
        y = self._forward.replay((x,))
        self._user = weakref.ref(user)
        return y

    def backward(self, grad_y: Tensor) -> Tensor:
        self._user = None
        return self._backward.replay((grad_y,))


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: for each stream that it has worked on, cuBLAS keeps a workspace, 32 MiB on an H100."""
    return torch.cuda.Stream(device)


def _warm_up(device: torch.device, run: Callable[[], object]) -> None:
    """Run on the stream of the captures, which must not see the current stream's other work."""
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)


class _Call:
    """Stands for one call for as long as its graph lives."""


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: CapturedPair, graphs: _CapturedPair | None) -> Tensor:
        ctx.pair, ctx.graphs, ctx.done = pair, graphs, False
        if graphs is not None:
            ctx.call = _Call()
            return graphs.forward(x, ctx.call)
        y, ctx.kept = pair.forward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        if ctx.done:
            raise RuntimeError("backward a second time: what it needs is used up by the first one")
        ctx.done = True
        if ctx.graphs is not None:
            return ctx.graphs.backward(grad_y), None, None
        kept, ctx.kept = ctx.kept, None
        return ctx.pair.backward(grad_y, kept), None, None
