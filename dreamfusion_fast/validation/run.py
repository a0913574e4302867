"""A diffusion model is loaded, draws by itself, guides a short run, and is measured on the way."""

from __future__ import annotations

import io
import logging
import math
import platform
import time
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dreamfusion_fast import __version__
from dreamfusion_fast.export.turntable import tile, to_uint8
from dreamfusion_fast.guidance.contract import DiffusionModel, PromptEmbeddings, Views
from dreamfusion_fast.guidance.creation import create_model
from dreamfusion_fast.guidance.distillation import ScoreDistillation
from dreamfusion_fast.rendering.orbits import orbit_cameras
from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import current, resolve_device
from dreamfusion_fast.training.presets import is_small
from dreamfusion_fast.training.sections import FirmConfig
from dreamfusion_fast.training.trainer import Trainer
from dreamfusion_fast.validation.config import ValidateConfig
from dreamfusion_fast.validation.measures import colour_statistics, denoising_errors, place_of_first
from dreamfusion_fast.validation.report import Check, Report
from dreamfusion_fast.validation.sampling import draw

_log = logging.getLogger(__name__)

OTHER_PROMPTS = ("a bicycle", "a tree", "a fish", "a house")
"""What pictures of the prompt are compared with; one that shares a word with the prompt is left out."""

_AZIMUTHS_DEG = (0.0, 90.0, 180.0, 270.0)  # of the views that are drawn and rendered
_LEVELS = (0.2, 0.5, 0.8)  # fractions of the schedule at which noise is told
# Milliseconds of a step of one view, with random weights of the same architecture (docs/memory.md), by GPU.
_STEP_MS = {
    "stable-diffusion": 15.0,
    "stable-diffusion-1.5": 15.0,
    "deepfloyd-if": 23.0,
}
_STEP_GPUS = ("H100", "H200")
_STEP_MARGIN = 2.0  # hosts of one kind differ by as much as half


def validate(config: ValidateConfig) -> Report:
    """Measure a diffusion model as this package uses it.

    Raises:
        UserError: it cannot be loaded, or the run cannot be done; the message says why.
    """
    config.check()
    device = resolve_device(config.device)
    with current(device):
        return _Validation(config, device).run()


class _Validation:
    def __init__(self, config: ValidateConfig, device: torch.device) -> None:
        self.config, self.device, self.report = config, device, Report()
        self.generator = torch.Generator().manual_seed(config.seed)
        small = is_small(config.guidance.name)
        self.scale = 3.0 if small else 7.5  # what such models are sampled with

    def run(self) -> Report:
        """All checks, in the order in which a fault shows up."""
        config = self.config
        start = time.monotonic()
        model = create_model(config.guidance, self.device)
        guidance = ScoreDistillation(model, config.guidance)
        own = guidance.embed(config.prompt)
        words = set(config.prompt.lower().split()) - {"a", "an", "the"}
        others = [guidance.embed(prompt) for prompt in OTHER_PROMPTS if not words & set(prompt.split())]
        guidance.load()
        self._describe(model, guidance.guidance_scale, time.monotonic() - start)
        self._check_text(own, others)
        shape = tuple(model.encode(torch.zeros(1, 3, model.image_size, model.image_size, device=self.device)).shape[1:])
        self._check_pictures(model, own, others, shape)
        scene = self._check_steps(guidance)
        self._check_renders(model, own, others, scene)
        return self.report

    def _check(self, name: str, value: float, low: float | None, high: float | None, unit: str, why: str) -> None:
        check = Check(name, value, low, high, unit, why)
        self.report.checks.append(check)
        _log.info("%s", check)

    def _describe(self, model: DiffusionModel, scale: float, seconds: float) -> None:
        gpu = self.device.type == "cuda"
        self.report.facts |= {
            "model": model.name,
            "revision": model.revision or "none",
            "prompt": self.config.prompt,
            "guidance scale": scale,
            "timesteps": model.schedule.steps,
            "image size": model.image_size,
            "seconds to load": round(seconds, 1),
            "device": torch.cuda.get_device_name(self.device) if gpu else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "dreamfusion_fast": __version__,
        }

    def _check_text(self, own: PromptEmbeddings, others: Sequence[PromptEmbeddings]) -> None:
        def first(embeddings: PromptEmbeddings) -> Tensor:
            return next(iter(embeddings.tensors.values())).float().flatten(1)

        front, _, back, _, null = first(own)
        pairs = {
            "front and back prompts differ by": [back],
            "prompt and empty prompt differ by": [null],
            "prompt and others differ by": [first(other)[0] for other in others],
        }
        why = "texts that differ are to be told apart: 0 where a tokenizer or its vocabulary is not the encoder's"
        for name, texts in pairs.items():
            nearest = min(float((front - text).norm() / front.norm()) for text in texts)
            self._check(name, nearest, 1e-3, None, "", why)

    def _check_pictures(
        self, model: DiffusionModel, own: PromptEmbeddings, others: Sequence[PromptEmbeddings], shape: tuple[int, ...]
    ) -> None:
        views = self._views()
        steps = self.config.picture_steps
        drawn = draw(model, own, views, shape, scale=self.scale, steps=steps, generator=self.generator)
        images = model.decode(drawn).permute(0, 2, 3, 1).float()
        self._picture(f"drawn by the model alone, at {_AZIMUTHS_DEG} degrees", images)
        spread = float(images.std())
        self._check("contrast of the pictures", spread, 0.05, 0.45, "", "0 is one grey, 0.5 is black and white alone")
        self._check_errors(model, own, others, drawn, views)

    def _check_errors(
        self,
        model: DiffusionModel,
        own: PromptEmbeddings,
        others: Sequence[PromptEmbeddings],
        clean: Tensor,
        views: Views,
    ) -> None:
        """The checks of `denoising_errors` in pictures that the model has drawn."""
        prompts = [(own, "text"), *((other, "text") for other in others), (own, "null")]
        table = self._errors(model, prompts, clean, views)
        for fraction, errors in zip(_LEVELS, table, strict=True):
            self._check(
                f"error of the noise told in pictures of its own, t = {fraction}",
                errors[0],
                0.0,
                0.9,
                "",
                "1 is the best linear guess; random weights are near it or above, a model that was trained on such "
                "pictures is well below",
            )
        gain = sum(errors[0] / errors[-1] for errors in table) / len(table)
        why = "what a text says of a picture is of use to tell its noise; 1 where the text is not heard"
        self._check("error with the prompt over that without, pictures of its own", gain, 0.0, 0.9999, "", why)
        place = place_of_first([errors[:-1] for errors in table])
        why = f"of {1 + len(others)} prompts the right one explains the noise best (arXiv 2303.16203)"
        self._check("place of the prompt, pictures of its own", place, 1, 1, "", why)

    def _check_steps(self, guidance: ScoreDistillation) -> Scene:
        config = self.config
        settings = Config.for_guidance(
            config.guidance.name,
            guidance=config.guidance,
            prompt=config.prompt,
            steps=config.steps,
            seed=config.seed,
            memory=config.memory,
            firm=FirmConfig(steps=0),
        )
        trainer = Trainer(settings, self.device, guidance)
        warm, residuals, started = config.steps // 4, [], 0.0
        for step in range(config.steps):
            if step == warm:
                started = self._now()
            residuals.append(trainer.step().losses["sds"])
        milliseconds = 1000 * (self._now() - started) / (config.steps - warm)
        trainer.check_parameters()
        values = [float(value) for value in residuals]
        self.report.curves["residual, eps_hat - eps"] = values
        late = values[warm:]
        limit = 1 + abs(guidance.guidance_scale)
        why = "eps_null + s (eps_text - eps_null) - eps, each of whose differences is below 1 for a sane model"
        self._check("residual, mean after the first quarter", sum(late) / len(late), 0.01, limit, "", why)
        self._check("residual, largest", max(values), None, 4 * limit, "", why)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        usual = _STEP_MS.get(config.guidance.name) if any(gpu in name for gpu in _STEP_GPUS) else None
        limit_ms = None if usual is None or trainer.batch != 1 else _STEP_MARGIN * usual
        why = "random weights of the same architecture take half of it or less" if limit_ms else "not known for this"
        self._check("a step", milliseconds, None, limit_ms, "ms", why)
        if self.device.type == "cuda":
            self.report.facts["peak GPU memory, GB"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        return trainer.scene

    def _check_renders(
        self, model: DiffusionModel, own: PromptEmbeddings, others: Sequence[PromptEmbeddings], scene: Scene
    ) -> None:
        size = min(model.image_size, 256)
        cameras = orbit_cameras(len(_AZIMUTHS_DEG))
        with torch.no_grad():
            white = torch.ones(3, device=self.device)
            output = scene.renderer.render(scene.renderer.prepare(cameras.to(self.device), size), white)
            images = output.color.view(-1, size, size, 3)
            lit = scene.render(cameras, size, Shading.TEXTURELESS)
        self._picture(f"after {self.config.steps} steps", images)
        self._picture("its shape", lit)
        found = colour_statistics(images, output.opacity.view(-1, size, size))
        why = "an object stands in the middle: 0 is nothing, 1 a filled picture"
        self._check("covered by the object", found["covered"], 0.01, 0.9, "", why)
        why = "score distillation saturates at large scales; above a half the scale is too large, or the model wrong"
        self._check("saturated channels", found["saturated"], None, 0.5, "", why)
        why = "0 is one colour: nothing has been learnt of it yet"
        self._check("contrast of the object", found["contrast"], 0.005, None, "", why)
        self._check("colourfulness of the object", found["colourfulness"], None, None, "", "for comparison")
        with torch.no_grad():
            clean = model.encode(images.permute(0, 3, 1, 2).contiguous())
        # After a short run the shape is rough: the error is not asked to be small, the prompt to be among the first.
        prompts = [(own, "text"), *((other, "text") for other in others)]
        table = self._errors(model, prompts, clean, self._views())
        why = f"of {len(prompts)} prompts the right one is among the first to explain the renders (arXiv 2303.16203)"
        self._check("place of the prompt, renders", place_of_first(table), 1, 2, "", why)

    def _errors(
        self, model: DiffusionModel, prompts: Sequence[tuple[PromptEmbeddings, str]], clean: Tensor, views: Views
    ) -> list[list[float]]:
        """`denoising_errors` at each noise level."""
        return [denoising_errors(model, prompts, clean, views, fraction, self.generator) for fraction in _LEVELS]

    def _views(self) -> Views:
        azimuth = torch.tensor([math.radians(angle) for angle in _AZIMUTHS_DEG], device=self.device)
        elevation = torch.full_like(azimuth, math.radians(15.0))
        return Views(azimuth, elevation, torch.ones(len(azimuth), 3, device=self.device))

    def _picture(self, name: str, images: Tensor) -> None:
        """Keep pictures [B, S, S, 3] side by side, as PNG."""
        data = io.BytesIO()
        Image.fromarray(tile([to_uint8(image) for image in images], len(images))).save(data, format="PNG")
        self.report.pictures[name] = data.getvalue()

    def _now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()
