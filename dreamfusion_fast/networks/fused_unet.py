"""Makes a frozen diffusers U-Net quicker on a GPU, with the same results up to rounding.

At the batch of one guided view a U-Net is a great many small launches, of which some only move numbers or divide them
by one. `fuse` replaces, in place, what has a quicker equal: group norms, with the activation behind and the sum of bias
and time embedding before them, and sums of biases and residuals (`networks.group_norm`); the three projections of
self-attention by one; gates (`networks.geglu`); convolutions of 1 x 1 by products, which add their bias on the way.
Images stay channels last in memory throughout, as tensor cores want them. Whatever it does not know stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfusion_fast.networks.geglu import geglu
from dreamfusion_fast.networks.group_norm import Activation, GroupNorm, measure, summed


def fuse(unet: nn.Module) -> None:
    """Replace what can be replaced in a `UNet2DConditionModel` in evaluation mode.

    The module is changed, and afterwards differentiable no more. Its parameters stay where they are, but for those of
    projections that become one.
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # in torch's docs only
    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ResnetBlock2D) and _plain(child):
                setattr(parent, name, FusedResidualBlock(child))
            if type(child) is GEGLU:
                setattr(parent, name, FusedGate(child))
        if isinstance(parent, Transformer2DModel) and isinstance(parent.norm, nn.GroupNorm):
            parent.norm = FusedNorm(parent.norm, "none")
            for name in ("proj_in", "proj_out"):
                if _pointwise(getattr(parent, name)):
                    setattr(parent, name, FusedPointwise(getattr(parent, name)))
            parent._get_output_for_continuous_inputs = _ChannelsLastOutput(parent)
        if isinstance(parent, Attention) and type(parent.processor) is AttnProcessor2_0 and _plain_attention(parent):
            parent.set_processor(FusedAttention(parent))
    activation = _activation(unet.conv_act)
    if isinstance(unet.conv_norm_out, nn.GroupNorm) and activation is not None:
        unet.conv_norm_out, unet.conv_act = FusedNorm(unet.conv_norm_out, activation), nn.Identity()


class FusedNorm(nn.Module):
    """A group norm with the activation behind it."""

    def __init__(self, norm: nn.GroupNorm, activation: Activation) -> None:
        super().__init__()
        self._norm = GroupNorm.of(norm, activation)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]`, channels last if it is not yet."""
        x = x.contiguous(memory_format=torch.channels_last)
        return measure(self._norm, x).normalised()


class FusedPointwise(nn.Module):
    """A convolution of 1 x 1 as a product."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]`, channels last, to as many pixels of other channels."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class FusedGate(nn.Module):
    """diffusers' `GEGLU`."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.proj = gate.proj

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., width]` to `[..., inner]`."""
        both = self.proj(hidden_states)
        return geglu(both.flatten(0, -2)).unflatten(0, both.shape[:-1])


class FusedResidualBlock(nn.Module):
    """diffusers' `ResnetBlock2D` with a time embedding that is added, or that scales and shifts."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self._activation, activation = block.nonlinearity, _activation(block.nonlinearity)
        assert activation is not None
        self._norm1, self._norm2 = GroupNorm.of(block.norm1, activation), GroupNorm.of(block.norm2, activation)
        self.conv1, self.conv2 = block.conv1, block.conv2
        shortcut = block.conv_shortcut
        self.conv_shortcut = FusedPointwise(shortcut) if _pointwise(shortcut) else shortcut
        self.time_emb_proj = block.time_emb_proj
        self._activates, self._modulates = not block.skip_time_act, block.time_embedding_norm == "scale_shift"

    @torch.no_grad()
    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """As `ResnetBlock2D.forward`."""
        x = input_tensor.contiguous(memory_format=torch.channels_last)
        h = measure(self._norm1, x).normalised()
        h = F.conv2d(h, self.conv1.weight, None, padding=1)
        offset, modulation = self.conv1.bias, None
        if self.time_emb_proj is not None and temb is not None:
            projected = self.time_emb_proj(self._activation(temb) if self._activates else temb)
            if self._modulates:
                modulation = projected
            else:
                offset = offset + projected
        h = measure(self._norm2, h, offset).normalised(modulation)
        h = F.conv2d(h, self.conv2.weight, None, padding=1)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return summed(h, self.conv2.bias, x.contiguous(memory_format=torch.channels_last))


class FusedAttention:
    """diffusers' `AttnProcessor2_0` with one product for queries, keys and values, or for keys and values."""

    def __init__(self, attention: Any) -> None:
        own = attention.to_q.in_features == attention.to_k.in_features and not attention.is_cross_attention
        projections = ([attention.to_q] if own else []) + [attention.to_k, attention.to_v]
        self._own = own
        self._weight = torch.cat([p.weight.detach() for p in projections])
        biases = [p.bias for p in projections]
        self._bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        # The parts are views of the whole now, so that they are in memory once.
        for p, part in zip(projections, self._weight.split([p.out_features for p in projections]), strict=True):
            p.weight = nn.Parameter(part, requires_grad=False)

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """`[n, tokens, width]`, as `AttnProcessor2_0` without norms and residual of its own."""
        n, heads = hidden_states.shape[0], attention.heads
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self._own and encoder_hidden_states is None:
            query, key, value = F.linear(hidden_states, self._weight, self._bias).chunk(3, dim=-1)
        elif self._own:
            query, key, value = attention.to_q(hidden_states), attention.to_k(source), attention.to_v(source)
        else:
            query = attention.to_q(hidden_states)
            key, value = F.linear(source, self._weight, self._bias).chunk(2, dim=-1)
        if attention_mask is not None:
            mask = attention.prepare_attention_mask(attention_mask, source.shape[1], n)
            attention_mask = mask.view(n, heads, -1, mask.shape[-1])
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


class _ChannelsLastOutput:
    """`Transformer2DModel._get_output_for_continuous_inputs` without its copy to the other memory format."""

    def __init__(self, transformer: Any) -> None:
        self._proj_out, self._linear = transformer.proj_out, transformer.use_linear_projection

    def __call__(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self._linear:
            hidden_states = self._proj_out(hidden_states)
        image = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
        return (image if self._linear else self._proj_out(image)) + residual


def _activation(module: Any) -> Activation | None:
    """Which one a module is; None: another."""
    if isinstance(module, nn.SiLU):
        return "silu"
    return "gelu" if isinstance(module, nn.GELU) and module.approximate == "none" else None


def _pointwise(module: Any) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride == (1, 1)


def _plain(block: Any) -> bool:
    return (
        block.time_embedding_norm in ("default", "scale_shift")
        and not (block.up or block.down)
        and _activation(block.nonlinearity) is not None
        and block.output_scale_factor == 1
        and block.conv1.bias is not None
        and block.conv2.bias is not None
    )


def _plain_attention(attention: Any) -> bool:
    absent = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    return (
        all(not getattr(attention, name, None) for name in absent)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and getattr(attention, "add_k_proj", None) is None
    )
