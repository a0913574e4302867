"""Autoencoders whose encoder leaves the range of float16, rescaled so that it stays within and computes the same.

SDXL's overflows in float16, and in bfloat16 the gradient of its input is off by 3 % (float16: 0.4 %, with random
weights). But all that is large in such an encoder is read by group normalisations alone, or added to what is. With

    norm(s x; s^2 eps) = norm(x; eps)

the weights of whatever writes to the residual stream can be multiplied by s, and the network stays the same function:
to the bit, but for what leaves the range, since s is a power of two. The same holds between the two convolutions of a
residual block, with an s of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Largest number that test images may give. Other images have 256 times as much room, and weights and gradients keep
# their digits: with 4096 gradients between two convolutions get so small that they lose some.
_LARGEST = 256.0
_TEST_SIZE = 256


def to_half(vae: Any) -> None:
    """Turn the encoder of an autoencoder into float16, in place, after `fit_half_range`; raises as that does."""
    fit_half_range(vae)
    for part in (vae.encoder, vae.quant_conv):
        if part is not None:
            part.half()


@torch.no_grad()
def fit_half_range(vae: Any, size: int = _TEST_SIZE) -> float:
    """Rescale the encoder of an autoencoder in place, so that it can be turned into float16.

    How large numbers get is seen in test images: black, white, edges and noise.

    Args:
        vae: a diffusers `AutoencoderKL` of residual blocks (`latent_encoder.unserved` says so), in float32 at least.
        size: height and width of the test images, pixels; divisible by what the encoder shrinks by.

    Returns:
        The factor of the residual stream, 1 or less.

    Raises:
        ValueError: it gives NaN or infinity as it is.
    """
    encoder = vae.encoder
    resnets = [resnet for block in (*encoder.down_blocks, encoder.mid_block) for resnet in block.resnets]
    attentions = [attention for attention in encoder.mid_block.attentions if attention is not None]
    downsamplers = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers is not None]
    writers = [encoder.conv_in, *resnets, *attentions, *downsamplers]
    largest = _largest_outputs(
        [*writers, *(resnet.conv1 for resnet in resnets)], lambda: encoder(_images(encoder, size))
    )
    scale = _power(max(largest[module] for module in writers))
    _multiply(encoder.conv_in, scale)
    for downsampler in downsamplers:
        _multiply(downsampler, scale, weight=False)
    for resnet in resnets:
        inner = _power(largest[resnet.conv1])
        _multiply(resnet.conv1, inner)
        _multiply(resnet.conv2, scale)
        if resnet.conv_shortcut is not None:
            _multiply(resnet.conv_shortcut, scale, weight=False)
        resnet.norm1.eps *= scale**2
        resnet.norm2.eps *= inner**2
    for attention in attentions:
        _multiply(attention.to_out[0], scale)
        attention.group_norm.eps *= scale**2
    encoder.conv_norm_out.eps *= scale**2
    return scale


def _images(encoder: Any, size: int) -> Tensor:
    """[5, 3, size, size] in [-1, 1]."""
    weight = encoder.conv_in.weight
    images = torch.ones(5, 3, size, size)
    images[1] = -1
    images[2, :, :, size // 2 :] = -1
    images[3, :, ::2] = -1
    images[4] = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(weight.device, weight.dtype)


def _largest_outputs(modules: list[Any], run: Callable[[], Any]) -> dict[Any, float]:
    """The largest absolute output of each module while something is run."""
    found: dict[Any, Tensor] = {}

    def see(module: Any, inputs: Any, output: Tensor) -> None:
        found[module] = output.abs().max()

    handles = [module.register_forward_hook(see) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    numbers = torch.stack([found[module] for module in modules]).tolist()
    if not all(map(math.isfinite, numbers)):
        raise ValueError("vae: it gives NaN or infinity")
    return dict(zip(modules, numbers, strict=True))


def _power(largest: float) -> float:
    """The power of two, at most 1, that brings a number to `_LARGEST` or below."""
    return 1.0 if largest <= _LARGEST else 2.0 ** -math.ceil(math.log2(largest / _LARGEST))


def _multiply(module: Any, scale: float, weight: bool = True) -> None:
    if weight:
        module.weight.mul_(scale)
    if module.bias is not None:
        module.bias.mul_(scale)
