"""SDI and ISM against their equations, written out for one view at a time, in plain numbers and float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from analytic import NULL, STEPS, TEXTS, distillation, embeddings, epsilon, images, level, views
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest
from dreamfusion_fast.guidance.methods import IsmConfig, SdiConfig

KINDS = ["epsilon", "v_prediction", "sample"]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def request(**settings: Any) -> GuidanceRequest:
    generator = torch.Generator().manual_seed(4)
    return GuidanceRequest(images(), embeddings(), views(), generator=generator, **settings)


def drawn(count: int, t_range: tuple[int, int]) -> tuple[list[int], Tensor]:
    """Timesteps and `count` tensors of noise, as they are drawn for `request`."""
    generator = torch.Generator().manual_seed(4)
    t = torch.randint(t_range[0], t_range[1] + 1, (3,), generator=generator)
    return t.tolist(), torch.randn(count, *images().shape, generator=generator).double()


def ddim(x: Tensor, t: int, to: int, noise: Tensor) -> Tensor:
    (alpha, sigma), (alpha_to, sigma_to) = level(t), level(to)
    return alpha_to * (x - sigma * noise) / alpha + sigma_to * noise


def mixed(x: Tensor, t: int, text: float, scale: float) -> Tensor:
    """The noise under classifier-free guidance."""
    null, full = (epsilon(x, *level(t), mean) for mean in (NULL, text))
    return null + scale * (full - null)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("eta", "scale", "steps"), [(0.3, -6.5, 10), (0.0, 0.0, 7), (0.0, 1.0, 3)])
def test_sdi_is_its_equation(kind: str, eta: float, scale: float, steps: int) -> None:
    guidance = distillation(kind, mode="sdi", clip_x0=False, sdi=SdiConfig(steps, scale, eta))
    out = guidance.gradient(request(t_range=(0.1, 0.9)))
    times, noise = drawn(1 + steps if eta else 1, (4, 36))
    assert out.t.tolist() == times
    stride = math.ceil(STEPS / steps)
    for row, (t, text) in enumerate(zip(times, TEXTS, strict=True)):
        x = found = 2 * images()[row] - 1
        now = 0
        while now < t:
            to = min(now + stride, t)
            step = ddim(found, now, to, mixed(found, now, text, scale))
            near, far = level(now), level(to)
            variance = (1 - near[0] ** 2) / (1 - far[0] ** 2) * (1 - far[0] ** 2 / near[0] ** 2)
            found = step + (eta * math.sqrt(variance) * noise[1 + now // stride][row] if eta else 0)
            now = to
        alpha, sigma = level(t)
        estimate = (found - sigma * mixed(found, t, text, 8.5)) / alpha
        torch.testing.assert_close(out.gradient[row], 2 * (x - estimate), **EXACT)
        n = (found - alpha * x) / sigma
        size = (mixed(found, t, text, 8.5) - n).square().mean().sqrt()
        torch.testing.assert_close(out.residual[row], size, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("delta_t", "delta_s"), [(0.05, 0.2), (0.2, 0.125), (0.9, 1.0)])
def test_ism_is_its_equation(kind: str, delta_t: float, delta_s: float) -> None:
    guidance = distillation(kind, mode="ism", clip_x0=False, ism=IsmConfig(delta_t, delta_s))
    out = guidance.gradient(request(t_range=(0.1, 0.9)))
    times, noise = drawn(1, (4, 36))
    for row, (t, text) in enumerate(zip(times, TEXTS, strict=True)):
        alpha, sigma = level(0)
        s, now = max(t - round(delta_t * STEPS), 0), 0
        found = alpha * (2 * images()[row] - 1) + sigma * noise[0][row]
        while now < s:
            to = min(now + round(delta_s * STEPS), s)
            found = ddim(found, now, to, epsilon(found, *level(now), NULL))
            now = to
        target = epsilon(found, *level(s), NULL)
        at_t = ddim(found, s, t, target)
        alpha, sigma = level(t)
        expected = 2 * sigma / alpha * (mixed(at_t, t, text, 7.5) - target)
        torch.testing.assert_close(out.gradient[row], expected, **EXACT)


@pytest.mark.parametrize("mode", ["sdi", "ism"])
def test_estimates_are_clamped(mode: Any) -> None:
    """The guided prediction is the noise that its clamped estimate of the clean input means."""
    free, clamped = (distillation(mode=mode, clip_x0=clip) for clip in (False, True))
    free_gradient, gradient = (guidance.gradient(request()).gradient for guidance in (free, clamped))
    model = clamped.model
    noisy, t, _ = model.asked[-1]  # type: ignore[attr-defined]
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in torch.tensor([level(int(i)) for i in t], dtype=torch.float64).T)
    text = torch.tensor(TEXTS, dtype=torch.float64).view(-1, 1, 1, 1)
    null = epsilon(noisy, alpha, sigma, NULL)
    guided = null + clamped.guidance_scale * (epsilon(noisy, alpha, sigma, text) - null)
    estimate = (noisy - sigma * guided) / alpha
    assert (estimate.abs() > 1).any()
    difference = 2 * (estimate - estimate.clamp(-1, 1))  # w(t) alpha / sigma is 1
    torch.testing.assert_close(gradient - free_gradient, difference, **EXACT)


@pytest.mark.parametrize("mode", ["sdi", "ism"])
def test_the_number_of_evaluations_is_that_of_the_latest_timestep(mode: Any) -> None:
    guidance = distillation(mode=mode, sdi=SdiConfig(steps=10), ism=IsmConfig(0.05, 0.2))
    guidance.gradient(request(t_range=(0.0, 0.5)))
    # Of 10 steps 5; of the inversion to 0.45 in steps of 0.2, 3, and one more to t.
    assert len(guidance.model.asked) == {"sdi": 5 + 1, "ism": 3 + 1 + 1}[mode]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["sdi", "ism"])
@pytest.mark.parametrize("views_per_call", [1, 2])
def test_parts_of_a_batch_give_what_the_batch_gives(mode: Any, views_per_call: int) -> None:
    whole = distillation(mode=mode).gradient(request())
    parts = distillation(mode=mode).gradient(request(views_per_call=views_per_call))
    torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["sdi", "ism", "vsd"])
def test_authors_scales_come_first_but_after_the_config(mode: Any) -> None:
    if mode == "vsd":
        with pytest.raises(UserError, match="'gaussian' has no network that could be trained"):
            distillation(mode=mode)
        return
    authors = {"sdi": 8.5, "ism": 7.5}[mode]
    assert distillation(mode=mode).guidance_scale == authors
    assert distillation(mode=mode, convention="text").guidance_scale == authors - 1
    assert distillation(mode=mode, guidance_scale=3.0).guidance_scale == 3
    assert distillation(mode=mode).method.weighting == "ism"
    assert distillation(mode=mode, weighting="sds").method.weighting == "sds"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SdiConfig(steps=0), "SdiConfig.steps: got 0, want 1 to 1000"),
        (lambda: IsmConfig(delta_s=0.0), "IsmConfig.delta_s: got 0.0, want above 0"),
        (lambda: GuidanceConfig(mode="sdi2"), "mode: got 'sdi2', want one of sds, csd, sdi, ism, vsd"),
    ],
)
def test_wrong_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
