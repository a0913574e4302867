"""The encoder of a latent diffusion model's autoencoder with the gradient of its input, in little memory and time.

In a step of latent score distillation the autoencoder takes longer than the U-Net: forward, and back from the latents
to the image. Its weights are frozen, so a convolution needs nothing of its input to go back, and a normalisation only
what it read. What autograd takes, 1.6 GB for one image of 512^2 in float16, is thus less than half:

- kept are the inputs of the normalisations, nothing else; with `recompute` not even those between the two convolutions
  of a residual block, which one more convolution brings back;
- normalisation and SiLU are passes of `networks.group_norm`, which also add what would be passes of their own: biases,
  residuals, and the two gradients that meet at a residual;
- images are channels last in memory, as tensor cores want them;
- attention keeps its input alone and goes through the scores in parts, by passes of `networks.softmax`.

The latent is the mean of the posterior. The result is that of diffusers' `AutoencoderKL` up to rounding, and the
gradient is exact: nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.gpu.capture import CapturedPair
from dreamfusion_fast.networks.group_norm import GroupNorm, Measured, measure, summed, sums_dtype
from dreamfusion_fast.networks.softmax import scaled_softmax, scaled_softmax_backward

# Scores of attention, float32, in memory at a time: 34 MB.
_SCORES = 1 << 23


@dataclass(frozen=True)
class Pending:
    """An image `[n, c, h, w]`, channels last, that is yet to be summed up: raw + offset + residual.

    Attributes:
        raw: as a convolution left it.
        offset: `[c]`, or None: zero.
        residual: like raw, or None: zero.
    """

    raw: Tensor
    offset: Tensor | None = None
    residual: Tensor | None = None

    def total(self, padding: int = 0) -> Tensor:
        """The sum, with so many rows of zeros below and columns of zeros to the right."""
        if padding == 0 and self.offset is None and self.residual is None:
            return self.raw
        return summed(self.raw, self.offset, self.residual, padding)

    def measured(self, norm: GroupNorm) -> Measured:
        """The same without a residual, and its statistics: in one pass over memory."""
        return measure(norm, self.raw, self.offset, self.residual)


class Layer(Protocol):
    """A part of the chain. `forward` gives what `backward` wants to have kept."""

    def forward(self, x: Pending, recompute: bool) -> tuple[Pending, Any]: ...

    def backward(self, grad: Tensor, kept: Any) -> Tensor: ...


class Convolution:
    """A convolution whose bias is left to whatever reads its output.

    As a layer, it takes images with `zeros` rows of zeros below and columns of zeros to the right.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, zeros: int = 0) -> None:
        self.weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.detach()
        self._stride, self._padding, self._zeros = (stride, stride), (padding, padding), zeros

    @classmethod
    def of(cls, module: torch.nn.Conv2d, zeros: int = 0) -> Convolution:
        """That of a module."""
        return cls(module.weight, module.bias, module.stride[0], int(module.padding[0]), zeros)

    def __call__(self, x: Tensor) -> Pending:
        return Pending(F.conv2d(x, self.weight, None, self._stride, self._padding), self.bias)

    def input_gradient(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The gradient of an input of that size; the input itself plays no part in it.

        It is the transposed convolution. `aten::convolution_backward` wants an input to be given, and unless that is
        channels last as well, and thus memory, it turns everything around and back: half of the encoder's backward.
        """
        kernel = self.weight.shape[2:]
        rest = [
            length - ((reached - 1) * stride - 2 * padding + width)
            for length, reached, stride, padding, width in zip(
                size[2:], grad.shape[2:], self._stride, self._padding, kernel, strict=True
            )
        ]
        found = F.conv_transpose2d(grad, self.weight, None, self._stride, self._padding, rest)
        return found.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Pending, recompute: bool) -> tuple[Pending, torch.Size]:
        """Keeps the size."""
        padded = x.total(self._zeros)
        return self(padded), padded.shape

    def backward(self, grad: Tensor, kept: torch.Size) -> Tensor:
        """The gradient of x."""
        height, width = kept[2] - self._zeros, kept[3] - self._zeros
        found = self.input_gradient(grad, kept)[:, :, :height, :width]
        return found.contiguous(memory_format=torch.channels_last)


class ResidualBlock:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through a convolution of 1 x 1 where the channels change."""

    def __init__(self, module: Any) -> None:
        self._norm1, self._norm2 = GroupNorm.of(module.norm1, "silu"), GroupNorm.of(module.norm2, "silu")
        self._conv1, self._conv2 = Convolution.of(module.conv1), Convolution.of(module.conv2)
        self._shortcut = None if module.conv_shortcut is None else Convolution.of(module.conv_shortcut)

    def forward(self, x: Pending, recompute: bool) -> tuple[Pending, list[Any]]:
        """Keeps x, and what is between the convolutions, or where that is recomputed only its statistics."""
        first = x.measured(self._norm1)
        second = self._conv1(first.normalised()).measured(self._norm2)
        y = self._conv2(second.normalised())
        around = Pending(first.x, first.offset)
        if self._shortcut is not None:
            around = self._shortcut(first.x)
            if first.offset is not None:
                moved = F.linear(first.offset, self._shortcut.weight.flatten(1))
                around = Pending(around.raw, _plus(around.offset, moved))
        kept = [first, second.statistics if recompute else second]
        return Pending(y.raw, _plus(y.offset, around.offset), around.raw), kept

    def backward(self, grad: Tensor, kept: list[Any]) -> Tensor:
        """The gradient of x. Empties `kept`."""
        second, first = kept.pop(), kept.pop()
        if isinstance(second, Tensor):
            between = self._conv1(first.normalised())
            second = Measured(self._norm2, between.raw, between.offset, second)
            del between
        g = second.input_gradient(self._conv2.input_gradient(grad, second.x.shape))
        second = None  # frees what it holds
        g = self._conv1.input_gradient(g, first.x.shape)
        skip = grad if self._shortcut is None else self._shortcut.input_gradient(grad, first.x.shape)
        return first.input_gradient(g, skip)


class Attention:
    """x + out(softmax(q k^T / sqrt(d)) v), one head, q, k and v from the normalised x. Pixels are tokens."""

    def __init__(self, module: Any) -> None:
        self._norm = GroupNorm.of(module.group_norm, "none")
        projections = (module.to_q, module.to_k, module.to_v)
        self._weight = torch.cat([p.weight.detach().flatten(1) for p in projections])
        self._bias = torch.cat([p.bias.detach() for p in projections])
        self._out_weight, self._out_bias = module.to_out[0].weight.detach().flatten(1), module.to_out[0].bias.detach()
        self._scale = module.to_q.weight.shape[0] ** -0.5

    def forward(self, x: Pending, recompute: bool) -> tuple[Pending, Measured]:
        """Keeps x."""
        found = x.measured(self._norm)
        q, k, v = self._projected(found)
        mixed = torch.empty_like(v)
        for rows in _parts(q):
            mixed[:, rows] = self._shares(q[:, rows], k) @ v
        out = _image(F.linear(mixed, self._out_weight), found.x)
        return Pending(out, _plus(self._out_bias, found.offset), found.x), found

    def backward(self, grad: Tensor, kept: Measured) -> Tensor:
        """The gradient of x. With P the softmax and g the gradient of P v: dS = P * (g v^T - sum(P * g v^T))."""
        q, k, v = self._projected(kept)
        grad_mixed = _tokens(grad) @ self._out_weight
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(part, dtype=sums_dtype(part)) for part in (k, v))
        for rows in _parts(q):
            shares = self._shares(q[:, rows], k)
            g = grad_mixed[:, rows]
            grad_v += shares.mT @ g
            to_shares = _wide_product(g, v.mT)
            to_scores = scaled_softmax_backward(shares.flatten(0, 1), to_shares.flatten(0, 1), self._scale)
            to_scores = to_scores.view_as(shares)
            grad_q[:, rows] = to_scores @ k
            grad_k += to_scores.mT @ q[:, rows]
        g = torch.cat([grad_q, grad_k.to(q.dtype), grad_v.to(q.dtype)], dim=2) @ self._weight
        return kept.input_gradient(_image(g, kept.x), grad)

    def _projected(self, x: Measured) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(_tokens(x.normalised()), self._weight, self._bias).chunk(3, 2)
        return q, k, v

    def _shares(self, q: Tensor, k: Tensor) -> Tensor:
        scores = _wide_product(q, k.mT)
        return scaled_softmax(scores.flatten(0, 1), self._scale, q.dtype).view_as(scores)


class Last:
    """Normalisation, SiLU and the last convolution."""

    def __init__(self, norm: torch.nn.GroupNorm, convolution: Convolution) -> None:
        self._norm, self._convolution = GroupNorm.of(norm, "silu"), convolution

    def forward(self, x: Pending, recompute: bool) -> tuple[Pending, Measured]:
        """Keeps x."""
        found = x.measured(self._norm)
        return self._convolution(found.normalised()), found

    def backward(self, grad: Tensor, kept: Measured) -> Tensor:
        """The gradient of x."""
        return kept.input_gradient(self._convolution.input_gradient(grad, kept.x.shape))


class LatentEncoder:
    """Images in [-1, 1] to the mean of the posterior, differentiable to the images.

    Args:
        vae: a diffusers `AutoencoderKL`, frozen, in the type and on the device in which it is to run.
        recompute: keep less, for one more convolution in each residual block on the way back.

    Raises:
        ValueError: `unserved(vae)` says why.
    """

    def __init__(self, vae: Any, recompute: bool = False) -> None:
        reason = unserved(vae)
        if reason:
            raise ValueError(f"vae: {reason}")
        encoder = vae.encoder
        self.recompute = recompute
        self.dtype = encoder.conv_in.weight.dtype
        self._layers: list[Layer] = [Convolution.of(encoder.conv_in)]
        for block in encoder.down_blocks:
            self._layers += [ResidualBlock(resnet) for resnet in block.resnets]
            if block.downsamplers is not None:
                self._layers.append(Convolution.of(block.downsamplers[0].conv, zeros=1))
        middle = encoder.mid_block
        self._layers.append(ResidualBlock(middle.resnets[0]))
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                self._layers.append(Attention(attention))
            self._layers.append(ResidualBlock(resnet))
        self._layers.append(Last(encoder.conv_norm_out, _mean_convolution(encoder.conv_out, vae.quant_conv)))
        self._differentiable = CapturedPair(self.forward, self.backward)

    def set_recompute(self, on: bool) -> None:
        """Keep less from the next call on, or more."""
        if on != self.recompute:
            self.recompute = on
            self.free_graphs()

    def free_graphs(self) -> None:
        """Free the captured graphs and their memory."""
        self._differentiable.clear()

    def __call__(self, images: Tensor) -> Tensor:
        """`[n, 3, H, W]` in any float type to `[n, channels, H / f, W / f]` in the same; CUDA graphs on a GPU."""
        if images.requires_grad and torch.is_grad_enabled():
            return self._differentiable(images)
        mean, _ = self.forward(images, keep=False)
        return mean

    @torch.no_grad()
    def forward(self, images: Tensor, keep: bool = True) -> tuple[Tensor, list[Any]]:
        """The mean in the type of the images, through which its gradient comes back, and what `backward` wants."""
        x = Pending(images.to(self.dtype).contiguous(memory_format=torch.channels_last))
        everything: list[Any] = [images.dtype]
        for layer in self._layers:
            x, kept = layer.forward(x, self.recompute)
            if keep:
                everything.append(kept)
        return x.total().to(images.dtype), everything if keep else []

    @torch.no_grad()
    def backward(self, grad: Tensor, kept: list[Any]) -> Tensor:
        """The gradient of the images, in their type, from that of the mean. Empties `kept`.

        In float16 it goes back as a multiple whose largest number is 1 to 2, so that small ones keep their digits.
        """
        factor = None
        if self.dtype == torch.float16:
            factor = grad.float().abs().amax().clamp(min=torch.finfo(torch.float32).tiny).log2().floor().exp2()
            grad = grad.float() / factor
        grad = grad.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for layer in reversed(self._layers):
            grad = layer.backward(grad, kept.pop())
        return (grad if factor is None else grad.float() * factor).to(kept.pop())


def unserved(vae: Any) -> str:
    """Why a `LatentEncoder` cannot stand in for a vae; empty when it can."""
    import diffusers.models.attention_processor as processors
    from diffusers.models.autoencoders.vae import Encoder
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D

    encoder = getattr(vae, "encoder", None)
    if not isinstance(encoder, Encoder):
        return f"the encoder is no diffusers Encoder but {type(encoder).__name__}"
    resnets, attentions = list(encoder.mid_block.resnets), [a for a in encoder.mid_block.attentions if a is not None]
    for block in encoder.down_blocks:
        if not isinstance(block, DownEncoderBlock2D):
            return f"a block is {type(block).__name__}, not DownEncoderBlock2D"
        resnets += block.resnets
        for downsampler in block.downsamplers or ():
            plain = isinstance(downsampler, Downsample2D) and downsampler.use_conv and downsampler.norm is None
            if not plain or downsampler.padding != 0:
                return "a downsampling is no convolution of 3 x 3 with zeros to the right and below"
    for resnet in resnets:
        plain = isinstance(resnet, ResnetBlock2D) and not (resnet.up or resnet.down or resnet.time_emb_proj)
        if not plain or resnet.output_scale_factor != 1 or not isinstance(resnet.nonlinearity, torch.nn.SiLU):
            return "a residual block is not norm, SiLU, convolution, twice"
    for attention in attentions:
        plain = isinstance(attention, processors.Attention) and attention.heads == 1 and attention.residual_connection
        if not plain or attention.rescale_output_factor != 1 or attention.group_norm is None:
            return "the attention is not of one head with a group norm and a residual"
    if vae.quant_conv is not None and vae.quant_conv.kernel_size != (1, 1):
        return "the last convolution is not of 1 x 1"
    return ""


def _mean_convolution(last: torch.nn.Conv2d, quantiser: torch.nn.Conv2d | None) -> Convolution:
    """The last convolution with the one of 1 x 1 behind it, without the half of the channels that is the variance."""
    assert last.bias is not None
    weight, bias = last.weight.detach(), last.bias.detach()
    if quantiser is not None:
        wide = sums_dtype(weight)
        mix = quantiser.weight.detach().flatten(1).to(wide)
        offset = 0.0 if quantiser.bias is None else quantiser.bias.detach().to(wide)
        bias = (mix @ bias.to(wide) + offset).to(bias.dtype)
        weight = torch.einsum("oc,cikl->oikl", mix, weight.to(wide)).to(weight.dtype)
    half = weight.shape[0] // 2
    return Convolution(weight[:half], bias[:half], 1, int(last.padding[0]))


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _tokens(image: Tensor) -> Tensor:
    """`[n, c, h, w]`, channels last, as `[n, h w, c]`."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """The opposite, `like` an image of that size."""
    n, _, height, width = like.shape
    return tokens.reshape(n, height, width, -1).permute(0, 3, 1, 2)


def _parts(q: Tensor) -> list[slice]:
    """Ranges of queries `[n, tokens, c]` that are worked on at a time."""
    n, tokens, _ = q.shape
    at_once = max(_SCORES // (n * tokens), 1)
    return [slice(first, first + at_once) for first in range(0, tokens, at_once)]


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64), not rounded to the operands' type."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.to(sums_dtype(a)) @ b.to(sums_dtype(b))
