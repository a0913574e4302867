"""What is added to a pipeline from files of its own: LoRAs and textual inversions."""

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
from dreamfusion_fast.guidance.models.textual_inversion import TextualInversion, Words, open_inversion

_CHANGED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

T = TypeVar("T")


class Additions:
    """LoRAs, in the order in which they are merged, and textual inversions.

    Args:
        loras: checked against the pipeline.
        inversions: as well.

    Raises:
        ValueError: two inversions are for one word.
    """

    def __init__(self, loras: Iterable[Lora] = (), inversions: Iterable[TextualInversion] = ()):
        self._loras = tuple(loras)
        self.words = Words(tuple(inversions))

    @classmethod
    def open(
        cls, config: GuidanceConfig, components: Iterable[str], skeleton: Callable[[str], torch.nn.Module]
    ) -> Additions:
        """Read and check the files that a config names.

        Args:
            config: its lora and textual_inversion are followed.
            components: of the pipeline.
            skeleton: a component without weights.

        Raises:
            UserError: one of them cannot be read, or is not for this pipeline.
        """
        if not config.lora and not config.textual_inversion:
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
        widths: dict[str, int] = {}
        for component, model in models.items():
            if type(model).__name__.startswith("CLIPText"):
                encoder: Any = model
                widths[component] = encoder.get_input_embeddings().weight.shape[1]
        loras = [_named("lora", text, partial(open_lora, text, shapes, aliases)) for text in config.lora]
        inversions = [
            _named("textual_inversion", text, partial(open_inversion, text, widths))
            for text in config.textual_inversion
        ]
        found = _named("textual_inversion", ", ".join(config.textual_inversion), partial(cls, loras, inversions))
        if config.text_dtype == "int8" and any(found._changing(name) for name in models if name != "unet"):
            raise UserError("guidance text_dtype int8: no LoRA can be merged into weights of 8 bits: use auto")
        return found

    def apply(self, component: str, model: torch.nn.Module, quantized: bool = False) -> None:
        """Change a model that was just loaded, a text encoder after its tokenizer.

        Raises:
            ValueError: its weights are quantized, a file has changed, or as `Lora.merge` does.
        """
        loras = self._changing(component)
        if loras and quantized:
            raise ValueError("no LoRA can be merged into quantized weights")
        for lora in loras:
            lora.merge(component, model)
        if self._has_words(component):
            self.words.teach_encoder(component.removeprefix("text_encoder"), model)

    def apply_to_tokenizer(self, component: str, tokenizer: Any) -> None:
        """The same of a tokenizer."""
        suffix = component.removeprefix("tokenizer")
        if self._has_words(f"text_encoder{suffix}"):
            self.words.teach_tokenizer(suffix, tokenizer)

    def identity(self, components: Iterable[str]) -> str:
        """A string that changes with all that is added to the components; empty where nothing is."""
        components = list(components)
        changing = [lora for lora in self._loras if any(component in lora.pairs for component in components)]
        learned = [each for each in self.words.inversions if any(component in each.keys for component in components)]
        return "".join(f"+lora:{lora.digest}:{lora.scale!r}" for lora in changing) + "".join(
            f"+inversion:{inversion.digest}:{inversion.word!r}" for inversion in learned
        )

    @property
    def files(self) -> dict[str, str]:
        """sha256 of the files, by their paths."""
        loras = {str(lora.path): lora.digest for lora in self._loras}
        return loras | {str(inversion.path): inversion.digest for inversion in self.words.inversions}

    def _changing(self, component: str) -> list[Lora]:
        return [lora for lora in self._loras if component in lora.pairs]

    def _has_words(self, component: str) -> bool:
        return any(component in inversion.keys for inversion in self.words.inversions)


def _named(field: str, text: str, read: Callable[[], T]) -> T:
    """What is read, with the name of the file in errors."""
    try:
        return read()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        name = Path(split_file(text)[0])
        raise UserError(one_line(f"guidance {field} {str(name)!r}: {why or error}", 1000)) from error
