"""The volume renderer: rays in, colours out, exact gradients, bounded memory.

Rays are marched once and only the distances of the surviving samples are kept. Then, chunk by chunk of whole rays:
positions -> field -> shading -> compositing. When the samples need more than one chunk, each chunk is recomputed in
backward, so that at no time more than one chunk's activations exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.base import Backend, FieldLike, box_tensor, check_backend, evaluate, query_density
from dreamfusion_fast.ops.composite import composite, composite_reference
from dreamfusion_fast.ops.march import march, march_lattice, march_lattice_reference, march_reference
from dreamfusion_fast.ops.ray_box import ray_box, ray_box_reference
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.recompute import recomputed, trainable_leaves
from dreamfusion_fast.rendering.sampling import cached_cone_distances, covering_distance
from dreamfusion_fast.rendering.shading import AMBIENT, DIFFUSE, Shading, shade

# Rays marched at a time. It bounds the distances held without gradients, keeps sample counts far from int32's limit,
# and is no setting, because jitter depends on it in images of more rays than this.
_RAYS_PER_MARCH = 1 << 18
# Activations take 1.7 KB per sample, 3.5 KB with normals (bench_render.py, on a CPU): at most 0.9 GB a chunk on
# a CPU and 3.7 GB on a GPU, which leaves room on a 16 GB card.
_CHUNK_SAMPLES = {"cpu": 1 << 18, "cuda": 1 << 20}

Background = Tensor | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class RendererConfig:
    """Settings of :class:`VolumeRenderer`."""

    samples_across: int = 512
    """Samples along the diagonal of the scene box, the first cascade's; the step is diagonal / samples_across."""
    step: float | None = None
    """Step in scene units; overrides samples_across."""
    cone_angle: float = 0.0
    """Growth of the step per distance, as a pixel's cone grows, for scenes with several cascades: a sample at distance
    t is max(step, min(t * cone_angle, max_step)) long. 0: all samples are as long. Needs near > 0; with an infinite
    far, a GPU is waited for once more per render."""
    max_step: float | None = None
    """Largest step with a cone_angle, scene units; None: no limit. Steps longer than an occupied part can miss it."""
    near: float = 0.0
    """Distance before which nothing is sampled."""
    far: float = math.inf
    """Distance beyond which nothing is sampled."""
    max_samples_per_chunk: int | None = None
    """Samples held at a time; None: 2^18 on a CPU, 2^20 on a GPU. A chunk holds at least one whole ray."""
    early_stop: float = 0.0
    """Drop samples that less than this share of the light reaches, found by a density pass of its own; 0: keep all."""
    backend: Backend = "native"
    """March and composite by the native core or by the pure-PyTorch twins (the field has a setting of its own)."""

    def __post_init__(self) -> None:
        if self.samples_across < 1:
            raise ValueError(f"RendererConfig.samples_across: got {self.samples_across}, want at least 1")
        if self.step is not None and not 0.0 < self.step < math.inf:
            raise ValueError(f"RendererConfig.step: got {self.step}, want above 0")
        if not 0.0 <= self.near < self.far:
            raise ValueError(f"RendererConfig.near, far: got {self.near}, {self.far}, want 0 <= near < far")
        if not 0.0 <= self.cone_angle < math.inf:
            raise ValueError(f"RendererConfig.cone_angle: got {self.cone_angle}, want at least 0")
        if self.cone_angle > 0.0 and self.near == 0.0:
            raise ValueError("RendererConfig.near: got 0.0, want above 0 with a cone_angle: steps grow from there")
        if self.max_step is not None and not (self.max_step > 0.0 and self.cone_angle > 0.0):
            raise ValueError(
                f"RendererConfig.max_step: got {self.max_step} with cone_angle {self.cone_angle}, want both above 0"
            )
        if self.max_samples_per_chunk is not None and self.max_samples_per_chunk < 1:
            raise ValueError(f"RendererConfig.max_samples_per_chunk: got {self.max_samples_per_chunk}, want at least 1")
        if not 0.0 <= self.early_stop < 1.0:
            raise ValueError(f"RendererConfig.early_stop: got {self.early_stop}, want 0 to below 1")
        check_backend(self.backend)


@dataclass(frozen=True)
class RenderOutput:
    """What a render gives back.

    Attributes:
        color: `[n_rays, 3]`, background included.
        opacity: `[n_rays]`, sum of the weights.
        depth: `[n_rays]`, sum of weight * distance (divide by opacity for the expected depth), scene units.
        normal: `[n_rays, 3]`, sum of weight * normal, or None when no normals were computed.
        orientation_loss: 0-dim, mean over rays of sum sg(w) max(0, n . v)^2 (DreamFusion, appendix A.2; v the ray's
            direction), or None without normals.
        samples: how many samples were evaluated.
    """

    color: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None
    orientation_loss: Tensor | None
    samples: int


@dataclass(frozen=True)
class _Packed:
    """Samples of a run of whole rays: distances `[m]`, ray of each `[m]` (local), offsets int32 `[n + 1]` (local), and
    the length of each `[m]`, or of all."""

    t: Tensor
    ray_indices: Tensor
    offsets: Tensor
    length: Tensor | float

    def pick(self, samples: slice | Tensor, first_ray: int, offsets: Tensor) -> _Packed:
        """Some of the samples, their rays counted from `first_ray` on."""
        length = self.length[samples] if isinstance(self.length, Tensor) else self.length
        return _Packed(self.t[samples], self.ray_indices[samples] - first_ray, offsets, length)


class VolumeRenderer(nn.Module):
    """Renders any field: emission-absorption along straight rays with a fixed step (Max 1995; NeRF, equation 3).

    Works with any callable from positions `[m, 3]` to `(density [m], colour [m, 3])`, a Field or not. Gradients reach
    the field's parameters, the background, and ray origins and directions through the sample positions; they do not
    depend on how the samples are chunked. A field must give the same output for the same positions when called twice
    (no dropout): chunks are recomputed in backward.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.rendering import OccupancyGrid, VolumeRenderer, orbit_cameras
        >>> class Ball(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.color = torch.nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
        ...     def forward(self, positions):
        ...         density = 100.0 * (positions.norm(dim=1) < 0.5)
        ...         return density, self.color.expand(positions.shape[0], 3)
        >>> field, occupancy = Ball(), OccupancyGrid(resolution=32)
        >>> occupancy.update(field, step=0)
        True
        >>> renderer = VolumeRenderer(field, occupancy)
        >>> output = renderer.render(orbit_cameras(1).rays(9, 9), background=torch.ones(3))
        >>> [round(value, 2) for value in output.color[40].tolist()]  # the middle of the image
        [1.0, 0.0, 0.0]
        >>> output.color.sum().backward()
        >>> field.color.grad.shape
        torch.Size([3])
    """

    def __init__(
        self, field: FieldLike, occupancy: OccupancyGrid | None = None, config: RendererConfig | None = None
    ) -> None:
        """Args:
        field: what to render.
        occupancy: where to sample; None: everywhere in the box.
        config: settings.
        """
        super().__init__()
        if not callable(field):
            raise TypeError(f"field: got {type(field).__name__}, want a callable from positions to (density, colour)")
        self.field = field
        self.occupancy = occupancy
        self.config = config or RendererConfig()
        box = occupancy.aabb if occupancy is not None else getattr(field, "aabb", None)
        self.register_buffer("aabb", box_tensor(box), persistent=False)
        if self.config.max_step is not None and self.config.max_step < self.step_size:
            raise ValueError(
                f"RendererConfig.max_step: got {self.config.max_step}, want at least the step, {self.step_size}"
            )
        native = self.config.backend == "native"
        self._ray_box = ray_box if native else ray_box_reference
        self._march = march if native else march_reference
        self._march_lattice = march_lattice if native else march_lattice_reference
        self._composite = composite if native else composite_reference

    aabb: Tensor

    @property
    def step_size(self) -> float:
        """Distance between samples, scene units; with a cone_angle, the least."""
        if self.config.step is not None:
            return self.config.step
        return float((self.aabb[3:] - self.aabb[:3]).double().norm()) / self.config.samples_across

    def forward(self, rays: Rays, **options: object) -> RenderOutput:
        """The same as :meth:`render`."""
        return self.render(rays, **options)  # type: ignore[arg-type]

    def render(
        self,
        rays: Rays,
        background: Background = None,
        shading: Shading | str = Shading.ALBEDO,
        light: Tensor | None = None,
        jitter: bool = False,
        seed: int = 0,
        with_normals: bool = False,
        ambient: float = AMBIENT,
        diffuse: float = DIFFUSE,
    ) -> RenderOutput:
        """Render rays.

        Args:
            rays: `n_rays` rays with unit directions.
            background: colours `[3]` or `[n_rays, 3]`, or a callable from directions to colours; None is black.
            shading: albedo, lambertian or textureless; the latter two need a light and compute normals.
            light: point light `[3]` or `[n_rays, 3]`, scene units.
            jitter: shift the samples of each ray by a random part of a step.
            seed: of the jitter.
            with_normals: compute normals, their image and the orientation loss with albedo shading, too.
            ambient: strength of the light from everywhere.
            diffuse: strength of the point light.

        Raises:
            InvalidRaysError: a ray is not finite or its direction not of unit length.
            ValueError: a wrong shape, an unknown shading or a missing light.
        """
        shading = Shading.parse(shading)
        rays.validate()
        n_rays = len(rays)
        _check_rows("light", light, n_rays)
        if not callable(background):
            _check_rows("background", background, n_rays)
        if shading.needs_normals and light is None:
            raise ValueError(f"light: got None, want a position [3] or [n_rays, 3] for {shading.value} shading")
        normals = with_normals or shading.needs_normals
        scene = _Scene(self, shading, normals, ambient, diffuse, rays.origins.dtype)

        parts, samples = [], 0
        for first in range(0, n_rays, _RAYS_PER_MARCH) or (0,):
            rows = slice(first, first + _RAYS_PER_MARCH)
            block, block_light = rays[rows], _rows(light, rows)
            packed = self._sample(block, jitter, seed + first // _RAYS_PER_MARCH)
            for chunk, chunk_packed in self._chunks(packed):
                whole = chunk.stop - chunk.start == len(block)
                chunk_rays = block if whole else block[chunk]
                if self.config.early_stop > 0.0:
                    chunk_packed = self._visible(chunk_rays, chunk_packed)
                samples += chunk_packed.t.shape[0]
                chunk_light = block_light if whole else _rows(block_light, chunk)
                parts.append(scene.render(chunk_rays, chunk_light, chunk_packed, keep=whole and len(block) == n_rays))
        opacity, depth, accumulated, orientation = (
            column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True)
        )
        color = accumulated[:, :3]
        if background is not None:
            behind = background(rays.directions) if callable(background) else background
            color = color + (1.0 - opacity)[:, None] * behind
        return RenderOutput(
            color=color,
            opacity=opacity,
            depth=depth,
            normal=accumulated[:, 3:] if normals else None,
            orientation_loss=orientation.sum() / max(n_rays, 1) if normals else None,
            samples=samples,
        )

    @torch.no_grad()
    def _sample(self, rays: Rays, jitter: bool, seed: int) -> _Packed:
        """March the rays through the occupied cells."""
        origins, directions = rays.origins.detach().contiguous(), rays.directions.detach().contiguous()
        config, occupancy = self.config, self.occupancy
        aabb = self.aabb.to(origins.dtype)
        outer = aabb if occupancy is None else occupancy.outer_aabb.to(origins.dtype)
        t_near, t_far = self._ray_box(origins, directions, outer, config.near, config.far)
        bitfield, resolution, cascades = None, 1, 1
        if occupancy is not None:
            bitfield, resolution, cascades = occupancy.bitfield, occupancy.resolution, occupancy.cascades
        inputs = (origins, directions, t_near, t_far, aabb, bitfield, resolution)
        if config.cone_angle == 0.0:
            step = self.step_size
            offsets, t, ray_indices = self._march(*inputs, step, jitter, seed, cascades=cascades)
            return _Packed(t, ray_indices, offsets, step)
        far = config.far if math.isfinite(config.far) else covering_distance(t_far, config.near)
        steps = (self.step_size, math.inf if config.max_step is None else config.max_step)
        distances = cached_cone_distances(config.near, far, *steps, config.cone_angle, t_far.dtype, t_far.device)
        offsets, t, ray_indices, lengths = self._march_lattice(*inputs, distances, jitter, seed, cascades=cascades)
        return _Packed(t, ray_indices, offsets, lengths)

    def _chunks(self, packed: _Packed) -> Iterator[tuple[slice, _Packed]]:
        """Split into runs of whole rays, each within the budget or of one ray."""
        n_rays, total = packed.offsets.shape[0] - 1, packed.t.shape[0]
        budget = self.config.max_samples_per_chunk or _CHUNK_SAMPLES.get(packed.t.device.type, _CHUNK_SAMPLES["cuda"])
        if total <= budget:
            yield slice(0, n_rays), packed
            return
        offsets = packed.offsets.cpu()
        start = 0
        while start < n_rays:
            first = int(offsets[start])
            stop = int(torch.searchsorted(offsets, first + budget, right=True)) - 1
            stop = min(max(stop, start + 1), n_rays)
            last = int(offsets[stop])
            yield (
                slice(start, stop),
                packed.pick(slice(first, last), start, packed.offsets[start : stop + 1] - first),
            )
            start = stop

    @torch.no_grad()
    def _visible(self, rays: Rays, packed: _Packed) -> _Packed:
        """Drop the samples that less than `early_stop` of the light reaches."""
        depth = query_density(self.field, _positions(rays.origins, rays.directions, packed)).double() * packed.length
        ends = torch.cat([depth.new_zeros(1), depth.clamp(max=1e6).cumsum(0)])
        before = ends[:-1] - ends[packed.offsets.long()][packed.ray_indices.long()]
        kept = before <= -math.log(self.config.early_stop)
        kept_ends = torch.cat([kept.new_zeros(1, dtype=torch.int32), kept.cumsum(0, dtype=torch.int32)])
        return packed.pick(kept, 0, kept_ends[packed.offsets.long()])


@dataclass(frozen=True)
class _Scene:
    """How one render call turns packed samples into per-ray sums."""

    renderer: VolumeRenderer
    shading: Shading
    normals: bool
    ambient: float
    diffuse: float
    dtype: torch.dtype

    def render(self, rays: Rays, light: Tensor | None, packed: _Packed, keep: bool) -> tuple[Tensor, ...]:
        """Opacity `[n]`, depth `[n]`, accumulated `[n, 3 or 6]`, orientation `[1]`.

        Args:
            rays: the chunk's `n` rays.
            light: `[3]`, `[n, 3]` or None.
            packed: their samples.
            keep: whether to keep the activations for backward instead of recomputing them.
        """

        def run(origins: Tensor, directions: Tensor, light: Tensor | None) -> tuple[Tensor, ...]:
            return self._composite(origins, directions, light, packed)

        if keep or not torch.is_grad_enabled():
            return run(rays.origins, rays.directions, light)
        return recomputed(run, (rays.origins, rays.directions, light), self._trainable)

    @cached_property
    def _trainable(self) -> list[Tensor]:
        """What the field can give gradients to: its parameters, and the leaves of one sample's graph, because a field
        may also be a plain function, or read tensors that it does not own."""
        renderer = self.renderer
        centre = 0.5 * (renderer.aabb[:3] + renderer.aabb[3:])
        leaves = {
            id(leaf): leaf for leaf in trainable_leaves(evaluate(renderer.field, centre[None].to(self.dtype))[:2])
        }
        for parameter in renderer.parameters():
            if parameter.requires_grad:
                leaves[id(parameter)] = parameter
        return list(leaves.values())

    def _composite(
        self, origins: Tensor, directions: Tensor, light: Tensor | None, packed: _Packed
    ) -> tuple[Tensor, ...]:
        renderer = self.renderer
        rays = Rays(origins, directions)
        positions = _positions(origins, directions, packed)
        output = evaluate(renderer.field, positions, with_normal=self.normals)
        sample_light = light.index_select(0, packed.ray_indices) if light is not None and light.dim() == 2 else light
        values = shade(output.albedo, output.normal, positions, sample_light, self.shading, self.ambient, self.diffuse)
        if output.normal is not None and self.normals:
            values = torch.cat([values, output.normal], dim=1)
        weights, opacity, depth, accumulated = renderer._composite(
            output.density, values, packed.t, packed.length, packed.offsets
        )
        orientation = opacity.new_zeros(1)
        if output.normal is not None and self.normals:
            facing_away = (
                (output.normal * rays.directions.index_select(0, packed.ray_indices)).sum(dim=1).clamp(min=0.0)
            )
            orientation = (weights.detach() * facing_away.square()).sum()[None]
        return opacity, depth, accumulated, orientation


def _positions(origins: Tensor, directions: Tensor, packed: _Packed) -> Tensor:
    """Sample positions `[m, 3]`."""
    index = packed.ray_indices
    return torch.addcmul(origins.index_select(0, index), directions.index_select(0, index), packed.t[:, None])


def _check_rows(name: str, value: Tensor | None, n_rays: int) -> None:
    if value is not None and tuple(value.shape) not in ((3,), (n_rays, 3)):
        raise ValueError(f"{name}: got shape {list(value.shape)}, want [3] or [{n_rays}, 3], one row per ray")


def _rows(value: Tensor | None, rows: slice) -> Tensor | None:
    return value[rows] if value is not None and value.dim() == 2 else value
