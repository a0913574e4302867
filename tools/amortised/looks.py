"""Looks at a packed network: how near its renders are to views it was not trained on, and a sheet of pictures."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from prior_data.batches import HELD_OUT_VIEWS
from torch import Tensor, nn

from dreamfusion_fast.rendering.orbits import cameras_at
from dreamfusion_fast.training.amortised import AmortisedField, KnownCaptions

from .batches import VIEW_SIZE, ObjectSampler
from .rendering import ObjectRenderer

AZIMUTHS = (0, 45, 90, 180)
# What it was trained on; colours that a thing did not have; parts with a colour; nouns of no caption.
PROMPTS = (
    "a chair", "an armchair", "a sofa", "a car", "a grand piano", "a teddy bear", "a toaster", "a potted plant",
    "a blue sofa", "a red chair", "a green teddy bear", "a purple piano", "a pink car", "a yellow toaster",
    "a chair with a red seat", "a bicycle", "a dog", "a lamp", "a robot", "a violin",
)  # fmt: skip
MIXTURES = (("a chair", "an armchair"), ("a car", "a sofa"), ("a red car", "a blue car"))
_ELEVATION_DEG, _DISTANCE = 20.0, 3.3
_ROW_LABEL = 150  # pixels


@torch.no_grad()
def evaluate(
    model: AmortisedField, sampler: ObjectSampler, renderer: ObjectRenderer, most: int
) -> dict[str, dict[str, float]]:
    """PSNR in dB, mean and median over objects: of held-out views of at most `most` objects that were trained on, with
    and without their codes, and of all views of the models that were held out."""
    catalogue = sampler.catalogue
    held_back = torch.arange(-HELD_OUT_VIEWS, 0, device=catalogue.device)
    chosen = torch.linspace(0, len(sampler.models) - 1, min(most, len(sampler.models))).round().long().tolist()
    rows: dict[str, list[float]] = {"trained, with code": [], "trained, without": [], "held out": []}
    for number in chosen:
        model_index = int(sampler.models[number])
        view = catalogue.first[model_index] + catalogue.count[model_index] + held_back
        code = model.codes[number][None]
        rows["trained, with code"].append(_psnr(model, sampler, renderer, model_index, view, code))
        rows["trained, without"].append(_psnr(model, sampler, renderer, model_index, view, None))
    for model_index in catalogue.held_out_models.tolist():
        view = catalogue.first[model_index] + torch.arange(int(catalogue.count[model_index]), device=catalogue.device)
        rows["held out"].append(_psnr(model, sampler, renderer, model_index, view, None))
    return {
        name: {"mean": round(float(np.mean(row)), 2), "median": round(float(np.median(row)), 2), "objects": len(row)}
        for name, row in rows.items()
        if row
    }


def _psnr(
    model: AmortisedField,
    sampler: ObjectSampler,
    renderer: ObjectRenderer,
    model_index: int,
    view: Tensor,
    code: Tensor | None,
) -> float:
    """Of views `[n]` of one model on white, under its noun."""
    noun = sampler.catalogue.choices[model_index, :1]
    planes = model.planes(*sampler.caption(noun, torch.zeros_like(noun)), code)
    albedo, opacity = sampler.pictures(view)
    wanted = (albedo * opacity[:, None] + 1 - opacity[:, None]).permute(0, 2, 3, 1).reshape(-1, 3)
    rays = sampler.rays(view)
    scene = torch.zeros(len(wanted), dtype=torch.int64, device=wanted.device)
    made = renderer.render(planes, rays, scene, torch.ones(3, device=wanted.device)).color
    return -10 * math.log10(max(float((made - wanted).square().mean()), 1e-10))


@dataclasses.dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures of prompts, side by side.

    Args:
        model, captions: of a packed file.
        renderer: of the model's field.
        encoder: of the captions.
        device: of the model.
    """

    model: AmortisedField
    captions: KnownCaptions
    renderer: ObjectRenderer
    encoder: nn.Module
    device: torch.device

    def draw(self, prompts: tuple[str, ...] = PROMPTS, mixtures: tuple[tuple[str, str], ...] = MIXTURES) -> Image.Image:
        """A row per prompt: four azimuths with the code of an object whose caption is nearest, four without one. Then a
        row per pair of prompts: the mean of both weighted from the one to the other, without a code."""
        rows = []
        for prompt in prompts:
            nearest = self.captions.nearest(prompt, self.encoder)
            states, pooled = self._read(prompt)
            code = self.model.codes[nearest.object(0)][None]
            parts = [self._pictures(self.model.planes(states, pooled, each), AZIMUTHS) for each in (code, None)]
            known = "" if nearest.known else " (unknown)"
            rows.append((f"{prompt}\n{nearest.phrase} {nearest.similarity:.2f}{known}", [*parts[0], *parts[1]]))
        count = 2 * len(AZIMUTHS)
        for first, second in mixtures:
            pictures = []
            for share in torch.linspace(0, 1, count).tolist():
                mixed = [a + share * (b - a) for a, b in zip(self._read(first), self._read(second), strict=True)]
                pictures += self._pictures(self.model.planes(mixed[0], mixed[1]), (45,))
            rows.append((f"{first}\nto {second}", pictures))
        return _sheet(rows)

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        states, pooled = self.encoder([prompt])
        return states.to(self.device), pooled.to(self.device)

    def _pictures(self, planes: Tensor, azimuths: tuple[int, ...]) -> list[np.ndarray]:
        azimuth = torch.tensor(azimuths, dtype=torch.float32, device=self.device).deg2rad()
        elevation = torch.full_like(azimuth, math.radians(_ELEVATION_DEG))
        cameras = cameras_at(azimuth, elevation, torch.full_like(azimuth, _DISTANCE))
        rays = cameras.rays(VIEW_SIZE, VIEW_SIZE)
        scene = torch.zeros(len(rays), dtype=torch.int64, device=self.device)
        colour = self.renderer.render(planes, rays, scene, torch.ones(3, device=self.device)).color
        return list((colour.clamp(0, 1) * 255).round().byte().view(-1, VIEW_SIZE, VIEW_SIZE, 3).cpu().numpy())


def _sheet(rows: list[tuple[str, list[np.ndarray]]]) -> Image.Image:
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (_ROW_LABEL + columns * VIEW_SIZE, len(rows) * VIEW_SIZE), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (label, pictures) in enumerate(rows):
        pen.text((4, number * VIEW_SIZE + 16), label, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (_ROW_LABEL + column * VIEW_SIZE, number * VIEW_SIZE))
    return sheet
