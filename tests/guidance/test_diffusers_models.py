"""diffusers pipelines as guidance, against diffusers itself and a float64 autograd derivation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.guidance import GuidanceConfig, PromptEmbeddings, ScoreDistillation, Views, create_guidance
from dreamfusion_fast.guidance.diffusers_models import LatentModel, PipelineModel, PixelModel, resize

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
VIEWS = Views(torch.tensor([3.1, 0.0, 0.5]), torch.tensor([0.0, 0.1, 1.4]))
ROWS = [2, 0, 3]


def _guidance(folder: Path, **options: Any) -> ScoreDistillation:
    guidance = create_guidance(GuidanceConfig(name=str(folder), **{"dtype": "float64", **options}), "cpu")
    assert isinstance(guidance, ScoreDistillation)
    return guidance


def _diffusers(folder: Path, kind: str) -> Any:
    """The same pipeline by diffusers, in float64."""
    from diffusers import IFPipeline, StableDiffusionPipeline

    options: dict[str, Any] = {} if kind == "latent" else {"watermarker": None}
    pipeline = {"latent": StableDiffusionPipeline, "pixel": IFPipeline}[kind].from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float64)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_embeddings_equal_those_of_diffusers(pipeline: Pipelines, kind: str) -> None:
    folder = pipeline(kind)
    embeddings = _guidance(folder, dtype="float32").embed("a Teapot")
    reference = _diffusers(folder, kind).to(torch.float32)
    for row, view in enumerate(["front", "side", "back", "overhead"]):
        options = {"prompt": f"a Teapot, {view} view", "device": "cpu", "negative_prompt": ""}
        text, null = reference.encode_prompt(**options, num_images_per_prompt=1, do_classifier_free_guidance=True)
        torch.testing.assert_close(embeddings.tensors["hidden"][row], text[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(embeddings.tensors["hidden"][-1], null[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(embeddings.tensors["hidden"][0], embeddings.tensors["hidden"][1])


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_prediction_equals_the_unet_asked_twice(pipeline: Pipelines, kind: str) -> None:
    folder = pipeline(kind)
    guidance = _guidance(folder)
    embeddings = guidance.embed("a teapot")
    noisy, t = torch.randn(3, 4 if kind == "latent" else 3, 8, 8, dtype=torch.float64), torch.tensor([3, 50, 98])
    with torch.no_grad():
        pair = guidance.model.predict(noisy, t, embeddings.select(VIEWS), VIEWS)
        unet = _diffusers(folder, kind).unet
        null = torch.cat([_ask(unet, noisy[i], t[i], embeddings.tensors["hidden"][-1]) for i in range(3)])
        text = torch.cat([_ask(unet, noisy[i], t[i], embeddings.tensors["hidden"][ROWS[i]]) for i in range(3)])
    torch.testing.assert_close(pair, torch.cat((null, text)), rtol=1e-9, atol=1e-9)
    assert (text - null).abs().max() > 1e-3, "the text must matter for this test to see anything"


def _ask(unet: Any, noisy: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
    """One prediction for one input, without the learned variance."""
    return unet(noisy[None], t, encoder_hidden_states=hidden[None].double()).sample[:, : len(noisy)]


def _derived(pipeline: Any, kind: str, images: Tensor, embeddings: PromptEmbeddings, t: Tensor, **how: Any) -> Tensor:
    """The gradient by autograd of the SDS objective, written with diffusers' own encoder, scheduler and U-Net."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=how["clip"], variance_type="fixed_small"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    images = images.clone().requires_grad_(True)
    x = images.mul(2).sub(1)
    if kind == "latent":
        x = pipeline.vae.encode(x).latent_dist.mode() * pipeline.vae.config.scaling_factor

    generator = torch.Generator().manual_seed(how["seed"])
    torch.randint(2, 98, (len(images),), generator=generator)
    noise = torch.randn(x.shape, generator=generator).double()
    objective = torch.zeros((), dtype=torch.float64)
    for i in range(len(images)):
        with torch.no_grad():
            noisy = scheduler.add_noise(x[i : i + 1], noise[i : i + 1], t[i : i + 1])
            null = _ask(pipeline.unet, noisy[0], t[i], embeddings.tensors["hidden"][-1])
            text = _ask(pipeline.unet, noisy[0], t[i], embeddings.tensors["hidden"][ROWS[i]])
            start = null if how["convention"] == "null" else text
            x0 = scheduler.step(start + how["scale"] * (text - null), int(t[i]), noisy).pred_original_sample
            abar = scheduler.alphas_cumprod[t[i]]
            epsilon = (noisy - abar.sqrt() * x0) / (1 - abar).sqrt()
            pull = (1 - abar) * (epsilon - noise[i : i + 1])
        objective = objective + (pull * x[i : i + 1]).sum()
    return torch.autograd.grad(objective, images)[0]


@pytest.mark.parametrize(
    ("kind", "prediction_type", "convention", "clip"),
    [
        ("latent", "epsilon", "null", False),
        ("latent", "epsilon", "text", False),
        ("latent", "v_prediction", "null", False),
        ("latent", "v_prediction", "text", False),
        ("pixel", "epsilon", "null", False),
        ("pixel", "epsilon", "text", True),
        ("pixel", "v_prediction", "text", False),
        ("pixel", "v_prediction", "null", True),
        ("pixel", "sample", "null", True),
    ],
)
def test_gradient_equals_an_independent_derivation(
    pipeline: Pipelines, kind: str, prediction_type: str, convention: str, clip: bool
) -> None:
    folder = pipeline(kind, prediction_type)
    guidance = _guidance(folder, guidance_scale=8.0, convention=convention, clip_x0=clip)
    embeddings = guidance.embed("a red chair")
    images = torch.rand(3, 3, guidance.image_size, guidance.image_size, dtype=torch.float64)
    out = guidance.sds_gradient(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(9))
    expected = _derived(
        _diffusers(folder, kind), kind, images, embeddings, out.t, clip=clip, convention=convention, scale=8.0, seed=9
    )
    assert len(set(out.t.tolist())) > 1
    assert expected.norm() > 1e-2
    torch.testing.assert_close(out.gradient, expected, rtol=1e-8, atol=1e-10)
    if clip:
        assert out.x0.abs().max() == 1, "nothing was clamped"


@pytest.mark.parametrize("size", [(16, 16), (7, 7), (33, 33), (16, 9)])
def test_gradient_through_the_resize(pipeline: Pipelines, size: tuple[int, int]) -> None:
    guidance = _guidance(pipeline("pixel"))
    embeddings = guidance.embed("a teapot")
    images = torch.rand(3, 3, *size, dtype=torch.float64)
    out = guidance.sds_gradient(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(2))
    small = resize(images, 8)
    inner = guidance.sds_gradient(small, embeddings, VIEWS, generator=torch.Generator().manual_seed(2))
    # The resize is linear: its adjoint is fixed by inner products with any other image.
    other = torch.rand_like(images)
    torch.testing.assert_close((out.gradient * other).sum(), (inner.gradient * resize(other, 8)).sum())
    assert out.gradient.shape == images.shape


def test_resize_is_antialiased_and_leaves_the_native_size_alone() -> None:
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1
    assert (resize(stripes, 4)[..., 1:-1] - 0.5).abs().max() < 0.05
    assert resize(stripes, 16) is stripes
    torch.testing.assert_close(resize(torch.full((1, 3, 5, 5), 0.3), 12), torch.full((1, 3, 12, 12), 0.3))


def test_what_the_folders_say_about_the_models(pipeline: Pipelines) -> None:
    latent, pixel = _guidance(pipeline("latent", "v_prediction")), _guidance(pipeline("pixel"))
    assert isinstance(latent.model, LatentModel)
    assert isinstance(pixel.model, PixelModel)
    assert (latent.image_size, pixel.image_size) == (16, 8)
    assert (latent.model.prediction_type, pixel.model.prediction_type) == ("v_prediction", "epsilon")
    assert (latent.guidance_scale, pixel.guidance_scale) == (100.0, 20.0)
    betas = torch.linspace(0.001**0.5, 0.12**0.5, 100, dtype=torch.float64) ** 2
    torch.testing.assert_close(latent.model.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=1e-6)


def test_text_encoder_is_loaded_once_per_prompt_and_freed(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamfusion_fast.guidance.pipeline_source import PipelineSource

    loaded: list[str] = []
    load = PipelineSource.load

    def counting(self: PipelineSource, component: str, dtype: torch.dtype | None = None) -> Any:
        loaded.append(component)
        return load(self, component, dtype)

    monkeypatch.setattr(PipelineSource, "load", counting)
    first = _guidance(pipeline("latent"))
    embeddings = first.embed("a chair")
    assert loaded == ["tokenizer", "text_encoder"]
    assert not [value for value in vars(first.model).values() if isinstance(value, torch.nn.Module)]
    again = _guidance(pipeline("latent")).embed("a chair")
    assert loaded == ["tokenizer", "text_encoder"]
    assert torch.equal(embeddings.tensors["hidden"], again.tensors["hidden"])
    _guidance(pipeline("latent")).embed("a red chair")
    assert loaded == ["tokenizer", "text_encoder"] * 2


def test_another_text_encoder_or_precision_is_another_entry(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")

    def identity(**options: Any) -> str:
        model = _guidance(folder, **options).model
        assert isinstance(model, PipelineModel)
        return model.text_identity

    before = identity()
    assert identity() == before
    assert identity(dtype="bfloat16") != before
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert identity() != before


def test_half_precision_model_gives_a_float32_gradient_near_the_exact_one(pipeline: Pipelines) -> None:
    results = []
    for dtype in ("float64", "bfloat16"):
        guidance = _guidance(pipeline("latent"), dtype=dtype, guidance_scale=2.0)
        images = torch.linspace(0, 1, 3 * 3 * 256).view(3, 3, 16, 16)
        embeddings = guidance.embed("a teapot")
        out = guidance.sds_gradient(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(4))
        assert out.gradient.dtype == torch.float32
        results.append(out.gradient)
    difference = (results[0] - results[1]).norm() / results[0].norm()
    assert difference < 0.05


def test_weights_are_frozen_and_load_may_be_called_ahead(pipeline: Pipelines) -> None:
    guidance = _guidance(pipeline("latent"))
    guidance.model.load()
    modules = [value for value in vars(guidance.model).values() if isinstance(value, torch.nn.Module)]
    assert len(modules) == 2
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)
    guidance.model.load()
    assert all(value in modules for value in vars(guidance.model).values() if isinstance(value, torch.nn.Module))
