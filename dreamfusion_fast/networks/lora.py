"""Low-rank adapters in a frozen network, turned on for one evaluation at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError

ATTENTION = r".*\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
"""The projections of attention, by the names that diffusers gives them."""


class LoraAdapters:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) in the layers of a network, by peft: W + B A, B zero at first.

    They are off except within `on`. Off, a layer calls what it was before, so that nothing of the network's results or
    of CUDA graphs that were captured of it changes. They are float32, float64 in a network of float64.

    Args:
        network: changed in place, once.
        rank: of A and B.
        targets: regular expression of the names of the layers.
        generator: of A, uniform within 1 / sqrt(inputs) as in a new linear layer; on the CPU.

    Attributes:
        parameters: name -> A [rank, inputs] and B [outputs, rank], in the order of the network's layers. Names have "/"
            where the network's have ".".

    Raises:
        UserError: the network has no such layers.
    """

    def __init__(
        self, network: nn.Module, rank: int, targets: str = ATTENTION, generator: torch.Generator | None = None
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            raise ValueError("network: got one with adapters, want one without")
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        try:
            with torch.random.fork_rng(devices=[]):  # peft draws from torch's own generator
                inject_adapter_in_model(config, network)
        except ValueError as error:
            raise UserError(f"the network has no layers called {targets}: it cannot be adapted by LoRA") from error
        self._layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                layer, _, kind = name.removesuffix(".default.weight").rpartition(".lora_")
                parameter.data = self._start(parameter, kind, generator)
                self.parameters[f"{layer}.{kind}".replace(".", "/")] = parameter
        self._turn(False)

    @staticmethod
    def _start(parameter: nn.Parameter, kind: str, generator: torch.Generator | None) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if kind == "B":
            return torch.zeros_like(parameter, dtype=dtype)
        bound = parameter.shape[1] ** -0.5
        values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        return values.to(parameter.device, dtype)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it the network is the adapted one."""
        self._turn(True)
        try:
            yield
        finally:
            self._turn(False)

    def _turn(self, on: bool) -> None:
        for layer in self._layers:
            layer.enable_adapters(on)
        for parameter in self.parameters.values():  # peft freezes what it turns off, and graphs may be waiting
            parameter.requires_grad_(True)
