"""How far a mesh shows what the render of its field shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dreamfusion_fast.export.picture import mesh_colors
from dreamfusion_fast.export.raster import rasterize_view
from dreamfusion_fast.export.seen import OPAQUE
from dreamfusion_fast.export.texture import UnwrappedMesh
from dreamfusion_fast.export.views import one, rings
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer

# Elevation in degrees and number of the 32 views, and their height and width. None of them is one of the views that
# `seen_distance` makes the surface from.
VIEWS = ((-10.0, 8), (15.0, 8), (30.0, 8), (55.0, 6), (80.0, 2))
SIZE = 256


@dataclass(frozen=True)
class Agreement:
    """Mesh and render compared in `VIEWS`, means over the views.

    Attributes:
        iou: intersection over union of the silhouettes; the render's is where its opacity is over 0.5.
        covered: share of the render's silhouette that the mesh covers.
        color: mean absolute difference of the colours where both are, in [0, 1].
    """

    iou: float
    covered: float
    color: float

    LOW = 0.9

    def __str__(self) -> str:
        return (
            f"mesh agrees with the render: {self.iou:.2f} "
            f"(covers {self.covered:.2f} of it, colours differ by {self.color:.2f})"
        )

    @property
    def warning(self) -> str | None:
        """One line for the user where mesh and render differ too much; else None."""
        if self.iou >= self.LOW:
            return None
        return (
            f"warning: mesh and render agree only to {self.iou:.2f}, below {self.LOW}: what is faint or "
            "thin may be missing or too thick; try more steps, another seed, or --export.resolution 256"
        )


@torch.no_grad()
def measure_agreement(renderer: VolumeRenderer, unwrapped: UnwrappedMesh, texture: NDArray[np.uint8]) -> Agreement:
    """Compare a mesh with the render of the field that it was made from.

    The cameras show the ball inscribed in the scene box's longest side.

    Args:
        renderer: of the field, on any device.
        unwrapped, texture: the mesh, which has to be closed.
    """
    box = renderer.aabb.cpu()
    radius = 0.5 * float((box[3:] - box[:3]).max())
    cameras = rings(VIEWS, 0.5 * (box[:3] + box[3:]), radius)
    scores = []
    for view in range(len(cameras)):
        output = renderer.render(one(cameras, view).to(renderer.aabb.device).rays(SIZE, SIZE))
        opacity = output.opacity.view(SIZE, SIZE).cpu().numpy()
        shown = opacity > OPAQUE
        seen = rasterize_view(unwrapped.mesh, cameras, view, SIZE, SIZE, closed=True)
        both = shown & seen.covered
        of_mesh = np.zeros((SIZE, SIZE, 3), np.float32)
        of_mesh[seen.covered] = mesh_colors(unwrapped, texture, seen)
        of_field = output.color.view(SIZE, SIZE, 3).cpu().numpy()[both] / opacity[both][:, None]
        color = float(np.abs(of_field - of_mesh[both]).mean()) if both.any() else np.nan
        scores.append((_ratio(both, shown | seen.covered), _ratio(both, shown), color))
    iou, covered, color = np.array(scores).T
    with_both = color[np.isfinite(color)]
    return Agreement(float(iou.mean()), float(covered.mean()), float(with_both.mean()) if len(with_both) else 1.0)


def _ratio(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    """Share of `whole` that `part` is; 1 where there is neither."""
    return float(part.sum() / whole.sum()) if whole.any() else 1.0
