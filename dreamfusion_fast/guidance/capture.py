"""A network evaluated as a CUDA graph: one launch in place of hundreds.

A diffusion model's U-Net at the batch of one guided view is bound by the time that the CPU takes to launch its
kernels. A captured graph replays them all at once, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Runs before a capture: libraries choose their algorithms and allocate their workspaces in the first ones.
_WARM_UPS = 3


class CapturedFunction:
    """`function(*tensors) -> tensor` without gradients, replayed from a CUDA graph per signature of its inputs.

    On other devices, and while somebody else captures, the function is called as it is.

    Args:
        function: launches the same kernels for inputs of the same shapes, dtypes and strides, whatever their values,
            and reads nothing on the host. Whatever else it reads (weights) must stay at its address.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graphs: dict[tuple[object, ...], _Captured] = {}
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, in memory of its own. All inputs have to be on one device."""
        if not inputs[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return self._function(*inputs)
        signature = tuple((x.device, x.dtype, x.shape, x.stride()) for x in inputs)
        captured = self._graphs.get(signature)
        if captured is None:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            captured = self._graphs[signature] = _Captured(self._function, inputs, self._pool)
        return captured.replay(inputs)


class _Captured:
    """One graph with the memory that it reads its inputs from and leaves its output in."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any) -> None:
        self._inputs = [torch.empty_like(x).copy_(x) for x in inputs]
        # Captures must not see the stream's other work, and the warm-ups must not see theirs.
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function(*self._inputs)
        torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self._output = function(*self._inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        return self._output.clone()
