"""The embedded prior as guidance: 64x64 pixels in, told the camera, the background and the shading of the render."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.gpu.capture import CapturedFunction
from dreamfusion_fast.guidance.config import PRIOR_FILE, DtypeName, resolve_dtype
from dreamfusion_fast.guidance.contract import DiffusionModel, Views
from dreamfusion_fast.guidance.models.schedule import VariancePreserving
from dreamfusion_fast.guidance.prompts import Prompt, shortened, warn_of_lost_words

from .cpu_network import CpuNetwork, cpu_network_serves
from .model import IMAGE_SIZE, SHADINGS, ViewCondition, alphas_cumprod, load_prior
from .text_encoder import MAX_TOKENS, WEIGHTS, WIDTH, TextEncoder

TEXT_FILES = ("text_encoder.safetensors.gz", "tokenizer.json")
FILES = (PRIOR_FILE, *TEXT_FILES)
"""What a folder of weights holds."""


class EmbeddedPrior(DiffusionModel):
    """See the module; a `DiffusionModel` of known cameras.

    Camera, background and shading are told under every condition: they are facts about the render, and guidance
    strengthens the caption alone.

    Args:
        device: where it runs.
        dtype: arithmetic; "auto" is bfloat16 on a GPU and on CPUs that multiply it in hardware, else float32.
        folder: weights; default: the package's own.
        fused: run the network by the CPU core's layers, or as a CUDA graph; False: in plain torch. With gradients
            enabled it is in plain torch.

    Attributes:
        views_per_group: views that the weights were trained to read together; they read single ones, too.
        network: a `PriorNetwork`. With `fused` on a CPU its weights are packed, and changes of it are not seen.
    """

    name = "the embedded prior"
    image_size = IMAGE_SIZE
    default_guidance_scale = 8.0
    x0_range = (-1.0, 1.0)
    clip_x0 = True

    def __init__(
        self, device: torch.device | str, dtype: DtypeName = "auto", folder: Path = WEIGHTS, fused: bool = True
    ) -> None:
        self.device = torch.device(device)
        self.folder = folder
        for file in FILES:
            if not (folder / file).is_file():
                mend = "install the package again" if folder == WEIGHTS else "tools/pack_prior.py writes it"
                raise UserError(f"the embedded prior's {file} is missing from {folder}: {mend}")
        if folder != WEIGHTS:
            path = folder / PRIOR_FILE
            self.files = {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
        self._dtype = _fast_dtype(self.device) if dtype == "auto" else resolve_dtype(dtype, self.device)
        self.network = network = load_prior(folder).to(self.device, self._dtype)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # in torch's docs only
        self.views_per_group = network.views
        # Not with the parts of `fused_unet`: a run is over in 1000 steps, and their kernels take seconds to compile.
        self._captured = {
            group: CapturedFunction(functools.partial(network, group=group), fused) for group in {1, network.views}
        }
        self._evaluate = CpuNetwork(network) if fused and cpu_network_serves(network) else self._repeated
        self.schedule = VariancePreserving(alphas_cumprod().to(self.device), "v_prediction")

    @property
    def text_identity(self) -> str:
        digest = hashlib.sha256()
        for file in TEXT_FILES:
            digest.update((self.folder / file).read_bytes())
        # The number is raised whenever texts become other tokens; before 2, long prompts lost the name of the view.
        return f"embedded-prior-text-2:{digest.hexdigest()}"

    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        """`tokens` `[n, 20, 384]` and `pooled` `[n, 384]`, float32, on the CPU; see `TextEncoder`.

        Texts that are too long lose words, as `prompts.shortened` says, and a warning names them.
        """
        encoder = TextEncoder(self.folder)
        captions, lost = shortened(texts, encoder.fits)
        warn_of_lost_words("embedded", MAX_TOKENS, lost)
        tokens, pooled = encoder(captions)
        return {"tokens": tokens, "pooled": pooled}

    def text_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """See `DiffusionModel.text_shapes`."""
        return {"tokens": (MAX_TOKENS, WIDTH), "pooled": (WIDTH,)}

    def encode(self, images: Tensor) -> Tensor:
        """`[B, 3, 64, 64]` in [-1, 1]; other sizes are resized with antialiasing."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return images * 2 - 1

    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        background = None if views.background is None else views.background.float()
        shading = torch.full((len(noisy),), SHADINGS.index(views.shading), device=self.device)
        known = ViewCondition(views.azimuth, views.elevation, background, shading)
        return self.evaluate(noisy, t, condition, known, views.group)

    def evaluate(
        self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], known: ViewCondition, group: int = 1
    ) -> Tensor:
        """`predict` with what is known of the views spelled out; group: 1 or `views_per_group`."""
        view = known.vector(len(noisy), self.device)
        vector = torch.cat([condition["pooled"], view.repeat(len(condition["pooled"]) // len(noisy), 1)], dim=1)
        evaluate = self._repeated if torch.is_grad_enabled() else self._evaluate
        return evaluate(noisy.to(self._dtype), t, condition["tokens"].to(self._dtype), vector.to(self._dtype), group)

    def trainable_network(self) -> nn.Module:
        """See `DiffusionModel.trainable_network`. On a CPU the frozen network's weights are packed apart from it."""
        return self.network

    def free_graphs(self) -> None:
        """See `UsesMemory.free_graphs`."""
        for captured in self._captured.values():
            captured.clear()

    def _repeated(self, noisy: Tensor, t: Tensor, tokens: Tensor, vector: Tensor, group: int) -> Tensor:
        """The network with the arguments of `CpuNetwork`: all conditions share image and timestep."""
        self.network.check_group(group, len(noisy))
        times = len(tokens) // len(noisy)
        images = noisy.repeat(times, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled():
            return self.network(images, t.repeat(times), tokens, vector, group)
        return self._captured[group](images, t.repeat(times), tokens, vector)


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products in it run in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return (
        torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    )
