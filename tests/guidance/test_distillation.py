"""Score distillation against what it must be for a model whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.guidance import (
    DiffusionModel,
    GuidanceConfig,
    GuidanceRequest,
    PromptEmbeddings,
    PromptSet,
    ScoreDistillation,
    Views,
    create_guidance,
)
from dreamfusion_fast.guidance.methods import Predictions, ScoreDistillationSampling
from dreamfusion_fast.guidance.models.schedule import VariancePreserving
from dreamfusion_fast.guidance.prompts import Prompt

CPU = torch.device("cpu")


class PointModel(DiffusionModel):
    """The exact model of a distribution of one image per text: its estimate of the clean image is the text's value.

    So eps_hat - eps = alpha / sigma (x - value), whatever the noise: the gradient is known without repeating any draw.
    """

    name = "points"
    image_size = 6
    default_guidance_scale = 7.5
    x0_range = (-1.0, 1.0)
    text_identity = "points"

    def __init__(self, prediction_type: str = "epsilon", device: torch.device = CPU, steps: int = 50):
        self.device = device
        self.schedule = VariancePreserving(
            torch.linspace(0.999, 0.01, steps, dtype=torch.float64, device=device), prediction_type
        )
        self.noisy: list[Tensor] = []
        self.poison = False

    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        return {"value": torch.tensor([[0.1 * len(str(text)) - 0.5] for text in texts], dtype=torch.float64)}

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        assert not torch.is_grad_enabled()
        self.noisy.append(noisy)
        times = len(condition["value"]) // len(noisy)
        abar = self.schedule.alphas_cumprod[t].repeat(times).view(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        x0 = condition["value"].view(-1, 1, 1, 1).expand(-1, *noisy.shape[1:])
        epsilon = (noisy.double().repeat(times, 1, 1, 1) - alpha * x0) / sigma
        if self.poison:
            epsilon = epsilon / 0
        return {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x0, "sample": x0}[
            self.schedule.prediction_type
        ]


VALUES = torch.tensor([[0.3], [-0.4], [0.9], [0.2], [-0.1]], dtype=torch.float64)


def _embeddings(device: torch.device = CPU) -> PromptEmbeddings:
    return PromptEmbeddings({"value": VALUES.to(device)})


def _views(device: torch.device = CPU) -> Views:
    """A back, a front and an overhead view."""
    return Views(
        torch.tensor([math.pi, 0.0, 1.0], device=device), torch.tensor([0.0, 0.1, math.radians(80)], device=device)
    )


TEXT = VALUES[[2, 0, 3]].view(-1, 1, 1, 1)
NULL = VALUES[[4, 4, 4]].view(-1, 1, 1, 1)


def _images(device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(3, 3, 6, 6, dtype=dtype).to(device)


def _levels(model: PointModel, t: Tensor) -> tuple[Tensor, Tensor]:
    abar = model.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


WEIGHTS = {
    "sds": lambda alpha, sigma: sigma**2,
    "uniform": lambda alpha, sigma: torch.ones_like(alpha),
    "fantasia3d": lambda alpha, sigma: alpha * sigma**2,
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("convention", ["null", "text"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("weighting", list(WEIGHTS))
def test_gradient_is_the_known_one(prediction_type: str, convention: Any, clip: bool, weighting: Any) -> None:
    model = PointModel(prediction_type)
    config = GuidanceConfig(guidance_scale=3.0, convention=convention, clip_x0=clip, weighting=weighting)
    images = _images()
    out = ScoreDistillation(model, config).gradient(GuidanceRequest(images, _embeddings(), _views()))

    alpha, sigma = _levels(model, out.t)
    x0 = (NULL if convention == "null" else TEXT) + 3.0 * (TEXT - NULL)
    assert (x0.abs() > 1).any(), "nothing to clamp"
    if clip:
        x0 = x0.clamp(-1, 1)
    x = 2 * images - 1
    expected = 2 * WEIGHTS[weighting](alpha, sigma) * alpha / sigma * (x - x0)
    torch.testing.assert_close(out.gradient, expected, rtol=1e-10, atol=1e-10)
    residual = alpha / sigma * (x - x0)
    torch.testing.assert_close(out.residual, residual.pow(2).mean((1, 2, 3)).sqrt())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_classifier_score_distillation(prediction_type: str) -> None:
    model = PointModel(prediction_type)
    model.clip_x0 = True
    images = _images()
    guidance = ScoreDistillation(model, GuidanceConfig(guidance_scale=3.0, mode="csd"))
    out = guidance.gradient(GuidanceRequest(images, _embeddings(), _views()))
    alpha, sigma = _levels(model, out.t)
    expected = 2 * sigma * alpha * 3.0 * (NULL - TEXT)
    torch.testing.assert_close(out.gradient, expected.expand_as(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_shares_of_both_residuals_add_up(prediction_type: str, clip: bool) -> None:
    images, config = _images(), GuidanceConfig(guidance_scale=3.0, clip_x0=clip)

    def run(share: float, mode: Any = "sds") -> Any:
        guidance = ScoreDistillation(PointModel(prediction_type), replace(config, mode=mode, clip_x0=None))
        guidance.clip_x0 = clip and mode == "sds"
        generator = torch.Generator().manual_seed(3)
        return guidance.gradient(GuidanceRequest(images, _embeddings(), _views(), generator=generator, sds_share=share))

    distilled, classified = run(1.0).gradient, run(1.0, "csd").gradient
    assert not torch.allclose(classified, distilled)
    assert torch.equal(run(0.0).gradient, classified)
    assert torch.equal(run(0.3, "csd").gradient, classified)
    torch.testing.assert_close(run(0.3).gradient, 0.3 * distilled + 0.7 * classified, rtol=1e-12, atol=1e-12)


class Away(ScoreDistillationSampling):
    """Towards the text and away from two directions, each under a condition of its own, as in Perp-Neg."""

    conditions = ("null", "text", "back", "side")

    def guided(self, predictions: Predictions) -> Tensor:
        null, text, back, side = predictions.outputs.values()
        return null + predictions.scale * (text - null) - 0.5 * (back - null) - 0.25 * (side - null)


@pytest.mark.parametrize("clip", [False, True])
def test_a_method_that_combines_other_conditions(clip: bool) -> None:
    images, model = _images(), PointModel()
    guidance = ScoreDistillation(model, GuidanceConfig(guidance_scale=3.0, clip_x0=clip), method=Away())
    out = guidance.gradient(GuidanceRequest(images, _embeddings(), _views()))
    x0 = NULL + 3.0 * (TEXT - NULL) - 0.5 * (VALUES[2] - NULL) - 0.25 * (VALUES[1] - NULL)
    assert (x0.abs() > 1).any(), "nothing to clamp"
    alpha, sigma = _levels(model, out.t)
    expected = 2 * sigma * alpha * (2 * images - 1 - (x0.clamp(-1, 1) if clip else x0))
    torch.testing.assert_close(out.gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_shares_outside_their_range_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"sds_share: got {share}, want 0 to 1"):
        ScoreDistillation(PointModel()).gradient(GuidanceRequest(_images(), _embeddings(), _views(), sds_share=share))


def test_conventions_differ_by_one_also_in_the_default_scale() -> None:
    gradients = [
        ScoreDistillation(PointModel(), GuidanceConfig(convention=convention, guidance_scale=scale)).gradient(
            GuidanceRequest(
                torch.full((3, 3, 6, 6), 0.5, dtype=torch.float64),
                _embeddings(),
                _views(),
                generator=torch.Generator().manual_seed(3),
            )
        )
        for convention, scale in [("null", None), ("null", 7.5), ("text", None), ("text", 6.5)]
    ]
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0].gradient, other.gradient, rtol=1e-10, atol=1e-10)


def test_gradient_clipping_is_per_pixel_and_keeps_direction() -> None:
    images = _images()
    free, clipped = (
        ScoreDistillation(PointModel(), GuidanceConfig(guidance_scale=3.0, grad_clip=limit)).gradient(
            GuidanceRequest(images, _embeddings(), _views(), generator=torch.Generator().manual_seed(1))
        )
        for limit in (None, 0.5)
    )
    # The gradient to the image is twice the one to the model's input.
    before, after = free.gradient.norm(dim=1) / 2, clipped.gradient.norm(dim=1) / 2
    assert (before > 0.5).any()
    assert (before < 0.5).any()
    torch.testing.assert_close(after, before.clamp_max(0.5))
    torch.testing.assert_close(
        clipped.gradient * before.unsqueeze(1), free.gradient * after.unsqueeze(1), rtol=1e-10, atol=1e-12
    )


def test_noise_is_standard_normal_and_follows_the_schedule() -> None:
    model = PointModel()
    images = torch.rand(64, 3, 6, 6, dtype=torch.float64)
    views = Views(torch.zeros(64), torch.zeros(64))
    out = ScoreDistillation(model).gradient(GuidanceRequest(images, _embeddings(), views))
    alpha, sigma = _levels(model, out.t)
    noise = (model.noisy[0] - alpha * (2 * images - 1)) / sigma
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.numel())
    assert not torch.allclose(noise[0], noise[1])


@pytest.mark.parametrize(
    ("t_range", "expected"),
    [((0.2, 0.3), {10, 11, 12, 13, 14, 15}), ((0.5, 0.5), {25}), ((0.0, 0.02), {0, 1}), ((1.0, 1.0), {49})],
)
def test_timesteps_fill_the_range(t_range: tuple[float, float], expected: set[int]) -> None:
    images, views = torch.rand(200, 3, 6, 6), Views(torch.zeros(200), torch.zeros(200))
    out = ScoreDistillation(PointModel()).gradient(GuidanceRequest(images, _embeddings(), views, t_range=t_range))
    assert set(out.t.tolist()) == expected


@pytest.mark.parametrize("t_range", [(0.9, 0.1), (0.0, 1.5), (-0.1, 0.5), (math.nan, 0.5), (0.1, 0.5, 0.9)])
def test_a_range_that_is_none_is_refused(t_range: tuple[float, float]) -> None:
    images, views = torch.rand(2, 3, 6, 6), Views(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"t_range: got .*, want .* 0 <= low <= high <= 1"):
        ScoreDistillation(PointModel()).gradient(GuidanceRequest(images, _embeddings(), views, t_range=t_range))


def test_resized_images_get_the_gradient_through_the_resize() -> None:
    class Halving(PointModel):
        def encode(self, images: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(images * 2 - 1, 2)

    model = Halving()
    images = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    out = ScoreDistillation(model, GuidanceConfig(guidance_scale=1.0)).gradient(
        GuidanceRequest(images, _embeddings(), _views())
    )
    alpha, sigma = _levels(model, out.t)
    pull = sigma * alpha * (model.encode(images) - TEXT)
    expected = 2 * pull.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) / 4
    torch.testing.assert_close(out.gradient, expected, rtol=1e-10, atol=1e-10)


def test_same_seed_same_numbers(device: torch.device) -> None:
    def run(on: torch.device) -> Any:
        guidance = ScoreDistillation(PointModel("v_prediction", on))
        images = torch.linspace(0, 1, 324).view(3, 3, 6, 6).to(on)
        generator = torch.Generator().manual_seed(5)
        return guidance.gradient(GuidanceRequest(images, _embeddings(on), _views(on), generator=generator))

    here, there = run(CPU), run(device)
    assert there.gradient.device.type == device.type
    assert here.t.tolist() == there.t.tolist()
    torch.testing.assert_close(here.gradient, there.gradient.cpu(), rtol=1e-5, atol=1e-5)
    assert here.gradient.dtype == torch.float32


@pytest.mark.parametrize("views_per_call", [1, 2, 3, 9])
def test_parts_of_a_batch_give_what_the_batch_gives(views_per_call: int) -> None:
    images, results, states = _images(), [], []
    for parts in (None, views_per_call):
        model, generator = PointModel(), torch.Generator().manual_seed(4)
        guidance = ScoreDistillation(model, GuidanceConfig(cache=False))
        request = GuidanceRequest(images, _embeddings(), _views(), generator=generator, views_per_call=parts)
        results.append(guidance.gradient(request))
        states.append(generator.get_state())
    assert max(map(len, model.noisy)) == min(views_per_call, 3)
    assert torch.equal(*states)
    whole, parts = results
    assert torch.equal(whole.t, parts.t)
    for name in ("gradient", "residual"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-14, atol=0)


def test_no_views_at_a_time_are_refused() -> None:
    with pytest.raises(ValueError, match="views_per_call: got 0, want at least 1"):
        GuidanceRequest(_images(), _embeddings(), _views(), views_per_call=0)


def test_images_are_left_alone() -> None:
    images = _images().requires_grad_(True)
    out = ScoreDistillation(PointModel()).gradient(GuidanceRequest(images, _embeddings(), _views()))
    assert images.grad is None
    assert not any(value.requires_grad for value in (out.gradient, out.t, out.residual))
    (2 * images).backward(out.gradient)
    torch.testing.assert_close(images.grad, 2 * out.gradient)


def test_works_inside_no_grad_and_on_strided_images() -> None:
    images = torch.rand(3, 6, 6, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    guidance = ScoreDistillation(PointModel())
    with torch.no_grad():
        inside = guidance.gradient(
            GuidanceRequest(images, _embeddings(), _views(), generator=torch.Generator().manual_seed(0))
        )
    outside = guidance.gradient(
        GuidanceRequest(images.contiguous(), _embeddings(), _views(), generator=torch.Generator().manual_seed(0))
    )
    torch.testing.assert_close(inside.gradient, outside.gradient)


def test_views_choose_their_rows() -> None:
    pair = PromptEmbeddings({"value": VALUES, "pooled": VALUES.view(5, 1, 1) * 2}).select(("null", "text"), _views())
    assert pair["value"].flatten().tolist() == VALUES[[4, 4, 4, 2, 0, 3]].flatten().tolist()
    torch.testing.assert_close(pair["pooled"].flatten(), 2 * pair["value"].flatten())


def test_any_conditions_of_a_view() -> None:
    rows = PromptEmbeddings({"value": VALUES}).select(("text", "back", "null", "front"), _views())["value"]
    assert rows.flatten().tolist() == VALUES[[2, 0, 3, 2, 2, 2, 4, 4, 4, 0, 0, 0]].flatten().tolist()


def test_embed_uses_the_config_and_the_cache() -> None:
    class Counting(PointModel):
        calls = 0

        def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
            Counting.calls += 1
            return super().embed_texts(texts)

    config = GuidanceConfig(negative_prompt="ugly", view_dependent=False)
    one = ScoreDistillation(Counting(), config).embed("a cup")
    two = ScoreDistillation(Counting(), config).embed(PromptSet("a cup", "ugly", view_dependent=False))
    assert Counting.calls == 1
    assert torch.equal(one.tensors["value"], two.tensors["value"])
    lengths = ((one.tensors["value"].flatten() + 0.5) * 10).round().tolist()
    assert lengths == [5, 5, 5, 5, 4]
    config.cache = False
    ScoreDistillation(Counting(), config).embed("a cup")
    assert Counting.calls == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite_are_an_error(value: float) -> None:
    images = _images()
    images[1, 0, 2, 3] = value
    with pytest.raises(NonFiniteError, match="guidance call 1: the rendered images"):
        ScoreDistillation(PointModel()).gradient(GuidanceRequest(images, _embeddings(), _views()))


def test_gradient_that_is_not_finite_is_an_error() -> None:
    model = PointModel()
    guidance = ScoreDistillation(model)
    guidance.gradient(GuidanceRequest(_images(), _embeddings(), _views()))
    model.poison = True
    with pytest.raises(NonFiniteError, match="guidance call 2: the gradient from points"):
        guidance.gradient(GuidanceRequest(_images(), _embeddings(), _views()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "sdi"},
        {"mode": "ism", "second_mode": "csd"},
        {"perp_neg": True, "guidance_rescale": 0.7},
        {"weighting": "dreamtime", "grad_clip": 1.0, "grad_clip_end": 2.0},
    ],
)
def test_gpu_reports_later_and_does_not_wait(settings: dict[str, Any]) -> None:
    cuda = torch.device("cuda")
    model = PointModel(device=cuda)
    guidance = ScoreDistillation(model, GuidanceConfig(**settings))
    embeddings, views = replace(_embeddings(cuda), interpolated=guidance.config.perp_neg), _views(cuda)
    images = _images(cuda)
    guidance.gradient(GuidanceRequest(images, embeddings, views))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            guidance.gradient(GuidanceRequest(images, embeddings, views))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model.poison = True

    def two_calls() -> None:
        for _ in range(2):
            guidance.gradient(GuidanceRequest(images, embeddings, views))
            torch.cuda.synchronize()

    with pytest.raises(NonFiniteError, match="guidance call 5: the gradient"):
        two_calls()


def test_clamping_latents_is_refused() -> None:
    model = PointModel()
    model.x0_range = None
    with pytest.raises(UserError, match="clip_x0 needs a pixel-space model"):
        ScoreDistillation(model, GuidanceConfig(clip_x0=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"convention": "both"}, "convention: got 'both', want one of null, text"),
        ({"weighting": "x"}, "weighting: got 'x', want one of"),
        ({"mode": "dds"}, "mode: got 'dds', want one of sds, csd"),
        ({"dtype": "int8"}, "dtype: got 'int8', want one of"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"grad_clip": 0.0}, "above 0"),
        ({"mode": "csd", "clip_x0": True}, "want no clip_x0 with csd"),
    ],
)
def test_config_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidanceConfig(**fields)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 1, 6, 6), ValueError, r"\[B, 3, H, W\]"),
        (torch.rand(3, 6, 6), ValueError, r"\[B, 3, H, W\]"),
        (torch.rand(2, 3, 6, 6), ValueError, "one view per image"),
        (torch.rand(0, 3, 6, 6), ValueError, "at least one"),
        (torch.rand(3, 3, 6, 6).half(), TypeError, "float16"),
    ],
)
def test_wrong_images_are_refused(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ScoreDistillation(PointModel()).gradient(GuidanceRequest(images, _embeddings(), _views()))


def test_wrong_views_and_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"background must have shape \[2, 3\]"):
        Views(torch.zeros(2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="azimuth and elevation"):
        Views(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="shading must be one of"):
        Views(torch.zeros(2), torch.zeros(2), shading="phong")
    with pytest.raises(ValueError, match=r"\[5, ...\]"):
        PromptEmbeddings({"value": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="at least one"):
        PromptEmbeddings({})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="no usable GPU"):
        create_guidance(GuidanceConfig(), "cuda")
