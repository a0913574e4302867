"""The same scene rendered by other people's packages, through their public interfaces, where they are installed.

| name | encoding | MLP |
|---|---|---|
| `nerfacc` | `gridencoder` of stable-dreamfusion and torch-ngp | torch, fp16 autocast |
| `nerfacc+tcnn` | tiny-cuda-nn's HashGrid | its FullyFusedMLP |
| `nerfacc+ours` | as `nerfacc+tcnn`, through our `integrations.tinycudann` | |
| `drop-in` | as `nerfacc+tcnn`, through our `integrations.nerfacc` and `integrations.tinycudann` | |

All march and composite by the names of nerfacc >= 0.5.3 and take normals from three forward differences of the
density. No peer is needed for anything, and none is a dependency. The jitter is nerfacc's own, so sample counts differ
from ours by a few. Density pruning is off unless the scene is pruned, as in the figures of `results/peers-h100.json`.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn
from workload import AABB, ALPHA_THRESHOLD, EARLY_STOP, RESOLUTION, STEP, Scene, fit

from dreamfusion_fast.rendering import Shading
from dreamfusion_fast.rendering.shading import shade

LEVELS, FEATURES, ROWS_LOG2, BASE, FINEST = 16, 2, 19, 16, 2048
HIDDEN = 64
DIFFERENCE = 0.01  # step of the finite differences, scene units


class UnavailableError(Exception):
    """A peer's package is not installed, or does not load; says which and why."""


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension that was built for another torch fails in many ways
        raise UnavailableError(f"{name} cannot be imported: {type(error).__name__}: {error}") from None


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the generator that nerfacc's jitter comes from.

    `torch.manual_seed` also seeds kinds of devices that are not there, and formats a stack trace for each of them.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class _Nerfacc(ABC):
    """March and compositing by nerfacc, around a field that a subclass gives."""

    not_capturable = "nerfacc's march waits for the GPU"
    module = "nerfacc"

    def __init__(self, scene: Scene) -> None:
        if scene.device.type != "cuda" and self.module == "nerfacc":
            raise UnavailableError("nerfacc marches on a GPU only")
        self._nerfacc = _load(self.module)
        self._scene = scene
        self._shading = Shading.parse(scene.shading)
        self._estimator = self._nerfacc.OccGridEstimator(list(AABB), resolution=RESOLUTION, levels=1).to(scene.device)
        self._estimator.binaries = scene.occupied[None]
        self._field = self._make_field().to(scene.device)
        if scene.pruned:
            fit(self._density, self.parameters(), scene.device)

    @abstractmethod
    def _make_field(self) -> nn.Module:
        """A module from `[m, 3]` in [0, 1]^3 to `[m, 4]`: logits of density and colour."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self._field.parameters())

    def render(self, seed: int) -> tuple[Tensor, int]:
        scene = self._scene
        origins, directions = scene.rays.origins, scene.rays.directions
        _seed(seed, scene.device)

        def places(t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor) -> Tensor:
            middle = 0.5 * (t_starts + t_ends)[:, None]
            return origins[ray_indices] + middle * directions[ray_indices]

        def sigma(t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor) -> Tensor:
            return self._density(places(t_starts, t_ends, ray_indices))

        def rgb_sigma(t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor) -> tuple[Tensor, Tensor]:
            return self._shaded(places(t_starts, t_ends, ray_indices))

        pruning = {"early_stop_eps": 0.0, "alpha_thre": 0.0}
        if scene.pruned:
            pruning = {"early_stop_eps": EARLY_STOP, "alpha_thre": ALPHA_THRESHOLD, "sigma_fn": sigma}
        ray_indices, t_starts, t_ends = self._estimator.sampling(
            origins, directions, render_step_size=STEP, stratified=True, **pruning
        )
        color, *_ = self._nerfacc.rendering(
            t_starts, t_ends, ray_indices, n_rays=len(scene.rays), rgb_sigma_fn=rgb_sigma
        )
        return color, t_starts.shape[0]

    def _shaded(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Colour `[m, 3]` and density `[m]` of positions `[m, 3]`."""
        logits = self._logits(positions)
        normal = None
        if self._shading.needs_normals:
            moved = (positions + DIFFERENCE * axis for axis in torch.eye(3, device=positions.device))
            slope = torch.stack([self._logits(p)[:, 0] - logits[:, 0] for p in moved], dim=1)
            normal = -nn.functional.normalize(slope, dim=1)
        albedo = torch.sigmoid(logits[:, 1:])
        color = shade(albedo, normal, positions, self._scene.light, self._shading)
        return color, nn.functional.softplus(logits[:, 0])

    def _density(self, positions: Tensor) -> Tensor:
        """Density `[m]` of positions `[m, 3]`."""
        return nn.functional.softplus(self._logits(positions)[:, 0])

    def _logits(self, positions: Tensor) -> Tensor:
        """The field's output in float32, with Magic3D's blob on the density."""
        logits = self._field((positions + 1) / 2).float()
        blob = 10.0 * (1.0 - positions.norm(dim=1) / 0.5)
        return torch.cat([logits[:, :1] + blob[:, None], logits[:, 1:]], dim=1)


class _GridEncoderField(nn.Module):
    """`gridencoder` and a torch MLP, both under fp16 autocast."""

    def __init__(self, gridencoder: ModuleType) -> None:
        super().__init__()
        self.encoder = gridencoder.GridEncoder(
            input_dim=3,
            num_levels=LEVELS,
            level_dim=FEATURES,
            base_resolution=BASE,
            log2_hashmap_size=ROWS_LOG2,
            desired_resolution=FINEST,
        )
        widths = [LEVELS * FEATURES, HIDDEN, HIDDEN, 4]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.mlp = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, unit: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            return self.mlp(self.encoder(2 * unit - 1, bound=1))


class NerfaccGridEncoder(_Nerfacc):
    """nerfacc with the CUDA grid encoder and a torch MLP."""

    def _make_field(self) -> nn.Module:
        return _GridEncoderField(_load("gridencoder"))


class NerfaccTcnn(_Nerfacc):
    """nerfacc with tiny-cuda-nn's encoding and fully fused MLP, both in half precision."""

    field_module = "tinycudann"

    def _make_field(self) -> nn.Module:
        encoding = {
            "otype": "HashGrid",
            "n_levels": LEVELS,
            "n_features_per_level": FEATURES,
            "log2_hashmap_size": ROWS_LOG2,
            "base_resolution": BASE,
            "per_level_scale": math.exp(math.log(FINEST / BASE) / (LEVELS - 1)),
        }
        network = {
            "otype": "FullyFusedMLP",
            "activation": "ReLU",
            "output_activation": "None",
            "n_neurons": HIDDEN,
            "n_hidden_layers": 2,
        }
        return _load(self.field_module).NetworkWithInputEncoding(3, 4, encoding, network)


class NerfaccOurs(NerfaccTcnn):
    """nerfacc over our module of tiny-cuda-nn's names: what is left is nerfacc's own."""

    field_module = "dreamfusion_fast.integrations.tinycudann"


class DropIn(NerfaccOurs):
    """Both through our modules of their names."""

    not_capturable = "the march waits for the GPU"
    module = "dreamfusion_fast.integrations.nerfacc"
