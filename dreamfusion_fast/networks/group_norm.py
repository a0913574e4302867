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

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

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
    n, channels, height, width = x.shape
    if x.numel() == 0:
        return x.new_zeros(n, norm.groups, 2, dtype=_real(x))
    if not _kernels_serve(x):
        value = _sum(x, offset, residual)
        if total is not None:
            total.copy_(value)
            value = total.to(_real(x))
        flat = value.reshape(n, norm.groups, -1)
        var, mean = torch.var_mean(flat, dim=2, correction=0)
        return torch.stack([mean, (var + norm.eps).rsqrt()], dim=2)
    result = x.new_empty(n, norm.groups, 2, dtype=torch.float32)
    rows, cols = _tile(channels, _TILE)
    tiles, chunks = _split(n, channels, height * width, _TILE)
    partials = x.new_empty(n, chunks, channels, 2, dtype=torch.float32)
    kernels, size = _kernels(), (height * width, channels)
    kernels.moments_kernel[(chunks, -(-channels // cols), n)](
        *(x, offset, _stride(offset), residual, total, partials, *size, chunks),
        ROWS=rows,
        COLS=cols,
        TILES=tiles,
        num_warps=_WARPS,
    )
    group = channels // norm.groups
    kernels.statistics_kernel[(norm.groups, n)](
        *(partials, result, *size, chunks, rows * tiles, norm.eps),
        GROUP=group,
        GROUP_COLS=_power_of_two(group),
        CHUNKS=_chunks_at_once(chunks),
    )
    return result


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
        value = _sum(x, offset, residual)
        y.zero_()
        y[:, :, :height, :width] = value
        return y
    rows, cols = _tile(channels, _TILE)
    _kernels().sum_kernel[(-(-size[2] * size[3] // rows), -(-channels // cols), n)](
        *(x, offset, residual, y, height, width, size[2], size[3], channels), ROWS=rows, COLS=cols, num_warps=_WARPS
    )
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
    if x.numel() == 0:
        return torch.empty_like(x)
    n, channels, height, width = x.shape
    if not _kernels_serve(x):
        z = _normalised(norm, x, statistics, offset)
        z = z * _per_channel(norm.weight, z) + _per_channel(norm.bias, z)
        if modulation is not None:
            scale, shift = modulation.to(z.dtype)[:, :, None, None].chunk(2, dim=1)
            z = z * (1 + scale) + shift
        return _channels_last(_activated(z, norm.activation), x.dtype)
    y = torch.empty_like(x)
    rows, cols = _tile(channels, _TILE)
    _kernels().normalise_kernel[(-(-height * width // rows), -(-channels // cols), n)](
        *(x, offset, _stride(offset), statistics, norm.weight, norm.bias),
        *(modulation, _stride(modulation), y),
        *(height * width, channels, norm.groups),
        GROUP=channels // norm.groups,
        ACTIVATION=ACTIVATIONS.index(norm.activation),
        ROWS=rows,
        COLS=cols,
        num_warps=_WARPS,
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
    if x.numel() == 0:
        return torch.empty_like(x)
    n, channels, height, width = x.shape
    if not _kernels_serve(x):
        x_hat = _normalised(norm, x, statistics, offset)
        g = grad_y.to(x_hat.dtype)
        if norm.activation != "none":
            z = x_hat * _per_channel(norm.weight, x_hat) + _per_channel(norm.bias, x_hat)
            g = g * _slope(z, norm.activation)
        g = g * _per_channel(norm.weight, g)
        grouped, grouped_hat = (t.reshape(n, norm.groups, -1) for t in (g, x_hat))
        first = grouped.mean(dim=2, keepdim=True)
        second = (grouped * grouped_hat).mean(dim=2, keepdim=True)
        grad = (grouped - first - grouped_hat * second) * statistics[:, :, 1:]
        grad = grad.reshape(x.shape)
        grad = grad if skip is None else grad + skip.to(grad.dtype)
        return _channels_last(grad, x.dtype)
    grad_x = torch.empty_like(x)
    tiles, chunks = _split(n, channels, height * width, _SUMMED_TILE)
    partials = x.new_empty(n, chunks, channels, 2, dtype=torch.float32)
    means = torch.empty_like(statistics)
    kernels, size, group = _kernels(), (height * width, channels), channels // norm.groups
    shared = (grad_y, x, offset, _stride(offset), statistics, norm.weight, norm.bias)
    settings = {"GROUP": group, "ACTIVATION": ACTIVATIONS.index(norm.activation), "num_warps": _WARPS}
    rows, cols = _tile(channels, _SUMMED_TILE)
    blocks = -(-channels // cols)
    kernels.gradient_sums_kernel[(chunks, blocks, n)](
        *shared, partials, *size, norm.groups, chunks, ROWS=rows, COLS=cols, TILES=tiles, **settings
    )
    kernels.gradient_means_kernel[(norm.groups, n)](
        *(partials, means, *size, chunks),
        GROUP=group,
        GROUP_COLS=_power_of_two(group),
        CHUNKS=_chunks_at_once(chunks),
    )
    rows, cols = _tile(channels, _TILE)
    kernels.gradient_kernel[(-(-height * width // rows), blocks, n)](
        *shared, means, skip, grad_x, *size, norm.groups, ROWS=rows, COLS=cols, **settings
    )
    return grad_x


def group_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: Activation = "silu"
) -> Tensor:
    """The twin: the whole layer in plain PyTorch, any float dtype, differentiable."""
    y = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    return _activated(y, activation)


def _activated(z: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return z
    return torch.nn.functional.silu(z) if activation == "silu" else torch.nn.functional.gelu(z)


def _slope(z: Tensor, activation: Activation) -> Tensor:
    """The derivative of `_activated`, which is not that of "none"."""
    if activation == "silu":
        gate = torch.sigmoid(z)
        return gate * (1 + z * (1 - gate))
    return torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


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


def _tile(channels: int, elements: int) -> tuple[int, int]:
    """Pixels and channels of a tile."""
    cols = min(_power_of_two(channels), _MAX_COLS)
    if channels % cols and channels % (cols // 2) == 0:
        cols //= 2  # 320 channels are five times 64
    return elements // cols, cols


def _split(n: int, channels: int, pixels: int, elements: int) -> tuple[int, int]:
    """Tiles of so many elements that are summed up per program, and programs along the pixels."""
    rows, cols = _tile(channels, elements)
    tiles = -(-pixels // rows)
    per_program = max(min(_TILES, tiles * n * -(-channels // cols) // _ENOUGH_PROGRAMS), 1)
    return per_program, -(-tiles // per_program)


def _chunks_at_once(chunks: int) -> int:
    """Chunks that a program brings together in one go."""
    return min(max(_power_of_two(chunks), 16), 256)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _stride(offset: Tensor | None) -> int:
    """Elements between the offsets of two images."""
    return offset.stride(0) if offset is not None and offset.dim() == 2 else 0


def _real(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sum(x: Tensor, offset: Tensor | None, residual: Tensor | None = None) -> Tensor:
    value = x.to(_real(x))
    if offset is not None:
        value = value + offset.to(value.dtype).reshape(-1, x.shape[1], 1, 1)
    return value if residual is None else value + residual.to(value.dtype)


def _normalised(norm: GroupNorm, x: Tensor, statistics: Tensor, offset: Tensor | None) -> Tensor:
    value = _sum(x, offset).reshape(x.shape[0], norm.groups, -1)
    return ((value - statistics[:, :, :1]) * statistics[:, :, 1:]).reshape(x.shape)


def _channels_last(image: Tensor, dtype: torch.dtype) -> Tensor:
    return image.to(dtype).contiguous(memory_format=torch.channels_last)


def _per_channel(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.to(like.dtype).reshape(1, -1, 1, 1)
