"""The volume renderer: rays in, colours out, exact gradients, bounded memory.

A field with a tile source streams (`streaming`); every other field, and gradients to rays and light, go through
autograd in chunks (`chunked`). Both give the same image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.base import Field, FieldLike, box_tensor, speaks_for_call, tile_source_of
from dreamfusion_fast.fields.revision import HostBox, revision_of
from dreamfusion_fast.fields.samples import check_extras, needs_of
from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.ops.tiles.march import count_samples
from dreamfusion_fast.rendering.cameras import Cameras
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.rays import InvalidRaysError, Rays
from dreamfusion_fast.rendering.shading import AMBIENT, DIFFUSE, Shading
from dreamfusion_fast.rendering.volume.chunked import ChunkedRender
from dreamfusion_fast.rendering.volume.differentiable import FieldRender, differentiable_output
from dreamfusion_fast.rendering.volume.graphs import RenderGraphs
from dreamfusion_fast.rendering.volume.prepared import PreparedRays, RenderOutput, RenderRequest
from dreamfusion_fast.rendering.volume.sample_count import SampleCount
from dreamfusion_fast.rendering.volume.sampling import SampledSpace
from dreamfusion_fast.rendering.volume.streaming import StreamedRender
from dreamfusion_fast.rendering.volume.workspace import default_budget

Background = Tensor | Callable[[Tensor], Tensor] | None

# Part of a grid's extent by which the field's box may stick out of it: a field's may have been rounded to 16 bits.
_BOX_TOLERANCE = 1e-3


class VolumeRenderer(nn.Module):
    """Renders any field: emission-absorption along straight rays with a fixed step (Max 1995; NeRF, equation 3).

    Works with any callable from positions `[m, 3]` to `(density [m], colour [m, 3])`, a Field or not. One with an
    attribute `needs`, such as `("positions", "directions", "appearance")`, is called with :class:`FieldSamples`. A
    :class:`FieldOutput` may hold the opacity of each sample in place of a density, normals, and any channels more.

    Gradients reach the field's parameters, the background, extras, and ray origins and directions through the sample
    positions; they do not depend on how the samples are chunked. A field must give the same output for the same samples
    when called twice (no dropout): chunks are recomputed in backward.

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

    _own_box: Tensor | None

    def __init__(
        self,
        field: FieldLike,
        occupancy: OccupancyGrid | None = None,
        config: RendererConfig | None = None,
        *,
        occupancy_resolution: int | None = None,
    ) -> None:
        """Args:
        field: what to render. If it has a box, `aabb`, that has to lie in the grid's.
        occupancy: where to sample; None: everywhere in the box. Keeps what steps of this renderer need
            (:meth:`OccupancyGrid.keep_for_step`).
        config: settings.
        occupancy_resolution: cells per side of a grid of the renderer's own, over the field's box and for its steps, in
            place of `occupancy`; all else of it is as :class:`OccupancyGrid` has it. `renderer.occupancy` is that grid,
            and training updates it: `renderer.occupancy.update(field, step)`.

        Raises:
            TypeError: the field cannot be called, or its `needs` are no names.
            ValueError: both a grid and a resolution of one, the grid's box leaves out a part of the field's, or
                max_step is below the step.
        """
        super().__init__()
        if not callable(field):
            raise TypeError(f"field: got {type(field).__name__}, want a callable from positions to (density, colour)")
        speaks_for_call(field)  # or raises
        needs_of(field)  # or raises
        if occupancy is not None and occupancy_resolution is not None:
            raise ValueError(f"occupancy_resolution: got {occupancy_resolution} and a grid, want one of them")
        self.field = field
        self.config = config or RendererConfig()
        box = getattr(field, "aabb", None)
        if occupancy_resolution is not None:
            occupancy = OccupancyGrid(
                box, occupancy_resolution, step_size=self.config.step_of(box_tensor(box).tolist())
            )
        self.occupancy = occupancy
        # A buffer of the field is read where it is, so that there is one truth about the box. Everything else, such as
        # a tuple, is copied here, to be moved along.
        self._box_is_buffer = isinstance(field, nn.Module) and any(box is buffer for buffer in field.buffers())
        self._field_has_box = box is not None
        copied = box_tensor(box)
        self.register_buffer("_own_box", None if self._box_is_buffer else copied, persistent=False)
        self._box, self._field_box = HostBox(), HostBox()
        self._settled: tuple[tuple[float, ...], tuple[float, ...]] | None = None
        given = occupancy.step_size if occupancy is not None and occupancy.step_is_given else self.step_size
        if not math.isclose(given, self.step_size, rel_tol=1e-6):
            warnings.warn(
                f"occupancy: was made for steps of {given:.6g}, the renderer's are {self.step_size:.6g}, and cells "
                "that matter to either are kept; want OccupancyGrid without step_size, or occupancy_resolution of the "
                "renderer",
                stacklevel=2,
            )
        self._settle()
        self._budget: int | None = None
        self._expected_samples: dict[int, int] = {}  # of the last render of so many rays
        self._graphs = RenderGraphs()

    @property
    def aabb(self) -> Tensor:
        """Scene box `[6]`: the grid's; without one the field's; without either [-1, 1]^3."""
        return self._field_aabb if self.occupancy is None else self.occupancy.aabb

    @property
    def step_size(self) -> float:
        """Distance between samples, scene units; with a cone_angle, the least."""
        return self.config.step_of(self._box.read(self.aabb))

    @property
    def _field_aabb(self) -> Tensor:
        field: Any = self.field
        return field.aabb if self._own_box is None else self._own_box

    @property
    def _diagonal(self) -> float:
        box = self._box.read(self.aabb)
        return math.dist(box[:3], box[3:])

    def forward(self, rays: Rays, **options: object) -> RenderOutput:
        """The same as :meth:`render`."""
        return self.render(rays, **options)  # type: ignore[arg-type]

    def prepare(
        self,
        views: Cameras | Rays,
        size: int | tuple[int, int] | None = None,
        jitter: bool = False,
        seed: int | Tensor = 0,
    ) -> PreparedRays:
        """Make the rays of a render to come, and begin to count their samples.

        Counting reads rays and occupancy grid, and nothing of the field. So a training loop can prepare a step on a
        CUDA stream of its own, beside the step before, and no render waits for the number of its samples: the GPU
        always has work ahead. Like all else on such a stream, the rays have to stay until it is done with them
        (`torch.Tensor.record_stream`). If rays, grid or box are changed before the render, it counts again. Only
        streamed renders on a GPU are counted ahead, and none in a CUDA graph.

        Args:
            views: `B` cameras, or rays.
            size: of the cameras' images, pixels: a side, or height and width. The rays are `B * height * width`, views
                one after another, rows from the top.
            jitter, seed: as in :meth:`render`.

        Raises:
            ValueError: a size without cameras or cameras without a size; the rays are not where the renderer is.
            TypeError: rays of another dtype than a streamed field.
        """
        if isinstance(views, Cameras) != (size is not None):
            raise ValueError(f"size: got {size} with {type(views).__name__}, want one for cameras, None for rays")
        if isinstance(views, Cameras):
            height, width = size if isinstance(size, tuple) else (size, size)
            rays = views.rays(height, width)
        else:
            rays = views
        self._check_seed(seed, rays)
        self._check_devices(rays)
        flat = _as_list(rays)
        source = self._source(flat, None)
        if source is None or not rays.origins.is_cuda or torch.cuda.is_current_stream_capturing():
            return PreparedRays(rays, jitter, seed)
        self._settle()
        with torch.no_grad():
            marched = self._space(flat).marched(flat, jitter, seed)
            count = SampleCount(marched, count_samples(marched)[0])
        return PreparedRays(rays, jitter, seed, count, self._revision(rays))

    def render(
        self,
        rays: Rays | PreparedRays,
        background: Background = None,
        shading: Shading | str = Shading.ALBEDO,
        light: Tensor | None = None,
        jitter: bool = False,
        seed: int | Tensor = 0,
        with_normals: bool = False,
        with_distortion: bool = False,
        with_sample_entropy: bool = False,
        ambient: float = AMBIENT,
        diffuse: float = DIFFUSE,
        extras: Mapping[str, Tensor] | None = None,
        return_samples: bool = False,
    ) -> RenderOutput:
        """Render rays.

        A field with a tile source renders on a GPU without a wait for it (but for what `streaming` says), also inside a
        CUDA graph: there, rays are not checked, and `overflowed` has to be looked at.

        Args:
            rays: rays with unit directions, of any leading shape: where it says `[n_rays]` here and in the output, this
                shape stands, such as `[B, H, W]`. For a field with a tile source they are of its parameters' dtype. All
                results are of this dtype, and light and background are converted to it. Or what :meth:`prepare` gave.
            background: colours `[3]` or `[n_rays, 3]`, or a callable from directions `[n, 3]` to colours `[n, 3]`; None
                is black.
            shading: albedo, lambertian or textureless; the latter two need a light and compute normals.
            light: point light `[3]` or `[n_rays, 3]`, scene units. A light that requires gradients gets them; no render
                streams then.
            jitter: shift the samples of each ray by a random part of a step.
            seed: of the jitter; a CUDA graph reads an int64 tensor `[]` on the device anew at each replay.
            with_normals: compute normals, their image and the orientation loss with albedo shading, too.
            with_distortion: compute the distortion loss.
            with_sample_entropy: compute the entropy loss.
            ambient: strength of the light from everywhere.
            diffuse: strength of the point light.
            extras: what the field wants to know per ray, `[n_rays, ...]` by name: indices of an appearance embedding,
                times. Gradients reach those that require them. Only for a field that `needs` more than positions.
            return_samples: hand out the samples as `ray_samples`, for losses on weights and the like. All are held, and
                what the field computes for backward with them; no render streams then.

        Raises:
            InvalidRaysError: a ray is not finite or its direction not of unit length.
            TypeError: rays of another dtype than a streamed field.
            ValueError: a wrong shape or device, an unknown shading, a missing light, jitter or seed for prepared rays,
                which have theirs, or a box that was changed such that the grid's leaves out a part of the field's.
            RuntimeError: more than 2^31 - 1 samples in one streamed image; within a transform of torch.func.
        """
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "VolumeRenderer.render: cannot be called within torch.func transforms (grad, vjp, jvp, vmap): use "
                "torch.autograd, and one batch of rays"
            )
        shading = Shading.parse(shading)
        if isinstance(rays, PreparedRays):
            if jitter or isinstance(seed, Tensor) or seed != 0:
                raise ValueError("jitter, seed: got values for prepared rays, want them in prepare")
            prepared, rays = rays, rays.rays
        else:
            self._check_seed(seed, rays)
            prepared = PreparedRays(rays, jitter, seed)
        shape, rays = rays.shape, _as_list(rays)
        light = _per_ray("light", light, shape)
        if not callable(background):
            background = _per_ray("background", background, shape)
        if shading.needs_normals and light is None:
            raise ValueError(f"light: got None, want a position [3] or [n_rays, 3] for {shading.value} shading")
        light = light.to(rays.origins.dtype) if light is not None and shading.needs_normals else None
        self._check_devices(rays)
        _check_device("light", light, rays)
        checked_extras = check_extras(self.field, extras, shape)
        for name, value in checked_extras.items():
            _check_device(f"extras[{name!r}]", value, rays)
        source = None if return_samples else self._source(rays, light)
        self._settle()
        request = RenderRequest(
            rays=rays,
            jitter=prepared.jitter,
            seed=prepared.seed,
            count=self._usable_count(prepared),
            shading=shading,
            light=light,
            ambient=ambient,
            diffuse=diffuse,
            normals=with_normals or shading.needs_normals,
            distortion=with_distortion,
            entropy=with_sample_entropy,
            extras=checked_extras,
            return_samples=return_samples,
        )
        if source is not None:
            output = self._stream(source, request)
        else:
            rays.validate()
            output = ChunkedRender(self.field, self.config, request).output(self._space(rays))
        color = output.color
        if background is not None:
            behind = _behind(background, rays) if callable(background) else background
            color = color + (1.0 - output.opacity)[:, None] * behind.to(color.dtype)
        output = replace(output, color=color)
        return output if len(shape) == 1 else output.shaped(shape)

    def _usable_count(self, prepared: PreparedRays) -> SampleCount | None:
        """The count of prepared rays, unless something was changed since, or replays of a graph may change it."""
        count, rays = prepared.count, prepared.rays
        if count is None or torch.cuda.is_current_stream_capturing() or prepared.revision != self._revision(rays):
            return None
        return count

    def _revision(self, rays: Rays) -> Hashable:
        """Of all that a count of samples depends on."""
        grid = None if self.occupancy is None else self.occupancy.revision
        tensors = (rays.origins, rays.directions, rays.near, rays.far)
        return self.config, self._settled, grid, *(None if t is None else revision_of(t) for t in tensors)

    def _settle(self) -> None:
        """Make sure that boxes, step and grid go together: again only where a box was changed, as by `load_state_dict`,
        and nothing else waits for a GPU."""
        boxes = (self._box.read(self.aabb), self._field_box.read(self._field_aabb))
        if boxes == self._settled:
            return
        step, max_step = self.step_size, self.config.max_step
        if max_step is not None and max_step < step:
            raise ValueError(f"RendererConfig.max_step: got {max_step}, want at least the step, {step}")
        if self.occupancy is not None:
            if self._field_has_box:
                self._check_boxes(*boxes, self.occupancy)
            self.occupancy.keep_for_step(step)
        self._settled = boxes

    @staticmethod
    def _check_boxes(box: tuple[float, ...], inner: tuple[float, ...], occupancy: OccupancyGrid) -> None:
        for low, high, field_low, field_high in zip(box[:3], box[3:], inner[:3], inner[3:], strict=True):
            margin = (0.5 * (2.0 ** (occupancy.cascades - 1) - 1.0) + _BOX_TOLERANCE) * (high - low)
            if field_low < low - margin or field_high > high + margin:
                raise ValueError(
                    f"occupancy: got the box {list(box)}, cascades {occupancy.cascades}, want one that holds the "
                    f"field's, {list(inner)}, as OccupancyGrid(field.aabb) does"
                )

    def _check_devices(self, rays: Rays) -> None:
        if isinstance(self.field, Field):
            _check_device("field", self.field.aabb, rays)
        if self.occupancy is None:
            _check_device("renderer", self.aabb, rays)
        else:
            _check_device("occupancy", self.occupancy.bitfield, rays)

    @staticmethod
    def _check_seed(seed: int | Tensor, rays: Rays) -> None:
        if not isinstance(seed, Tensor):
            if not 0 <= seed < 2**63:
                raise ValueError(f"seed: got {seed}, want 0 <= seed < 2^63")
        elif seed.dtype != torch.int64 or seed.dim() or seed.device != rays.origins.device:
            raise ValueError(
                f"seed: got {seed.dtype} {list(seed.shape)} on {seed.device}, want a number or an int64 tensor [] on "
                f"{rays.origins.device}, where the rays are"
            )

    def _space(self, rays: Rays) -> SampledSpace:
        return SampledSpace.of(rays, self.aabb, self.occupancy, self.config, self._diagonal, self.step_size)

    def _source(self, rays: Rays, light: Tensor | None) -> TileSource | None:
        """The source to stream, or None: the field has no tile source, or rays or light require gradients."""
        tensors = (rays.origins, rays.directions, light)
        if self.config.backend != "native" or any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return None
        source = tile_source_of(self.field)
        if source is not None and source.table.dtype != rays.origins.dtype:
            dtype = source.table.dtype
            raise TypeError(f"rays: got {rays.origins.dtype}, want {dtype}, the field's: rays.to(dtype={dtype})")
        return source

    def _stream(self, source: TileSource, request: RenderRequest) -> RenderOutput:
        rays = request.rays
        expected = self._expected_samples.get(len(rays))
        make = partial(self._streamed, source, expected)
        render: FieldRender | None
        box = self._box.read(self.aabb)
        render = self._graphs.find(source, self.aabb, box, self.occupancy, self.config, request, expected, make)
        if render is None:
            render = make(request)
        try:
            output = differentiable_output(render)
        except InvalidRaysError:  # found when the samples were counted, without a wait of its own
            rays.validate()  # says which one, and why
            raise
        if isinstance(output.samples, int):
            self._expected_samples[len(rays)] = output.samples
        return output

    def _streamed(self, source: TileSource, expected: int | None, request: RenderRequest) -> StreamedRender:
        rays = request.rays
        if self._budget is None:
            self._budget = self.config.memory_budget or default_budget(rays.origins.device)
        return StreamedRender.of(source, request, self._space(rays), self.config, self._budget, expected)


def _check_device(name: str, tensor: Tensor | None, rays: Rays) -> None:
    """Raise unless a tensor is where the rays are. Kernels get addresses, which say nothing of the device."""
    if tensor is not None and tensor.device != rays.origins.device:
        raise ValueError(f"{name}: is on {tensor.device}, want {rays.origins.device}, where the rays are")


def _as_list(rays: Rays) -> Rays:
    """The rays as `[n_rays]`; those that are so stay what they are."""
    return rays if len(rays.shape) == 1 else rays.flat()


def _behind(background: Callable[[Tensor], Tensor], rays: Rays) -> Tensor:
    """The colours that a background returns when it is called: `[3]` or `[n_rays, 3]`."""
    colors: Any = background(rays.directions)
    if not isinstance(colors, Tensor):
        raise TypeError(f"background: returned {type(colors).__name__}, want a tensor [n, 3]")
    if colors.shape not in ((3,), (len(rays), 3)):
        raise ValueError(f"background: returned {list(colors.shape)} for {len(rays)} directions, want [{len(rays)}, 3]")
    return colors


def _per_ray(name: str, value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`[3]`, or a row for each ray of the flat list."""
    if value is None or value.shape == (3,):
        return value
    if value.shape != (*shape, 3):
        raise ValueError(f"{name}: got shape {list(value.shape)}, want [3] or {[*shape, 3]}, one row per ray")
    return value.reshape(-1, 3)
