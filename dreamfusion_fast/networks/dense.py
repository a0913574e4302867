"""Dense layers of a small convolutional network on a CPU: linear, 3x3 convolution, group normalisation, in float32.

For networks whose weights are frozen: these are packed once, when a layer is made, and there are no gradients. Images
are channels last, ``[n, height, width, channels]`` and contiguous, so that an image's pixels are rows of a matrix. What
would be a pass over memory of its own is done as a product is stored: bias and the sum with a residual branch.

The convolution is Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016, arXiv 1509.09308): 16 products for
four outputs in place of 36. Its transforms of the image are sums and differences of four values, its transform of the
weights is done in float64. So its rounding errors are not larger than those of the sum over nine pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.networks.group_norm import GroupNorm
from dreamfusion_fast.networks.group_norm import group_norm_reference as channels_first_reference
from dreamfusion_fast.ops._checks import check_tensor
from dreamfusion_fast.ops._native import call, cpu_available, function_of

# Output channels come in panels, input channels of a convolution and channels of a normalisation in eights.
PANEL = 16
LANES = 8
_FLOAT32 = (torch.float32,)
# Winograd's G for two outputs of three taps.
_FILTER_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def dense_serves() -> bool:
    """Whether the CPU core has these layers: it was compiled for a processor with AVX2 and fused multiply-add."""
    return cpu_available() and bool(function_of("dense_serves", "cpu", _FLOAT32[0])())


class _Dense:
    """Frozen weights, ``[outputs, inputs, ...]`` float32 on the CPU, outputs a multiple of 16, and a bias or None.

    Attributes:
        inputs, outputs: numbers of features or channels.

    Raises:
        TypeError, ValueError: another dtype or shape, or a tensor that is not on the CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel: list[int | str]) -> None:
        op = type(self).__name__
        check_tensor(op, "weight", weight, ["outputs", "inputs", *kernel], _FLOAT32)
        if weight.device.type != "cpu":
            raise ValueError(f"{op}: weight must be on the CPU, got {weight.device}")
        self.outputs, self.inputs = weight.shape[:2]
        _check_multiple(op, "outputs", self.outputs, PANEL)
        if bias is not None:
            check_tensor(op, "bias", bias, [self.outputs], _FLOAT32, like=weight)
        self.bias = None if bias is None else bias.detach().contiguous()


class DenseLinear(_Dense):
    """A linear layer's weights ``[outputs, inputs]``, packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias, [])
        self.packed = weight.detach().reshape(-1, PANEL, self.inputs).transpose(1, 2).contiguous()


class DenseConv(_Dense):
    """Weights ``[outputs, inputs, 3, 3]`` of a convolution with stride 1 and zeros around, transformed and packed.

    Inputs are a multiple of 8.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias, [3, 3])
        _check_multiple("DenseConv", "inputs", self.inputs, LANES)
        g = torch.tensor(_FILTER_TRANSFORM, dtype=torch.float64)
        points = (weight.detach().double().reshape(-1, 9) @ torch.kron(g, g).t()).float()
        self.packed = points.view(-1, PANEL, self.inputs, 16).permute(0, 3, 2, 1).contiguous()


def linear(x: Tensor, layer: DenseLinear, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + b + residual, for a small network's frozen layers.

    Args:
        x: ``[..., inputs]`` float32, contiguous, on the CPU.
        layer: the packed weights.
        residual: ``[..., outputs]``, like x; added.
        out: where to write; may be `residual`, not `x`. None: new memory.

    Returns:
        ``[..., outputs]`` float32. No gradients.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or strides.
        RuntimeError: there is no core, or it was not compiled for this (`dense_serves`).
    """
    shape = [*x.shape[:-1], layer.outputs]
    _check_image("linear", "x", x, [*x.shape[:-1], layer.inputs])
    out = _output("linear", x, shape, residual, out)
    addresses = _addresses(x, layer.packed, layer.bias, residual, out)
    call("dense_linear", x, *addresses, x.numel() // layer.inputs, layer.inputs, layer.outputs)
    return out


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`linear` in plain PyTorch, from the weights as they are before packing."""
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def conv3x3(x: Tensor, layer: DenseConv, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A convolution with a 3x3 kernel, stride 1 and a margin of one zero, plus bias and residual.

    Args:
        x: ``[n, height, width, inputs]`` float32, contiguous, on the CPU; height and width even.
        layer: the packed weights.
        residual: ``[n, height, width, outputs]``; added.
        out: where to write; may be `residual`, not `x`. None: new memory.

    Returns:
        ``[n, height, width, outputs]`` float32. No gradients.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear`.
    """
    _check_image("conv3x3", "x", x, ["n", "height", "width", layer.inputs])
    n, height, width, _ = x.shape
    _check_multiple("conv3x3", "height of x", height, 2)
    _check_multiple("conv3x3", "width of x", width, 2)
    out = _output("conv3x3", x, [n, height, width, layer.outputs], residual, out)
    addresses = _addresses(x, layer.packed, layer.bias, residual, out)
    call("dense_conv", x, *addresses, n, height, width, layer.inputs, layer.outputs)
    return out


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`conv3x3` in plain PyTorch, from the weights as they are before packing."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
    return y if residual is None else y + residual


class DenseGroupNorm(GroupNorm):
    """A `GroupNorm` whose parameters are float32 and on the CPU, its channels a multiple of 8."""

    def __post_init__(self) -> None:
        if self.activation == "gelu":
            raise ValueError("DenseGroupNorm: activation must be silu or none, got 'gelu'")
        _check_image("DenseGroupNorm", "weight", self.weight, ["channels"])
        _check_image("DenseGroupNorm", "bias", self.bias, list(self.weight.shape))
        _check_multiple("DenseGroupNorm", "channels", self.weight.shape[0], LANES)
        super().__post_init__()


def group_norm(x: Tensor, norm: DenseGroupNorm, modulation: Tensor | None = None) -> Tensor:
    """Group normalisation (Wu and He 2018) with, where wanted, a scale and shift per image and SiLU behind it.

    Args:
        x: ``[n, ..., channels]`` float32, contiguous, on the CPU; pixels in the middle.
        norm: the parameters.
        modulation: ``[n, 2 * channels]``, scales and then shifts: the normalised x times (1 + scale), plus shift.

    Returns:
        like x. No gradients.

    Raises:
        TypeError, ValueError, RuntimeError: as `linear`.
    """
    channels = norm.weight.shape[0]
    if x.dim() < 3:
        raise ValueError(f"group_norm: x must have shape [n, ..., channels], got {list(x.shape)}")
    _check_image("group_norm", "x", x, [*x.shape[:-1], channels])
    if modulation is not None:
        _check_image("group_norm", "modulation", modulation, [x.shape[0], 2 * channels])
    out = torch.empty_like(x)
    addresses = _addresses(x, norm.weight, norm.bias, modulation, out)
    sizes = (len(x), x[0].numel() // channels if len(x) else 0, channels, norm.groups)
    call("dense_group_norm", x, *addresses, *sizes, norm.eps, norm.activation == "silu")
    return out


def group_norm_reference(x: Tensor, norm: DenseGroupNorm, modulation: Tensor | None = None) -> Tensor:
    """`group_norm` in plain PyTorch, in the type of x."""
    return channels_first_reference(norm, x.movedim(-1, 1), modulation).movedim(1, -1)


def _check_multiple(op: str, name: str, value: int, of: int) -> None:
    if value < 1 or value % of:
        raise ValueError(f"{op}: {name} must be a multiple of {of}, got {value}")


def _check_image(op: str, name: str, tensor: Tensor, shape: list[int | str]) -> None:
    check_tensor(op, name, tensor, shape, _FLOAT32)
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} must be contiguous and on the CPU, got strides {tensor.stride()} on {tensor.device}"
        )


def _output(op: str, x: Tensor, shape: list[int], residual: Tensor | None, out: Tensor | None) -> Tensor:
    wanted: list[int | str] = [*shape]
    if residual is not None:
        _check_image(op, "residual", residual, wanted)
    if out is None:
        return x.new_empty(shape)
    _check_image(op, "out", out, wanted)
    if out.data_ptr() == x.data_ptr() and x.numel():
        raise ValueError(f"{op}: out must not be x, which is read until the end")
    return out


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
