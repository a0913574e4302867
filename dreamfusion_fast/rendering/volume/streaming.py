"""The streaming renderer of fields with a tile source: exact gradients, nothing held per sample, no wait for a GPU.

Rays are marched once to count their samples. Then, tile by tile of the packed samples: march again -> encode -> MLP
(and its input gradient, for normals) -> shade and composite into per-ray sums. Backward goes through the tiles in the
opposite order and recomputes each. Held in between are the rays and a few numbers per ray and per tile; if all tiles
fit into the budget at once, they are kept instead of recomputed.

The number of samples stays on the device. The host enqueues as many tiles as the last render of that many rays needed,
and a reserve; only then it asks for the true number, whose copy was started before the first tile. So a GPU never idles
for it, no sample is ever dropped, and what was too few tiles becomes more of them. In a CUDA graph nobody can ask:
there the number of tiles is fixed at the capture, and a render that would need more gives NaN and sets `overflowed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.ops._checks import INTEGERS
from dreamfusion_fast.ops.sample_head import SampleHead
from dreamfusion_fast.ops.tiles.march import KeptSamples, MarchedRays, count_samples, march_tile, tile_table
from dreamfusion_fast.ops.tiles.mlp import MlpGradients, prepared_backward
from dreamfusion_fast.ops.tiles.ray_sums import (
    N_PREFIX,
    N_SUMS,
    SampleTile,
    ray_sums_backward,
    ray_sums_forward,
    ray_sums_visible,
)
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.volume.prepared import RenderRequest
from dreamfusion_fast.rendering.volume.sample_count import SampleCount
from dreamfusion_fast.rendering.volume.sampling import SampledSpace
from dreamfusion_fast.rendering.volume.workspace import SMALLEST_TILE, Workspace, tile_size

# Tiles are enqueued for so many samples beyond what the last render had, before the true number is known.
_RESERVE = 1.25
_RESERVE_SAMPLES = 4096
# The buffers are made here, for a field that is consistent: to check them at each launch would take longer than it.
_CHECKED = True


@dataclass(eq=False)
class StreamedRender:
    """One render: what forward and backward both need.

    Attributes:
        source: the field.
        rays: what is marched.
        head: how samples are shaded.
        normals, distortion, entropy: whether they are computed.
        diagonal: of the box in which anything is sampled, scene units.
        budget: bytes of workspace.
        expected: samples of the last render like this one; None: there was none.
        counted: how many samples there are, if they were counted ahead.
        early_stop: share of the light below which samples are left out; 0: none are.
        alpha_threshold: opacity below which they are left out; 0: none are.
        max_tile: most samples of a tile; None: what the budget holds.
        scenes: int32 `[n_rays]`, of which scene each ray is; None: there is one.
        samples: how many there are; a number once the host knows, else on the device.
        overflowed: bool `[]`, in a CUDA graph: more samples than tiles were captured for. None elsewhere.
    """

    source: TileSource
    rays: MarchedRays
    head: SampleHead
    normals: bool
    distortion: bool
    entropy: bool
    diagonal: float
    budget: int
    expected: int | None
    counted: SampleCount | None = None
    early_stop: float = 0.0
    alpha_threshold: float = 0.0
    max_tile: int | None = None
    scenes: Tensor | None = None
    samples: int | Tensor = 0
    overflowed: Tensor | None = None
    # What forward leaves for backward, and what is found out on the way.
    size: int = 0
    total: SampleCount | None = None
    firsts: Tensor | None = None
    offsets: Tensor | None = None
    visible: KeptSamples | None = None
    tiles: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kept_table: Tensor | None = None
    prefix: list[Tensor] = field(default_factory=list)
    kept: list[Workspace] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        source: TileSource,
        request: RenderRequest,
        space: SampledSpace,
        config: RendererConfig,
        budget: int,
        expected: int | None,
    ) -> StreamedRender:
        """A render of a field."""
        rays = space.marched(request.rays, request.jitter, request.seed)
        light = None
        if request.light is not None and request.shading.needs_normals:
            light = request.light.detach().to(rays.origins.dtype).contiguous()
        head = replace(
            source.head,
            shading=request.shading.value,
            ambient=request.ambient,
            diffuse=request.diffuse,
            light=light,
        )
        return cls(
            source,
            rays,
            head,
            request.normals,
            request.distortion,
            request.entropy,
            space.diagonal,
            budget,
            expected,
            request.count,
            config.early_stop,
            config.alpha_threshold,
            config.max_samples_per_chunk,
            None if source.scene is None else _scenes_of(source, request.extras[source.scene]),
        )

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that gradients are for: the table, then weights, then biases of the MLP."""
        return self.source.parameters

    @property
    def channels(self) -> Mapping[str, int]:
        """What else the field says of samples, by name, and how wide each is."""
        return self.source.channels

    @property
    def n_sums(self) -> int:
        """Columns of the sums."""
        return N_SUMS + sum(self.channels.values())

    @property
    def guarded(self) -> tuple[Tensor | None, ...]:
        """The tensors that must not change between forward and backward, which marches and shades again."""
        rays = self.rays
        return rays.origins, rays.directions, rays.aabb, rays.bitfield, self.head.light, self.scenes

    def forward(self, training: bool) -> Tensor:
        """The sums `[n_rays, N_SUMS + channels]`, without a graph. With `training`, backward can follow.

        Raises:
            InvalidRaysError: a ray is not finite or its direction not of unit length.
            RuntimeError: more samples than 32-bit offsets can hold.
            torch.OutOfMemoryError: not even the smallest tile fits.
        """
        while True:
            try:
                return self._forward(training)
            except torch.OutOfMemoryError:
                self._shrink()

    def zero_grad_sums(self) -> Tensor:
        """Zeros for the gradient of the sums."""
        return self.rays.origins.new_zeros(len(self.rays), self.n_sums)

    def backward(
        self, sums: Tensor, grad_sums: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, MlpGradients | None]:
        """The gradients of table and MLP, as far as `needs` asks for them."""
        table = self.source.table
        while True:
            try:
                grad_table = torch.zeros_like(table, memory_format=torch.contiguous_format) if needs[0] else None
                gradients, _ = self._backward(sums, grad_sums, needs, grad_table)
                return grad_table, gradients
            except torch.OutOfMemoryError:
                grad_table = None
                self._shrink()
            self.forward(False)  # the cuts between smaller tiles are others

    def backward_to_scatter(
        self, sums: Tensor, grad_sums: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Callable[[Tensor], None], MlpGradients | None]:
        """`backward` of a single tile but for its last launch, which adds to a gradient of the table that is given."""
        gradients, scatter = self._backward(sums, grad_sums, needs, None)
        assert scatter is not None
        return scatter, gradients

    def _shrink(self) -> None:
        """Prepare to start again with tiles of half the size; raises the error in flight if they are small already."""
        captured = self.rays.origins.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.size <= SMALLEST_TILE or captured:
            raise
        self.max_tile, self.size = self.size // 2, 0
        self.prefix, self.kept, self.tiles, self.kept_table = [], [], [], None
        torch.cuda.empty_cache()

    def _forward(self, training: bool) -> Tensor:
        rays, source = self.rays, self.source
        counts, self.firsts = count_samples(rays)
        table = source.readable_table()
        total = SampleCount(rays, counts) if self.counted is None else self.counted
        if self.early_stop > 0.0 or self.alpha_threshold > 0.0:
            counts = self._visible_counts(table, counts, total)
            total = SampleCount(rays, counts)
        self.total = total
        planned = self._planned(total)
        n_tiles = self._lay_out(counts, planned, training)
        sums = rays.origins.new_zeros(len(rays), self.n_sums)
        keep = training and n_tiles * self.size * source.bytes_per_sample(self.normals, True) <= self.budget
        self.kept_table = table if keep else None
        workspace = None
        done = 0
        while True:
            for k in range(done, n_tiles):
                if workspace is None or keep:
                    workspace = self._workspace()
                tile = self._evaluate(k, table, workspace)
                ray_sums_forward(self.head, tile, sums, self.prefix[k], self.distortion, self.entropy)
                if keep:
                    self.kept.append(workspace)
            done = n_tiles
            if total.captured:
                self.samples = total.on_device
                self.overflowed = total.on_device > n_tiles * self.size
                return sums.masked_fill_(self.overflowed, math.nan)
            self.samples = total.read()
            n_tiles = -(-self.samples // self.size)
            if n_tiles <= done:
                return sums
            self._lay_out(counts, self.samples, training)
            if keep:
                keep, workspace = False, None  # the last one made is that of a kept tile

    def _backward(
        self, sums: Tensor, grad_sums: Tensor, needs: tuple[bool, bool], grad_table: Tensor | None
    ) -> tuple[MlpGradients | None, Callable[[Tensor], None] | None]:
        """The gradients of the MLP, and what adds the first tile's to a gradient of the table that is not there yet."""
        source = self.source
        scatter = None
        table = source.readable_table() if self.kept_table is None else self.kept_table
        gradients = MlpGradients(*source.plain) if needs[1] else None
        n_tiles = len(self.prefix) if isinstance(self.samples, Tensor) else -(-self.samples // self.size)
        suffix = sums.new_zeros(n_tiles + 1, 1).unbind()
        workspace = self.kept[0] if 0 < n_tiles <= len(self.kept) else self._workspace()
        to_logits = workspace.rows(source.n_outputs)
        to_features = workspace.rows(source.n_features, source.gradient_dtype)
        to_slopes = workspace.rows(3) if self.normals else None
        to_gradient = workspace.rows(source.n_features, source.gradient_dtype) if self.normals else None
        mlp_backward = None
        for k in reversed(range(n_tiles)):
            kept = k < len(self.kept)
            if kept:
                workspace = self.kept[k]
            tile = self._tile(k, workspace) if kept else self._evaluate(k, table, workspace)
            cuts = (self.prefix[k], suffix[k + 1], suffix[k])
            losses = (self.distortion, self.entropy)
            ray_sums_backward(self.head, tile, sums, grad_sums, *cuts, to_logits, to_slopes, *losses)
            positions, count = workspace.positions, self.tiles[k][1]
            second: tuple[Tensor | None, Tensor | None] = (None, None)
            if to_slopes is not None and to_gradient is not None and workspace.input_gradient is not None:
                shared = (positions, table, workspace.layout, to_gradient, count, _CHECKED)
                if grad_table is None:
                    source.encoding.directional_derivative(to_slopes, *shared)
                    second = (to_slopes, workspace.input_gradient)
                else:
                    second = source.encoding.derivative_before_scatter(
                        to_slopes, workspace.input_gradient, grad_table, *shared
                    )
            if mlp_backward is None or kept:
                mlp_backward = prepared_backward(
                    workspace.features,
                    *source.plain,
                    "relu",
                    source.precision,
                    to_logits,
                    to_features if needs[0] else None,
                    gradients,
                    to_gradient,
                )
            mlp_backward(count)
            scatter = partial(_scatter, source, positions, workspace.layout, to_features, count, second)
            if grad_table is not None:
                scatter(grad_table)
        return gradients, scatter

    def _planned(self, total: SampleCount) -> int:
        """Samples to enqueue tiles for."""
        if total is self.counted:
            return total.read()
        if self.expected is not None and self.rays.origins.is_cuda:
            return min(self._most(), int(_RESERVE * self.expected) + _RESERVE_SAMPLES)
        return self._most() if total.captured else total.read()

    def _most(self) -> int:
        """More samples there cannot be."""
        rays = self.rays
        if rays.distances is not None:
            per_ray = rays.distances.shape[0] - 1
        else:
            per_ray = math.ceil(self.diagonal / rays.step) + 1
        return len(rays) * per_ray

    def _lay_out(self, counts: Tensor, samples: int, training: bool) -> int:
        """Fix offsets and the size of tiles, if they are not, and lay out tiles for so many samples: how many."""
        if self.size == 0:
            per_sample = self.source.bytes_per_sample(self.normals, training)
            self.size = tile_size(per_sample, self.budget, samples, counts.device)
            if self.max_tile is not None:
                self.size = min(self.size, self.max_tile)
            self.offsets = counts.new_zeros(len(self.rays) + 1)
            torch.cumsum(counts, 0, dtype=torch.int32, out=self.offsets[1:])
        assert self.offsets is not None
        n_tiles = -(-samples // self.size)
        self.tiles = tile_table(self.offsets, self.size, n_tiles)
        missing = max(n_tiles - len(self.prefix), 0)
        # Written by the tile that a ray is cut by, and only then read.
        self.prefix += self.rays.origins.new_empty(missing, N_PREFIX).unbind()
        return n_tiles

    def _workspace(self) -> Workspace:
        return Workspace(self.size, self.source, self.normals, self.rays.distances is not None)

    def _tile(self, k: int, workspace: Workspace) -> SampleTile:
        assert self.offsets is not None
        return SampleTile(
            self.offsets,
            self.tiles[k][0],
            self.rays.directions,
            workspace.t,
            workspace.lengths,
            workspace.positions,
            workspace.logits,
            workspace.slopes,
            k * self.size,
            self.rays.step,
        )

    def _layout(self, k: int) -> Any:
        """How the samples of a tile read the table: of which scenes they are, if there are several."""
        if self.scenes is None:
            return self.source.layout
        assert self.offsets is not None
        numbers = torch.arange(k * self.size, (k + 1) * self.size, dtype=torch.int32, device=self.scenes.device)
        # The last ray that begins at or before a sample, and not one beyond the last for what is beyond the samples.
        rays = torch.searchsorted(self.offsets, numbers, right=True, out_int32=True) - 1
        return replace(self.source.layout, scenes=self.scenes[rays.clamp(max=len(self.rays) - 1).long()])

    def _evaluate(self, k: int, table: Tensor, workspace: Workspace) -> SampleTile:
        """March and ask the field: fills the workspace."""
        source, tile = self.source, self._tile(k, workspace)
        count = self.tiles[k][1]
        assert self.firsts is not None
        march_tile(
            self.rays,
            self.firsts,
            tile.offsets,
            tile.ray_range,
            tile.first,
            tile.t,
            tile.lengths,
            tile.positions,
            source.box,
            self.visible,
        )
        workspace.layout = self._layout(k)
        source.encoding.encode(workspace.positions, table, workspace.layout, workspace.features, count, _CHECKED)
        workspace.mlp_forward(count)
        gradient = workspace.input_gradient
        if gradient is not None and tile.slopes is not None:
            source.encoding.position_gradient(
                gradient, workspace.positions, table, workspace.layout, tile.slopes, count, _CHECKED
            )
        return tile

    def _visible_counts(self, table: Tensor, counts: Tensor, total: SampleCount) -> Tensor:
        """Samples of each ray that more than `early_stop` of the light reaches and that hold back `alpha_threshold` of
        it, by a density pass of its own.

        It looks at all samples, so it has to know how many there are, and outside a CUDA graph it asks. With a
        threshold they are any of a ray's, and a byte for each sample that was marched says which: the one thing that is
        held per sample.
        """
        density = replace(self, normals=False, prefix=[], kept=[], visible=None, size=0)
        n_samples = self._most() if total.captured else total.read()
        n_tiles = density._lay_out(counts, n_samples, False)
        assert density.offsets is not None
        depths, visible = self.rays.origins.new_zeros(len(self.rays)), torch.zeros_like(counts)
        limit = -math.log(self.early_stop) if self.early_stop > 0.0 else math.inf
        least = -math.log1p(-self.alpha_threshold)
        flags = counts.new_empty(n_samples, dtype=torch.uint8) if least > 0.0 else None
        try:
            workspace = density._workspace()
            for k in range(n_tiles):
                tile = density._evaluate(k, table, workspace)
                ray_sums_visible(self.head, tile, depths, visible, limit, least, flags)
        except torch.OutOfMemoryError:
            self.size = density.size  # what `_shrink` halves
            raise
        self.visible = None if flags is None else KeptSamples(flags, density.offsets)
        return visible


def _scatter(
    source: TileSource,
    positions: Tensor,
    layout: Any,
    to_features: Tensor,
    count: Tensor,
    second: tuple[Tensor | None, Tensor | None],
    grad_table: Tensor,
) -> None:
    """Add a tile's share to the gradient of the table."""
    source.encoding.scatter(grad_table, positions, layout, to_features, count, *second, _CHECKED)


def _scenes_of(source: TileSource, scenes: Tensor) -> Tensor:
    """The scenes of rays as kernels take them; on a GPU those that there are not give NaN, as the encoding says."""
    n_scenes = source.table.shape[0]
    where, rays = f"extras[{source.scene!r}]", scenes.shape[0]
    if scenes.dtype not in INTEGERS:
        raise TypeError(f"{where}: got {scenes.dtype}, want integers, the number of a scene per ray")
    if scenes.dim() != 1:
        raise ValueError(f"{where}: got shape {list(scenes.shape)}, want [{rays}], one number per ray")
    if not scenes.is_cuda and rays > 0 and not 0 <= int(scenes.min()) <= int(scenes.max()) < n_scenes:
        raise ValueError(f"{where}: got {int(scenes.min())} to {int(scenes.max())}, want 0 to {n_scenes - 1}")
    return scenes.clamp(-1, n_scenes).to(torch.int32).contiguous()
