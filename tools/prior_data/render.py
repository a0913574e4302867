"""Render albedo (RGBA) and world-space normals of catalogue models with OpenGL (EGL, no window)."""

from dataclasses import dataclass

import moderngl
import numpy as np
from PIL import Image

from .catalogue import Entry
from .obj import Material, Part, read_obj

FIELD_OF_VIEW = np.deg2rad(40.0)
RADIUS = 0.95
MINIMUM_DISTANCE = 1.05 / np.sin(FIELD_OF_VIEW / 2)
TEXTURE_LIMIT = 512

_VERTEX = """
#version 330
uniform mat4 projection;
in vec3 position; in vec3 normal; in vec2 uv;
out vec3 world; out vec3 shading; out vec2 coordinate;
void main() { world = position; shading = normal; coordinate = uv; gl_Position = projection * vec4(position, 1.0); }
"""
_FRAGMENT = """
#version 330
uniform vec3 eye; uniform vec4 colour; uniform bool textured; uniform bool blended; uniform sampler2D image;
in vec3 world; in vec3 shading; in vec2 coordinate;
layout(location = 0) out vec4 albedo; layout(location = 1) out vec4 direction;
void main() {
    vec4 value = colour;
    if (textured) value *= texture(image, coordinate);
    if (value.a < (blended ? 0.02 : 0.35)) discard;
    if (!blended) value.a = 1.0;
    vec3 n = normalize(shading);
    if (!(dot(n, n) > 0.5)) n = normalize(cross(dFdx(world), dFdy(world)));
    if (dot(n, eye - world) < 0.0) n = -n;
    albedo = vec4(value.rgb * value.a, value.a);
    direction = vec4(n * value.a, value.a);
}
"""


def normalise(parts: list[Part], entry: Entry) -> None:
    """Rotate, stretch to the catalogue's size, centre the bounding box and scale the farthest vertex to RADIUS."""
    rotation = entry.rotation.astype(np.float64)
    points = [part.positions.astype(np.float64) @ rotation.T for part in parts]
    low = np.min([p.min((0, 1)) for p in points], 0)
    high = np.max([p.max((0, 1)) for p in points], 0)
    extent = high - low
    stretch = np.where(extent > 1e-9 * extent.max(), np.array(entry.size) / np.maximum(extent, 1e-12), 1.0)
    points = [(p - (low + high) / 2) * stretch for p in points]
    scale = RADIUS / max(float(np.linalg.norm(p, axis=-1).max()) for p in points)
    for part, p in zip(parts, points, strict=True):
        part.positions = (p * scale).astype(np.float32)
        normals = part.normals @ rotation.T / stretch
        part.normals = (normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def base_colour(material: Material) -> np.ndarray:
    """Display colour [3] of a material without its texture.

    A texture replaces a grey diffuse value (exporters leave 0.64 or 0.8 there) and is tinted by a coloured one.
    Mirrors and chrome have black diffuse colours and live off their highlights: they get half of those instead.
    """
    diffuse = material.diffuse
    if material.texture is not None:
        return diffuse / diffuse.max() if diffuse.max() > 0.05 and np.ptp(diffuse) > 0.1 else np.ones(3)
    if diffuse.max() < 0.25:
        return np.maximum(diffuse, 0.5 * material.specular * (0.6 if material.illumination < 3 else 1.0))
    return diffuse


@dataclass
class _Drawable:
    vertices: moderngl.VertexArray
    buffer: moderngl.Buffer
    colour: tuple[float, float, float, float]
    texture: moderngl.Texture | None
    blended: bool
    data: np.ndarray
    centres: np.ndarray


class Scene:
    """One normalised model in graphics memory."""

    def __init__(self, renderer: "Renderer", entry: Entry):
        self.renderer = renderer
        parts = [part for part in read_obj(entry.obj) if part.material.opacity > 0.05]
        normalise(parts, entry)
        self.drawables = [self._upload(part) for part in parts]

    def _upload(self, part: Part) -> _Drawable:
        context, material = self.renderer.context, part.material
        texture, translucent = None, False
        if material.texture is not None:
            with Image.open(material.texture) as opened:
                image = opened.convert("RGBA")
            image.thumbnail((TEXTURE_LIMIT, TEXTURE_LIMIT))
            alpha = np.asarray(image)[..., 3]
            translucent = bool(np.mean((alpha > 25) & (alpha < 200)) > 0.3)
            texture = context.texture(image.size, 4, image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes())
            texture.build_mipmaps()
            texture.filter = (moderngl.LINEAR_MIPMAP_LINEAR, moderngl.LINEAR)
        opacity = material.opacity
        blended = opacity < 0.99 or translucent
        # Glass of opacity 0.1 would vanish on any background; a picture of it still shows a pane.
        opacity = max(opacity, 0.4) if blended and not translucent else 1.0
        data = np.concatenate([part.positions, part.normals, part.uvs], -1).astype("f4")
        buffer = context.buffer(data.tobytes())
        vertices = context.vertex_array(self.renderer.program, [(buffer, "3f 3f 2f", "position", "normal", "uv")])
        colour = (*(float(c) for c in base_colour(material)), float(opacity))
        return _Drawable(vertices, buffer, colour, texture, blended, data, part.positions.mean(1))

    def release(self) -> None:
        """Free the graphics memory."""
        for drawable in self.drawables:
            drawable.vertices.release()
            drawable.buffer.release()
            if drawable.texture is not None:
                drawable.texture.release()

    def view(self, azimuth: float, elevation: float, distance: float) -> tuple[np.ndarray, np.ndarray]:
        """Albedo [S, S, 4] (straight alpha) and normals [S, S, 3] in [-1, 1] (zero where empty), float32."""
        renderer = self.renderer
        eye = distance * np.array(
            [np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)]
        )
        context, program = renderer.context, renderer.program
        program["projection"].write(projection_matrix(eye).T.astype("f4").tobytes())
        program["eye"].value = tuple(eye)
        renderer.target.use()
        renderer.target.clear(0.0, 0.0, 0.0, 0.0)
        context.enable_only(moderngl.DEPTH_TEST)
        for drawable in self.drawables:
            if not drawable.blended:
                self._draw(drawable)
        context.enable(moderngl.BLEND)
        context.blend_func = moderngl.ONE, moderngl.ONE_MINUS_SRC_ALPHA
        renderer.target.depth_mask = False
        panes = [drawable for drawable in self.drawables if drawable.blended]
        for drawable in sorted(panes, key=lambda d: -np.linalg.norm(d.centres - eye, axis=-1).mean()):
            order = np.argsort(-np.linalg.norm(drawable.centres - eye, axis=-1))
            drawable.buffer.write(drawable.data[order].tobytes())
            self._draw(drawable)
        renderer.target.depth_mask = True
        return renderer.read()

    def _draw(self, drawable: _Drawable) -> None:
        program = self.renderer.program
        program["colour"].value = drawable.colour
        program["textured"].value = drawable.texture is not None
        program["blended"].value = drawable.blended
        if drawable.texture is not None:
            drawable.texture.use(0)
        drawable.vertices.render(moderngl.TRIANGLES)


def projection_matrix(eye: np.ndarray, near: float = 0.5, far: float = 8.0) -> np.ndarray:
    """World to clip space [4, 4] (column vectors) for a camera at ``eye`` that looks at the origin, +Y up."""
    backward = eye / np.linalg.norm(eye)
    right = np.cross([0.0, 1.0, 0.0], backward)
    right /= np.linalg.norm(right)
    rows = np.stack([right, np.cross(backward, right), backward])
    view = np.eye(4)
    view[:3, :3], view[:3, 3] = rows, -rows @ eye
    focal = 1 / np.tan(FIELD_OF_VIEW / 2)
    clip = np.zeros((4, 4))
    clip[0, 0] = clip[1, 1] = focal
    clip[2, 2:] = (far + near) / (near - far), 2 * far * near / (near - far)
    clip[3, 2] = -1
    return clip @ view


class Renderer:
    """An off-screen OpenGL context that draws ``size`` pixels square with ``samples`` x ``samples`` supersampling."""

    def __init__(self, size: int = 64, samples: int = 3):
        self.size, self.samples = size, samples
        self.context = moderngl.create_standalone_context(backend="egl")
        self.program = self.context.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT)
        full = (size * samples, size * samples)
        self.target = self.context.framebuffer(
            [self.context.texture(full, 4, dtype="f1"), self.context.texture(full, 4, dtype="f2")],
            self.context.depth_renderbuffer(full),
        )

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The drawn picture, averaged down: straight albedo [S, S, 4] and unit normals [S, S, 3]."""
        size, samples = self.size, self.samples
        colour = np.frombuffer(self.target.read(components=4, dtype="f1"), np.uint8).astype(np.float32) / 255
        normal = np.frombuffer(self.target.read(components=3, attachment=1, dtype="f2"), np.float16).astype(np.float32)
        colour = colour.reshape(size, samples, size, samples, 4).mean((1, 3))[::-1]
        normal = normal.reshape(size, samples, size, samples, 3).mean((1, 3))[::-1]
        alpha = colour[..., 3:]
        straight = np.concatenate([np.where(alpha > 0, colour[..., :3] / np.maximum(alpha, 1e-4), 0), alpha], -1)
        length = np.linalg.norm(normal, axis=-1, keepdims=True)
        return np.clip(straight, 0, 1), np.where(length > 1e-3, normal / np.maximum(length, 1e-3), 0)


def fill(values: np.ndarray, mask: np.ndarray, block: int = 8) -> np.ndarray:
    """Fill the unmasked pixels of values [S, S, C] with their block's mean, empty blocks with the picture's mean.

    What lies behind the silhouette never shows, but it must not bleed into the edge nor cost bytes when compressed.
    """
    if not mask.any():
        return np.zeros_like(values)
    size, channels = values.shape[0] // block, values.shape[2]
    weight = mask[..., None].astype(np.float32)
    count = weight.reshape(size, block, size, block, 1).sum((1, 3))
    mean = (values * weight).reshape(size, block, size, block, channels).sum((1, 3)) / np.maximum(count, 1)
    mean = np.where(count > 0, mean, values[mask].mean(0))
    return np.where(mask[..., None], values, mean.repeat(block, 0).repeat(block, 1))
