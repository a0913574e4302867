"""diffusers pipelines as guidance: Stable Diffusion 1.x and 2.x (latents) and DeepFloyd IF stage I (pixels)."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.base import DiffusionModel, GuidanceConfig, Views, resolve_dtype
from dreamfusion_fast.guidance.pipeline_source import PipelineSource, one_line, open_source

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# DeepFloyd IF was trained on captions of at most 77 tokens, although T5 takes longer ones.
_T5_TOKENS = 77


def load_pipeline_model(config: GuidanceConfig, device: torch.device) -> PipelineModel:
    """The diffusion model of a diffusers pipeline, its configurations checked, its weights not loaded yet.

    Raises:
        UserError: the name leads nowhere, or to a pipeline that cannot guide; the message says what is missing.
    """
    source = open_source(config)
    if source.class_name("unet") is None:
        others = [part for part in ("transformer", "prior", "safety_checker") if source.class_name(part) is not None]
        held = f"only {', '.join(others)}" if others else "none"
        raise UserError(
            f"guidance {source.name!r} ({source.index.get('_class_name', 'a pipeline')}) has no unet, {held}: "
            "pipelines of Stable Diffusion 1.x and 2.x and DeepFloyd IF stage I can guide"
        )
    if source.class_name("text_encoder_2") is not None:
        raise UserError(f"guidance {source.name!r} has two text encoders; pipelines with one can guide")
    if source.class_name("vae") is not None:
        return LatentModel(source, resolve_dtype(config.dtype, device), device)
    return PixelModel(source, resolve_dtype(config.dtype, device), device)


class PipelineModel(DiffusionModel):
    """What latent and pixel pipelines have in common: schedule, text encoder, U-Net."""

    _components: tuple[str, ...] = ("unet", "scheduler", "text_encoder", "tokenizer")

    def __init__(self, source: PipelineSource, dtype: torch.dtype, device: torch.device):
        source.require(list(self._components))
        self.name = source.name
        self.device = device
        self.dtype = dtype
        # Not every transformers version can mask in float64.
        self._text_dtype = torch.float32 if dtype == torch.float64 else dtype
        self._source = source
        configs = {component: source.config(component) for component in self._components if component != "tokenizer"}
        for component in configs:
            if component != "scheduler":
                source.check_weights(component)
        self._unet_config = configs["unet"]
        self._text_config = configs["text_encoder"]
        self._check_text_width()
        self._read_schedule(configs["scheduler"])
        self._unet: Any = None

    def _check_text_width(self) -> None:
        width = self._text_config.get("hidden_size", self._text_config.get("d_model"))
        wanted = self._unet_config.get("encoder_hid_dim") or self._unet_config.get("cross_attention_dim")
        if isinstance(wanted, int) and width != wanted:
            raise UserError(
                f"guidance {self.name!r}: the text encoder gives vectors of width {width}, the unet reads "
                f"width {wanted}: these two were not made for each other"
            )

    def _read_schedule(self, config: dict[str, Any]) -> None:
        from diffusers import DDPMScheduler

        prediction_type = config.get("prediction_type", "epsilon")
        if "num_train_timesteps" not in config or "Flow" in str(config.get("_class_name")):
            raise UserError(
                f"guidance {self.name!r}: {config.get('_class_name')} is no diffusion noise schedule with timesteps"
            )
        if prediction_type not in _PREDICTION_TYPES:
            raise UserError(
                f"guidance {self.name!r}: prediction_type must be one of {', '.join(_PREDICTION_TYPES)}, "
                f"got {prediction_type!r}"
            )
        # Every scheduler of diffusers shares these fields; DDPM is the one that holds alphas_cumprod and nothing else.
        fields = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        try:
            scheduler: Any = DDPMScheduler(**{field: config[field] for field in fields if field in config})
        except (NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"guidance {self.name!r}: the noise schedule cannot be made: {one_line(error)}") from error
        self.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        self.prediction_type = prediction_type

    @property
    def text_identity(self) -> str:
        return f"{type(self).__name__}:{self._text_dtype}:{self._source.identity(['tokenizer', 'text_encoder'])}"

    def embed_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """See `DiffusionModel.embed_texts`: "hidden" [n, tokens, width] on the CPU."""
        tokenizer = self._source.load("tokenizer")
        encoder = self._source.load("text_encoder", self._text_dtype).to(self.device)
        tokens = self._tokenize(tokenizer, texts)
        masked = encoder.config.model_type == "t5" or getattr(encoder.config, "use_attention_mask", False)
        with torch.no_grad():
            hidden = encoder(
                tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device) if masked else None,
            )[0].cpu()
        del encoder
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {"hidden": hidden}

    def _tokenize(self, tokenizer: Any, texts: list[str]) -> Any:
        if self._text_config.get("model_type") == "t5":
            texts = [text.lower() for text in texts]
            length = _T5_TOKENS
        else:
            length = min(tokenizer.model_max_length, self._text_config.get("max_position_embeddings", 77))
        return tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )

    def load(self) -> None:
        if self._unet is None:
            self._unet = self._source.load("unet", self.dtype).to(self.device)

    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        """See `DiffusionModel.predict`; channels of a learned variance are dropped."""
        self.load()
        output = self._unet(
            noisy.to(self.dtype).repeat(2, 1, 1, 1),
            t.repeat(2),
            encoder_hidden_states=condition["hidden"].to(self.dtype),
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

    def _wrong_channels(self, wanted: int) -> UserError:
        return UserError(
            f"guidance {self.name!r}: the unet reads {self._unet_config.get('in_channels')} channels, {wanted} are "
            "wanted: a text-to-image model is needed, not one for inpainting, editing or upscaling"
        )


class PixelModel(PipelineModel):
    """A pipeline whose U-Net works on RGB images in [-1, 1], such as DeepFloyd IF stage I."""

    default_guidance_scale = 20.0
    x0_range = (-1.0, 1.0)

    def __init__(self, source: PipelineSource, dtype: torch.dtype, device: torch.device):
        super().__init__(source, dtype, device)
        if self._unet_config.get("in_channels") != 3:
            raise self._wrong_channels(3)
        self.image_size = _square(self._unet_config, self.name)

    def encode(self, images: Tensor) -> Tensor:
        return resize(images, self.image_size) * 2 - 1


class LatentModel(PipelineModel):
    """A pipeline whose U-Net works on the latents of an autoencoder, such as Stable Diffusion.

    The latent of an image is the mean of the autoencoder's posterior, not a sample of it: the posterior of these models
    is far narrower than the noise of any timestep, and the mean gives the gradient without that noise.
    """

    _components = (*PipelineModel._components, "vae")
    default_guidance_scale = 100.0

    def __init__(self, source: PipelineSource, dtype: torch.dtype, device: torch.device):
        super().__init__(source, dtype, device)
        vae = source.config("vae")
        channels = vae.get("latent_channels", 4)
        if self._unet_config.get("in_channels") != channels:
            raise self._wrong_channels(channels)
        self._scale = float(vae.get("scaling_factor") or 0.18215)
        self._shift = float(vae.get("shift_factor") or 0.0)
        # Some autoencoders overflow in float16 and say so.
        self._vae_dtype = torch.float32 if vae.get("force_upcast", False) and dtype == torch.float16 else dtype
        self.image_size = _square(self._unet_config, self.name) * 2 ** (len(vae["block_out_channels"]) - 1)
        self._vae: Any = None

    def load(self) -> None:
        super().load()
        if self._vae is None:
            self._vae = self._source.load("vae", self._vae_dtype).to(self.device)
            # The decoder is never run.
            self._vae.decoder = None

    def encode(self, images: Tensor) -> Tensor:
        self.load()
        pixels = resize(images, self.image_size) * 2 - 1
        mean = self._vae.encode(pixels.to(self._vae_dtype)).latent_dist.mean
        return (mean.to(images.dtype) - self._shift) * self._scale


def resize(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] at [B, 3, size, size], bilinear, antialiased where it shrinks, differentiable."""
    if images.shape[-2:] == (size, size):
        return images
    shrinks = images.shape[-2] > size or images.shape[-1] > size
    return torch.nn.functional.interpolate(
        images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks
    )


def _square(unet_config: dict[str, Any], name: str) -> int:
    size = unet_config.get("sample_size")
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int) or size < 1:
        raise UserError(f"guidance {name!r}: the unet's sample_size must be one positive number, got {size!r}")
    return size
