"""Group normalisation with an activation, over channels-last images, in parts, for networks whose weights are frozen.

    y = f(x_hat * weight + bias),   x_hat = (x - mean) / sqrt(var + eps)

with mean and variance over the pixels and channels of a group (Wu and He 2018), and f SiLU, GELU or nothing.
Convolutional diffusion networks are a chain of this and convolutions. On a GPU each part is one pass over memory, and
takes along what would be a pass of its own: the bias of the convolution before it, the sum with a residual branch, the
sum of two gradients. Nothing is kept for backward but x and two numbers per group.

None of this is differentiable by autograd, and there are no gradients of weights: `Measured.input_gradient` is the
backward of `measure` and `Measured.normalised` together. Where Triton does not serve, the same in PyTorch.
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


@dataclass(frozen=True, eq=False)
class Measured:
    """An image with the statistics of its groups, as `measure` returns it: all that the layer reads, and its backward.

    Attributes:
        norm: the layer.
        x: ``[n, channels, height, width]``, channels last in memory.
        offset: ``[channels]`` or ``[n, channels]``, which is to be added to x, or None: zero.
        statistics: ``[n, groups, 2]``, mean and 1 / standard deviation of x + offset, float32 (float64 for float64).
    """

    norm: GroupNorm
    x: Tensor
    offset: Tensor | None
    statistics: Tensor

    def normalised(self, modulation: Tensor | None = None) -> Tensor:
        """y, like x.

        Args:
            modulation: ``[n, 2 channels]``, scales and then shifts: what is activated is
                ``(x_hat * weight + bias) * (1 + scale) + shift`` (adaptive group norm, Dhariwal and Nichol 2021).
        """
        x, y = self.x, torch.empty_like(self.x)
        if modulation is not None:
            _check_channels("modulation", modulation, [x.shape[0], 2 * x.shape[1]], x)
        if x.numel() == 0:
            return y
        if not _kernels_serve(x):
            return y.copy_(group_norm_reference(self.norm, self._centred(), modulation))
        grid, settings = _launch(x, _TILE)
        with torch.cuda.device_of(x):
            _kernels().normalise_kernel[grid](
                *self._read(), modulation, _stride(modulation), y, *self._sizes(), **self._constants(), **settings
            )
        return y

    @on_its_device
    def input_gradient(self, grad_y: Tensor, skip: Tensor | None = None) -> Tensor:
        """The gradient of x from that of y, like x; `skip` is added to it.

        With g the gradient of x_hat, that is grad_y * f'(z) * weight, it is
        ``(g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)``, means over a group.

        Args:
            grad_y: like x.
            skip: like x, or None: zero.
        """
        x, grad_x = self.x, torch.empty_like(self.x)
        _check_image("grad_y", grad_y, x)
        if skip is not None:
            _check_image("skip", skip, x)
        if x.numel() == 0:
            return grad_x
        if not _kernels_serve(x):
            with torch.enable_grad():
                value = self._centred().detach().requires_grad_()
                y = group_norm_reference(self.norm, value)
            (grad,) = torch.autograd.grad(y, value, grad_y.to(y.dtype))
            return grad_x.copy_(grad if skip is None else grad + skip)
        shared, sizes, constants = (grad_y, *self._read()), self._sizes(), self._constants()
        kernel = _kernels().gradient_kernel
        grid, settings = _launch(x, _SUMMED_TILE, sums=True)
        partials = x.new_empty(len(x), grid[0], x.shape[1], 2, dtype=torch.float32)
        kernel[grid](*shared, None, None, partials, *sizes, **constants, **settings)
        means = _over_groups(self.norm, x, partials)
        grid, settings = _launch(x, _TILE)
        kernel[grid](*shared, means, skip, grad_x, *sizes, TILES=1, **constants, **settings)
        return grad_x

    def _read(self) -> tuple[Tensor | int | None, ...]:
        return self.x, self.offset, _stride(self.offset), self.statistics, self.norm.weight, self.norm.bias

    def _sizes(self) -> tuple[int, int]:
        return self.x.shape[2] * self.x.shape[3], self.x.shape[1]

    def _constants(self) -> dict[str, int]:
        norm = self.norm
        return {"GROUP": len(norm.weight) // norm.groups, "ACTIVATION": ACTIVATIONS.index(norm.activation)}

    def _centred(self) -> Tensor:
        """x + offset less the mean, which the layer does not see, and to which torch's float32 layer loses digits."""
        value = _sum(self.x, self.offset).reshape(len(self.x), self.norm.groups, -1)
        return (value - self.statistics[:, :, :1]).reshape(self.x.shape)


@on_its_device
def measure(norm: GroupNorm, x: Tensor, offset: Tensor | None = None, residual: Tensor | None = None) -> Measured:
    """Mean and 1 / standard deviation of each group of x + offset, or of x + offset + residual.

    Args:
        norm: the layer.
        x: ``[n, channels, height, width]``, channels last in memory.
        offset: ``[channels]`` or ``[n, channels]``, such as the bias of the convolution that x comes from.
        residual: like x. With it, what is measured and returned in place of x and offset is the sum as it was rounded.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or memory format.
    """
    check_tensor("group_norm", "x", x, ["n", norm.weight.shape[0], "height", "width"], DTYPES, like=norm.weight)
    _check_image("x", x, x)
    if offset is not None:
        _check_channels("offset", offset, [x.shape[1]] if offset.dim() == 1 else [x.shape[0], x.shape[1]], x)
    total = None
    if residual is not None:
        _check_image("residual", residual, x)
        total = torch.empty_like(x)
    if x.numel() == 0:
        found = x.new_zeros(len(x), norm.groups, 2, dtype=sums_dtype(x))
    elif not _kernels_serve(x):
        value = _sum(x, offset, residual)
        if total is not None:
            value = total.copy_(value).to(value.dtype)
        var, mean = torch.var_mean(value.reshape(len(x), norm.groups, -1), dim=2, correction=0)
        found = torch.stack([mean, (var + norm.eps).rsqrt()], dim=2)
    else:
        grid, settings = _launch(x, _TILE, sums=True)
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        partials = x.new_empty(len(x), grid[0], channels, 2, dtype=torch.float32)
        _kernels().moments_kernel[grid](
            *(x, offset, _stride(offset), residual, total, partials, pixels, channels), **settings
        )
        found = _over_groups(norm, x, partials, settings["ROWS"] * settings["TILES"])
    return Measured(norm, x, offset, found) if total is None else Measured(norm, total, None, found)


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
        TypeError, ValueError: as `measure`.
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


def group_norm_reference(norm: GroupNorm, x: Tensor, modulation: Tensor | None = None) -> Tensor:
    """The twin: the whole layer in plain PyTorch, in the type of x, any float, differentiable.

    Args:
        norm: the layer.
        x: ``[n, channels, ...]``.
        modulation: as in `Measured.normalised`.
    """
    z = F.group_norm(x, norm.groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    if modulation is not None:
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))
        scale, shift = (part.reshape(shape) for part in modulation.to(x.dtype).chunk(2, dim=1))
        z = z * (1 + scale) + shift
    if norm.activation == "none":
        return z
    return F.silu(z) if norm.activation == "silu" else F.gelu(z)


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
    from dreamfusion_fast.networks import _triton  # triton takes a while to import, and need not be there

    return _triton


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


def _over_groups(norm: GroupNorm, x: Tensor, partials: Tensor, chunk_pixels: int | None = None) -> Tensor:
    """Two numbers per group, ``[n, groups, 2]``, from two per channel of each chunk.

    With `chunk_pixels`, mean and 1 / deviation from means and sums of squared deviations; without, means from sums.
    """
    result = partials.new_empty(len(x), norm.groups, 2)
    chunks, channels = partials.shape[1:3]
    group = channels // norm.groups
    _kernels().groups_kernel[(norm.groups, len(x))](
        *(partials, result, x.shape[2] * x.shape[3], channels, chunks, chunk_pixels, norm.eps),
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


def sums_dtype(x: Tensor) -> torch.dtype:
    """The type in which sums over x are taken."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum(x: Tensor, offset: Tensor | None, residual: Tensor | None = None) -> Tensor:
    value = x.to(sums_dtype(x))
    if offset is not None:
        value = value + offset.to(value.dtype).reshape(-1, x.shape[1], 1, 1)
    return value if residual is None else value + residual
