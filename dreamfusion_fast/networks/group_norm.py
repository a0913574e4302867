"""Group normalisation with an activation, over channels-last images, in parts, for networks whose weights are frozen.

    y = f(x_hat * weight + bias),   x_hat = (x - mean) / sqrt(var + eps)

with mean and variance over the pixels and channels of a group (Wu and He 2018), and f SiLU, GELU or nothing.
Convolutional diffusion networks are a chain of this and convolutions. On a GPU each part is one pass over memory, and
takes along what would be a pass of its own: the bias of the convolution before it, the sum with a residual branch, the
sum of two gradients. Nothing is kept for backward but x and two numbers per group.

None of this is differentiable by autograd, and there are no gradients of weights: `input_gradient` is the backward of
`normalise` and `statistics` together. Where Triton does not serve, the same in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamfusion_fast.ops._checks import check_tensor
from dreamfusion_fast.ops._triton import on_its_device, triton_serves

Activation = Literal["none", "silu", "gelu"]
ACTIVATIONS = get_args(Activation)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of a tile: 64 per thread, as floats, leave room for a second operand in registers.
_TILE = 8192
# The same where two operands are read and two sums are kept per element.
_SUMMED_TILE = 2048
_WARPS = 4
_MAX_COLS = 128
# Tiles that one program sums up, if that leaves a GPU enough programs. More of them leave less to bring together.
_TILES = 16
_ENOUGH_PROGRAMS = 256

Norm = TypeVar("Norm", bound="GroupNorm")


@dataclass(frozen=True, eq=False)
class GroupNorm:
    """One layer.

    Attributes:
        weight, bias: ``[channels]``.
        groups: number of groups; divides the channels.
        eps: added to the variance.
        activation: what follows; GELU is the exact one.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        op = type(self).__name__
        check_tensor(op, "weight", self.weight, ["channels"], DTYPES)
        check_tensor(op, "bias", self.bias, self.weight.shape, DTYPES, like=self.weight, same_dtype=True)
        channels = self.weight.shape[0]
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.groups < 1 or channels % self.groups:
            raise ValueError(f"{op}: groups must divide the {channels} channels, got {self.groups}")

    @classmethod
    def of(cls: type[Norm], module: torch.nn.GroupNorm, activation: Activation) -> Norm:
        """A module's, frozen."""
        return cls(module.weight.detach(), module.bias.detach(), module.num_groups, module.eps, activation)


@on_its_device
def statistics(
    norm: GroupNorm,
    x: Tensor,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Mean and 1 / standard deviation of each group of x + offset + residual.

    Args:
        norm: the layer.
        x: ``[n, channels, height, width]``, channels last in memory.
        offset: ``[channels]`` or ``[n, channels]``, such as the bias of the convolution that x comes from.
        residual: like x; with `total`.
        total: like x, written: the sum. With it, the statistics are those of the sum as it was rounded.

    Returns:
        ``[n, groups, 2]``, float32 (float64 for a float64 x).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or memory format.
    """
    _check(norm, x, offset)
    for name, tensor in (("residual", residual), ("total", total)):
        if tensor is not None:
            _check_image(name, tensor, x)
    if residual is not None and total is None:
        raise ValueError("group_norm: total must be given with a residual, got None")
    if x.numel() == 0:
        return x.new_zeros(len(x), norm.groups, 2, dtype=_wide(x))
    if not _kernels_serve(x):
        value = _sum(x, offset, residual)
        if total is not None:
            value = total.copy_(value).to(value.dtype)
        var, mean = torch.var_mean(value.reshape(len(x), norm.groups, -1), dim=2, correction=0)
        return torch.stack([mean, (var + norm.eps).rsqrt()], dim=2)
    grid, settings = _launch(x, _TILE, sums=True)
    partials = x.new_empty(len(x), grid[0], x.shape[1], 2, dtype=torch.float32)
    pixels, channels, _ = _sizes(norm, x)
    _kernels().moments_kernel[grid](
        *(x, offset, _stride(offset), residual, total, partials, pixels, channels, grid[0]), **settings
    )
    return _over_groups(norm, x, partials, settings["ROWS"] * settings["TILES"])


@on_its_device
def summed(x: Tensor, offset: Tensor | None = None, residual: Tensor | None = None, padding: int = 0) -> Tensor:
    """x + offset + residual, rounded once, with `padding` rows of zeros below and columns of zeros to the right.

    Args:
        x: ``[n, channels, height, width]``, channels last in memory.
        offset: ``[channels]``, or None: zero.
        residual: like x, or None: zero.
        padding: at least 0.

    Returns:
        ``[n, channels, height + padding, width + padding]``, channels last in memory.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or memory format.
    """
    check_tensor("group_norm", "x", x, ["n", "channels", "height", "width"], DTYPES)
    _check_image("x", x, x)
    n, channels, height, width = x.shape
    if offset is not None:
        _check_channels("offset", offset, [channels], x)
    if residual is not None:
        _check_image("residual", residual, x)
    if padding < 0:
        raise ValueError(f"group_norm: padding must be at least 0, got {padding}")
    size = (n, channels, height + padding, width + padding)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() == 0 or not _kernels_serve(x):
        return y.copy_(F.pad(_sum(x, offset, residual), (0, padding, 0, padding)))
    grid, settings = _launch(y, _TILE)
    _kernels().sum_kernel[grid](*(x, offset, residual, y, height, width, *size[2:], channels), **settings)
    return y


@on_its_device
def normalise(
    norm: GroupNorm,
    x: Tensor,
    statistics: Tensor,
    offset: Tensor | None = None,
    modulation: Tensor | None = None,
) -> Tensor:
    """y of x + offset, like x.

    Args:
        norm, x, offset: as in `statistics`, which was given no residual.
        statistics: its result.
        modulation: ``[n, 2 channels]``, scales and then shifts: what is activated is
            ``(x_hat * weight + bias) * (1 + scale) + shift`` (adaptive group norm, Dhariwal and Nichol 2021).
    """
    _check(norm, x, offset)
    if modulation is not None:
        _check_channels("modulation", modulation, [x.shape[0], 2 * x.shape[1]], x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if not _kernels_serve(x):
        return y.copy_(group_norm_reference(norm, _centred(norm, x, statistics, offset), modulation))
    grid, settings = _launch(x, _TILE)
    _kernels().normalise_kernel[grid](
        *(x, offset, _stride(offset), statistics, norm.weight, norm.bias),
        *(modulation, _stride(modulation), y),
        *_sizes(norm, x),
        **_layer(norm),
        **settings,
    )
    return y


@on_its_device
def input_gradient(
    norm: GroupNorm,
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    offset: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The gradient of x from that of y, like x; `skip` is added to it.

    With g the gradient of x_hat, that is grad_y * f'(z) * weight, it is
    ``(g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)``, means over a group.

    Args:
        norm, x, statistics, offset: as in `normalise`.
        grad_y: like x.
        skip: like x, or None: zero.
    """
    _check(norm, x, offset)
    _check_image("grad_y", grad_y, x)
    if skip is not None:
        _check_image("skip", skip, x)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x
    if not _kernels_serve(x):
        with torch.enable_grad():
            value = _centred(norm, x, statistics, offset).detach().requires_grad_()
            y = group_norm_reference(norm, value)
        (grad,) = torch.autograd.grad(y, value, grad_y.to(y.dtype))
        return grad_x.copy_(grad if skip is None else grad + skip)
    shared = (grad_y, x, offset, _stride(offset), statistics, norm.weight, norm.bias)
    grid, settings = _launch(x, _SUMMED_TILE, sums=True)
    partials = x.new_empty(len(x), grid[0], x.shape[1], 2, dtype=torch.float32)
    _kernels().gradient_sums_kernel[grid](*shared, partials, *_sizes(norm, x), grid[0], **_layer(norm), **settings)
    means = _over_groups(norm, x, partials)
    grid, settings = _launch(x, _TILE)
    _kernels().gradient_kernel[grid](*shared, means, skip, grad_x, *_sizes(norm, x), **_layer(norm), **settings)
    return grad_x


def group_norm_reference(norm: GroupNorm, x: Tensor, modulation: Tensor | None = None) -> Tensor:
    """The twin: the whole layer in plain PyTorch, in the type of x, any float, differentiable.

    Args:
        norm: the layer.
        x: ``[n, channels, ...]``.
        modulation: as in `normalise`.
    """
    z = F.group_norm(x, norm.groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    if modulation is not None:
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))
        scale, shift = (part.reshape(shape) for part in modulation.to(x.dtype).chunk(2, dim=1))
        z = z * (1 + scale) + shift
    if norm.activation == "none":
        return z
    return F.silu(z) if norm.activation == "silu" else F.gelu(z)


def _check(norm: GroupNorm, x: Tensor, offset: Tensor | None) -> None:
    check_tensor("group_norm", "x", x, ["n", norm.weight.shape[0], "height", "width"], DTYPES, like=norm.weight)
    _check_image("x", x, x)
    if offset is not None:
        _check_channels("offset", offset, [x.shape[1]] if offset.dim() == 1 else [x.shape[0], x.shape[1]], x)


def _check_channels(name: str, tensor: Tensor, shape: list[int], x: Tensor) -> None:
    check_tensor("group_norm", name, tensor, shape, DTYPES, like=x)
    if tensor.stride(-1) != 1:
        raise ValueError(f"group_norm: {name} must have channels next to each other in memory")


def _check_image(name: str, tensor: Tensor, x: Tensor) -> None:
    check_tensor("group_norm", name, tensor, x.shape, DTYPES, like=x, same_dtype=True)
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"group_norm: {name} must be contiguous with channels last in memory, got strides {tensor.stride()}"
        )


def _kernels_serve(x: Tensor) -> bool:
    return x.dtype != torch.float64 and triton_serves(x.device)


def _kernels() -> ModuleType:
    from dreamfusion_fast.networks import _group_norm_triton  # triton takes a while to import, and need not be there

    return _group_norm_triton


def _launch(image: Tensor, elements: int, sums: bool = False) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and settings of a kernel over tiles of so many elements; with `sums`, of one that sums up TILES of them."""
    n, channels, height, width = image.shape
    cols = min(_power_of_two(channels), _MAX_COLS)
    if channels % cols and channels % (cols // 2) == 0:
        cols //= 2  # 320 channels are five times 64
    rows = elements // cols
    chunks, blocks = -(-height * width // rows), -(-channels // cols)
    settings = {"ROWS": rows, "COLS": cols, "num_warps": _WARPS}
    if sums:
        tiles = settings["TILES"] = max(min(_TILES, chunks * blocks * n // _ENOUGH_PROGRAMS), 1)
        chunks = -(-chunks // tiles)
    return (chunks, blocks, n), settings


def _sizes(norm: GroupNorm, x: Tensor) -> tuple[int, int, int]:
    """Pixels, channels and groups."""
    return x.shape[2] * x.shape[3], x.shape[1], norm.groups


def _layer(norm: GroupNorm) -> dict[str, int]:
    return {"GROUP": len(norm.weight) // norm.groups, "ACTIVATION": ACTIVATIONS.index(norm.activation)}


def _over_groups(norm: GroupNorm, x: Tensor, partials: Tensor, chunk_pixels: int | None = None) -> Tensor:
    """Two numbers per group, ``[n, groups, 2]``, from two per channel of each chunk.

    With `chunk_pixels`, mean and 1 / deviation from means and sums of squared deviations; without, means from sums.
    """
    result = partials.new_empty(len(x), norm.groups, 2)
    pixels, channels, groups = _sizes(norm, x)
    chunks, group = partials.shape[1], channels // groups
    _kernels().groups_kernel[(groups, len(x))](
        *(partials, result, pixels, channels, chunks, chunk_pixels, norm.eps),
        GROUP=group,
        GROUP_COLS=_power_of_two(group),
        CHUNKS=min(max(_power_of_two(chunks), 16), 256),  # that are brought together in one go
    )
    return result


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _stride(offset: Tensor | None) -> int:
    """Elements between the offsets of two images."""
    return offset.stride(0) if offset is not None and offset.dim() == 2 else 0


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sum(x: Tensor, offset: Tensor | None, residual: Tensor | None = None) -> Tensor:
    value = x.to(_wide(x))
    if offset is not None:
        value = value + offset.to(value.dtype).reshape(-1, x.shape[1], 1, 1)
    return value if residual is None else value + residual


def _centred(norm: GroupNorm, x: Tensor, statistics: Tensor, offset: Tensor | None) -> Tensor:
    """x + offset less the mean, which the layer does not see, and to which torch's float32 layer loses digits."""
    return (_sum(x, offset).reshape(len(x), norm.groups, -1) - statistics[:, :, :1]).reshape(x.shape)
