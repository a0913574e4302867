"""The parts of the latent prior's recipe that need no data: losses, schedules, the text encoder."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

pytest.importorskip("diffusers")

from latent_prior import autoencoder, diffusion, networks, text
from training_loop import Phase
from training_state import PART_BYTES

from dreamfusion_fast.guidance.models.embedded.text_encoder import WEIGHTS, TextEncoder
from dreamfusion_fast.networks.latent_encoder import LatentEncoder, unserved

EXACT = networks.Precision(torch.device("cpu"), False)
TINY = networks.Shape((8, 8, 16), (8, 16, 16), groups=4)


def test_default_state_can_be_carried() -> None:
    """At most five parts beside training.json and two pictures, 64 MiB in all."""
    with torch.device("meta"):
        vae, unet = networks.make_autoencoder(networks.Shape()), networks.make_unet(networks.Shape())
    weights = {name: sum(p.numel() for p in m.parameters()) for name, m in (("vae", vae), ("unet", unet))}
    # As the docstring of Shape and docs/prior.md say.
    assert sum(p.numel() for p in vae.encoder.parameters()) == 287_680
    assert sum(p.numel() for p in vae.decoder.parameters()) == 462_515
    assert weights["unet"] == 2_973_100
    # Weights and average in float32, two moments in bfloat16; the autoencoder in float16.
    size = 12 * weights["unet"] + 2 * weights["vae"]
    assert size + 0.5e6 < 5 * PART_BYTES
    assert size + 1.5e6 < 64 * 2**20
    # While the autoencoder is trained, the U-Net has no moments yet.
    assert (4 + 4) * weights["unet"] + 8 * weights["vae"] < size


def test_schedules_by_steps_and_by_the_clock() -> None:
    by_steps = Phase("a", 1, 1.0, steps=1000, seconds=60.0, step=500, elapsed=59.0)
    assert (by_steps.progress, by_steps.rate) == (0.5, pytest.approx(0.5))
    by_clock = Phase("a", 1, 1.0, steps=None, seconds=60.0, step=500, elapsed=15.0)
    assert by_clock.progress == 0.25
    assert by_clock.rate == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert Phase("a", 1, 1.0, steps=None, seconds=60.0, step=9, elapsed=0.0).rate == pytest.approx(10 / 200)
    assert Phase("a", 1, 1.0, steps=None, seconds=60.0, step=9, elapsed=70.0).progress == 1


def test_autoencoder_is_one_that_the_fast_encoder_serves() -> None:
    for shape in (TINY, networks.Shape()):
        vae = networks.make_autoencoder(shape)
        assert unserved(vae) == ""
        assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 16, 16)
    vae = networks.make_autoencoder(TINY).double().requires_grad_(False)
    images, mix = torch.rand(1, 3, 64, 64, dtype=torch.float64) * 2 - 1, torch.randn(1, 4, 16, 16, dtype=torch.float64)
    gradients = []
    for encoding in (lambda x: vae.encode(x).latent_dist.mean, LatentEncoder(vae)):
        x = images.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad((encoding(x) * mix).sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_autoencoder_loss_is_what_it_says() -> None:
    vae = networks.make_autoencoder(TINY)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.manual_seed(3)
    found = autoencoder.terms(networks.Autoencoding(vae), images, EXACT)
    torch.manual_seed(3)
    posterior = vae.encode(images).latent_dist
    output = vae.decode(posterior.mean + posterior.std * torch.randn(2, 4, 16, 16)).sample
    across = lambda x: x[..., 1:] - x[..., :-1]  # noqa: E731
    down = lambda x: x[..., 1:, :] - x[..., :-1, :]  # noqa: E731
    edges = sum((d(output) - d(images)).abs().mean() for d in (across, down)) / 2
    expected = torch.stack([(output - images).abs().mean(), edges, posterior.kl().mean()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(autoencoder.total(found), expected[0] + expected[1] + 1e-6 * expected[2])


def test_unet_loss_is_what_it_says() -> None:
    """Against diffusers' scheduler: its velocity is the target, and a network that gives it has no error."""
    scheduler, latents, noise = networks.make_scheduler(), torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    t = torch.tensor([20, 500, 999])
    velocity = scheduler.get_velocity(latents, noise, t)
    noisy = scheduler.add_noise(latents, noise, t)

    def oracle(x: Tensor, timestep: Tensor, tokens: Tensor, return_dict: bool) -> tuple[Tensor]:
        torch.testing.assert_close(x, noisy)
        return (velocity + torch.tensor([0.0, 1.0, 2.0]).view(-1, 1, 1, 1),)

    errors = diffusion.v_errors(oracle, latents, noise, t, torch.zeros(3, 20, 384), scheduler.alphas_cumprod, EXACT)
    torch.testing.assert_close(errors, torch.tensor([0.0, 1.0, 4.0]), rtol=1e-5, atol=1e-6)

    seen: list[Tensor] = []

    def one_off(x: Tensor, timestep: Tensor, tokens: Tensor, return_dict: bool) -> tuple[Tensor]:
        seen.append(timestep)
        return (torch.zeros_like(x),)

    zeros = torch.zeros(64, 4, 16, 16)
    loss, sums, counts = diffusion.training_loss(one_off, zeros, zeros, scheduler.alphas_cumprod, EXACT)
    abar = scheduler.alphas_cumprod[seen[0]]
    assert seen[0].min() >= 20
    weight = (seen[0] / 150).clamp(max=1)
    assert loss.item() == pytest.approx((weight * abar).mean().item(), rel=0.15)  # v of a zero latent is noise * alpha
    assert counts.sum() == 64
    torch.testing.assert_close(counts, torch.bincount(seen[0] // 100, minlength=10).float())
    assert (sums[counts == 0] == 0).all()


CAPTIONS = ["", "a red armchair, side view", "a tea pot", "an unbelievably long caption about " + "furniture " * 20]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 2e-2)])
def test_text_encoder_equals_the_package_s(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """At every token but padding, for which only the folder's has a state."""
    text.FolderTextEncoder.from_package(WEIGHTS, dtype).save(tmp_path, dtype)
    package = TextEncoder(WEIGHTS)
    expected, _ = package(CAPTIONS)
    found, _ = text.FolderTextEncoder.from_folder(tmp_path)(CAPTIONS)
    kept = torch.tensor([e.attention_mask for e in package.tokenizer.encode_batch(CAPTIONS)]).bool()
    assert kept.sum(1).tolist()[::3] == [2, 20]
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=tolerance)
    assert (expected[~kept] == 0).all()
