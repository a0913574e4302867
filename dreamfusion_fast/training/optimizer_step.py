"""The optimiser's step as a CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from dreamfusion_fast.gpu.capture import capturing

# Gradients are new tensors in each step, in memory that the allocator hands out again: mostly the same, at times one of
# a few. So many places are remembered, and captured when seen a second time.
_MAX_GRAPHS = 8


class CapturedStep:
    """`optimizer.step()` of a fused Adam: one launch, wherever parameters and gradients lie where they once lay.

    Gradients are read where the backward left them: to give them a place of their own would cost a pass over them.

    Args:
        optimizer: Adam, fused; the learning rates of its groups may change from step to step, all else stays.
        device: of its parameters. On a CPU each step is the optimiser's own.
    """

    def __init__(self, optimizer: torch.optim.Adam, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()
        self._rates = torch.zeros(len(optimizer.param_groups), device=device)

    def prepare(self) -> None:
        """Adam's state before its first step, as Adam itself makes it.

        Adam would make it group by group, between updates of parameters: memory that ran out there could not be undone.
        With its state at hand, a fused step allocates nothing.
        """
        if self._optimizer.state:
            return
        state = {}
        for parameter in self._parameters():
            state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self._optimizer.state.update(state)

    def __call__(self) -> None:
        """One step with the gradients that are there; `prepare` has been called."""
        if self._device.type != "cuda":
            self._optimizer.step()
            return
        groups, places = self._optimizer.param_groups, self._places()
        rates = torch.tensor([group["lr"] for group in groups], dtype=torch.float32)
        if places not in self._graphs:
            self._graphs[places] = None
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            for group, rate in zip(groups, rates.tolist(), strict=True):
                group["lr"] = rate  # as a graph reads it: a step is the same, captured or not
            self._optimizer.step()
            return
        self._graphs.move_to_end(places)
        self._rates.copy_(rates.pin_memory(), non_blocking=True)
        graph = self._graphs[places]
        if graph is None:
            graph = self._graphs[places] = self._capture()
        graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of the step, which reads learning rates on the GPU. Nothing is run yet."""
        groups = self._optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)  # the default stream cannot be captured
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"], group["capturable"] = rate, True
            with torch.cuda.stream(stream), capturing(graph):
                self._optimizer.step()
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable
        return graph

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _places(self) -> Hashable:
        """Where everything lies that a step reads and writes."""
        places: list[int | None] = []
        for parameter in self._parameters():
            grad = parameter.grad
            places += [parameter.data_ptr(), None if grad is None else grad.data_ptr()]
            if grad is not None:
                places += [value.data_ptr() for value in self._optimizer.state[parameter].values()]
        return tuple(places)
