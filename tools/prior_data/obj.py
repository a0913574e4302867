"""A small OBJ + MTL reader that keeps what an albedo render needs: triangles, normals, texture coordinates, colours."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np


@dataclass
class Material:
    """Diffuse colour [3] in display values, opacity in [0, 1], and the texture's path (None without one)."""

    diffuse: np.ndarray = field(default_factory=lambda: np.full(3, 0.7))
    specular: np.ndarray = field(default_factory=lambda: np.zeros(3))
    opacity: float = 1.0
    illumination: int = 2
    texture: Path | None = None


@dataclass
class Part:
    """Triangle soup of one material: positions, normals [n, 3, 3] and texture coordinates [n, 3, 2], float32."""

    material: Material
    positions: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray


def _find(folder: Path, name: str) -> Path | None:
    path = folder / name.replace("\\", "/")
    if path.is_file():
        return path
    for other in folder.glob("*"):
        if other.name.lower() == path.name.lower():
            return other
    return None


def read_materials(path: Path) -> dict[str, Material]:
    """Materials of an MTL file by name. Colours outside [0, 1] are clipped."""
    materials: dict[str, Material] = {}
    current = Material()
    for line in path.read_text(encoding="latin-1").splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key, values = words[0], words[1:]
        if key == "newmtl":
            current = materials[line.strip()[6:].strip()] = Material()
        elif key == "Kd":
            current.diffuse = np.clip([float(x) for x in values[:3]], 0, 1)
        elif key == "Ks":
            current.specular = np.clip([float(x) for x in values[:3]], 0, 1)
        elif key == "d":
            current.opacity = float(values[-1])
        elif key == "illum":
            current.illumination = int(float(values[0]))
        elif key == "map_Kd":
            current.texture = _find(path.parent, line.strip()[6:].strip()) or _find(path.parent, values[-1])
    return materials


def read_obj(path: Path) -> list[Part]:
    """Triangles of an OBJ file grouped by material. Polygons are split as fans; missing normals are the faces' own.

    :raises ValueError: if the file holds no triangle.
    """
    positions: list[list[float]] = []
    normals: list[list[float]] = []
    uvs: list[list[float]] = []
    materials: dict[str, Material] = {}
    corners: dict[str, list[tuple[int, int, int]]] = {}
    current = corners.setdefault("", [])
    index: dict[str, tuple[int, int, int]] = {}

    def corner(word: str) -> tuple[int, int, int]:
        found = index.get(word)
        if found is not None:
            return found
        numbers = [int(x) if x else 0 for x in word.split("/")] + [0, 0]
        absolute = tuple(
            n - 1 if n > 0 else (len(pool) + n if n < 0 else -1)
            for n, pool in zip(numbers[:3], (positions, uvs, normals), strict=True)
        )
        if "-" not in word:
            index[word] = absolute
        return absolute

    for line in path.read_text(encoding="latin-1").replace("\\\n", " ").splitlines():
        words = line.split()
        if not words:
            continue
        key = words[0]
        if key == "v":
            positions.append([float(x) for x in words[1:4]])
        elif key == "vn":
            normals.append([float(x) for x in words[1:4]])
        elif key == "vt":
            uvs.append([float(x) for x in words[1:3]])
        elif key == "f":
            face = [corner(word) for word in words[1:]]
            for second, third in pairwise(face[1:]):
                current += (face[0], second, third)
        elif key == "usemtl":
            current = corners.setdefault(line.strip()[6:].strip(), [])
        elif key == "mtllib":
            library = _find(path.parent, line.strip()[6:].strip())
            if library is not None:
                materials.update(read_materials(library))

    position_table = np.array(positions, np.float32).reshape(-1, 3)
    normal_table = np.nan_to_num(np.array(normals, np.float32).reshape(-1, 3))
    uv_table = np.array([[*uv, 0.0][:2] for uv in uvs], np.float32).reshape(-1, 2)
    parts = []
    for name, indices in corners.items():
        if not indices:
            continue
        triples = np.array(indices).reshape(-1, 3, 3)
        points = position_table[triples[..., 0]]
        faces = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
        area = np.linalg.norm(faces, axis=1)
        keep = area > 0
        triples, points, faces = triples[keep], points[keep], faces[keep] / area[keep, None]
        flat = np.repeat(faces[:, None], 3, 1)
        vertex_normals = flat
        if len(normal_table):
            vertex_normals = normal_table[np.maximum(triples[..., 2], 0)]
            length = np.linalg.norm(vertex_normals, axis=-1, keepdims=True)
            bad = (triples[..., 2:] < 0) | (length < 1e-6)
            vertex_normals = np.where(bad, flat, vertex_normals / np.maximum(length, 1e-6))
        coordinates = np.zeros((*triples.shape[:2], 2), np.float32)
        if len(uv_table):
            coordinates = np.where(triples[..., 1:2] < 0, 0, uv_table[np.maximum(triples[..., 1], 0)])
        if len(points):
            parts.append(Part(materials.get(name, Material()), points, vertex_normals, coordinates))
    if not parts:
        raise ValueError(f"{path} holds no triangle")
    return parts
