"""diffusers pipelines of flow-matching transformers as guidance: Stable Diffusion 3 and 3.5, FLUX.1."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dreamfusion_fast.guidance.config import GuidanceConfig, resolve_dtype
from dreamfusion_fast.guidance.models.flow_text import FluxPrompts, StableDiffusion3Prompts
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.models.pipelines import LatentModel, PipelineModel, checked_timesteps
from dreamfusion_fast.guidance.models.schedule import FlowMatching
from dreamfusion_fast.guidance.models.text_encoders import PromptEncoder, has_bfloat16

_log = logging.getLogger(__name__)

_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# Fields of a scheduler that shift its sigmas, each with what it is above and at most.
_SHIFTS = {"shift": (0.0, 1e3), "base_shift": (-1e2, 1e2), "max_shift": (-1e2, 1e2)} | dict.fromkeys(
    ("base_image_seq_len", "max_image_seq_len"), (0.0, 1e6)
)
# A table of positions is made before weights are read; the largest published one, of Stable Diffusion 3.5 medium, is of
# 384 a side.
_MOST_POSITIONS = 512
# Numbers held per token and channel in a block of the transformer: its input, norms, projections, and the wide layer.
_HELD_PER_CHANNEL = 24


class FlowModel(LatentModel):
    """The base of transformers that predict the velocity n - x of latents (`schedule.FlowMatching`).

    Timesteps number the sigmas that the published scheduler has for the model's image size, from the least noise up.
    Images are of thousands of tokens: kernels run longer than they take to be launched, so there is nothing to capture.
    """

    _part = "transformer"
    _capturable = False
    _condition_names = ("hidden", "pooled")
    # As in the configuration of RFDS for Stable Diffusion 3 (github.com/yangxiaofeng/rectified_flow_prior).
    default_guidance_scale = 100.0
    # Of the transformer's configuration, where it leaves them out: diffusers'.
    _usual_sizes: ClassVar[dict[str, int]]
    schedule: FlowMatching

    def _arithmetic(self, config: GuidanceConfig, device: torch.device) -> torch.dtype:
        """By default bfloat16 on GPUs that have it: the larger of these models were published in it."""
        if config.dtype == "auto" and device.type == "cuda" and has_bfloat16(device):
            return torch.bfloat16
        return resolve_dtype(config.dtype, device)

    def _size(self, field: str) -> int:
        """A whole number above 0 of the transformer's configuration; raises UserError for all else."""
        size = self._network_config.get(field, self._usual_sizes[field])
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise self._source.error(f"the transformer's {field} must be a whole number above 0, got {size!r}")
        return size

    def _check_text_width(self) -> None:
        pairs = [
            ("vectors", self._text.hidden_width, "joint_attention_dim"),
            ("pooled vectors", self._text.pooled_width, "pooled_projection_dim"),
        ]
        for what, given, field in pairs:
            if given != self._size(field):
                raise self._source.error(
                    f"the text encoders give {what} of width {given}, the transformer reads width {self._size(field)}: "
                    "they were not made for each other"
                )

    def _check_read_and_predicted(self, channels: int) -> None:
        """Raise UserError unless the transformer reads so many channels and predicts as many."""
        read = self._size("in_channels")
        given = self._network_config.get("out_channels")
        predicted = self._size("in_channels" if given is None else "out_channels")
        if (read, predicted) != (channels, channels):
            raise self._source.error(
                f"the transformer reads {read} channels and predicts {predicted}, {channels} are wanted: a "
                "text-to-image model is needed, not one for inpainting, editing or control"
            )

    @property
    @abstractmethod
    def _image_tokens(self) -> int:
        """Tokens of an image of the model's own size."""

    @property
    @abstractmethod
    def _text_tokens(self) -> int:
        """Tokens of a text."""

    def _read_schedule(self, config: dict[str, Any]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        source, kind = self._source, config.get("_class_name")
        if kind not in _SCHEDULERS or config.get("invert_sigmas"):
            raise source.error(f"{kind} is no schedule of a flow from images to noise: {' or '.join(_SCHEDULERS)} is")
        steps = checked_timesteps(config, source)
        for field, (above, most) in _SHIFTS.items():
            value = config.get(field, 1.0)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not above < value <= most:
                raise source.error(f"the scheduler's {field} must be above {above:g} and up to {most:g}, got {value!r}")
        # The other fields say how few of the timesteps a sampler takes.
        fields = (*_SHIFTS, "num_train_timesteps", "use_dynamic_shifting", "time_shift_type")
        with source.faults("the noise schedule cannot be made"):
            scheduler: Any = FlowMatchEulerDiscreteScheduler(
                **{field: config[field] for field in fields if field in config}
            )
            sigmas = np.linspace(1 / steps, 1.0, steps)
            scheduler.set_timesteps(sigmas=sigmas[::-1].copy(), mu=self._dynamic_shift(scheduler.config))
            rising = scheduler.sigmas[:-1].flip(0)
        if not bool((rising > 0).all() and (rising <= 1).all() and (rising.diff() >= 0).all()):
            raise source.error("the noise schedule's sigmas are not above 0 and up to 1, in order")
        self.schedule = FlowMatching(rising.to(self.device))

    def _dynamic_shift(self, config: Any) -> float | None:
        """mu of a shift that depends on the number of tokens, as FLUX's pipeline computes it; None: it is fixed."""
        if not config.use_dynamic_shifting:
            return None
        share = (self._image_tokens - config.base_image_seq_len) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        return config.base_shift + share * (config.max_shift - config.base_shift)

    def _try_network(self) -> None:
        size, transformer = self._source.sample_size, self._source.skeleton("transformer")
        channels = self._vae_source.config("vae").get("latent_channels", 4)
        with self._source.faults("the configuration of transformer describes a model that cannot be evaluated"):
            noisy = torch.zeros(1, channels, size, size, device="meta")
            hidden = torch.zeros(1, self._text_tokens, self._size("joint_attention_dim"), device="meta")
            pooled = torch.zeros(1, self._size("pooled_projection_dim"), device="meta")
            with torch.no_grad():
                output = self._ask(transformer, noisy, torch.zeros(1, device="meta"), hidden, pooled)
            if output.shape != noisy.shape:
                raise ValueError(f"it makes {list(output.shape)} of {list(noisy.shape)}")

    def _call_network(self, noisy: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        hidden, pooled = (value.to(self.dtype) for value in condition)
        return self._ask(self._network, noisy, self.schedule.sigmas[t] * self.schedule.steps, hidden, pooled)

    @abstractmethod
    def _ask(self, transformer: Any, noisy: Tensor, time: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
        """The velocity, as the pipeline asks for it.

        Args:
            transformer: the network.
            noisy: [B, C, h, w], in its dtype, as the texts are.
            time: [B] float32, sigma times the number of timesteps.
            hidden, pooled: [B, tokens, width] and [B, width].
        """

    def _evaluation_bytes(self) -> int:
        width = self._size("num_attention_heads") * self._size("attention_head_dim")
        return 2 * (self._image_tokens + self._text_tokens) * width * _HELD_PER_CHANNEL * self.dtype.itemsize


class StableDiffusion3Model(FlowModel):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), with or without their T5."""

    _tiny_autoencoder = "madebyollin/taesd3"
    _usual_sizes: ClassVar[dict[str, int]] = {
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "num_attention_heads": 18,
        "attention_head_dim": 64,
        "patch_size": 2,
        "pos_embed_max_size": 96,
    }

    def __init__(self, source: PipelineSource, config: GuidanceConfig, device: torch.device):
        with_t5 = source.index.get("text_encoder_3") not in (None, [None, None])
        self._text_suffixes = ("", "_2", "_3") if with_t5 else ("", "_2")
        texts = [f"{part}{suffix}" for suffix in self._text_suffixes for part in ("text_encoder", "tokenizer")]
        self._components = ("transformer", "scheduler", "vae", *texts)
        super().__init__(source, config, device)

    def _make_prompt_encoder(self, config: GuidanceConfig) -> PromptEncoder:
        width = self._size("joint_attention_dim")
        return StableDiffusion3Prompts(self._source, self._text_suffixes, config, self.dtype, self.device, width)

    def _check_network(self) -> None:
        positions, patches = self._size("pos_embed_max_size"), self._source.sample_size / self._size("patch_size")
        if not patches <= positions <= _MOST_POSITIONS:
            raise self._source.error(
                f"the transformer's pos_embed_max_size must be {patches:g}, the patches along a side, to "
                f"{_MOST_POSITIONS}, got {positions}"
            )

    def _check_channels(self, channels: int) -> None:
        self._check_read_and_predicted(channels)

    @property
    def _text_tokens(self) -> int:
        return 77 + StableDiffusion3Prompts.t5_tokens

    @property
    def _image_tokens(self) -> int:
        return (self._source.sample_size // self._size("patch_size")) ** 2

    def _ask(self, transformer: Any, noisy: Tensor, time: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
        return transformer(
            hidden_states=noisy,
            timestep=time,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


class FluxModel(FlowModel):
    """FLUX.1 (Black Forest Labs 2024): dev and schnell.

    dev is distilled from a guided model and reads the scale of that guidance, which is kept at its authors' 3.5 for the
    text and for the negative prompt. What `guidance_scale` does comes on top, and its default is the one of Stable
    Diffusion 3 divided by 3.5; nobody has published another. schnell is distilled further, to few steps: it has not
    learned much of the noise levels between them, and is warned of.
    """

    _tiny_autoencoder = "madebyollin/taef1"
    _text_suffixes = ("", "_2")
    _components = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    _usual_sizes: ClassVar[dict[str, int]] = {
        "in_channels": 64,
        "out_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "patch_size": 1,
    }
    # The scale that dev was published with, diffusers' default.
    _distilled_scale = 3.5
    default_guidance_scale = 29.0

    def __init__(self, source: PipelineSource, config: GuidanceConfig, device: torch.device):
        super().__init__(source, config, device)
        if not self._reads_scale:
            _log.warning(
                f"guidance {self.name!r}: a FLUX without an input for the guidance scale, as FLUX.1-schnell, was "
                "distilled to few steps and knows little of the noise levels between them; flux-dev guides better"
            )

    @property
    def _reads_scale(self) -> bool:
        return bool(self._network_config.get("guidance_embeds", False))

    @property
    def _text_tokens(self) -> int:
        """512, and 256 for schnell, as in its authors' code (github.com/black-forest-labs/flux)."""
        return 512 if self._reads_scale else 256

    def _make_prompt_encoder(self, config: GuidanceConfig) -> PromptEncoder:
        return FluxPrompts(self._source, config, self.dtype, self.device, self._text_tokens)

    def _check_network(self) -> None:
        if self._size("patch_size") != 1 or self._source.sample_size % 2:
            raise self._source.error("the transformer reads no patches of 2 x 2 latents, as FLUX.1 does")

    def _check_channels(self, channels: int) -> None:
        self._check_read_and_predicted(4 * channels)

    @property
    def _image_tokens(self) -> int:
        return (self._source.sample_size // 2) ** 2

    def _ask(self, transformer: Any, noisy: Tensor, time: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
        batch, channels, height, width = noisy.shape
        rows, columns, device = height // 2, width // 2, noisy.device
        places = torch.zeros(rows, columns, 3, device=device)
        places[..., 1] = torch.arange(rows, device=device)[:, None]
        places[..., 2] = torch.arange(columns, device=device)
        packed = noisy.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        scale = torch.full((batch,), self._distilled_scale, device=device) if self._reads_scale else None
        output = transformer(
            hidden_states=packed.reshape(batch, rows * columns, 4 * channels),
            timestep=time.to(noisy.dtype) / 1000,
            guidance=scale,
            pooled_projections=pooled,
            encoder_hidden_states=hidden,
            txt_ids=torch.zeros(hidden.shape[1], 3, device=device),
            img_ids=places.flatten(0, 1),
            return_dict=False,
        )[0]
        unpacked = output.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return unpacked.reshape(batch, channels, height, width)


FLOW_MODELS: dict[str, type[PipelineModel]] = {
    "SD3Transformer2DModel": StableDiffusion3Model,
    "FluxTransformer2DModel": FluxModel,
}
"""The models by the class of their transformer."""
