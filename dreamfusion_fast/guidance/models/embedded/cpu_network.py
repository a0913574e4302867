"""The embedded prior's network on a CPU in float32: the same weights and the same result, faster.

`unet.PriorUNet` holds the weights; here is its forward pass once more, in layers of `dreamfusion_fast.networks.dense`.
Images are channels last all the way, so that those of a transformer are matrices without a copy. What depends on the
timestep and the caption alone is computed in one product for all blocks.

All conditions of a view look at the same noisy image, so its first convolution is done once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.networks import dense
from dreamfusion_fast.networks.dense import PANEL, DenseConv, DenseGroupNorm, DenseLinear, dense_serves

from .model import PriorNetwork


def cpu_network_serves(network: PriorNetwork) -> bool:
    """Whether `CpuNetwork` can evaluate this one: on a CPU in float32, with widths that are multiples of 16."""
    weight = network.unet.conv_in.weight
    return (
        dense_serves()
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and all(width % PANEL == 0 for width in network.config["block_out_channels"])
    )


class CpuNetwork:
    """A `PriorNetwork` of the architecture that the package ships, evaluated on a CPU.

    Args:
        network: float32, on the CPU. Its weights are packed here: later changes of them are not seen.
    """

    def __init__(self, network: PriorNetwork) -> None:
        unet, self._check_group = network.unet, network.check_group
        self._time, self._time_embedding = unet.time_proj, unet.time_embedding
        self._class_embedding = unet.class_embedding
        self._conv_in = _padded_conv(unet.conv_in)
        self._modulations = _Joined()
        self._captions = _Joined()
        self._down = [self._stage(block, block.downsamplers) for block in unet.down_blocks]
        self._middle = self._stage(unet.mid_block, None)
        self._up = [self._stage(block, block.upsamplers) for block in unet.up_blocks]
        self._norm_out = DenseGroupNorm.of(unet.conv_norm_out, "silu")
        self._conv_out = _padded_conv(unet.conv_out)
        self._channels_out = unet.conv_out.out_channels
        self._modulations.close()
        self._captions.close()

    def _stage(self, block: Any, resamplers: Any) -> _Stage:
        resnets = [_Resnet(resnet, self._modulations) for resnet in block.resnets]
        attentions = [_Transformer(t, self._captions) for t in getattr(block, "attentions", ())]
        return _Stage(resnets, attentions, None if resamplers is None else resamplers[0].conv)

    @torch.no_grad()
    def __call__(self, noisy: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, group: int = 1) -> Tensor:
        """v under k conditions, as `PriorNetwork` gives it for `noisy` and `timestep` repeated.

        Args:
            noisy: `[n, 3, 64, 64]`.
            timestep: `[n]`.
            tokens: `[k n, 20, 384]`.
            condition: `[k n, CONDITION_WIDTH]`.
            group: see `PriorNetwork`; n is a multiple of it, so that no group is of two conditions.

        Returns:
            `[k n, 3, 64, 64]`.

        Raises:
            ValueError: a group that the network was not trained for, or a part of one.
        """
        self._check_group(group, len(noisy))
        times = len(tokens) // len(noisy)
        embedded = self._time_embedding(self._time(timestep)).repeat(times, 1) + self._class_embedding(condition)
        modulations = self._modulations(F.silu(embedded))
        captions = self._captions(tokens.contiguous())

        packed = F.pixel_unshuffle(noisy, 2).permute(0, 2, 3, 1)
        x = dense.conv3x3(F.pad(packed, (0, self._conv_in.inputs - packed.shape[-1])), self._conv_in)
        x = x.repeat(times, 1, 1, 1)
        skips = [x]
        for stage in self._down:
            for resnet, attention in stage.layers():
                x = resnet(x, modulations)
                if attention is not None:
                    x = attention(x, captions, group)
                skips.append(x)
            if stage.resample is not None:
                x = stage.downsample(x)
                skips.append(x)
        first, last = self._middle.resnets
        x = last(self._middle.attentions[0](first(x, modulations), captions, group), modulations)
        for stage in self._up:
            for resnet, attention in stage.layers():
                x = resnet(torch.cat([x, skips.pop()], dim=-1), modulations)
                if attention is not None:
                    x = attention(x, captions, group)
            if stage.resample is not None:
                x = stage.upsample(x)
        x = dense.conv3x3(dense.group_norm(x, self._norm_out), self._conv_out)
        return F.pixel_shuffle(x[..., : self._channels_out].permute(0, 3, 1, 2), 2)


class _Joined:
    """Linear layers of one input, in one product."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._biases: list[Tensor | None] = []
        self._layer: DenseLinear | None = None

    def add(self, *linears: Any) -> slice:
        """The columns that these layers' outputs will have."""
        start = sum(weight.shape[0] for weight in self._weights)
        self._weights += [linear.weight for linear in linears]
        self._biases += [linear.bias for linear in linears]
        return slice(start, start + sum(linear.out_features for linear in linears))

    def close(self) -> None:
        biases = [bias for bias in self._biases if bias is not None]
        self._layer = DenseLinear(torch.cat(self._weights), torch.cat(biases) if biases else None)
        self._weights, self._biases = [], []

    def __call__(self, x: Tensor) -> Tensor:
        assert self._layer is not None
        return dense.linear(x, self._layer)


class _Stage:
    """A block of the U-Net: resnets, each with a transformer behind it or not, and a change of resolution."""

    def __init__(self, resnets: list[_Resnet], attentions: list[_Transformer], resample: Any) -> None:
        self.resnets, self.attentions, self.resample = resnets, attentions, resample
        self._upsample = DenseConv(resample.weight, resample.bias) if resample and resample.stride == (1, 1) else None

    def layers(self) -> list[tuple[_Resnet, _Transformer | None]]:
        if not self.attentions:
            return [(resnet, None) for resnet in self.resnets]
        return list(zip(self.resnets, self.attentions, strict=True))

    def downsample(self, x: Tensor) -> Tensor:
        return self.resample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()

    def upsample(self, x: Tensor) -> Tensor:
        assert self._upsample is not None
        n, height, width, channels = x.shape
        wide = x[:, :, None, :, None].expand(n, height, 2, width, 2, channels)
        return dense.conv3x3(wide.reshape(n, 2 * height, 2 * width, channels), self._upsample)


class _Resnet:
    """Two convolutions; time and caption scale and shift what is normalised before the second."""

    def __init__(self, resnet: Any, modulations: _Joined) -> None:
        self._columns = modulations.add(resnet.time_emb_proj)
        self._norm1, self._norm2 = (
            DenseGroupNorm.of(resnet.norm1, "silu"),
            DenseGroupNorm.of(resnet.norm2, "silu"),
        )
        self._conv1 = DenseConv(resnet.conv1.weight, resnet.conv1.bias)
        self._conv2 = DenseConv(resnet.conv2.weight, resnet.conv2.bias)
        shortcut = resnet.conv_shortcut
        self._shortcut = None if shortcut is None else DenseLinear(shortcut.weight.flatten(1), shortcut.bias)

    def __call__(self, x: Tensor, modulations: Tensor) -> Tensor:
        h = dense.conv3x3(dense.group_norm(x, self._norm1), self._conv1)
        h = dense.group_norm(h, self._norm2, modulations[:, self._columns].contiguous())
        if self._shortcut is None:
            return dense.conv3x3(h, self._conv2, residual=x)
        x = dense.linear(x, self._shortcut)
        return dense.conv3x3(h, self._conv2, residual=x, out=x)


class _Transformer:
    """Self-attention within a group, attention to the caption's tokens, and a gated feed-forward layer, on pixels."""

    def __init__(self, transformer: Any, captions: _Joined) -> None:
        (block,) = transformer.transformer_blocks
        self._norm = DenseGroupNorm.of(transformer.norm, "none")
        self._proj_in, self._proj_out = _linear(transformer.proj_in), _linear(transformer.proj_out)
        self._norms = [block.norm1, block.norm2, block.norm3]
        attn1, attn2 = block.attn1, block.attn2
        self._heads = attn1.heads
        self._qkv = DenseLinear(torch.cat([attn1.to_q.weight, attn1.to_k.weight, attn1.to_v.weight]))
        self._out1, self._out2 = _linear(attn1.to_out[0]), _linear(attn2.to_out[0])
        self._query = _linear(attn2.to_q)
        self._columns = captions.add(attn2.to_k, attn2.to_v)
        self._gate, self._feed = _linear(block.ff.net[0].proj), _linear(block.ff.net[2])

    def __call__(self, image: Tensor, captions: Tensor, group: int) -> Tensor:
        n, height, width, channels = image.shape
        x = dense.linear(dense.group_norm(image, self._norm).view(n, height * width, channels), self._proj_in)
        rows = dense.linear(self._norms[0](x), self._qkv).view(n // group, group * height * width, 3 * channels)
        q, k, v = rows.chunk(3, dim=-1)
        dense.linear(self._attend(q, k, v).view(x.shape), self._out1, residual=x, out=x)
        k, v = captions[..., self._columns].chunk(2, dim=-1)
        dense.linear(self._attend(dense.linear(self._norms[1](x), self._query), k, v), self._out2, residual=x, out=x)
        value, gate = dense.linear(self._norms[2](x), self._gate).chunk(2, dim=-1)
        dense.linear(F.gelu(gate).mul_(value), self._feed, residual=x, out=x)
        return dense.linear(x.view(image.shape), self._proj_out, residual=image)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, _, channels = q.shape
        heads = [part.unflatten(-1, (self._heads, channels // self._heads)).transpose(1, 2) for part in (q, k, v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(n, -1, channels)


def _linear(module: Any) -> DenseLinear:
    return DenseLinear(module.weight, module.bias)


def _padded_conv(module: Any) -> DenseConv:
    """A convolution with zeros for the channels, of its input or output, that are missing to a multiple of 16."""
    out, into = (-channels % PANEL for channels in (module.out_channels, module.in_channels))
    return DenseConv(F.pad(module.weight, (0, 0, 0, 0, 0, into, 0, out)), F.pad(module.bias, (0, out)))
