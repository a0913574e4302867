"""What is added to a pipeline from files of its own: LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from dreamfusion_fast.errors import UserError, one_line
from dreamfusion_fast.guidance.config import GuidanceConfig, split_file
from dreamfusion_fast.guidance.models.lora import Lora, open_lora
from dreamfusion_fast.guidance.models.original_layout import unet_names

_CHANGED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

T = TypeVar("T")


class Additions:
    """LoRAs, in the order in which they are merged.

    Args:
        loras: checked against the pipeline.
    """

    def __init__(self, loras: Iterable[Lora] = ()):
        self._loras = tuple(loras)

    @classmethod
    def open(
        cls, config: GuidanceConfig, components: Iterable[str], skeleton: Callable[[str], torch.nn.Module]
    ) -> Additions:
        """Read and check the files that a config names.

        Args:
            config: its lora is followed.
            components: of the pipeline.
            skeleton: a component without weights.

        Raises:
            UserError: one of them cannot be read, or is not for this pipeline.
        """
        if not config.lora:
            return cls()
        models = {component: skeleton(component) for component in components if component in _CHANGED}
        shapes = {
            component: {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            for component, model in models.items()
        }
        aliases: dict[str, str] = {}
        if "unet" in models:
            unet: Any = models["unet"]
            layers = unet.config.layers_per_block
            modules = [name.removesuffix(".weight") for name in shapes["unet"]]
            if isinstance(layers, int):  # the original layout has no other
                aliases = {original: name for name, original in unet_names(modules, layers).items()}
        found = cls(_named("lora", text, partial(open_lora, text, shapes, aliases)) for text in config.lora)
        if config.text_dtype == "int8" and any(found._changing(name) for name in models if name != "unet"):
            raise UserError("guidance text_dtype int8: no LoRA can be merged into weights of 8 bits: use auto")
        return found

    def apply(self, component: str, model: torch.nn.Module, quantized: bool = False) -> None:
        """Change a component that was just loaded.

        Raises:
            ValueError: its weights are quantized, or as `Lora.merge` does.
        """
        loras = self._changing(component)
        if loras and quantized:
            raise ValueError("no LoRA can be merged into quantized weights")
        for lora in loras:
            lora.merge(component, model)

    def identity(self, components: Iterable[str]) -> str:
        """A string that changes with all that is added to the components; empty where nothing is."""
        components = list(components)
        changing = [lora for lora in self._loras if any(component in lora.pairs for component in components)]
        return "".join(f"+lora:{lora.digest}:{lora.scale!r}" for lora in changing)

    @property
    def files(self) -> dict[str, str]:
        """sha256 of the files, by their paths."""
        return {str(lora.path): lora.digest for lora in self._loras}

    def _changing(self, component: str) -> list[Lora]:
        return [lora for lora in self._loras if component in lora.pairs]


def _named(field: str, text: str, read: Callable[[], T]) -> T:
    """What is read, with the name of the file in errors."""
    try:
        return read()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        name = Path(split_file(text)[0])
        raise UserError(one_line(f"guidance {field} {str(name)!r}: {why or error}", 1000)) from error
