"""Meshes, textures and pictures of a field, with other programs in mind."""

from __future__ import annotations

from dreamfusion_fast.export.agreement import Agreement, measure_agreement
from dreamfusion_fast.export.density import DensityGrid, sample_density
from dreamfusion_fast.export.field import TexturedMesh, export_field
from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.export.picture import render_mesh
from dreamfusion_fast.export.surface import extract_mesh
from dreamfusion_fast.export.texture import UnwrappedMesh, bake, save_glb, unwrap
from dreamfusion_fast.export.turntable import render_preview, render_turntable, save_png, tile

__all__ = [
    "Agreement",
    "DensityGrid",
    "Mesh",
    "TexturedMesh",
    "UnwrappedMesh",
    "bake",
    "export_field",
    "extract_mesh",
    "measure_agreement",
    "render_mesh",
    "render_preview",
    "render_turntable",
    "sample_density",
    "save_glb",
    "save_png",
    "tile",
    "unwrap",
]
