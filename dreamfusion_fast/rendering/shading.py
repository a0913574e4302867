"""Shading of samples: albedo, diffuse light, and diffuse light on white (textureless)."""

from __future__ import annotations

from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from dreamfusion_fast.ops.sample_head import lit_color

AMBIENT = 0.1
DIFFUSE = 0.9


class Shading(str, Enum):
    """How samples are coloured (DreamFusion, section 3.1)."""

    ALBEDO = "albedo"
    LAMBERTIAN = "lambertian"
    TEXTURELESS = "textureless"

    @property
    def needs_normals(self) -> bool:
        """Whether the shading reads normals and a light."""
        return self is not Shading.ALBEDO

    @classmethod
    def parse(cls, value: Shading | str) -> Shading:
        """The shading of that name; ValueError naming the choices otherwise."""
        try:
            return cls(value)
        except ValueError:
            raise ValueError(f"shading: got {value!r}, want one of {', '.join(s.value for s in cls)}") from None


def shade(
    albedo: Tensor,
    normal: Tensor | None,
    positions: Tensor,
    light: Tensor | None,
    shading: Shading | str = Shading.ALBEDO,
    ambient: float = AMBIENT,
    diffuse: float = DIFFUSE,
) -> Tensor:
    """Colours of samples lit by a point light: albedo * (ambient + diffuse * max(0, n . l)), l the unit vector to it.

    Args:
        albedo: `[m, 3]`.
        normal: `[m, 3]`, unit; unused with albedo shading.
        positions: `[m, 3]`.
        light: position `[3]` or `[m, 3]`; unused with albedo shading.
        shading: albedo returns `albedo` itself, textureless replaces it by white.
        ambient: strength of the light from everywhere.
        diffuse: strength of the point light.

    Returns:
        `[m, 3]`.

    Raises:
        ValueError: normal or light missing, or an unknown shading.
    """
    shading = Shading.parse(shading)
    if shading is Shading.ALBEDO:
        return albedo
    if normal is None or light is None:
        raise ValueError(f"shading {shading.value}: got no {'normal' if normal is None else 'light'}, want both")
    return lit_color(albedo, normal, positions, light, shading is Shading.TEXTURELESS, ambient, diffuse)


def sample_lights(
    camera_positions: Tensor,
    generator: torch.Generator,
    mode: Literal["camera", "uniform"] = "camera",
    distance: tuple[float, float] = (0.8, 1.5),
) -> Tensor:
    """One point light per view.

    Args:
        camera_positions: `[B, 3]`.
        generator: source of randomness.
        mode: "camera": direction of N(camera, I), as in DreamFusion, appendix A.2; "uniform": any direction.
        distance: range of the distance from the origin; the paper's range matches its camera distances of 1 to 1.5.

    Returns:
        `[B, 3]`, on the cameras' device.
    """
    if mode not in ("camera", "uniform"):
        raise ValueError(f"mode: got {mode!r}, want camera or uniform")
    low, high = distance
    if not 0.0 < low <= high:
        raise ValueError(f"distance: got ({low}, {high}), want 0 < low <= high")
    batch = camera_positions.shape[0]
    noise = torch.randn(batch, 3, generator=generator, device=generator.device).to(camera_positions)
    length = low + (high - low) * torch.rand(batch, 1, generator=generator, device=generator.device)
    towards = camera_positions + noise if mode == "camera" else noise
    return length.to(camera_positions) * torch.nn.functional.normalize(towards, dim=1)
