"""Checkpoints of Stable Diffusion and SDXL in one safetensors file, in the original layout, as the sites have them.

Such a file holds weights. Configurations come from `single_file_configs`, or from the pipeline that is named as its
base, and so does the vocabulary of CLIP, which otherwise comes from the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.errors import UserError, one_line
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.models import pipeline_classes
from dreamfusion_fast.guidance.models.hub import HubError, hub_file
from dreamfusion_fast.guidance.models.original_layout import (
    open_clip_name,
    plain_text_name,
    unet_names,
    vae_name,
)
from dreamfusion_fast.guidance.models.pipeline_files import content_hash
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.models.single_file_configs import CONFIGS

_UNET = "model.diffusion_model."
_VAES = ("first_stage_model.", "vae.")
# Of the encoder of SDXL that is CLIP, of that of Stable Diffusion 1, and the same from before transformers 4.
_CLIPS = (
    "conditioner.embedders.0.transformer.text_model.",
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.transformer.",
)
_OPEN_CLIPS = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}
_REFINER = "conditioner.embedders.0.model."
_VOCABULARY = "openai/clip-vit-large-patch14"
_VOCABULARY_FILES = ("vocab.json", "merges.txt")
_MOST_TENSORS = 20_000
_NAMED = 3


@dataclass(frozen=True)
class _Stored:
    """Where a weight is in the file: its name there, which third of it, and whether it is transposed."""

    key: str
    third: int | None = None
    transposed: bool = False

    def taken(self, value: Tensor, shape: torch.Size) -> Tensor:
        """The weight; a convolution of 1 x 1 may be a linear layer. Raises ValueError for another shape."""
        if self.third is not None and len(value) % 3 == 0:
            value = value.chunk(3)[self.third]
        if self.transposed:
            value = value.T
        if list(value.shape) != list(shape) and list(value.shape) != [*shape, 1, 1]:
            raise ValueError(f"{one_line(self.key, 100)} is {list(value.shape)} in place of {list(shape)}")
        return value.reshape(shape).contiguous()


class SingleFileSource(PipelineSource):
    """A pipeline whose weights are in one file.

    Args:
        path: of the file.
        config: its base is followed.
        base: of the pipeline that the config's base names, None: one of `CONFIGS` does or it names none.

    Raises:
        UserError: no safetensors file, or of a model that is not served.
    """

    def __init__(self, path: Path, config: GuidanceConfig, base: PipelineSource | None = None):
        self._path = path
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._base = base
        self._base_name = config.base
        self._config = config
        super().__init__(config.name, config)

    def _find(self) -> None:
        """Reads what tensors there are."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._path), framework="pt") as file:
                names = sorted(file.keys())
                if len(names) > _MOST_TENSORS:
                    raise ValueError(f"it holds {len(names)} tensors, want at most {_MOST_TENSORS}")
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise self.error(f"it is no safetensors file: {one_line(error)}") from error
        if self._base is None:
            self._base = _HeldSource(self._base_name or self._model(), self._config)

    def _model(self) -> str:
        """The model's short name."""
        if self._holds(_OPEN_CLIPS["text_encoder_2"]):
            return "sdxl"
        if self._holds(_REFINER):
            raise self.error(
                "it has SDXL's second text encoder alone, as its refiner does, which only improves pictures of the "
                "base model: name the base model"
            )
        if self._holds(_OPEN_CLIPS["text_encoder"]):
            raise self.error(
                "it is of Stable Diffusion 2, and does not say of which: name stable-diffusion (512^2, epsilon) or "
                "stable-diffusion-2.1 (768^2, v-prediction) as guidance base"
            )
        if self._holds(_UNET) and not any(map(self._holds, _CLIPS)):
            raise self.error("it holds no text encoder: the whole checkpoint is wanted, or a pipeline in a folder")
        return "stable-diffusion-1.5"

    def _holds(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._shapes)

    @property
    def _whole(self) -> PipelineSource:
        assert self._base is not None
        return self._base

    def _read_index(self) -> dict[str, Any]:
        return self._whole.index

    def _json(self, relative: str) -> dict[str, Any]:
        content = self._whole._json(relative)
        if relative.startswith("scheduler/"):  # what trainers of SDXL leave in a file, without contents that matter
            if "v_pred" in self._shapes:
                content = content | {"prediction_type": "v_prediction"}
            if "ztsnr" in self._shapes:
                content = content | {"rescale_betas_zero_snr": True}
        return content

    def _file(self, relative: str) -> Path:
        return self._whole._file(relative)

    def _files_in(self, component: str) -> list[str] | None:
        return self._whole._files_in(component)

    def check_tokenizer(self, component: str) -> None:
        self._whole.check_tokenizer(component)

    def warn_of_adapters(self) -> None:
        """None lie beside a file."""

    def _identity(self, components: list[str]) -> str:
        return f"{content_hash(self._path)}:{self._whole.identity(components)}"

    @property
    def files(self) -> dict[str, str]:
        """See `PipelineSource.files`: with its own."""
        return {str(self._path): content_hash(self._path), **super().files}

    def check_weights(self, component: str) -> None:
        """Raise UserError if the file lacks weights of a component, or they have other shapes."""
        if "edm_mean" in self._shapes:
            raise self.error("its latents have a mean and deviation per channel, which is not served")
        missing, wrong, total = [], [], 0
        stored = self._stored(component)
        for name, parameter in self.skeleton(component).named_parameters():
            total += 1
            place = stored.get(name)
            if place is None or place.key not in self._shapes:
                missing.append(name if place is None else place.key)
                continue
            try:
                place.taken(torch.empty(self._shapes[place.key], device="meta"), parameter.shape)
            except ValueError as error:
                wrong.append(str(error))
        if len(missing) == total:
            raise self.error(f"it holds no {component}: the whole checkpoint is wanted, or a pipeline in a folder")
        faults = [
            f"{what} {len(some)} of its tensors ({', '.join(some[:_NAMED])}{', ...' if len(some) > _NAMED else ''})"
            for what, some in (("missing are", missing), ("of another shape are", wrong))
            if some
        ]
        if faults:
            raise self.error(f"the weights of {component} are incomplete or another model's: {'; '.join(faults)}")

    def _stored(self, component: str) -> Mapping[str, _Stored]:
        """Where the weights of a component are, by diffusers' and transformers' names."""
        names = [name for name, _ in self.skeleton(component).named_parameters()]
        if component == "unet":
            layers = self.config("unet").get("layers_per_block", 2)
            if not isinstance(layers, int):
                raise self.error(f"the unet's layers_per_block must be a whole number, got {layers!r}")
            return {name: _Stored(_UNET + original) for name, original in unet_names(names, layers).items()}
        if component == "vae":
            levels = len(self.config("vae").get("block_out_channels", (64,)))
            prefix = next(filter(self._holds, _VAES), _VAES[0])
            return {name: _Stored(prefix + vae_name(name, levels)) for name in names}
        prefix = _OPEN_CLIPS.get(component, "")
        if component == "text_encoder" and not self._holds(prefix):
            prefix = next(filter(self._holds, _CLIPS), _CLIPS[0])
            return {name: _Stored(prefix + plain_text_name(name)) for name in names}
        found = {}
        for name in names:
            original, third = open_clip_name(name)
            found[name] = _Stored(prefix + original, third, transposed=original == "text_projection")
        return found

    def load(self, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """See `PipelineSource.load`."""
        if dtype is None:
            tokenizer = self._whole.load(component)
            with self.faults(f"cannot load {component}"):
                self.additions.apply_to_tokenizer(component, tokenizer)
            return tokenizer
        if options:
            raise self.error(f"{component} in a single file cannot be quantized: use guidance text_dtype auto")
        from safetensors import safe_open

        library, class_name = self._class(component)
        with self.faults(f"cannot load {component} ({class_name})"):
            self.check_weights(component)
            model_class = pipeline_classes.component_class(component, library, class_name)
            settings = pipeline_classes.model_settings(model_class, library, self.config(component))
            model = pipeline_classes.skeleton(model_class, library, settings)
            stored = self._stored(component)
            with safe_open(str(self._path), framework="pt") as file:
                state = {
                    name: stored[name].taken(file.get_tensor(stored[name].key), parameter.shape).to(dtype)
                    for name, parameter in model.named_parameters()
                }
            model.load_state_dict(state, strict=False, assign=True)
            for name, buffer in model.named_buffers():
                if buffer.is_meta:
                    if not name.endswith("position_ids"):
                        raise ValueError(f"{name} is in no file")
                    owner, _, last = name.rpartition(".")
                    numbers = torch.arange(buffer.shape[-1]).expand(buffer.shape).contiguous()
                    model.get_submodule(owner).register_buffer(last, numbers, persistent=False)
            self.additions.apply(component, model)
        return model.eval().requires_grad_(False)


class _HeldSource(PipelineSource):
    """Configurations of a published model, and CLIP's vocabulary from the hub. It has no weights."""

    def __init__(self, model: str, config: GuidanceConfig):
        self._files = CONFIGS[model]
        super().__init__(config.name, config)

    def _json(self, relative: str) -> dict[str, Any]:
        return self._files[relative]

    def _file(self, relative: str) -> Path:
        try:
            return hub_file(_VOCABULARY, relative.rpartition("/")[2], None)
        except HubError as error:
            raise UserError(
                f"guidance {self.name!r} needs the vocabulary of CLIP, which is in no single file: name a pipeline "
                f"that has it as guidance base, or let it come from the hub: {error}"
            ) from error

    def _files_in(self, component: str) -> list[str]:
        return [*_VOCABULARY_FILES, "tokenizer_config.json"] if component.startswith("tokenizer") else []

    def check_tokenizer(self, component: str) -> None:
        """Raise UserError if the vocabulary cannot be had."""
        for name in _VOCABULARY_FILES:
            self._file(f"{component}/{name}")

    def _identity(self, components: list[str]) -> str:
        return f"{_VOCABULARY}:{','.join(components)}"
