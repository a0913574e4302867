"""What the examples look at: a shiny ball and a box on a floor, photographed by a ray tracer of a few lines.

Nothing is downloaded. Everything lies in `BOX`, with z up.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dreamfusion_fast.rendering import Cameras, Rays

WHITE = torch.ones(3)
COLORS = torch.tensor([[0.0, 0.0, 0.0], [0.8, 0.15, 0.1], [0.1, 0.3, 0.75], [0.6, 0.6, 0.5]])  # nothing, ball, box...
BOX = (-0.9, -0.9, -0.65, 0.9, 0.9, 0.45)
_BALL = torch.tensor([-0.3, 0.1, 0.0]), 0.4  # middle and radius
_BOX = torch.tensor([0.4, -0.25, -0.1]), torch.tensor([0.25, 0.25, 0.3])  # middle and half of the size
_FLOOR = torch.tensor([0.0, 0.0, -0.5]), torch.tensor([0.85, 0.85, 0.1])
_LIGHT = normalize(torch.tensor([0.5, -0.6, 1.0]), dim=0)


@dataclass(frozen=True)
class Photographs:
    """`poses` [B, 3, 4] by OpenCV's convention, `intrinsics` [3, 3], `size` in pixels.

    And for each pixel of all views, as `rays` has them: `color` [n, 3] before black, `opacity` [n, 1], `label` [n], a
    row of `COLORS`, and `depth` [n], infinite where there is nothing.
    """

    poses: Tensor
    intrinsics: Tensor
    size: int
    rays: Rays
    color: Tensor
    opacity: Tensor
    label: Tensor
    depth: Tensor

    def before(self, background: Tensor) -> Tensor:
        """Colours [n, 3] with a background [3] or [n, 3]."""
        return self.color + (1.0 - self.opacity) * background


def photograph(views: int, seed: int, size: int = 32) -> Photographs:
    """Square pictures from random places above the floor, looking at the middle."""
    generator = torch.Generator().manual_seed(seed)
    azimuth = 2.0 * torch.pi * (torch.arange(views) + torch.rand(views, generator=generator)) / views
    height = 0.15 + 0.7 * torch.rand(views, generator=generator)
    around = (1.0 - height**2).sqrt()
    position = 2.6 * torch.stack([around * azimuth.cos(), around * azimuth.sin(), height], dim=1)
    forward = normalize(torch.tensor([0.0, 0.0, -0.15]) - position, dim=1)
    right = normalize(torch.cross(forward, torch.tensor([0.0, 0.0, 1.0]).expand_as(forward), dim=1), dim=1)
    poses = torch.stack([right, torch.cross(forward, right, dim=1), forward, position], dim=2)
    intrinsics = torch.tensor([[1.2 * size, 0.0, 0.5 * size], [0.0, 1.2 * size, 0.5 * size], [0.0, 0.0, 1.0]])
    cameras = Cameras.from_poses(poses, intrinsics, size, size)
    color, found, _ = _trace(cameras.rays(3 * size, 3 * size))  # nine rays for a pixel
    rgba = torch.cat([color, (found > 0)[:, None]], dim=1).view(views, size, 3, size, 3, 4).mean(dim=(2, 4)).view(-1, 4)
    rays = cameras.rays()
    return Photographs(poses, intrinsics, size, rays, rgba[:, :3], rgba[:, 3:], *_trace(rays)[1:])


def distances(points: Tensor) -> Tensor:
    """Signed distances [m, 3] of `points` [m, 3] to ball, box and floor, below 0 inside."""
    middle, radius = _BALL
    found = [(points - middle).norm(dim=1) - radius]
    for middle, half in (_BOX, _FLOOR):
        beyond = (points - middle).abs() - half
        found.append(beyond.clamp(min=0.0).norm(dim=1) + beyond.amax(dim=1).clamp(max=0.0))
    return torch.stack(found, dim=1)


def signed_distance(points: Tensor) -> Tensor:
    """Distance [m] of `points` [m, 3] to the nearest surface, below 0 inside of what there is."""
    return distances(points).amin(dim=1)


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: 20 is a tenth off, 30 a thirtieth."""
    return -10.0 * float((picture - truth).square().mean().log10())


def save_if_asked(picture: Tensor, size: int) -> None:
    """Write colours [B * size * size, 3] as a PNG, one view beside the other, to the path that the script was given."""
    if len(sys.argv) < 2:
        return
    rows = (picture.detach().clamp(0.0, 1.0) * 255.0).round().byte().view(-1, size, size, 3).transpose(0, 1)
    width = rows.shape[1] * size
    data = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in rows)
    parts = (b"IHDR", struct.pack(">2I5B", width, size, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    with open(sys.argv[1], "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in parts:
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))


def _trace(rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, class and distance of what each ray meets first: a diffuse surface, and a highlight on the ball."""
    meetings = [_meet_ball(rays, *_BALL), _meet_box(rays, *_BOX), _meet_box(rays, *_FLOOR)]
    depth, first = torch.stack([t for t, _ in meetings]).min(dim=0)
    normal = torch.stack([n for _, n in meetings])[first, torch.arange(len(rays))]
    label = torch.where(depth.isfinite(), first + 1, 0)
    lit = (normal @ _LIGHT).clamp(min=0.0)
    mirrored = rays.directions - 2.0 * (rays.directions * normal).sum(dim=1, keepdim=True) * normal
    highlight = 0.7 * (mirrored @ _LIGHT).clamp(min=0.0) ** 8 * (label == 1)
    color = (COLORS[label] * (0.35 + 0.65 * lit)[:, None] + highlight[:, None]).clamp(max=1.0)
    return torch.where((label > 0)[:, None], color, 0.0), label, depth


def _meet_ball(rays: Rays, middle: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Distance to the ball, infinite where it is missed, and the normal there."""
    offset = rays.origins - middle
    b = (offset * rays.directions).sum(dim=1)
    root = b * b - offset.square().sum(dim=1) + radius * radius
    t = torch.where(root > 0.0, -b - root.clamp(min=0.0).sqrt(), torch.inf)
    return t, normalize(offset + t.nan_to_num(posinf=0.0)[:, None] * rays.directions, dim=1)


def _meet_box(rays: Rays, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the box, infinite where it is missed, and the normal of the face that is met."""
    to_middle = (middle - rays.origins) / rays.directions
    across = (half / rays.directions).abs()
    enter, axis = (to_middle - across).max(dim=1)
    leave = (to_middle + across).amin(dim=1)
    face = torch.nn.functional.one_hot(axis, 3).to(enter.dtype)
    return torch.where(enter < leave, enter, torch.inf), -face * rays.directions.sign()
