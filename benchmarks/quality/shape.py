"""How flat an object is, by its outlines and normals; the same for meshes and for real models."""

from __future__ import annotations

import numpy as np

from quality.pictures import Layers, eye_directions


def thickness(layers: Layers) -> float:
    """The smallest area of its outlines over the largest: 0 for a sheet of paper seen all around, 1 for a ball."""
    areas = layers.alpha.sum((1, 2))
    return float(areas.min() / areas.max()) if areas.max() > 0 else 0.0


def relief(layers: Layers) -> float:
    """How much normals spread within a view, mean over the views: 1 - the length of their mean.

    0 for a flat board that faces the camera, 1/3 for a ball seen from afar.
    """
    facing = np.einsum("nhwc,nc->nhw", layers.normal, eye_directions(len(layers)))
    # Faces of thin parts may turn away by rounding; what is seen faces the camera.
    normal = np.where(facing[..., None] < 0, -layers.normal, layers.normal)
    weight = layers.alpha * (np.linalg.norm(layers.normal, axis=-1) > 0.5)
    total = weight.sum((1, 2))
    seen = total > 0
    if not seen.any():
        return 0.0
    mean = (normal * weight[..., None]).sum((1, 2))[seen] / total[seen, None]
    return float(1 - np.linalg.norm(mean, axis=-1).mean())
