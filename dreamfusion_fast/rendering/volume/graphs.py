"""Small streamed renders as CUDA graphs, for training steps that are not captured themselves.

A 64^2 image is a third of a millisecond of work for a GPU, in some thirty launches, for which Python takes two. When a
render like the last ones comes again, it is captured, forward and backward: from then on each is one launch. What
differs between renders that are alike is copied to where the graph reads it: rays, light and seed. Results are those of
`StreamedRender`, which the graphs are captured from, and which steps in whenever they do not fit: more samples than
there is room for, a second render before the first one went backward, a second backward.

The price is memory: the buffers of a captured render stay, at most `MAX_GRAPHS` times. `RendererConfig.graphs` turns
all of this off; within a capture of the caller's own it is off by itself.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.gpu.capture import capturing
from dreamfusion_fast.gpu.memory import is_out_of_memory
from dreamfusion_fast.ops.tiles.mlp import MlpGradients
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.volume.prepared import RenderRequest
from dreamfusion_fast.rendering.volume.streaming import StreamedRender

# Larger renders keep the GPU busy for as long as Python takes for their launches.
MAX_SAMPLES = 1 << 17
# Kinds of render whose graphs are kept: the shadings that a training loop takes in turns.
MAX_GRAPHS = 4
# So many renders alike are run as they are before one is captured.
_BEFORE_CAPTURE = 3
_REMEMBERED = 16

MakeRender = Callable[[RenderRequest], StreamedRender]


class RenderGraphs:
    """The graphs of one renderer."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._graphs: OrderedDict[Hashable, _Graphs | None] = OrderedDict()
        self._dropped = False

    def find(
        self,
        source: TileSource,
        aabb: Tensor,
        box: tuple[float, ...],
        occupancy: OccupancyGrid | None,
        config: RendererConfig,
        request: RenderRequest,
        expected: int | None,
        make: MakeRender,
    ) -> GraphedRender | None:
        """A render by graphs, if there are any for it or it is time to capture them.

        Args:
            source, occupancy, config, request: of the render.
            aabb, box: the renderer's box, and what it holds.
            expected: samples of the last render like this one; None: there was none.
            make: a render of a request as it is.
        """
        if expected is None or expected > MAX_SAMPLES or not self._apply(occupancy, config, request):
            return None
        parameters = source.parameters
        wanted = [parameter.requires_grad for parameter in parameters]
        if not any(wanted):
            return None
        kind = _kind(source, parameters, aabb, box, occupancy, config, request)
        if kind not in self._graphs:
            self._seen[kind] = self._seen.pop(kind, 0) + 1
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            if self._seen[kind] <= _BEFORE_CAPTURE:
                return None
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
                self._dropped = True
            if self._dropped:  # the allocator keeps the memory of graphs that are gone, and uses it for nothing else
                torch.cuda.empty_cache()
                self._dropped = False
            self._graphs[kind] = _capture(request, make, (wanted[0], any(wanted[1:])))
        graphs = self._graphs[kind]
        self._graphs.move_to_end(kind)
        if graphs is None or graphs.busy:
            return None
        if expected > graphs.capacity:  # a render did not fit: capture again, with more room
            del self._graphs[kind]
            self._dropped = True
            return None
        return GraphedRender(graphs, request, make, parameters, aabb, occupancy)

    def __reduce__(self) -> tuple[type[RenderGraphs], tuple[()]]:
        """A copy of a renderer, pickled or not, begins without any."""
        return RenderGraphs, ()

    @staticmethod
    def _apply(occupancy: OccupancyGrid | None, config: RendererConfig, request: RenderRequest) -> bool:
        """Whether this render can be captured: whatever asks the GPU, or launches for what it said, cannot."""
        return (
            config.graphs
            and request.rays.origins.is_cuda
            and torch.is_grad_enabled()
            and not config.prunes
            and request.rays.near is None
            and request.rays.far is None
            and not request.extras
            and config.cone_angle == 0.0
            and (occupancy is None or occupancy.cascades == 1)
            and not torch.cuda.is_current_stream_capturing()
        )


def _kind(
    source: TileSource,
    parameters: list[Tensor],
    aabb: Tensor,
    box: tuple[float, ...],
    occupancy: OccupancyGrid | None,
    config: RendererConfig,
    request: RenderRequest,
) -> Hashable:
    """All that a graph does not read anew: numbers, shapes and addresses."""
    light, origins = request.light, request.rays.origins
    return (
        torch._C._cuda_getCurrentRawStream(origins.device.index),
        len(request.rays),
        request.shading,
        None if light is None else light.shape,
        request.ambient,
        request.diffuse,
        request.normals,
        request.distortion,
        request.entropy,
        request.jitter,
        config,
        source.head.arguments,
        source.layout,
        source.precision,
        source.box,
        tuple((parameter.data_ptr(), parameter.requires_grad) for parameter in parameters),
        aabb.data_ptr(),
        box,
        None if occupancy is None else (occupancy.bitfield.data_ptr(), occupancy.resolution),
    )


class _Graphs:
    """Two graphs, where they read what differs, and what they leave.

    Attributes:
        render: what was captured.
        capacity: samples that there is room for; 0: the render takes more than one tile, and there is no second graph.
        sums, gradients, scatter: as `StreamedRender` gives them; the second graph needs the first one's buffers as they
            were left.
        grad_sums: what the second graph reads.
        run: number of the last render.
    """

    def __init__(self, request: RenderRequest, make: MakeRender, needs: tuple[bool, bool]) -> None:
        rays, light = request.rays, request.light
        self._rays = [_room_for(rays.origins), _room_for(rays.directions)]
        self._light = None if light is None else _room_for(light)
        self._seed = torch.zeros((), dtype=torch.int64, device=rays.origins.device)
        captured = replace(request, rays=Rays(*self._rays), light=self._light, seed=self._seed, count=None)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        device = rays.origins.device
        # Not the default stream, which cannot be captured.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            with capturing(self._forward, pool):
                self.render = make(captured)
                self.sums = self.render.forward(True)
            one_tile = len(self.render.kept) == 1
            self.capacity = self.render.size if one_tile else 0
            if one_tile:
                with capturing(self._backward, pool):
                    self.grad_sums = torch.empty_like(self.sums)
                    self.scatter, self.gradients = self.render.backward_to_scatter(self.sums, self.grad_sums, needs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.run = 0
        self._user: weakref.ref[GraphedRender] | None = None

    @property
    def busy(self) -> bool:
        """Whether a render was run that may still go backward for the first time."""
        user = None if self._user is None else self._user()
        return user is not None and not user.went_back

    def forward(self, user: GraphedRender, request: RenderRequest) -> int:
        """Render; the number of samples. If there is room for so many, the results are in `sums`."""
        rays = request.rays
        to, of = list(self._rays), [rays.origins.detach(), rays.directions.detach()]
        if self._light is not None and request.light is not None:
            to.append(self._light)
            of.append(request.light.detach())
        torch._foreach_copy_(to, of)
        if isinstance(request.seed, Tensor):
            self._seed.copy_(request.seed)
        else:
            self._seed.fill_(request.seed)
        self.run += 1
        self._user = weakref.ref(user)
        self._forward.replay()
        if request.count is not None:
            return request.count.read()
        assert self.render.total is not None
        self.render.total.send()
        return self.render.total.read()

    def backward(self) -> None:
        """From `grad_sums` to `gradients`, and to what `scatter` reads."""
        self._backward.replay()


class GraphedRender:
    """One render by graphs; a `FieldRender` like `StreamedRender`."""

    overflowed: Tensor | None = None

    def __init__(
        self,
        graphs: _Graphs,
        request: RenderRequest,
        make: MakeRender,
        parameters: list[Tensor],
        aabb: Tensor,
        occupancy: OccupancyGrid | None,
    ) -> None:
        self.normals, self.distortion, self.entropy = request.normals, request.distortion, request.entropy
        self.channels = graphs.render.channels
        self.samples: int | Tensor = 0
        self.parameters = parameters
        rays = request.rays
        bitfield = None if occupancy is None else occupancy.bitfield
        self.guarded = (rays.origins, rays.directions, aabb, bitfield, request.light)
        self.went_back = False
        self._graphs, self._request, self._make = graphs, request, make
        self._run = 0
        self._instead: StreamedRender | None = None

    def forward(self, training: bool) -> Tensor:
        """As `StreamedRender.forward`."""
        graphs = self._graphs
        self.samples = graphs.forward(self, self._request)
        if self.samples <= graphs.capacity:
            self._run = graphs.run
            return graphs.sums.clone()
        return self._run_instead(training)

    def zero_grad_sums(self) -> Tensor:
        """As `StreamedRender.zero_grad_sums`; the graphs' own, for the `backward` that follows."""
        if self._instead is None and self._graphs.run != self._run:
            self._run_instead(True)  # another render has used the buffers since
        return self._graphs.grad_sums.zero_() if self._instead is None else self._instead.zero_grad_sums()

    def backward(
        self, sums: Tensor, grad_sums: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, MlpGradients | None]:
        """As `StreamedRender.backward`, of what `zero_grad_sums` gave."""
        graphs = self._graphs
        self.went_back = True
        if self._instead is not None:
            return self._instead.backward(sums, grad_sums, needs)
        assert grad_sums is graphs.grad_sums
        graphs.backward()
        if not needs[0]:
            return None, graphs.gradients
        grad_table = torch.zeros_like(self.parameters[0], memory_format=torch.contiguous_format)
        graphs.scatter(grad_table)
        return grad_table, graphs.gradients

    def _run_instead(self, training: bool) -> Tensor:
        self.went_back = True  # the graphs are free
        self._instead = self._make(self._request)
        return self._instead.forward(training)


def _capture(request: RenderRequest, make: MakeRender, needs: tuple[bool, bool]) -> _Graphs | None:
    """The graphs of a render, or None where it takes more than one tile or more memory than there is."""
    try:
        graphs = _Graphs(request, make, needs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return graphs if graphs.capacity > 0 else None


def _room_for(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
