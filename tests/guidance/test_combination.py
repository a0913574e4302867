"""Conditions made one: rescaled guidance, Perp-Neg, interpolated and negative prompts, in every method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from analytic import NULL, STEPS, VALUES, distillation, embeddings, images, level, views
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, PromptEmbeddings, Views
from dreamfusion_fast.guidance.methods import Combination
from dreamfusion_fast.guidance.methods.combination import perp_neg_weights
from dreamfusion_fast.guidance.methods.dreamtime import DREAMTIME

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def request(**settings: Any) -> GuidanceRequest:
    generator = torch.Generator().manual_seed(4)
    return GuidanceRequest(images(), embeddings(), views(), generator=generator, **settings)


def test_rescaled_guidance_has_the_deviation_of_the_text() -> None:
    null, text = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    outputs = {"null": null, "text": text}
    at = Views(torch.zeros(3), torch.zeros(3))
    plain = null + 9.0 * (text - null)
    for share in (0.0, 0.7, 1.0):
        found = Combination(9.0, rescale=share)(outputs, at)
        for row in range(3):
            factor = float(text[row].std(correction=0) / plain[row].std(correction=0))
            torch.testing.assert_close(found[row], share * factor * plain[row] + (1 - share) * plain[row], **EXACT)
    torch.testing.assert_close(found.flatten(1).std(dim=1), text.flatten(1).std(dim=1), **EXACT)


def perpendicular(e: Tensor, d: Tensor) -> Tensor:
    """Gram-Schmidt with unit vectors, of one view."""
    unit = d / d.norm()
    return e - (e.flatten() @ unit.flatten()) * unit


@pytest.mark.parametrize("convention", ["null", "text"])
def test_perp_neg_takes_away_what_is_perpendicular(convention: Any) -> None:
    null, text, front, side = torch.randn(4, 3, 4, 5, 5, dtype=torch.float64)
    at = Views(torch.tensor([0.4, -2.2, 0.1], dtype=torch.float64), torch.tensor([0.0, 0.1, 1.4], dtype=torch.float64))
    combination = Combination(5.0, convention, perp_neg=True)
    assert combination.conditions == ("null", "text", "front", "side")
    found = combination({"null": null, "text": text, "front": front, "side": side}, at)
    for row, (azimuth, overhead) in enumerate([(0.4, False), (2.2, False), (0.1, True)]):
        r = azimuth / (math.pi / 2)
        if overhead:
            weights = (0.0, 0.0)
        elif r < 1:
            weights = (4 * math.exp(-0.5 * (1 - r)) - 2.426, 4 * math.exp(-0.5 * r) - 2.426)
        else:
            weights = (math.exp(-0.5 * (2 - r)) + 0.967, math.exp(-0.5 * (2 - r)) - 0.606)
        d = (text - null)[row]
        pushed = d - sum(w * perpendicular((e - null)[row], d) for w, e in zip(weights, (front, side), strict=True))
        base = (null if convention == "null" else text)[row]
        torch.testing.assert_close(found[row], base + 5.0 * pushed, **EXACT)


def test_a_view_has_no_negative_prompt_of_its_own() -> None:
    front, side, back = perp_neg_weights(torch.tensor([0.0, math.pi / 2, math.pi]), torch.zeros(3)).tolist()
    assert abs(front[0]) < 1e-3
    assert front[1] > 1
    assert abs(side[1]) < 1e-3
    assert side[0] > 1
    assert back[0] > 1


def test_perp_neg_stays_finite_where_the_text_changes_nothing() -> None:
    same, other = torch.ones(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    outputs = {"null": same, "text": same, "front": other, "side": other}
    assert Combination(7.0, perp_neg=True)(outputs, Views(torch.zeros(1), torch.zeros(1))).isfinite().all()


@pytest.mark.parametrize("mode", ["sds", "csd", "sdi", "ism"])
@pytest.mark.parametrize("perp_neg", [False, True])
def test_the_negative_prompt_acts_in_every_mode(mode: Any, perp_neg: bool) -> None:
    """Another unconditional row is another gradient, and away from it for csd."""
    gradients = []
    for value in (NULL, NULL + 0.2):
        rows = VALUES.clone()
        rows[-1] = value
        guidance = distillation(mode=mode, second_mode=mode, perp_neg=perp_neg, guidance_scale=3.0, clip_x0=False)
        asked = GuidanceRequest(
            images(), PromptEmbeddings({"value": rows}), views(), generator=torch.Generator().manual_seed(4)
        )
        gradients.append(guidance.gradient(asked))
    assert all(
        float((one - other).abs().min()) > 1e-3 for one, other in zip(*(g.gradient for g in gradients), strict=True)
    )
    if mode == "csd" and not perp_neg:
        alpha, sigma = (
            x.view(-1, 1, 1, 1) for x in torch.tensor([level(t) for t in gradients[0].t.tolist()]).double().T
        )
        slope = sigma * alpha / (alpha**2 * 0.6**2 + sigma**2)  # of the noise by the mean, with its sign changed
        expected = (2 * sigma**2 * 3.0 * slope * 0.2).expand_as(images())
        torch.testing.assert_close(gradients[1].gradient - gradients[0].gradient, expected, rtol=1e-6, atol=1e-6)


def test_the_text_of_the_negative_prompt_is_embedded_in_the_last_row() -> None:
    seen: list[str] = []
    guidance = distillation(negative_prompt="blurry", perp_neg=True)
    guidance.model.embed_texts = lambda texts: seen.extend(map(str, texts)) or {"value": VALUES}  # type: ignore
    found = guidance.embed("a cup")
    assert seen[-1] == "blurry"
    assert found.interpolated
    assert not distillation().embed("a cup").interpolated
    assert distillation(interpolate_views=True).embed("a cup").interpolated


def test_prompts_are_interpolated_by_azimuth() -> None:
    rows = PromptEmbeddings({"value": VALUES, "tokens": VALUES.view(5, 1, 1) * torch.ones(5, 2, 3)}, interpolated=True)
    azimuths = torch.deg2rad(torch.tensor([0.0, 30.0, -90.0, 120.0, 180.0, 210.0, 30.0], dtype=torch.float64))
    elevations = torch.tensor([0.0] * 6 + [1.3], dtype=torch.float64)
    found = rows.select(("null", "text", "side"), Views(azimuths, elevations))
    front, side, back, overhead, null = VALUES.flatten().tolist()
    wanted = [front, (2 * front + side) / 3, side, (2 * side + back) / 3, back, (side + 2 * back) / 3, overhead]
    torch.testing.assert_close(
        found["value"].flatten(), torch.tensor([null] * 7 + wanted + [side] * 7, dtype=torch.float64), **EXACT
    )
    torch.testing.assert_close(found["tokens"][:, 1, 2], found["value"].flatten(), **EXACT)
    assert rows.to("cpu").interpolated


def test_whole_gradient_with_perp_neg() -> None:
    """Prompts that change one and the same number of every pixel have nothing that is perpendicular."""
    guidance = distillation(perp_neg=True, second_mode="sds", guidance_scale=3.0, clip_x0=False)
    out = guidance.gradient(request())
    plain = distillation(second_mode="sds", guidance_scale=3.0, clip_x0=False).gradient(request())
    torch.testing.assert_close(out.gradient, plain.gradient, **EXACT)
    assert guidance.model.asked[-1][2] == 4  # type: ignore[attr-defined]


def test_clipping_ramps_over_the_run() -> None:
    settings: dict[str, Any] = {"second_mode": "sds", "guidance_scale": 3.0}
    free = distillation(**settings).gradient(request()).gradient.norm(dim=1) / 2
    for progress, limit in ((0.0, 0.05), (0.25, 0.1), (1.0, 0.25)):
        guidance = distillation(grad_clip=0.05, grad_clip_end=0.25, **settings)
        found = guidance.gradient(request(progress=progress)).gradient.norm(dim=1) / 2
        assert (free > limit).any()
        torch.testing.assert_close(found, free.clamp_max(limit), **EXACT)


def test_weights_of_lucid_dreamer_and_dreamtime() -> None:
    plain, ism, dreamtime = (
        distillation(second_mode="sds", weighting=name).gradient(request()) for name in ("uniform", "ism", "dreamtime")
    )
    m1, m2, s1, s2 = DREAMTIME
    for row, t in enumerate(plain.t.tolist()):
        alpha, sigma = level(t)
        torch.testing.assert_close(ism.gradient[row], sigma / alpha * plain.gradient[row], **EXACT)
        time = t / STEPS
        wanted = 1.0
        if time > m1:
            wanted = math.exp(-((time - m1) ** 2) / (2 * s1**2))
        if time < m2:
            wanted = math.exp(-((time - m2) ** 2) / (2 * s2**2))
        torch.testing.assert_close(dreamtime.gradient[row], wanted * plain.gradient[row], **EXACT)
        torch.testing.assert_close(dreamtime.residual, plain.residual, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "second"), [("sds", "ism"), ("sdi", "csd"), ("csd", "sdi")])
def test_any_two_methods_by_their_shares(first: Any, second: Any) -> None:
    """Each with its own input, its own scale and its own weight."""

    def run(mode: Any, other: Any, share: float) -> Tensor:
        return distillation(mode=mode, second_mode=other).gradient(request(sds_share=share)).gradient

    one, both = run(first, second, 1.0), run(first, second, 0.3)
    expected = 0.3 * one + 0.7 * run(first, second, 0.0)
    torch.testing.assert_close(both, expected, **EXACT)
    torch.testing.assert_close(one, run(first, first, 1.0), **EXACT)
    torch.testing.assert_close(run(first, second, 0.0), run(second, second, 1.0), **EXACT)


def test_what_both_ask_is_asked_once() -> None:
    guidance = distillation(mode="sds")
    guidance.gradient(request(sds_share=0.5))
    assert [times for *_, times in guidance.model.asked] == [2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grad_clip_end": 2.0}, "grad_clip_end, grad_clip: got 2.0, None, want a grad_clip to begin with"),
        ({"perp_neg": True, "view_dependent": False}, "perp_neg, view_dependent: got True, False"),
        ({"interpolate_views": True, "view_dependent": False}, "interpolate_views, view_dependent: got True, False"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: got 1.5, want 0 to 1"),
    ],
)
def test_settings_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidanceConfig(**fields)


def test_modes_of_a_config() -> None:
    assert GuidanceConfig().modes == ("sds", "csd")
    assert GuidanceConfig(mode="csd").modes == ("csd", None)
    assert GuidanceConfig(mode="sds", second_mode="sds").modes == ("sds", None)
    assert GuidanceConfig(mode="ism", second_mode="csd").modes == ("ism", "csd")
