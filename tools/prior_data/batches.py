"""Training batches for the embedded prior, composed on the device.

A sample is a view, its light, colour and background, and a caption that fits. In a group, so many samples one after
another show one object from around it: one model, colour, background, kind of shading and ambient light, one name in
the captions, and the same things told. Cameras are the views' own, and so is the lamp near each camera, as in a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamfusion_fast.guidance.models.embedded.model import SHADINGS, ViewCondition
from dreamfusion_fast.guidance.models.embedded.text_encoder import TextEncoder
from dreamfusion_fast.guidance.prompts import view_index

from .captions import TEXTURELESS as CLAY
from .captions import VIEWS, compose, noun_phrases
from .colours import COLOURS
from .views import load_views

# How closely a group's views keep to directions evenly around the object at one elevation: the concentration of a von
# Mises-Fisher distribution over the model's views. With some 70 of them, they lie about 12 degrees off.
SPREAD = 60.0
# Share of samples that are told their camera: views alone, and groups.
CAMERA_TOLD, CAMERAS_TOLD = 0.7, 0.9
ALBEDO, TEXTURELESS = SHADINGS.index("albedo"), SHADINGS.index("textureless")
HELD_OUT_VIEWS = 2  # of every model, for the probe
# Display colours of the caption's colour words, in the order of COLOURS; training jitters them.
COLOUR_VALUES = {
    "black": (0.09, 0.09, 0.09), "white": (0.93, 0.93, 0.93), "grey": (0.5, 0.5, 0.5), "red": (0.8, 0.08, 0.08),
    "orange": (0.93, 0.48, 0.08), "yellow": (0.94, 0.84, 0.12), "green": (0.13, 0.6, 0.16), "blue": (0.1, 0.25, 0.82),
    "purple": (0.5, 0.16, 0.65), "pink": (0.95, 0.5, 0.68), "brown": (0.42, 0.25, 0.12),
}  # fmt: skip


@dataclass
class Parts:
    """The draws that make a batch, kept so that the probe can change one condition and leave the rest.

    `phrase`, `word` (0 none, then COLOURS, then clay) and `suffix` (0 none) `[n]` int64 make the caption; `null` `[n]`
    bool drops it.
    """

    phrase: Tensor
    word: Tensor
    suffix: Tensor
    null: Tensor
    view: ViewCondition


@dataclass
class Batch:
    """`images` `[n, 3, 64, 64]` in [-1, 1], `tokens` `[n, 20, 384]`, `condition` `[n, CONDITION_WIDTH]`, and the parts
    of the last two."""

    images: Tensor
    tokens: Tensor
    condition: Tensor
    parts: Parts


class CatalogueSampler:
    """Draws batches from a folder of rendered views; everything lies on the device.

    Args:
        data: folder made by `build.py`.
        text_encoder: folder made by `tools/build_text_encoder.py`, or a module that is called as `TextEncoder` is.
        device: where batches are composed.
        suffixes: of captions, "" among them; those of the views, or none but that.
    """

    def __init__(
        self, data: Path, text_encoder: Path | nn.Module, device: torch.device, suffixes: Sequence[str] = VIEWS
    ) -> None:
        self.device = device
        albedo, normal, meta = load_views(data, workers=16 if device.type == "cuda" else 2)
        models = json.loads((data / "models.json").read_text())
        self.albedo = torch.from_numpy(albedo).to(device)
        self.normal = torch.from_numpy(normal).to(device)
        self.azimuth = torch.from_numpy(meta["azimuth"]).to(device)
        self.elevation = torch.from_numpy(meta["elevation"]).to(device)
        self.distance = torch.from_numpy(meta["distance"]).to(device)
        owner = torch.from_numpy(meta["model"]).long()
        counts = torch.bincount(owner, minlength=len(models))
        assert bool((owner.diff() >= 0).all()), "views must be ordered by model"
        self.first = (counts.cumsum(0) - counts).to(device)
        self.count = counts.to(device)
        # Of each model; here and not where it is used, since a GPU's maximum would make every step wait.
        self._places = torch.arange(int(counts.max()), device=device)
        self._trained_on = self._places < (self.count[:, None] - HELD_OUT_VIEWS)
        self._direction = _directions(self.azimuth, self.elevation)
        trained = torch.tensor([m["split"] == "train" for m in models])
        weight = torch.tensor([float(m["weight"]) for m in models]) * trained * (counts > 0)
        self.weight = weight.to(device)
        self.held_out_models = (~trained & (counts > 0)).nonzero().flatten().to(device)

        phrases = noun_phrases(models)
        index = {p: i for i, p in enumerate(phrases)}
        self.phrases = phrases
        width = max(len(m["phrases"]) for m in models)
        choices, chances = torch.zeros(len(models), width, dtype=torch.long), torch.zeros(len(models), width)
        natural, has_natural = torch.zeros(len(models), 2, dtype=torch.long), torch.zeros(len(models), dtype=torch.bool)
        for i, model in enumerate(models):
            count = len(model["phrases"])
            choices[i, :count] = torch.tensor([index[p] for p in model["phrases"]])
            chances[i, :count] = torch.tensor([float(w) for w in model["phrases"].values()])
            words = [1 + COLOURS.index(c) for c in model["colours"][:2]]
            if words:
                natural[i] = torch.tensor([words[0], words[-1]])
                has_natural[i] = True
        self.choices, self.chances = choices.to(device), chances.to(device)
        self.natural, self.has_natural = natural.to(device), has_natural.to(device)
        # In the order of SHADINGS; here and not where it is drawn, since a copy to the GPU would make every step wait.
        self.shading_chances = torch.tensor([0.5, 0.35, 0.15], device=device)
        self.colour_values = torch.tensor([COLOUR_VALUES[c] for c in COLOURS], device=device)
        encoder = TextEncoder(text_encoder) if isinstance(text_encoder, Path) else text_encoder
        self.encoder = encoder.to(device)
        self._encode_captions(suffixes)

    def summary(self) -> str:
        trained = int((self.weight > 0).sum())
        texts = f"{len(self.phrases)} phrases, {len(self.tokens)} captions"
        return f"{len(self.albedo)} views, {trained} models trained on, {texts}"

    def _encode_captions(self, suffixes: Sequence[str]) -> None:
        words = ["", *COLOURS, CLAY]
        captions = [compose(phrase, word, view) for phrase in self.phrases for word in words for view in suffixes]
        self.words, self.suffixes = len(words), len(suffixes)
        pieces = [self.encoder(chunk) for chunk in _chunks([*captions, ""], 4096)]
        self.tokens = torch.cat([p[0].bfloat16() for p in pieces])
        self.pooled = torch.cat([p[1] for p in pieces])

    def caption_index(self, parts: Parts) -> Tensor:
        """Row of each part's caption in `tokens` and `pooled`, `[n]` int64."""
        caption = (parts.phrase * self.words + parts.word) * self.suffixes + parts.suffix
        return torch.where(parts.null, len(self.tokens) - 1, caption)

    def condition(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Token states `[n, 20, 384]` and condition vector `[n, CONDITION_WIDTH]` of the parts."""
        caption = self.caption_index(parts)
        vector = parts.view.vector(len(caption), self.device)
        return self.tokens[caption].float(), torch.cat([self.pooled[caption], vector], -1)

    def batch(self, n: int, group: int = 1) -> Batch:
        """A training batch of n views in groups: models by weight, views uniform without the held-out ones."""
        return self._compose(*self.draw_groups(n, group), group)

    def held_out_batch(self, n: int, group: int = 1) -> Batch:
        """Views never trained on, of models that were; in groups the first view of each, the others were trained on."""
        return self._compose(*self.draw_groups(n, group, held_out=True), group)

    def draw(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Models by weight and one view of each, held out of training or not: indices `[n]` int64."""
        model = torch.multinomial(self.weight, n, replacement=True)
        if held_out:
            return model, self.first[model] + self.count[model] - 1 - (self._rand(n) * HELD_OUT_VIEWS).long()
        return model, self.first[model] + (self._rand(n) * (self.count[model] - HELD_OUT_VIEWS)).long()

    def draw_groups(self, n: int, group: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """`draw`, each view followed by others of its model, so that `group` of them are around it: indices `[n]`.

        Raises:
            ValueError: n is no multiple of the group.
        """
        if n % group:
            raise ValueError(f"batch: got {n}, want a multiple of {group}, the views of a group")
        model, view = self.draw(n // group, held_out)
        if group == 1:
            return model, view
        turns = torch.arange(1, group, device=self.device) * (2 * math.pi / group)
        azimuth = (self.azimuth[view][:, None] + turns).flatten()
        elevation = self.elevation[view].repeat_interleave(group - 1)
        others = model.repeat_interleave(group - 1)
        wanted = _directions(azimuth, elevation)
        places = (self.first[others][:, None] + self._places).clamp(max=len(self.albedo) - 1)
        nearness = SPREAD * (self._direction[places] * wanted[:, None]).sum(-1)
        chance = torch.where(self._trained_on[others], nearness, -math.inf).softmax(-1)
        other = self.first[others] + torch.multinomial(chance, 1)[:, 0]
        view = torch.cat([view[:, None], other.view(-1, group - 1)], 1).flatten()
        return model.repeat_interleave(group), view

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device)

    def _compose(self, model: Tensor, view: Tensor, group: int) -> Batch:
        images, parts = self.pictures(model, view, group)
        return Batch(images, *self.condition(parts), parts)

    def pictures(self, model: Tensor, view: Tensor, group: int = 1) -> tuple[Tensor, Parts]:
        """Views under drawn light, colour and background, `[n, 3, 64, 64]` in [-1, 1], and what may be said of them."""
        n = len(model) // group  # draws are of groups, `spread` gives them to their views

        def spread(values: Tensor) -> Tensor:
            return values if group == 1 else values.repeat_interleave(group, 0)

        azimuth, elevation = self.azimuth[view], self.elevation[view]
        rgba = self.albedo[view].permute(0, 3, 1, 2).float() / 255
        albedo, alpha = rgba[:, :3], rgba[:, 3:]
        normal = torch.nn.functional.normalize(self.normal[view].permute(0, 3, 1, 2).float() / 127.5 - 1, dim=1)

        shading = torch.multinomial(self.shading_chances, n, replacement=True)
        textureless = shading == TEXTURELESS
        albedo, word = self.coloured(model[::group], albedo, alpha, ~textureless)
        albedo = torch.where(_column(spread(textureless)), torch.ones_like(albedo), albedo)
        clay = torch.where(self._rand(n) < 0.6, 1 + len(COLOURS), 0)
        word = spread(torch.where(textureless, clay, word))

        shading = spread(shading)
        image = self._light(albedo, normal, azimuth, elevation, shading, group)
        background = spread(self._backgrounds(n))
        image = image * alpha + _plane(background) * (1 - alpha)

        phrase, suffix, null = self.captions(model, azimuth, elevation, group)
        told = CAMERA_TOLD if group == 1 else CAMERAS_TOLD
        camera_known = spread(self._rand(n) < told) & ~(null & spread(self._rand(n) < 0.5))
        background_known, shading_known = spread(self._rand(n) < 0.9), spread(self._rand(n) < 0.9)
        condition = ViewCondition(
            azimuth, elevation, background, shading, camera_known, background_known, shading_known
        )
        parts = Parts(phrase, word, suffix, null, condition)
        return image * 2 - 1, parts

    def coloured(
        self, model: Tensor, albedo: Tensor, alpha: Tensor, may: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A third of the objects in another colour, and the colour word of each, or none.

        Args:
            model: `[n]`.
            albedo: `[n * views, 3, height, width]`, the views of each object one after another.
            alpha: `[n * views, 1, height, width]`.
            may: `[n]`, which may be recoloured; None: all.

        Returns:
            Albedo, and words `[n]` (0 none, then COLOURS): that of the new colour, or in half of the others that of
            their own colour, if it has one.
        """
        n = len(model)
        recoloured = self._rand(n) < 0.35
        if may is not None:
            recoloured &= may
        colour = torch.randint(len(COLOURS), (n,), device=self.device)
        changed = recoloured.repeat_interleave(len(albedo) // max(n, 1))
        albedo = torch.where(_column(changed), self._recolour(albedo, alpha, colour), albedo)
        named = self.natural[model, torch.randint(2, (n,), device=self.device)]
        named = torch.where(self.has_natural[model] & (self._rand(n) < 0.5), named, 0)
        return albedo, torch.where(recoloured, 1 + colour, named)

    def captions(
        self, model: Tensor, azimuth: Tensor, elevation: Tensor, group: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A drawn phrase and view suffix for each picture, and whether its caption is dropped.

        In a group, phrase and dropping are the same, and all name their views or none does.
        """
        first = model[::group]
        n = len(first)
        phrase = self.choices[first, torch.multinomial(self.chances[first], 1)[:, 0]]
        named, null = self._rand(n) < 0.6, self._rand(n) < 0.1
        phrase, named, null = (values.repeat_interleave(group) for values in (phrase, named, null))
        return phrase, torch.where(named, 1 + view_index(azimuth, elevation), 0), null

    def _recolour(self, albedo: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
        """The colour word's colour, jittered, under the texture's brightness relative to that of all views."""
        group = len(albedo) // max(len(colour), 1)
        luminance = albedo.mean(1).unflatten(0, (-1, group))
        weight = alpha[:, 0].unflatten(0, (-1, group))
        mean = (luminance * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1)
        relative = (luminance / mean.clamp(min=0.05)[:, None, None, None]).clamp(0.35, 1.5)
        target = self.colour_values[colour] * (0.8 + 0.4 * self._rand(len(colour), 1)) + 0.06 * (
            self._rand(len(colour), 3) - 0.5
        )
        return (target[:, None, :, None, None] * relative[:, :, None]).clamp(0, 1).flatten(0, 1)

    def _light(
        self, albedo: Tensor, normal: Tensor, azimuth: Tensor, elevation: Tensor, shading: Tensor, group: int
    ) -> Tensor:
        """Lambertian light from around the camera; albedo renders stay unlit."""
        n = len(albedo)
        camera = _directions(azimuth, elevation)
        light = torch.nn.functional.normalize(camera + 0.5 * torch.randn(n, 3, device=self.device), dim=-1)
        ambient = 0.1 + 0.5 * self._rand(n // group, 1, 1, 1).repeat_interleave(group, 0)
        lit = albedo * (ambient + (1 - ambient) * (normal * _plane(light)).sum(1, keepdim=True).clamp(min=0))
        return torch.where(_column(shading == ALBEDO), albedo, lit)

    def _backgrounds(self, n: int) -> Tensor:
        """Half random colours, a third white, the rest grey levels."""
        kind = self._rand(n, 1)
        grey = self._rand(n, 1).expand(-1, 3)
        return torch.where(kind < 0.5, self._rand(n, 3), torch.where(kind < 0.83, torch.ones_like(grey), grey))


def _directions(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit vectors `[n, 3]` towards cameras there."""
    flat = elevation.cos()
    return torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], -1)


def _column(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)


def _plane(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _chunks(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
