"""diffusers pipelines with a U-Net: Stable Diffusion 1.x and 2.x (latents), DeepFloyd IF stage I (pixels)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.gpu.capture import CapturedFunction
from dreamfusion_fast.guidance.config import GuidanceConfig, resolve_dtype
from dreamfusion_fast.guidance.contract import DiffusionModel, Views
from dreamfusion_fast.guidance.memory import GuidanceMemory
from dreamfusion_fast.guidance.models.pipeline_origins import open_autoencoder
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.models.schedule import PredictionType, VariancePreserving
from dreamfusion_fast.guidance.models.text_encoders import PromptEncoder
from dreamfusion_fast.guidance.prompts import Prompt
from dreamfusion_fast.networks.fused_unet import fuse
from dreamfusion_fast.networks.half_range import to_half
from dreamfusion_fast.networks.latent_encoder import LatentEncoder, unserved
from dreamfusion_fast.networks.offload import RESIDENT_SHARE, can_stream_weights, stream_weights
from dreamfusion_fast.networks.quantised import Quantisation, absent_library, quantise, quantised_bytes
from dreamfusion_fast.ops._triton import triton_serves

_PREDICTION_TYPES = get_args(PredictionType)
# Bytes in float16: of a U-Net like Stable Diffusion's per pixel of its input, for the guided pair; of its autoencoder's
# encoder and its gradient, per pixel of the image, as `LatentEncoder` runs it and as diffusers does.
_UNET_BYTES = 45_000
_ENCODE_BYTES, _ENCODE_RECOMPUTED_BYTES = 3_500, 2_300
_ENCODE_BYTES_OF_DIFFUSERS = 8_500
_MOST_TIMESTEPS = 100_000

SERVED = "pipelines of Stable Diffusion 1.x to 3.5, SDXL, DeepFloyd IF stage I and FLUX.1 can guide"


class PipelineModel(DiffusionModel):
    """The base of all pipelines: schedule, text encoders, and the network that predicts, here a U-Net.

    Args:
        source: the pipeline.
        config: its dtype, weights, fused, text_device and text_dtype are followed.
        device: of the run.
    """

    _part = "unet"  # the component that predicts
    # Commits of other repositories that parts come from, by hub id.
    elsewhere: Mapping[str, str] = MappingProxyType({})
    _components: tuple[str, ...] = ("unet", "scheduler", "text_encoder", "tokenizer")
    _text_suffixes: tuple[str, ...] = ("",)
    _condition_names: tuple[str, ...] = ("hidden",)
    # Whether it is so small that launching its kernels takes longer than running them.
    _capturable = True
    # What the U-Net may be told beside timestep and hidden states: None, or "text" for the hidden states pooled inside.
    _added_conditions: tuple[str | None, ...] = (None, "text")

    def __init__(self, source: PipelineSource, config: GuidanceConfig, device: torch.device):
        source.require(list(self._components))
        self.name = source.name
        self.revision = source.revision
        self.device = device
        self.dtype = self._arithmetic(config, device)
        self._source = source
        configs = {part: source.config(part) for part in self._components if not part.startswith("tokenizer")}
        for component in self._components:
            if component.startswith("tokenizer"):
                source.check_tokenizer(component)
            elif component != "scheduler":
                source.check_weights(component)
        self._network_config = configs[self._part]
        self._check_network()
        self._text = self._make_prompt_encoder(config)
        self._check_text_width()
        self._read_schedule(configs["scheduler"])
        self._network: Any = None
        self._quantisation = self._find_quantisation(config)
        # Quantised layers are made anew in each call, by libraries that do not promise to be captured.
        self._captures = config.fused and self._capturable and self._quantisation is None
        self._offload, self._trains = False, False
        self._evaluate = CapturedFunction(self._call_network, self._captures)
        # The quicker parts are kernels of Triton; without it, diffusers' own are as quick and need less.
        self._fuses = config.fused and device.type == "cuda" and triton_serves(device)

    def _arithmetic(self, config: GuidanceConfig, device: torch.device) -> torch.dtype:
        return resolve_dtype(config.dtype, device)

    def _make_prompt_encoder(self, config: GuidanceConfig) -> PromptEncoder:
        return PromptEncoder(self._source, self._text_suffixes, config, self.dtype, self.device)

    def _find_quantisation(self, config: GuidanceConfig) -> Quantisation | None:
        """How weights are rounded; raises UserError if a library for it is absent."""
        if config.weights == "plain":
            return None
        absent = absent_library(config.weights)
        if absent is not None:
            raise UserError(
                f"guidance weights {config.weights} needs {absent}, not installed here: pip install {absent}, or use "
                "weights plain"
            )
        return config.weights

    def _check_network(self) -> None:
        """Raise UserError for a U-Net that reads something which `_unet_arguments` does not give."""
        config = self._network_config
        if config.get("addition_embed_type") == "text_time" and "text_time" not in self._added_conditions:
            raise self._source.error(
                "the unet is one of SDXL, which reads two text encoders, but the pipeline has no text_encoder_2"
            )
        if config.get("addition_embed_type") in (None, "text") and "text_time" in self._added_conditions:
            raise self._source.error(
                "the pipeline has two text encoders, but the unet is not one of SDXL, which reads both"
            )
        if config.get("time_cond_proj_dim") is not None:
            raise self._source.error(
                "the unet is distilled and takes the guidance scale as an input: the model it was made from can guide"
            )
        read = {
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "addition_embed_type": self._added_conditions,
            "encoder_hid_dim_type": (None, "text_proj"),
        }
        for field, served in read.items():
            if config.get(field) not in served:
                raise self._source.error(f"the unet reads more than text ({field} is {config[field]!r}): {SERVED}")

    def _check_text_width(self) -> None:
        config = self._network_config
        field = "cross_attention_dim" if config.get("encoder_hid_dim") is None else "encoder_hid_dim"
        wanted = config.get(field, 1280)  # diffusers' default
        widths = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
        if not widths or not all(isinstance(width, int) for width in widths):
            raise self._source.error(
                f"the unet's {field} must be a whole number, or one for each block, got {wanted!r}"
            )
        width = self._text.hidden_width
        others = sorted({other for other in widths if other != width})
        if others:
            many = len(self._text_suffixes) > 1
            raise self._source.error(
                f"the text encoder{'s give' if many else ' gives'} vectors of width {width}"
                f"{' together' if many else ''}, the unet reads width {' and '.join(map(str, others))}: they were not "
                "made for each other"
            )

    def _read_schedule(self, config: dict[str, Any]) -> None:
        from diffusers import DDPMScheduler

        prediction_type = config.get("prediction_type", "epsilon")
        other_kind = any(word in str(config.get("_class_name")) for word in ("Flow", "EDM"))
        if "num_train_timesteps" not in config or other_kind:
            raise self._source.error(f"{config.get('_class_name')} is no diffusion noise schedule with timesteps")
        if prediction_type not in _PREDICTION_TYPES:
            raise self._source.error(
                f"prediction_type must be one of {', '.join(_PREDICTION_TYPES)}, got {prediction_type!r}"
            )
        timesteps = checked_timesteps(config, self._source)
        # Every scheduler of diffusers shares these fields; DDPM is the one that holds alphas_cumprod and nothing else.
        fields = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        with self._source.faults("the noise schedule cannot be made"):
            scheduler: Any = DDPMScheduler(**{field: config[field] for field in fields if field in config})
        levels = scheduler.alphas_cumprod
        if len(levels) != timesteps or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise self._source.error("the noise schedule's alphas_cumprod leave 0 to 1, or are not one for a timestep")
        self.schedule = VariancePreserving(scheduler.alphas_cumprod.to(self.device), prediction_type)

    def try_out(self) -> None:
        """Evaluate the network on torch's meta device, without weights, so that nothing wrong is loaded.

        Raises:
            UserError: its configuration describes no model, or one that cannot be evaluated.
        """
        self._try_network()
        for suffix in self._text_suffixes:
            self._source.skeleton(f"text_encoder{suffix}")

    def _try_network(self) -> None:
        size, unet = self._source.sample_size, self._source.skeleton("unet")
        hidden = self._text.hidden_width
        if hidden is None:
            raise self._source.error("the text encoder's configuration lacks its width")
        with self._source.faults("the configuration of unet describes a model that cannot be evaluated"):
            widths = {"hidden": (1, 77, hidden), "pooled": (1, self._text.pooled_width or 1)}
            condition = {name: torch.zeros(*widths[name], device="meta") for name in self._condition_names}
            noisy = torch.zeros(1, self._network_config["in_channels"], size, size, device="meta")
            arguments = tree_map_only(Tensor, lambda value: value.to("meta").float(), self._unet_arguments(condition))
            with torch.no_grad():
                output = unet(noisy, torch.zeros(1, device="meta"), **arguments, return_dict=False)[0]
            if output.shape[2:] != noisy.shape[2:]:
                raise ValueError(f"it makes {list(output.shape)} of {list(noisy.shape)}")

    @property
    def text_identity(self) -> str:
        return self._text.identity

    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        """See `PromptEncoder.embed`: "hidden" [n, tokens, width] and with two encoders "pooled" [n, width]."""
        return self._text.embed(texts)

    def text_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """See `DiffusionModel.text_shapes`."""
        shapes = {"hidden": (None, self._text.hidden_width), "pooled": (self._text.pooled_width,)}
        return {name: shapes[name] for name in self._condition_names}

    def free_graphs(self) -> None:
        """See `UsesMemory.free_graphs`: those of what predicts."""
        self._evaluate.clear()

    def set_offload(self, on: bool) -> None:
        """See `UsesMemory.set_offload`: the weights of what predicts. It is loaded again when next needed."""
        if on != self._offload:
            self._offload, self._network = on, None
            self._evaluate.enabled = self._captures and not on
            self.free_graphs()

    def load(self) -> None:
        if self._network is not None:
            return
        network = self._source.load(self._part, self.dtype)
        if self._quantisation is not None:
            quantise(network, self._quantisation, self.device)
        elif self._offload:  # as it is: graphs, and parts that read weights of several layers, find them nowhere
            stream_weights(network, self.device)
        else:
            network.to(self.device)
            if self._fuses and self._part == "unet" and not self._trains:
                fuse(network)
        self._network = network

    def trainable_network(self) -> nn.Module:
        """See `DiffusionModel.trainable_network`: the network without fused parts, which have no gradient."""
        if not self._trains:
            self._trains, self._network = True, None
            self.free_graphs()
        self.load()
        return self._network

    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        """See `DiffusionModel.predict`; channels of a learned variance are dropped. A CUDA graph on a GPU."""
        self.load()
        told = [condition[name] for name in self._condition_names]
        times = len(told[0]) // len(noisy)
        evaluate = self._call_network if torch.is_grad_enabled() else self._evaluate
        output = evaluate(noisy.to(self.dtype).repeat(times, 1, 1, 1), t.repeat(times), *told)
        return output[:, : noisy.shape[1]]

    def _call_network(self, noisy: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        arguments = self._unet_arguments(dict(zip(self._condition_names, condition, strict=True)))
        return self._network(noisy, t, **arguments, return_dict=False)[0]

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        """See `UsesMemory.memory_needs`: weights counted, the rest scaled from what was measured of SD 1.5.

        The measurements are those of `benchmarks/bench_guidance.py`, with a third added.
        """
        network = self._source.skeleton(self._part)
        if self._quantisation is not None:
            weights = quantised_bytes(network, self._quantisation, self.dtype)
            return GuidanceMemory(weights=weights, unet=self._evaluation_bytes())
        numbers = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
        weights = numbers * self.dtype.itemsize
        offloadable = int((1 - RESIDENT_SHARE) * weights) if can_stream_weights(self.device) else 0
        return GuidanceMemory(weights=weights, unet=self._evaluation_bytes(), offloadable=offloadable)

    def _evaluation_bytes(self) -> int:
        """What predicting the guided pair of one view takes beside the weights."""
        size, width = self._source.sample_size, self._network_config.get("block_out_channels", (320,))[0]
        return _UNET_BYTES * size**2 * width // 320 * self.dtype.itemsize // 2

    def _unet_arguments(self, condition: Mapping[str, Tensor]) -> dict[str, Any]:
        """The U-Net's inputs beside image and timestep, from rows of all conditions; never waits for the GPU."""
        return {"encoder_hidden_states": condition["hidden"].to(self.dtype)}

    def _check_channels(self, channels: int) -> None:
        """Raise UserError unless the U-Net reads so many and predicts as many, or twice: with a learned variance."""
        config = self._network_config
        if config.get("in_channels") != channels:
            raise self._source.error(
                f"the unet reads {config.get('in_channels')} channels, {channels} are wanted: "
                "a text-to-image model is needed, not one for inpainting, editing or upscaling"
            )
        given = config.get("out_channels", 4)  # diffusers' default
        if given not in (channels, 2 * channels):
            raise self._source.error(
                f"the unet's out_channels must be {channels}, as many as it reads, or "
                f"{2 * channels} with a learned variance, got {given!r}"
            )


class PixelModel(PipelineModel):
    """A pipeline whose U-Net works on RGB images in [-1, 1], such as DeepFloyd IF stage I."""

    default_guidance_scale = 20.0
    x0_range = (-1.0, 1.0)

    def __init__(self, source: PipelineSource, config: GuidanceConfig, device: torch.device):
        super().__init__(source, config, device)
        self._check_channels(3)
        self.image_size = source.image_size

    def encode(self, images: Tensor) -> Tensor:
        return resize(images, self.image_size) * 2 - 1


class LatentModel(PipelineModel):
    """A pipeline whose U-Net works on the latents of an autoencoder, such as Stable Diffusion.

    The latent of an image is the mean of the autoencoder's posterior, not a sample of it: the posterior of these models
    is far narrower than the noise of any timestep, and the mean gives the gradient without that noise.
    """

    _components = (*PipelineModel._components, "vae")
    # SDXL's autoencoder overflows in float16 and says so by force_upcast. As in diffusers, only SDXL's is believed: the
    # same stands, as the default, in every folder of Stable Diffusion 1.x and 2.x that diffusers saved. It is
    # rescaled to fit (`fit_half_range`); where the encoder is not the package's own, it runs in float32.
    _may_upcast = False
    # Ollin Boer Bohan's tiny autoencoder for these latents.
    _tiny_autoencoder = "madebyollin/taesd"
    default_guidance_scale = 100.0

    def __init__(self, source: PipelineSource, config: GuidanceConfig, device: torch.device):
        super().__init__(source, config, device)
        self._vae_source = source
        if config.autoencoder is not None:
            self._vae_source = open_autoencoder(config, self._tiny_autoencoder)
            self._vae_source.check_weights("vae")
            if self._vae_source.revision is not None:
                self.elsewhere = {self._vae_source.name: self._vae_source.revision}
        vae, self._is_tiny = self._vae_source.config("vae"), self._vae_source.class_name("vae") == "AutoencoderTiny"
        if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
            raise self._source.error("a vae with a latents_mean or latents_std per channel is not served")
        self._check_channels(vae.get("latent_channels", 4))
        self._scale = source.number(vae, "scaling_factor", 1.0 if self._is_tiny else 0.18215)
        self._shift = source.number(vae, "shift_factor", 0.0)
        if self._scale == 0:
            raise self._source.error("the vae's scaling_factor is 0, which leaves nothing of an image")
        self._overflows = bool(self._may_upcast and vae.get("force_upcast", False))
        self._wanted_vae_dtype = config.autoencoder_dtype
        self.image_size = source.image_size
        self._width = vae.get("block_out_channels", (64,))[0]
        self._vae: Any = None
        self._encoder: LatentEncoder | None = None
        self._recompute = False

    def try_out(self) -> None:
        """See `PipelineModel.try_out`; the autoencoder's encoder, too."""
        super().try_out()
        size: int = self._source.sample_size
        vae = self._vae_source.skeleton("vae")
        with (
            self._vae_source.faults("the configuration of vae describes a model that cannot be evaluated"),
            torch.no_grad(),
        ):
            mean = self._encode_by(vae, torch.zeros(1, 3, self.image_size, self.image_size, device="meta"))
            if mean.shape[2:] != (size, size):
                raise ValueError(f"its latents are {list(mean.shape[2:])}, the {self._part} reads {[size, size]}")

    def load(self) -> None:
        super().load()
        if self._vae is None:
            vae = self._vae_source.load("vae", self._unscaled_dtype)
            vae.decoder = None  # `decode` loads it again
            vae.to(self.device)
            if self._vae_dtype != self._unscaled_dtype:
                with self._vae_source.faults("its autoencoder cannot be run in float16"):
                    to_half(vae)
            if self._encodes_fused():
                self._encoder = LatentEncoder(vae, self._recompute)
            self._vae = vae  # last: what did not fit is loaded again

    def encode(self, images: Tensor) -> Tensor:
        self.load()
        pixels = resize(images, self.image_size) * 2 - 1
        if self._encoder is not None:
            mean = self._encoder(pixels)
        else:
            mean = self._encode_by(self._vae, pixels.to(self._vae_dtype))
        return (mean.to(images.dtype) - self._shift) * self._scale

    def _encode_by(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents before their scale and shift, by diffusers' module."""
        encoded = vae.encode(pixels)
        return encoded.latents if self._is_tiny else encoded.latent_dist.mean

    @property
    def _vae_dtype(self) -> torch.dtype:
        """Arithmetic of the autoencoder."""
        if self._wanted_vae_dtype != "auto":
            return resolve_dtype(self._wanted_vae_dtype, self.device)
        upcast = self._overflows and self.dtype == torch.float16 and not self._encodes_fused()
        return torch.float32 if upcast else self.dtype

    @property
    def _unscaled_dtype(self) -> torch.dtype:
        """That of diffusers' module, decoder and all, which is not rescaled."""
        overflows = self._overflows and self._vae_dtype == torch.float16
        return torch.float32 if overflows else self._vae_dtype

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """See `DiffusionModel.decode`: by diffusers' decoder, one picture after another."""
        vae = self._vae_source.load("vae", self._unscaled_dtype).to(self.device)
        latents = (x / self._scale + self._shift).to(self._unscaled_dtype)
        images = [vae.decode(latent[None]).sample for latent in latents]
        return (torch.cat(images).to(x.dtype) / 2 + 0.5).clamp(0, 1)

    def _encodes_fused(self) -> bool:
        """Whether `LatentEncoder` stands in for diffusers' encoder; known before weights are loaded."""
        return self._fuses and not unserved(self._vae_source.skeleton("vae"))

    def set_recompute(self, on: bool) -> None:
        """See `UsesMemory.set_recompute`. Where diffusers' encoder runs, nothing changes."""
        self._recompute = on
        if self._encoder is not None:
            self._encoder.set_recompute(on)

    def free_graphs(self) -> None:
        """See `UsesMemory.free_graphs`: the autoencoder's, too."""
        super().free_graphs()
        if self._encoder is not None:
            self._encoder.free_graphs()

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        """See `PipelineModel.memory_needs`. The autoencoder's encoder is less than half of its weights.

        diffusers' encoder, which runs where `LatentEncoder` cannot, takes more and has nothing to recompute.
        """
        needs = super().memory_needs(batch, render_size)
        bytes_each = self._vae_dtype.itemsize
        scale = self.image_size**2 * self._width * bytes_each // (2 * 128)
        encode = recomputed = _ENCODE_BYTES_OF_DIFFUSERS
        if self._encodes_fused():
            encode, recomputed = _ENCODE_BYTES, _ENCODE_RECOMPUTED_BYTES
        return replace(
            needs,
            weights=needs.weights + self._vae_source.parameters("vae") * bytes_each // 2,
            encode=encode * scale,
            encode_recomputed=recomputed * scale,
        )


def resize(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] at [B, 3, size, size], bilinear, antialiased where it shrinks, differentiable."""
    if images.shape[-2:] == (size, size):
        return images
    shrinks = images.shape[-2] > size or images.shape[-1] > size
    return torch.nn.functional.interpolate(
        images, (size, size), mode="bilinear", align_corners=False, antialias=shrinks
    )


def checked_timesteps(config: dict[str, Any], source: PipelineSource) -> int:
    """The number of timesteps that a scheduler's configuration states; raises UserError for one that no model has."""
    timesteps = config.get("num_train_timesteps")
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or not 1 <= timesteps <= _MOST_TIMESTEPS:
        raise source.error(f"num_train_timesteps must be 1 to {_MOST_TIMESTEPS}, got {timesteps!r}")
    return timesteps
