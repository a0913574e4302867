"""Batches of objects: what is said of each, and rays through views of it with the colours that they should have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from prior_data.batches import HELD_OUT_VIEWS, CatalogueSampler
from torch import Tensor

from dreamfusion_fast.rendering.orbits import cameras_at
from dreamfusion_fast.rendering.rays import Rays

VIEW_SIZE = 64
_PIXELS = VIEW_SIZE**2
# Share of the draws in which an object's code is not told, so that the caption alone is learned, too.
CODE_DROPOUT = 0.15
# Share of a view's rays that go through pixels of the object, and the opacity from which a pixel is one.
_ON_OBJECT, _OBJECT_OPACITY = 0.5, 0.5


@dataclass(frozen=True, eq=False)
class ObjectBatch:
    """n objects, and m rays that see them.

    Attributes:
        objects: `[n]` int64, rows of the codes.
        coded: `[n]` bool, whose code is told.
        states, pooled: `[n, 20, 384]` and `[n, 384]`, the captions.
        rays: `[m]`.
        scene: `[m]` int64, 0 to n - 1, which object a ray sees.
        albedo, opacity: `[m, 3]` and `[m]`, wanted of the object; albedo means nothing where the opacity is 0.
        background: `[m, 3]`, behind it: one colour for each view.
    """

    objects: Tensor
    coded: Tensor
    states: Tensor
    pooled: Tensor
    rays: Rays
    scene: Tensor
    albedo: Tensor
    opacity: Tensor
    background: Tensor

    @property
    def color(self) -> Tensor:
        """`[m, 3]`, wanted of the render."""
        return self.albedo * self.opacity[:, None] + self.background * (1 - self.opacity[:, None])


class ObjectSampler:
    """Draws batches from the catalogue.

    Args:
        catalogue: made with `suffixes=("",)`: objects are described, and not views of them.
    """

    def __init__(self, catalogue: CatalogueSampler) -> None:
        self.catalogue = catalogue
        trained = catalogue.weight > 0
        self.models = trained.nonzero().flatten()
        """`[objects]`, the model in the catalogue of each object that has a code."""
        self._object_of = trained.cumsum(0) - 1

    def draw(self, n: int, views: int, rays: int) -> ObjectBatch:
        """n objects by weight, some in another colour, each seen in `views` random views by `rays` rays a view."""
        c = self.catalogue
        model = torch.multinomial(c.weight, n, replacement=True)
        places = torch.rand(n, views, device=c.device) * (c.count[model, None] - HELD_OUT_VIEWS)
        view = (c.first[model, None] + places.long()).flatten()
        albedo, opacity = self.pictures(view)
        albedo, word = c.coloured(model, albedo, opacity[:, None])

        on_object = (opacity.flatten(1) > _OBJECT_OPACITY).float() + 1e-6
        aimed = torch.multinomial(on_object, round(_ON_OBJECT * rays), replacement=True)
        anywhere = torch.randint(_PIXELS, (n * views, rays - aimed.shape[1]), device=c.device)
        pixel = torch.cat([aimed, anywhere], dim=1)
        index = (torch.arange(n * views, device=c.device)[:, None] * _PIXELS + pixel).flatten()
        states, pooled = self.say(model, word)
        background = torch.rand(n * views, 3, device=c.device).repeat_interleave(rays, dim=0)
        return ObjectBatch(
            objects=self._object_of[model],
            coded=torch.rand(n, device=c.device) >= CODE_DROPOUT,
            states=states,
            pooled=pooled,
            rays=self.rays(view)[index],
            scene=torch.arange(n, device=c.device).repeat_interleave(views * rays),
            albedo=albedo.permute(0, 2, 3, 1).reshape(-1, 3)[index],
            opacity=opacity.flatten()[index],
            background=background,
        )

    def say(self, model: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        """Captions of models `[n]` with these colour words `[n]`: token states and pooled vectors."""
        c = self.catalogue
        phrase = c.choices[model, torch.multinomial(c.chances[model], 1)[:, 0]]
        return self.caption(phrase, word)

    def caption(self, phrase: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
        """Token states and pooled vectors of phrases `[n]` with these colour words `[n]`."""
        row = phrase * self.catalogue.words + word
        return self.catalogue.tokens[row].float(), self.catalogue.pooled[row]

    def pictures(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Albedo `[n, 3, 64, 64]` and opacity `[n, 64, 64]` of views `[n]`, both in [0, 1]."""
        rgba = self.catalogue.albedo[view].permute(0, 3, 1, 2).float() / 255
        return rgba[:, :3], rgba[:, 3]

    def rays(self, view: Tensor) -> Rays:
        """Of all pixels of views `[n]`: `[n * 64 * 64]`, views one after another, rows from the top."""
        c = self.catalogue
        return cameras_at(c.azimuth[view], c.elevation[view], c.distance[view]).rays(VIEW_SIZE, VIEW_SIZE)
