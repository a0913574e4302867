"""U-Nets with quicker parts: the numbers of diffusers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from dreamfusion_fast.networks.fused_unet import FusedAttention, FusedResidualBlock, _pointwise, fuse

pytestmark = pytest.mark.usefixtures("one_thread")


def make_unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(5)
    unet = UNet2DConditionModel(**settings | changes)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet.eval().requires_grad_(False)


def run(unet: Any, dtype: torch.dtype, device: str = "cpu", **more: Any) -> Tensor:
    torch.manual_seed(6)
    x = torch.randn(2, 4, 8, 8).to(device, dtype)
    text = torch.randn(2, 7, unet.config.cross_attention_dim).to(device, dtype)
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700], device=device), text, return_dict=False, **more)[0]


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_linear_projection": True, "only_cross_attention": True},
        SDXL,
        {"resnet_time_scale_shift": "scale_shift"},
        {"resnet_time_scale_shift": "scale_shift", "act_fn": "gelu"},
    ],
    ids=["as it is", "linear projection", "sdxl", "scale and shift", "gelu"],
)
def test_the_same_numbers(changes: dict[str, Any]) -> None:
    unet = make_unet(**changes).double()
    more: dict[str, Any] = {}
    if "addition_embed_type" in changes:
        torch.manual_seed(7)
        more["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 10).double(), "time_ids": torch.rand(2, 6).double()}
    wanted = run(unet, torch.float64, **more)
    size = sum(parameter.numel() for parameter in unet.parameters())
    fuse(unet)
    blocks = [module for module in unet.modules() if isinstance(module, FusedResidualBlock)]
    assert len(blocks) == 8
    gone = (nn.GroupNorm, GEGLU)
    assert not any(isinstance(module, gone) or _pointwise(module) for module in unet.modules())
    assert all(isinstance(processor, FusedAttention) for processor in unet.attn_processors.values())
    torch.testing.assert_close(run(unet, torch.float64, **more), wanted, rtol=1e-10, atol=1e-11)
    # Nothing is stored twice: parameters of norms are gone from the list, the others are the same tensors.
    storages = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    held = sum(parameter.numel() for parameter in unet.parameters())
    assert held <= size
    assert len(storages) <= len(list(unet.parameters()))


def test_an_added_attention_is_left_alone() -> None:
    """DeepFloyd IF's blocks, with keys and values of the text beside those of the image."""
    unet = make_unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    ).double()
    wanted = run(unet, torch.float64)
    fuse(unet)
    torch.testing.assert_close(run(unet, torch.float64), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernels(dtype: torch.dtype) -> None:
    """As near to float64 as diffusers' own in the same type."""
    exact = make_unet()
    wanted = run(copy.deepcopy(exact).double(), torch.float64)
    half = exact.to("cuda", dtype)
    plain = run(half, dtype, "cuda")
    fuse(half)
    fused = run(half, dtype, "cuda")
    own, others = (float((x.double().cpu() - wanted).norm() / wanted.norm()) for x in (fused, plain))
    assert own <= 1.3 * others
