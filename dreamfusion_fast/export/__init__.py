"""Meshes, textures and pictures of a field, with other programs in mind."""

from __future__ import annotations

from dreamfusion_fast.export.field import MeshSummary, export_field
from dreamfusion_fast.export.mesh import Mesh, automatic_threshold, extract_mesh
from dreamfusion_fast.export.texture import UnwrappedMesh, at_surface, bake, composited, save_glb, unwrap
from dreamfusion_fast.export.turntable import render_preview, render_turntable, save_png, tile, view_grid

__all__ = [
    "Mesh",
    "MeshSummary",
    "UnwrappedMesh",
    "at_surface",
    "automatic_threshold",
    "bake",
    "composited",
    "export_field",
    "extract_mesh",
    "render_preview",
    "render_turntable",
    "save_glb",
    "save_png",
    "tile",
    "unwrap",
    "view_grid",
]
