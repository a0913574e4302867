"""A Transformer that makes the planes of a scene from a caption: one token per patch of a plane, and what it reads.

Learned tokens, a square of them per plane, look at each other and at the caption's tokens (pre-norm blocks of
self-attention, cross-attention and MLP); then each becomes a patch of vertices, and convolutions, of each plane its
own, make the patches of a plane meet. Without them the patches' edges show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfusion_fast.ops.triplane import PLANES
from dreamfusion_fast.settings import Range, Settings

_OCTAVES = 4  # of the sines that tokens begin with


@dataclass(frozen=True)
class PlaneTransformerConfig(Settings):
    """Settings of :class:`PlaneTransformer`: 64 x 64 vertices of 24 features by default, and 25 million weights."""

    text_width: Annotated[int, Range(1, 8192)] = 384
    """Width of the caption's tokens, as of MiniLM."""
    width: Annotated[int, Range(1, 8192)] = 384
    """Width of the planes' tokens; a multiple of `heads`."""
    heads: Annotated[int, Range(1, 256)] = 6
    """Heads of attention."""
    blocks: Annotated[int, Range(1, 256)] = 10
    """Transformer blocks."""
    tokens: Annotated[int, Range(1, 256)] = 16
    """Tokens along a side of each plane."""
    patch: Annotated[int, Range(1, 64)] = 4
    """Vertices along a side of the patch that a token becomes."""
    patch_features: Annotated[int, Range(1, 1024)] = 32
    """Features of these vertices, before the convolutions."""
    features: Annotated[int, Range(1, 1024)] = 24
    """Features of the planes' vertices."""
    code_width: Annotated[int, Range(1, 8192)] = 64
    """Numbers of the code that tells objects with the same caption apart."""

    def check_together(self) -> None:
        if self.width % self.heads:
            self.refuse("width", want=f"a multiple of heads = {self.heads}")

    @property
    def resolution(self) -> int:
        """Vertices along a side of the planes."""
        return self.tokens * self.patch


class PlaneTransformer(nn.Module):
    """Planes `[B, 3, resolution, resolution, features]` of captions, for :meth:`TriplaneField.with_planes`.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.networks.plane_transformer import PlaneTransformer, PlaneTransformerConfig
        >>> config = PlaneTransformerConfig(width=32, heads=2, blocks=1, tokens=4, features=8)
        >>> network = PlaneTransformer(config, torch.Generator().manual_seed(0))
        >>> network(torch.rand(2, 20, 384), torch.rand(2, 384)).shape
        torch.Size([2, 3, 16, 16, 8])
    """

    def __init__(self, config: PlaneTransformerConfig | None = None, generator: torch.Generator | None = None) -> None:
        """Initialise from `generator` (torch's global one if None): weights N(0, g / fan in), where g is 1 / 8 up to
        the last norm and keeps the variance after it; biases 0; tokens of variance 1, which vary smoothly over a plane.

        What a token is must not vanish beside what the caption adds to all of them alike: with tokens of N(0, 0.02^2),
        objects had no shape after a thousand steps.

        Args:
            config: settings.
            generator: a CPU generator that makes the initial parameters reproducible.
        """
        super().__init__()
        self.config = c = config or PlaneTransformerConfig()
        self.tokens = nn.Parameter(torch.empty(PLANES * c.tokens**2, c.width))
        self.no_code = nn.Parameter(torch.empty(c.width))
        self.read_states = nn.Linear(c.text_width, c.width)
        self.read_pooled = nn.Linear(c.text_width, c.width)
        self.read_code = nn.Linear(c.code_width, c.width)
        self.blocks = nn.ModuleList(_Block(c.width, c.heads) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width)
        self.unfold = nn.Linear(c.width, c.patch**2 * c.patch_features)
        wide, narrow = PLANES * c.patch_features, PLANES * c.features
        self.convolutions = nn.ModuleList(
            nn.Conv2d(wide, out, 3, padding=1, groups=PLANES) for out in (wide, wide, narrow)
        )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif name == "tokens":
                    parameter.copy_(_first_tokens(c.tokens, c.width, generator))
                elif "norm" not in name:
                    fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                    parameter.normal_(0.0, (_gain(name) / fan_in) ** 0.5, generator=generator)

    def forward(self, states: Tensor, pooled: Tensor, mask: Tensor | None = None, code: Tensor | None = None) -> Tensor:
        """The planes.

        Args:
            states: `[B, L, text_width]`, the caption's token states.
            pooled: `[B, text_width]`, the caption as one vector.
            mask: bool `[B, L]`, which of the tokens are there; None: all.
            code: `[B, code_width]`, of the object meant; a row that is NaN in whole, or None for all: no code.

        Returns:
            `[B, 3, resolution, resolution, features]`, contiguous, float32 whatever autocast does within.

        Raises:
            ValueError: an argument of another shape.
        """
        self._check(states, pooled, mask, code)
        c, batch = self.config, states.shape[0]
        extra = self.no_code.expand(batch, 1, c.width)
        if code is not None:
            given = ~code.isnan().all(dim=1)
            read = self.read_code(torch.where(given[:, None], code, torch.zeros_like(code)))
            extra = torch.where(given[:, None, None], read[:, None], extra.to(read.dtype))
        context = torch.cat([self.read_states(states), self.read_pooled(pooled)[:, None], extra], dim=1)
        there = None
        if mask is not None:
            there = torch.cat([mask, mask.new_ones(batch, 2)], dim=1)[:, None, None, :]
        x = self.tokens.expand(batch, -1, -1)
        for block in self.blocks:
            x = block(x, context, there)
        x = self._laid_out(self.unfold(self.norm(x)))
        for number, convolution in enumerate(self.convolutions):
            x = convolution(F.silu(x) if number else x)
        side = c.resolution
        return x.view(batch, PLANES, c.features, side, side).permute(0, 1, 3, 4, 2).float().contiguous()

    def _laid_out(self, patches: Tensor) -> Tensor:
        """Each token's patch where it belongs: `[B, 3 * patch_features, resolution, resolution]`."""
        c, batch = self.config, patches.shape[0]
        grid = patches.view(batch, PLANES, c.tokens, c.tokens, c.patch, c.patch, c.patch_features)
        # batch, plane, features, then rows (of tokens, in a patch) and columns likewise
        return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, PLANES * c.patch_features, c.resolution, c.resolution)

    def _check(self, states: Tensor, pooled: Tensor, mask: Tensor | None, code: Tensor | None) -> None:
        c = self.config
        if states.dim() != 3 or states.shape[2] != c.text_width:
            raise ValueError(f"states: got shape {list(states.shape)}, want [B, L, {c.text_width}]")
        batch, length = states.shape[:2]
        wanted = {
            "pooled": (pooled, [batch, c.text_width]),
            "mask": (mask, [batch, length]),
            "code": (code, [batch, c.code_width]),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}, want {shape}")


def _gain(name: str) -> float:
    """Initial variance of a layer's output over that of its input."""
    if not name.startswith(("unfold", "convolutions")):
        return 0.125  # blocks add little at first
    return 2.8 if name.startswith(("convolutions.1", "convolutions.2")) else 1.0  # 1 / E[silu(x)^2] of x ~ N(0, 1)


def _first_tokens(side: int, width: int, generator: torch.Generator | None) -> Tensor:
    """`[3 * side * side, width]` of variance 1: sines of a token's place in its plane, mixed at random."""
    middles = (torch.arange(side) + 0.5) * (2 / side) - 1
    angles = middles[:, None] * (0.5 * math.pi * 2.0 ** torch.arange(_OCTAVES))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    across = waves.shape[1]
    place = torch.cat([waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)], dim=2)
    mix = torch.randn(PLANES, 2 * across, width, generator=generator) * across**-0.5
    return (place @ mix[:, None]).reshape(-1, width)


class _Attention(nn.Module):
    """Attention of x to a context, of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, there: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=there)
        return self.out(seen.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Self-attention, cross-attention and an MLP four times as wide, each on a normalised input and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.itself, self.caption = _Attention(width, heads), _Attention(width, heads)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor, there: Tensor | None) -> Tensor:
        normal = self.norms[0](x)
        x = x + self.itself(normal, normal, None)
        x = x + self.caption(self.norms[1](x), context, there)
        return x + self.narrow(F.gelu(self.wide(self.norms[2](x))))
