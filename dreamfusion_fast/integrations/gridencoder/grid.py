"""`GridEncoder`, with the arguments, attributes and parameters of gridencoder's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamfusion_fast.integrations.gridencoder import backend
from dreamfusion_fast.integrations.gridencoder.geometry import LEVEL_DIMS, Geometry, check_flavour, encode
from dreamfusion_fast.integrations.gridencoder.regularise import add_total_variation, add_weight_decay
from dreamfusion_fast.ops._checks import check_flag, check_number, check_tensor, shown

GRIDTYPES = {"hash": 0, "tiled": 1}
INTERPOLATIONS = {"linear": 0, "smoothstep": 1}


def grid_encode(
    inputs: Tensor,
    embeddings: Tensor,
    offsets: Tensor,
    per_level_scale: float,
    base_resolution: int,
    calc_grad_inputs: bool = False,
    gridtype: int = 0,
    align_corners: bool = False,
    interpolation: int = 0,
    max_level: float | None = None,
    flavour: str | None = None,
) -> Tensor:
    """The encoding as a function of positions and table, as gridencoder has it.

    Args:
        inputs: ``[n, input_dim]``, input_dim 2 to 5; zeros result outside [0, 1]. Float32 is computed in, or float64 if
            the table is.
        embeddings: ``[rows, level_dim]``, level_dim 1, 2, 4, 8, 16 or 32.
        offsets: ``[num_levels + 1]`` int32, the first row of each level.
        per_level_scale, base_resolution: the growth of resolution, and the first one.
        calc_grad_inputs: taken and ignored: there is a gradient to inputs that want one.
        gridtype: 0 for "hash", 1 for "tiled".
        align_corners: whether the first and the last vertex lie on the faces of the box.
        interpolation: 0 for "linear", 1 for "smoothstep".
        max_level: the share of levels to compute, in [0, 1] (of "torch-ngp" how many); features of others are 0.
        flavour: as in `GridEncoder`.

    Returns:
        ``[n, num_levels * level_dim]``, of the type of embeddings; float16 on a GPU under autocast, if level_dim is
        even. Differentiable twice to inputs and embeddings, where gridencoder's is once, and to inputs exactly: none
        where positions are clamped.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.
    """
    op, n_levels = "grid_encode", offsets.shape[0] - 1
    flavour = backend.flavour if flavour is None else flavour
    check_flavour(op, flavour)
    check_tensor(op, "embeddings", embeddings, ["rows", "level_dim"], [torch.float16, torch.float32, torch.float64])
    check_tensor(op, "inputs", inputs, ["n", "input_dim"], [torch.float16, torch.float32, torch.float64], embeddings)
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    growth, dims = float(np.log2(per_level_scale)), inputs.shape[1]
    placed = Geometry(growth, int(base_resolution), n_levels, dims, gridtype == 0, bool(align_corners), flavour)
    levels = n_levels
    if max_level is not None:
        wanted = max_level * n_levels if flavour == "stable-dreamfusion" else max_level
        levels = max(min(math.ceil(wanted), n_levels), 1)
    rows = embeddings.shape[0] if levels == n_levels else int(offsets[levels])
    table = embeddings[:rows].to(dtype)
    features = encode(inputs.to(dtype), table, offsets, placed, interpolation == 1, levels).flatten(1)
    if levels < n_levels:
        features = nn.functional.pad(features, (0, (n_levels - levels) * embeddings.shape[1]))
    half = inputs.is_cuda and torch.is_autocast_enabled() and embeddings.shape[1] % 2 == 0
    return features.half() if half else features.to(embeddings.dtype)


class GridEncoder(nn.Module):
    """A multiresolution grid of features, as gridencoder's module of that name.

    State dicts load from one to the other: ``embeddings`` ``[rows, level_dim]`` and ``offsets`` ``[num_levels + 1]``.

    Args:
        input_dim: of positions, 2 to 5; 2 and 3 by the native kernels, others by PyTorch's operations.
        num_levels: at least 1.
        level_dim: features of a level, 1, 2, 4, 8, 16 or 32.
        per_level_scale: the growth of resolution from level to level.
        base_resolution: of the first level.
        log2_hashmap_size: of the most rows of a level.
        desired_resolution: of the last level; takes the place of per_level_scale.
        gridtype: "hash", or "tiled": rows repeat where a level has more vertices than rows.
        align_corners: whether the first and the last vertex lie on the faces of the box.
        interpolation: "linear" or "smoothstep".
        flavour: of gridencoder, "stable-dreamfusion" or "torch-ngp"; None: the one that was installed, at first the
            former.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.
    """

    def __init__(
        self,
        input_dim: int = 3,
        num_levels: int = 16,
        level_dim: int = 2,
        per_level_scale: float = 2,
        base_resolution: int = 16,
        log2_hashmap_size: int = 19,
        desired_resolution: float | None = None,
        gridtype: str = "hash",
        align_corners: bool = False,
        interpolation: str = "linear",
        flavour: str | None = None,
    ) -> None:
        super().__init__()
        op = "GridEncoder"
        flavour = backend.flavour if flavour is None else flavour
        check_flavour(op, flavour)
        check_number(op, "input_dim", input_dim, "2 to 5", lambda number: 2 <= number <= 5, whole=True)
        check_number(op, "num_levels", num_levels, "at least 1", lambda number: number >= 1, whole=True)
        check_number(op, "level_dim", level_dim, "1, 2, 4, 8, 16 or 32", lambda n: n in LEVEL_DIMS, whole=True)
        wanted = "between 0 and 28"
        check_number(op, "log2_hashmap_size", log2_hashmap_size, wanted, lambda n: 0 <= n <= 28, whole=True)
        check_number(op, "base_resolution", base_resolution, "at least 1", lambda number: number >= 1)
        check_flag(op, "align_corners", align_corners)
        for name, value, choices in (
            ("gridtype", gridtype, GRIDTYPES),
            ("interpolation", interpolation, INTERPOLATIONS),
        ):
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{op}: {name} must be {' or '.join(choices)}, got {shown(value)}")
        if desired_resolution is not None and num_levels > 1:
            check_number(op, "desired_resolution", desired_resolution, "above 0", lambda number: number > 0)
            per_level_scale = np.exp2(np.log2(desired_resolution / base_resolution) / (num_levels - 1))
        check_number(op, "per_level_scale", per_level_scale, "above 0", lambda number: 0 < number < math.inf)
        self.input_dim, self.num_levels, self.level_dim = input_dim, num_levels, level_dim
        self.per_level_scale, self.base_resolution = per_level_scale, base_resolution
        self.log2_hashmap_size, self.max_params = log2_hashmap_size, 2**log2_hashmap_size
        self.output_dim = num_levels * level_dim
        self.gridtype, self.gridtype_id = gridtype, GRIDTYPES[gridtype]
        self.interpolation, self.interp_id = interpolation, INTERPOLATIONS[interpolation]
        self.align_corners, self.flavour = align_corners, flavour
        offsets = [0]
        for level in range(num_levels):
            resolution = math.ceil(base_resolution * per_level_scale**level)
            side = resolution if align_corners else resolution + 1
            offsets.append(offsets[-1] + -(-min(self.max_params, side**input_dim) // 8) * 8)
        if offsets[-1] >= 2**31:
            raise ValueError(f"{op}: the table must have fewer than 2^31 rows, got {offsets[-1]}")
        self.offsets: Tensor
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.int32))
        self.n_params = offsets[-1] * level_dim
        self.embeddings = nn.Parameter(torch.empty(offsets[-1], level_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table uniformly from +-1e-4."""
        nn.init.uniform_(self.embeddings, -1e-4, 1e-4)

    def extra_repr(self) -> str:
        """The arguments, in one line."""
        finest = round(self.base_resolution * self.per_level_scale ** (self.num_levels - 1))
        return (
            f"input_dim={self.input_dim}, num_levels={self.num_levels}, level_dim={self.level_dim}, "
            f"resolution={self.base_resolution} -> {finest}, embeddings={tuple(self.embeddings.shape)}, "
            f"gridtype={self.gridtype}, align_corners={self.align_corners}, interpolation={self.interpolation}, "
            f"flavour={self.flavour}"
        )

    def forward(self, inputs: Tensor, bound: float = 1, max_level: float | None = None) -> Tensor:
        """Encodes positions.

        Args:
            inputs: ``[..., input_dim]``, in [-bound, bound]; elsewhere features are 0.
            bound: half of the box's side.
            max_level: as in `grid_encode`.

        Returns:
            ``[..., num_levels * level_dim]``.

        Raises:
            TypeError, ValueError: as `grid_encode`.
        """
        if not isinstance(inputs, Tensor) or inputs.dim() < 1 or inputs.shape[-1] != self.input_dim:
            given = list(inputs.shape) if isinstance(inputs, Tensor) else shown(inputs)
            raise ValueError(f"GridEncoder: inputs must have shape [..., {self.input_dim}], got {given}")
        unit = self._unit(inputs, bound)
        arguments = (unit, self.embeddings, self.offsets, self.per_level_scale, self.base_resolution, False)
        options = (self.gridtype_id, self.align_corners, self.interp_id, max_level, self.flavour)
        return grid_encode(*arguments, *options).view(*inputs.shape[:-1], self.output_dim)

    def _unit(self, inputs: Tensor, bound: float) -> Tensor:
        return ((inputs + bound) / (2 * bound)).reshape(-1, self.input_dim)

    def _table_gradient(self, op: str) -> Tensor:
        if self.embeddings.grad is None:
            raise ValueError(f"{op}: embeddings.grad must be there, after backward and before the optimizer's step")
        return self.embeddings.grad

    def grad_total_variation(
        self,
        weight: float = 1e-7,
        inputs: Tensor | None = None,
        bound: float = 1,
        B: int = 1000000,  # noqa: N803 - the name that callers use
    ) -> None:
        """Adds the gradient of a total variation at positions to that of embeddings; see `add_total_variation`.

        Args:
            weight: of it.
            inputs: ``[..., input_dim]`` in [-bound, bound]; None: B random ones.
            bound: half of the box's side.
            B: how many.

        Raises:
            ValueError: embeddings have no gradient yet.
        """
        grad = self._table_gradient("grad_total_variation")
        table = self.embeddings.detach()
        if inputs is None or inputs.numel() == 0:
            positions = torch.rand(B, self.input_dim, device=table.device, dtype=table.dtype)
        else:
            positions = self._unit(inputs.detach(), bound).to(table.dtype)
        sizes = (float(np.log2(self.per_level_scale)), int(self.base_resolution), self.num_levels, self.input_dim)
        geometry = Geometry(*sizes, self.gridtype == "hash", self.align_corners, self.flavour)
        add_total_variation(grad, positions, table, self.offsets.tolist(), geometry, weight)

    def grad_weight_decay(self, weight: float = 0.1) -> None:
        """Adds the gradient of a weight decay, averaged per level, to that of embeddings; see `add_weight_decay`.

        Args:
            weight: of it.

        Raises:
            ValueError: embeddings have no gradient yet.
        """
        add_weight_decay(self._table_gradient("grad_weight_decay"), self.embeddings.detach(), self.offsets, weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a module that was pickled whole by a project's own GridEncoder, which knows of no flavour."""
        super().__setstate__(state)
        self.__dict__.setdefault("flavour", backend.flavour)
