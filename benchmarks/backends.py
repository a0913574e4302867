"""Who renders the scene: the native core, with a hash grid or a triplane, the pure-PyTorch twins, or a peer if its
packages are installed."""

from __future__ import annotations

from typing import Protocol

import torch
from peers import DropIn, NerfaccGridEncoder, NerfaccOurs, NerfaccTcnn, UnavailableError
from torch import Tensor, nn
from workload import ALPHA_THRESHOLD, EARLY_STOP, RESOLUTION, Scene, fit

from dreamfusion_fast.fields import HashGridFieldConfig, TriplaneFieldConfig
from dreamfusion_fast.rendering import OccupancyGrid, RendererConfig, VolumeRenderer

OURS = ("native", "triplane", "reference")
PEERS = {
    "drop-in": DropIn,
    "nerfacc+ours": NerfaccOurs,
    "nerfacc": NerfaccGridEncoder,
    "nerfacc+tcnn": NerfaccTcnn,
}
NAMES = (*OURS, *PEERS)

__all__ = ["NAMES", "OURS", "Renderer", "UnavailableError", "build"]


class Renderer(Protocol):
    """The thing that is timed: one scene, rendered again and again."""

    not_capturable: str
    """Why a step cannot be captured in a CUDA graph; empty if it should be."""

    def parameters(self) -> list[nn.Parameter]:
        """The tensors that get gradients."""

    def render(self, seed: int) -> tuple[Tensor, int | Tensor]:
        """Colour `[n_rays, 3]`, and how many samples it took; a tensor on the device is not read while time runs."""


class Ours:
    """`VolumeRenderer` over `HashGridField`, all of it native or all of it the twins, or over `TriplaneField`."""

    def __init__(self, scene: Scene, name: str, mlp_dtype: str, memory_budget: int | None) -> None:
        backend = "native" if name == "triplane" else name
        waits = "the twins wait" if backend != "native" else "pruning waits" if scene.pruned else ""
        self.not_capturable = waits and f"{waits} for the GPU"
        self._scene = scene
        kind = TriplaneFieldConfig if name == "triplane" else HashGridFieldConfig
        config = kind(hidden_layers=2, bound="box", mlp_dtype=mlp_dtype, backend=backend)  # type: ignore[arg-type]
        occupancy = OccupancyGrid(resolution=RESOLUTION, backend=backend).to(scene.device)  # type: ignore[arg-type]
        occupancy.set_occupied(scene.occupied)
        pruning = {"early_stop": EARLY_STOP, "alpha_threshold": ALPHA_THRESHOLD} if scene.pruned else {}
        options = RendererConfig(backend=backend, memory_budget=memory_budget, **pruning)  # type: ignore[arg-type]
        field = config.build(generator=torch.Generator().manual_seed(0))
        renderer = VolumeRenderer(field.to(scene.device), occupancy, options)
        self._renderer = renderer.to(scene.device)
        if scene.pruned:
            fit(field.density, self.parameters(), scene.device)

    def parameters(self) -> list[nn.Parameter]:
        return list(self._renderer.parameters())

    def render(self, seed: int) -> tuple[Tensor, int | Tensor]:
        scene = self._scene
        output = self._renderer.render(scene.rays, shading=scene.shading, light=scene.light, jitter=True, seed=seed)
        return output.color, output.samples


def build(name: str, scene: Scene, mlp_dtype: str, memory_budget: int | None) -> Renderer:
    """The renderer `name` of the scene. Raises UnavailableError if its packages are not there."""
    if name in PEERS:
        return PEERS[name](scene)
    return Ours(scene, name, mlp_dtype, memory_budget)
