"""The autoencoder's encoder with its own backward: the numbers of diffusers and autograd, in less memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.networks import latent_encoder as module
from dreamfusion_fast.networks.half_range import fit_half_range
from dreamfusion_fast.networks.latent_encoder import LatentEncoder, unserved

pytestmark = pytest.mark.usefixtures("one_thread")


def make_vae(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Three levels, of which the first has as many channels as the second, and weights that make every part matter."""
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    torch.manual_seed(3)
    vae = AutoencoderKL(**settings | changes)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) / max(parameter[0].numel(), 1) ** 0.5)
    return vae.to(dtype).eval().requires_grad_(False)


def with_autograd(vae: Any, images: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    mean = vae.encode(images).latent_dist.mean
    return mean.detach(), torch.autograd.grad(mean, images, mix)[0]


def with_encoder(encoder: LatentEncoder, images: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    mean = encoder(images)
    return mean.detach(), torch.autograd.grad(mean, images, mix)[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 1},
        {"mid_block_add_attention": False},
        {"use_quant_conv": False},
        {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2},
    ],
    ids=["as it is", "one layer", "no attention", "no quant conv", "two levels"],
)
@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_the_numbers_of_autograd(
    recompute: bool, changes: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 to its rounding, the scores of attention in several parts."""
    if "down_block_types" in changes:
        changes = changes | {"up_block_types": ("UpDecoderBlock2D",) * 2}
    monkeypatch.setattr(module, "_SCORES", 7 * 2 * 16)
    vae = make_vae(**changes)
    images = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    wanted_mean = vae.encode(images).latent_dist.mean
    mix = torch.randn_like(wanted_mean)
    wanted, wanted_gradient = with_autograd(vae, images, mix)
    mean, gradient = with_encoder(LatentEncoder(vae, recompute), images, mix)
    assert wanted_gradient.abs().max() > 0.01
    torch.testing.assert_close(mean, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-11)


def test_the_attention_matters() -> None:
    """So that the test above sees it."""
    vae = make_vae()
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    with_it = vae.encode(images).latent_dist.mean
    vae.encoder.mid_block.attentions[0].to_out[0].weight.zero_()
    assert (vae.encode(images).latent_dist.mean - with_it).abs().max() > 0.01


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float16, 2.0), (torch.bfloat16, 2.0), (torch.float32, 20.0)])
def test_the_kernels(dtype: torch.dtype, roundings: float, recompute: bool) -> None:
    """Errors by norm, beside those of diffusers' module and autograd in the same type."""
    exact = make_vae(block_out_channels=(32, 32, 64), norm_num_groups=8)
    images = torch.rand(2, 3, 72, 40, dtype=torch.float64) * 2 - 1
    mix = torch.randn(2, 4, 18, 10, dtype=torch.float64)
    wanted = with_autograd(exact, images, mix)
    vae = make_vae(dtype, block_out_channels=(32, 32, 64), norm_num_groups=8).cuda()
    found = with_encoder(LatentEncoder(vae, recompute), images.float().cuda(), mix.to(dtype).cuda())
    plain = with_autograd(vae, images.to(dtype).cuda(), mix.to(dtype).cuda())

    def errors(results: tuple[Tensor, Tensor]) -> list[float]:
        return [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(results, wanted, strict=True)]

    for own, others in zip(errors(found), errors(plain), strict=True):
        assert own <= max(1.5 * others, roundings * torch.finfo(dtype).eps)


def enlarge(vae: Any, stream: float, inner: float) -> Any:
    """The same function with numbers in the residual stream and inside of blocks that are larger by these factors."""
    encoder = vae.encoder
    with torch.no_grad():
        for module in (encoder.conv_in, *(a.to_out[0] for a in encoder.mid_block.attentions)):
            module.weight.mul_(stream)
            module.bias.mul_(stream)
        for block in (*encoder.down_blocks, encoder.mid_block):
            for resnet in block.resnets:
                for module, factor in ((resnet.conv1, inner), (resnet.conv2, stream)):
                    module.weight.mul_(factor)
                    module.bias.mul_(factor)
                if resnet.conv_shortcut is not None:
                    resnet.conv_shortcut.bias.mul_(stream)
                resnet.norm1.eps *= stream**2
                resnet.norm2.eps *= inner**2
            for downsampler in getattr(block, "downsamplers", None) or ():
                downsampler.conv.bias.mul_(stream)
        for attention in encoder.mid_block.attentions:
            attention.group_norm.eps *= stream**2
        encoder.conv_norm_out.eps *= stream**2
    return vae


def in_half(vae: Any) -> Any:
    for part in (vae.encoder, vae.quant_conv):
        part.half()
    return vae


def gradient_error(vae: Any, wanted: tuple[Tensor, Tensor], images: Tensor, mix: Tensor) -> float:
    encoder = LatentEncoder(vae)
    _, gradient = with_encoder(encoder, images.float(), mix.to(encoder.dtype))
    return float((gradient.double() - wanted[1]).norm() / wanted[1].norm())


@pytest.mark.parametrize("size", [16, 32])
def test_rescaling_changes_nothing_but_the_range(size: int) -> None:
    vae = enlarge(make_vae(), 3e6, 1e7)
    images, mix = (
        torch.rand(2, 3, size, size, dtype=torch.float64) * 2 - 1,
        torch.randn(2, 4, size // 4, size // 4).double(),
    )
    wanted, wanted_gradient = with_autograd(vae, images, mix)
    scale = fit_half_range(vae, 32)
    assert 1e-5 < scale < 1e-2
    assert math.log2(scale).is_integer()
    mean, gradient = with_autograd(vae, images, mix)
    torch.testing.assert_close(mean, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-13)
    assert fit_half_range(vae, 32) == 1.0  # it fits now


@pytest.mark.parametrize(("stream", "inner"), [(1e5, 1.0), (1.0, 3e5), (3e5, 1e5)])
def test_an_encoder_that_overflows_in_float16_is_rescaled(stream: float, inner: float) -> None:
    """And its gradient then has the error of float16, as one has that does not overflow; bfloat16's is larger."""
    shape: dict[str, Any] = {"block_out_channels": (32, 64, 64), "norm_num_groups": 8}
    images, mix = torch.rand(1, 3, 32, 32, dtype=torch.float64) * 2 - 1, torch.randn(1, 4, 8, 8, dtype=torch.float64)
    wanted = with_autograd(enlarge(make_vae(**shape), stream, inner), images, mix)
    assert not gradient_error(in_half(enlarge(make_vae(**shape), stream, inner)), wanted, images, mix) < 1
    rescaled = enlarge(make_vae(torch.float32, **shape), stream, inner)
    fit_half_range(rescaled, 32)
    error = gradient_error(in_half(rescaled), wanted, images, mix)
    assert error < 1e-2
    assert error < 1.5 * gradient_error(in_half(make_vae(**shape)), wanted, images, mix)
    assert error < gradient_error(enlarge(make_vae(**shape), stream, inner).to(torch.bfloat16), wanted, images, mix) / 3


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e6])
def test_gradients_of_any_size_go_back_in_float16(magnitude: float) -> None:
    vae, images = make_vae(), torch.rand(1, 3, 16, 16, dtype=torch.float64) * 2 - 1
    mix = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    wanted = with_autograd(vae, images, mix)[1]
    encoder = LatentEncoder(in_half(make_vae()))
    given = images.float().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(given).float(), given, mix.float() * magnitude)
    assert float((gradient.double() / magnitude - wanted).norm() / wanted.norm()) < 1e-2
    (zero,) = torch.autograd.grad(encoder(given).float(), given, torch.zeros(1, 4, 4, 4))
    assert not zero.any()


def test_an_encoder_that_gives_nan_is_not_rescaled() -> None:
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight[0] = float("nan")
    with pytest.raises(ValueError, match="vae: it gives NaN"):
        fit_half_range(vae, 32)


@pytest.mark.gpu
def test_it_holds_less() -> None:
    """One image of 512^2, in units of an activation of the first level; the attention is over 16 384 pixels."""
    vae = make_vae(torch.float16, block_out_channels=(64, 64, 128), norm_num_groups=32).cuda()
    images = torch.rand(1, 3, 512, 512, device="cuda")
    one = 512 * 512 * 64 * 2

    def peak(encode: Any) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given = images.half().requires_grad_()
        torch.autograd.grad(encode(given).float().sum(), given)
        return (torch.cuda.max_memory_allocated() - before) / one

    plain = peak(lambda x: vae.encode(x).latent_dist.mean)
    kept, recomputed = peak(LatentEncoder(vae)), peak(LatentEncoder(vae, recompute=True))
    assert recomputed < kept - 1
    assert kept < 0.7 * plain


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
def test_calls_through_graphs_do_not_disturb_each_other() -> None:
    vae = make_vae(torch.float32).cuda()
    encoder = LatentEncoder(vae)
    images, mix = torch.rand(3, 1, 3, 16, 16, device="cuda"), torch.randn(1, 4, 4, 4, device="cuda")
    wanted = [with_autograd(vae, x, mix) for x in images]
    leaves = [x.clone().requires_grad_() for x in images]
    # One after the other, and two forwards before their backwards.
    first = encoder(leaves[0])
    gradients = [torch.autograd.grad(first, leaves[0], mix)[0]]
    second, third = encoder(leaves[1]), encoder(leaves[2])
    gradients += [torch.autograd.grad(y, x, mix)[0] for y, x in ((second, leaves[1]), (third, leaves[2]))]
    for mean, gradient, (wanted_mean, wanted_gradient) in zip((first, second, third), gradients, wanted, strict=True):
        torch.testing.assert_close(mean.detach(), wanted_mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-3 * float(wanted_gradient.abs().max()))
    again = encoder(leaves[0])
    torch.autograd.grad(again, leaves[0], mix, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        torch.autograd.grad(again, leaves[0], mix)


def test_a_second_backward_is_an_error() -> None:
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    mean = LatentEncoder(make_vae())(images)
    torch.autograd.grad(mean.sum(), images, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        torch.autograd.grad(mean.sum(), images)


def test_without_gradients_nothing_is_kept() -> None:
    encoder, images = LatentEncoder(make_vae()), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    mean, kept = encoder.forward(images, keep=False)
    assert not kept
    assert not encoder(images).requires_grad
    torch.testing.assert_close(encoder(images), mean, rtol=0, atol=0)


def test_what_it_cannot_stand_in_for_is_said() -> None:
    from diffusers import AutoencoderTiny

    assert "no diffusers Encoder" in unserved(AutoencoderTiny())
    vae = make_vae()
    assert unserved(vae) == ""
    vae.encoder.mid_block.resnets[0].output_scale_factor = 2.0
    with pytest.raises(ValueError, match="vae: a residual block is not norm, SiLU, convolution, twice"):
        LatentEncoder(vae)
