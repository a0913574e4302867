"""Draw the pictures of docs/how-it-works.md, each for light and for dark pages.

python tools/documentation/diagrams.py      # writes docs/images/NAME-light.svg and NAME-dark.svg
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from svg import THEMES, Drawing

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def step(colors: dict[str, str]) -> Drawing:
    """One step: images go to the guidance, and their gradient comes back."""
    d = Drawing(680, 470, "One training step: from the field to an image, to a gradient, and back to the field", colors)
    d.box((20, 15), (250, 62), "cameras, light, background", ["drawn anew in each step"], "given")
    d.box((410, 15), (250, 62), "prompt", ["“an armchair, side view”, …"], "given")
    d.box((20, 135), (250, 130), "renderer", ["rays, samples, compositing"])
    d.rect((410, 135), (250, 205), "frozen", "line", 8)
    d.text((535, 160), "guidance", bold=True)
    stages = (
        "image to the model's input",
        "add noise, random timestep",
        "predict: with the text, without",
        "method: residual of both",
    )
    for index, words in enumerate(stages):
        d.rect((425, 173 + 40 * index), (220, 30), "plain", "line", 6)
        d.text((535, 193 + 40 * index), words, 13)
    d.box((20, 375), (250, 75), "field", ["hash grid and MLP:", "density and colour at a position"], "trained")
    d.box((305, 375), (165, 75), "occupancy grid", ["which space is", "empty"])
    d.box((505, 375), (155, 75), "Adam", ["moves table, MLP", "and background"])

    d.arrow([(145, 77), (145, 133)])
    d.arrow([(535, 77), (535, 133)])
    d.text((545, 110), "embedded once", 13, "soft", "start")
    d.arrow([(270, 165), (408, 165)])
    d.text((339, 155), "image", 13, "soft")
    d.arrow([(410, 225), (272, 225)], "gradient")
    d.text((339, 215), "its gradient", 13, "gradient")
    d.arrow([(50, 375), (50, 267)])
    d.text((58, 326), "density, colour", 13, "soft", "start")
    d.arrow([(175, 265), (175, 373)], "gradient")
    d.text((183, 326), "gradient", 13, "gradient", "start")
    d.arrow([(387, 375), (387, 295), (255, 295), (255, 267)])
    d.text((324, 287), "where to sample", 13, "soft")
    d.arrow([(270, 400), (303, 400)])
    d.arrow([(582, 375), (582, 357), (255, 357), (255, 373)], "gradient")
    return d


def occupancy(colors: dict[str, str]) -> Drawing:
    """A ray takes equal steps through the box, and a sample where the cell is occupied."""
    d = Drawing(680, 330, "Rays through the occupancy grid: samples lie in occupied cells only", colors)
    left, top, cell, n = 190.0, 15.0, 18.0, 16
    solid = [(8.6, 8.2, 3.4), (5.4, 11.2, 1.6)]

    def occupied(x: float, y: float) -> bool:
        return any(math.hypot(int(x) + 0.5 - cx, int(y) + 0.5 - cy) < r + 0.75 for cx, cy, r in solid)

    for column in range(n):
        for row in range(n):
            if occupied(column, row):
                d.rect((left + cell * column, top + cell * row), (cell, cell), "trained", corner=0)
    for index in range(n + 1):
        for ends in (((0, index), (n, index)), ((index, 0), (index, n))):
            d.line([(left + cell * x, top + cell * y) for x, y in ends], "plain", 1)
    d.rect((left, top), (cell * n, cell * n), None, "line", 0)
    for cx, cy, r in solid:
        d.dot((left + cell * cx, top + cell * cy), cell * r, None, "b")
    eye = (-6.5, 9.0)
    d.dot((left + cell * eye[0], top + cell * eye[1]), 6, "c")
    d.text((left + cell * eye[0], top + cell * eye[1] + 26), "camera", 13, "soft")
    for slope in (-0.34, -0.06, 0.17):
        length = math.hypot(1, slope)
        end = (n + 1.2, eye[1] + slope * (n + 1.2 - eye[0]))
        d.line([(left + cell * x, top + cell * y) for x, y in (eye, end)], "line", 1)
        for index in range(60):
            distance = (-eye[0] * length) + (index + 0.5) * 0.62
            x, y = eye[0] + distance / length, eye[1] + slope * distance / length
            if not (0 <= x < n and 0 <= y < n):
                continue
            at = (left + cell * x, top + cell * y)
            d.dot(at, 3.6, "a") if occupied(x, y) else d.dot(at, 1.5, "line")
    for row, (words, fill) in enumerate((("occupied", "trained"), ("sample", "a"), ("step, skipped", "line"))):
        y = top + 40 + 30 * row
        if fill == "trained":
            d.rect((510, y - 12), (16, 16), fill, "line", 0)
        else:
            d.dot((518, y - 4), 4.5 if fill == "a" else 2, fill)
        d.text((538, y + 1), words, 13, "soft", "start")
    return d


def compositing(colors: dict[str, str]) -> Drawing:
    """Density along a ray, the light that is left, and what each sample adds."""
    d = Drawing(680, 330, "Along a ray: density, the light that is left, and the weight of each sample", colors)
    left, gap, width, scale = 60.0, 29.0, 22.0, 105.0
    densities = [0, 0.05, 0.1, 0.5, 1.3, 1.9, 1.2, 0.4, 0.1, 0.05, 0, 0, 0.3, 1.1, 1.5, 1.0, 0.3, 0.1, 0, 0]
    shown = max(densities)
    light, points, weights = 1.0, [], []
    for index, density in enumerate(densities):
        points.append((left + gap * index, 290 - scale * light))
        alpha = 1 - math.exp(-0.2 * density)
        weights.append(light * alpha)
        light *= 1 - alpha
        points.append((left + gap * (index + 1), 290 - scale * light))
    for index, (density, weight) in enumerate(zip(densities, weights, strict=True)):
        x = left + gap * index + (gap - width) / 2
        tall, heavy = 92 * density / shown, scale * weight
        d.rect((x, 140 - tall), (width, tall), "c")
        d.rect((x, 290 - heavy), (width, heavy), "a")
    d.line(points, "gradient", 2.5)
    for y in (140.0, 290.0):
        d.line([(left, y), (left + gap * len(densities), y)], "line", 1.5)
    d.text((left + 5, 30), "density, asked of the field", 14, "c", "start", True)
    d.text((left + 5, 176), "light that is left", 14, "gradient", "start", True)
    d.text((left + gap * 20, 245), "weight of a sample", 14, "a", "end", True)
    d.text((left, 314), "camera", 13, "soft", "start")
    d.text((left + gap * 20, 314), "distance along the ray", 13, "soft", "end")
    return d


def streaming(colors: dict[str, str]) -> Drawing:
    """Samples of rays, packed one after another, cut into tiles that may begin inside a ray."""
    title = "The samples of all rays are packed and cut into tiles, which go through the field in turn"
    d = Drawing(680, 440, title, colors)
    rays = ((3, "a"), (5, "b"), (2, "c"), (6, "d"), (0, "e"), (4, "f"))
    width, per_tile = 30.0, 8
    left = (680 - 20 * width) / 2
    d.text((left, 22), "rays, and the samples that lie in occupied cells", 14, "soft", "start")
    packed: list[str] = []
    for row, (count, color) in enumerate(rays):
        y = 42 + 17 * row
        d.line([(left, y), (left + 20 * width, y)], "line", 1)
        for index in range(count):
            d.dot((left + 120 + 37 * row + 24 * index, y), 5, color)
        packed += [color] * count
    d.text((left, 172), "packed, ray after ray; a tile may begin inside a ray", 14, "soft", "start")
    for index, color in enumerate(packed):
        d.rect((left + width * index + 2, 182), (width - 4, 26), color, corner=4)
    for tile in range(math.ceil(len(packed) / per_tile)):
        first, last = per_tile * tile, min(per_tile * (tile + 1), len(packed))
        x0, x1 = left + width * first + 2, left + width * last - 2
        d.line([(x0, 216), (x0, 224), (x1, 224), (x1, 216)], "ink", 1.5)
        d.text(((x0 + x1) / 2, 243), f"tile {tile}", 14)
    d.arrow([(left + 120, 250), (left + 120, 278)])
    d.text((left + 132, 269), "tile after tile, in one workspace", 13, "soft", "start")
    stages = (("march", "again"), ("encode", "hash grid"), ("MLP", ""), ("shade", "and add up"))
    for index, (title, words) in enumerate(stages):
        x = left + 122 * index
        d.box((x, 282), (102, 60), title, [words] if words else [], "trained" if index in (1, 2) else "plain")
        if index:
            d.arrow([(x - 20, 312), (x - 1, 312)])
    d.arrow([(left + 468, 312), (left + 487, 312)])
    d.box((left + 488, 282), (112, 60), "ray sums", ["colour, depth"], "given")
    d.arrow([(left + 544, 342), (left + 544, 378), (left + 51, 378), (left + 51, 344)], "gradient")
    d.text((340, 399), "backward: the tiles in the opposite order, from the gradients of these sums;", 13, "gradient")
    d.text((340, 418), "each tile is computed again, or kept if all of them fit into the budget", 13, "gradient")
    return d


def mesh(colors: dict[str, str]) -> Drawing:
    """From the field of the last step to the file."""
    d = Drawing(680, 300, "From the field of the last step to mesh.glb", colors)
    boxes = (
        ("field", ["after the last step", "of the guidance"], "trained"),
        ("made firm", ["fitted to its own renders,", "each pixel opaque or empty"], "trained"),
        ("looked at", ["46 views: silhouettes,", "and where matter begins"], "plain"),
        ("surface", ["zero of a signed distance,", "by marching cubes"], "plain"),
        ("unwrapped", ["smoothed, fewer faces,", "each with texels of its own"], "plain"),
        ("coloured", ["what a ray collects that", "enters through the surface"], "plain"),
    )
    places = [(20 + 225 * column, 20 + 110 * row) for row in range(2) for column in range(3)]
    for (x, y), (title, lines, fill) in zip(places, boxes, strict=True):
        d.box((x, y), (200, 75), title, lines, fill)
    for x in (220, 445):
        for y in (57.5, 167.5):
            d.arrow([(x, y), (x + 23, y)])
    d.arrow([(565, 95), (565, 112), (115, 112), (115, 128)])
    d.arrow([(565, 205), (565, 238)])
    d.box((470, 240), (200, 45), "mesh.glb", [], "given")
    d.box((20, 240), (390, 45), "compared with renders in 32 views", [], "given")
    d.arrow([(470, 262.5), (412, 262.5)])
    return d


DIAGRAMS: dict[str, Callable[[dict[str, str]], Drawing]] = {
    "step": step,
    "occupancy": occupancy,
    "compositing": compositing,
    "streaming": streaming,
    "mesh-stages": mesh,
}


def files() -> dict[Path, str]:
    """The text of each file, by its path."""
    return {
        IMAGES / f"{name}-{theme}.svg": draw(colors).svg()
        for name, draw in DIAGRAMS.items()
        for theme, colors in THEMES.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
