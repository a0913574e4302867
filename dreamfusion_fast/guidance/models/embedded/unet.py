"""The U-Net of the embedded prior: diffusers' `UNet2DConditionModel` of one architecture, in plain torch.

Parameters have diffusers' names, so its weights fit, and a test holds the two together. The prior does without the
library because importing it takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PriorUNet(nn.Module):
    """Image, time and caption to an image.

    Args:
        config: as `UNET_CONFIG`, whose other settings are fixed; `block_out_channels` has three entries.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = list(config["block_out_channels"])
        first, second, third = widths
        self._frequencies = first // 2
        embedded, groups = 4 * first, config["norm_num_groups"]
        part = {"embedded": embedded, "groups": groups}
        attention = {"heads": config["attention_head_dim"], "context": config["cross_attention_dim"], "groups": groups}
        self.conv_in = nn.Conv2d(config["in_channels"], first, 3, padding=1)
        self.time_embedding = _Embedding(first, embedded)
        self.class_embedding = _Embedding(config["projection_class_embeddings_input_dim"], embedded)
        self.down_blocks: Any = nn.ModuleList(
            [
                _Block([(first, first)], first, part, None, down=True),
                _Block([(first, second)], second, part, attention, down=True),
                _Block([(second, third)], third, part, attention),
            ]
        )
        self.mid_block = _Block([(third, third)] * 2, third, part, attention, attentions=1)
        self.up_blocks: Any = nn.ModuleList(
            [
                _Block([(third + third, third), (third + second, third)], third, part, attention, up=True),
                _Block([(third + second, second), (second + first, second)], second, part, attention, up=True),
                _Block([(second + first, first), (first + first, first)], first, part, None),
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, config["out_channels"], 3, padding=1)

    def time_proj(self, timestep: Tensor) -> Tensor:
        """Cosines, then sines of `[n]` timesteps, `[n, width]` float32 (Vaswani et al. 2017, arXiv 1706.03762)."""
        steps = torch.arange(self._frequencies, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[:, None] * torch.exp(steps * (-math.log(10_000.0) / self._frequencies))
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, image: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, group: int = 1) -> Tensor:
        """`[n, in_channels, h, w]`, `[n]`, `[n, tokens, context]`, `[n, condition]` to `[n, out_channels, h, w]`.

        Self-attention looks at all of a group's images, so many of the n one after another (Shi et al. 2023, arXiv
        2308.16512, section 3.1). That takes no parameters, and a group of 1 is diffusers' network.
        """
        time = self.time_embedding(self.time_proj(timestep).to(image.dtype))
        embedded = F.silu(time + self.class_embedding(condition))
        x = self.conv_in(image)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, embedded, tokens, group)
            skips.append(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, embedded, tokens, group)
        for block in self.up_blocks:
            x = block(x, embedded, tokens, group, skips)
            if block.upsamplers is not None:
                x = block.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Embedding(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class _Block(nn.Module):
    """Resnets, each followed by a transformer where there is one, and what changes the resolution after them."""

    def __init__(
        self,
        channels: list[tuple[int, int]],
        width: int,
        part: dict[str, int],
        attention: dict[str, int] | None,
        *,
        attentions: int | None = None,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Resnet(*pair, **part) for pair in channels])
        if attention is not None:
            count = len(channels) if attentions is None else attentions
            self.attentions = nn.ModuleList([_Transformer(width, **attention) for _ in range(count)])
        self.downsamplers: Any = nn.ModuleList([_Resample(width, 2)]) if down else None
        self.upsamplers: Any = nn.ModuleList([_Resample(width, 1)]) if up else None

    def forward(
        self, x: Tensor, embedded: Tensor, tokens: Tensor, group: int, skips: list[Tensor] | None = None
    ) -> Tensor:
        attentions = getattr(self, "attentions", ())
        for index, resnet in enumerate(self.resnets):
            x = resnet(x if skips is None else torch.cat([x, skips.pop()], dim=1), embedded)
            if index < len(attentions):
                x = attentions[index](x, tokens, group)
        return x


class _Resample(nn.Module):
    """Half the resolution, or with a stride of 1 twice."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride == (1, 1):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class _Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedded: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedded, 2 * outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = self.time_emb_proj(embedded)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(h * (1 + scale) + shift))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, context: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks: Any = nn.ModuleList([_TransformerBlock(width, heads, context)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, image: Tensor, tokens: Tensor, group: int) -> Tensor:
        n, channels, height, width = image.shape
        x = self.proj_in(self.norm(image).permute(0, 2, 3, 1).reshape(n, height * width, channels))
        x = self.proj_out(self.transformer_blocks[0](x, tokens, group))
        return x.view(n, height, width, channels).permute(0, 3, 1, 2) + image


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = _Attention(width, heads, width), _Attention(width, heads, context)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, tokens: Tensor, group: int) -> Tensor:
        n, pixels, width = x.shape
        own = self.norm1(x).reshape(n // group, group * pixels, width)
        x = x + self.attn1(own, own).view(n, pixels, width)
        x = x + self.attn2(self.norm2(x), tokens)
        return x + self.ff(self.norm3(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out: Any = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """Gated (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        gate, out = nn.Module(), nn.Linear(4 * width, width)
        gate.proj = nn.Linear(width, 8 * width)
        self.net: Any = nn.ModuleList([gate, nn.Identity(), out])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0].proj(x).chunk(2, dim=-1)
        return self.net[2](value * F.gelu(gate))
