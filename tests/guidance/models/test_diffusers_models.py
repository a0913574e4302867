"""diffusers pipelines as guidance, against diffusers itself and a float64 autograd derivation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.guidance import (
    GuidanceConfig,
    GuidanceRequest,
    PromptEmbeddings,
    ScoreDistillation,
    Views,
    create_guidance,
)
from dreamfusion_fast.guidance.cache import EmbeddingCache
from dreamfusion_fast.guidance.models.pipelines import LatentModel, PixelModel, resize
from dreamfusion_fast.guidance.models.sdxl_pipeline import SDXLModel
from dreamfusion_fast.guidance.prompts import Prompt
from dreamfusion_fast.rendering import RendererConfig
from dreamfusion_fast.training.memory_plan import MemoryLimit, MemoryPlanner

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
    from diffusers import IFPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    unchecked: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline_class, options = {
        "latent": (StableDiffusionPipeline, unchecked),
        "sdxl": (StableDiffusionXLPipeline, {"add_watermarker": False}),
        "pixel": (IFPipeline, {**unchecked, "watermarker": None}),
    }[kind]
    pipeline = pipeline_class.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float64)


@pytest.mark.quick(2)
@pytest.mark.parametrize("negative", ["", "red view"])
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_embeddings_equal_those_of_diffusers(pipeline: Pipelines, kind: str, negative: str) -> None:
    folder = pipeline(kind)
    embeddings = _guidance(folder, dtype="float32", negative_prompt=negative).embed("a Teapot")
    reference = _diffusers(folder, kind).to(torch.float32)
    names = ["hidden", "pooled"] if kind == "sdxl" else ["hidden"]
    assert sorted(embeddings.tensors) == names
    for row, view in enumerate(["front", "side", "back", "overhead"]):
        options = {"prompt": f"a Teapot, {view} view", "device": "cpu", "negative_prompt": negative or None}
        expected = reference.encode_prompt(**options, num_images_per_prompt=1, do_classifier_free_guidance=True)
        for name, text, null in zip(names, expected[::2], expected[1::2], strict=True):
            torch.testing.assert_close(embeddings.tensors[name][row], text[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(embeddings.tensors[name][-1], null[0], rtol=1e-5, atol=1e-5)
    for value in embeddings.tensors.values():
        assert not torch.allclose(value[0], value[1])
        assert bool((value[-1] == 0).all()) == (kind == "sdxl" and not negative)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_a_cached_embedding_of_another_width_is_made_again(pipeline: Pipelines, kind: str, tmp_path: Path) -> None:
    folder, name = pipeline(kind), "pooled" if kind == "sdxl" else "hidden"
    model = _guidance(folder, dtype="float32").model

    def embed(tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        cache = EmbeddingCache(tmp_path)
        compute = model.embed_texts if tensors is None else lambda _: tensors
        return cache.get_or_compute(model.text_identity, [Prompt("a teapot")], compute, model.text_shapes())

    right = embed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # taken
        assert torch.equal(embed({})[name], right[name])
    (entry,) = tmp_path.iterdir()
    entry.unlink()
    embed(right | {name: right[name][..., :-1].contiguous()})
    with pytest.warns(UserWarning, match="are not this model's"):
        again = embed()
    assert again.keys() == right.keys()
    assert all(torch.equal(again[key], right[key]) for key in right)


def test_empty_negative_prompt_is_embedded_where_the_pipeline_says_so(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("sdxl")
    index = folder / "model_index.json"
    before = _guidance(folder).model.text_identity
    index.write_text(index.read_text().replace('"force_zeros_for_empty_prompt": true', '"other": true'))
    assert _guidance(folder).model.text_identity != before
    embeddings = _guidance(folder, dtype="float32").embed("a teapot")
    expected = _diffusers(folder, "sdxl").to(torch.float32).encode_prompt("", device="cpu", negative_prompt="")
    torch.testing.assert_close(embeddings.tensors["hidden"][-1], expected[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings.tensors["pooled"][-1], expected[2][0], rtol=1e-5, atol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_prediction_equals_that_of_the_pipeline_while_it_samples(
    pipeline: Pipelines, kind: str, prediction_type: str
) -> None:
    """diffusers draws two pictures; what its U-Net was given and gave is recorded and asked of the guidance."""
    from diffusers import DDPMScheduler

    folder = pipeline(kind, prediction_type)
    guidance, reference = _guidance(folder, negative_prompt="red"), _diffusers(folder, kind)
    embeddings = guidance.embed("a teapot")
    views = Views(torch.tensor([3.1, 0.0]), torch.zeros(2))
    null, text = (half.double() for half in embeddings.select(("null", "text"), views)["hidden"].chunk(2))
    given: dict[str, Any] = {"prompt_embeds": text, "negative_prompt_embeds": null}
    if kind == "sdxl":
        null, text = (half.double() for half in embeddings.select(("null", "text"), views)["pooled"].chunk(2))
        given.update(pooled_prompt_embeds=text, negative_pooled_prompt_embeds=null)
    # Every timestep of this scheduler's is one that the model was trained on, and its input is not scaled.
    variance = "learned_range" if kind == "pixel" else "fixed_small"
    reference.scheduler = DDPMScheduler.from_config(reference.scheduler.config, variance_type=variance)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    reference.unet.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output[0])))
    generator = torch.Generator().manual_seed(5)
    reference(**given, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="pt")

    assert len({int(t) for _, t, _ in seen}) == 3
    for noisy, t, output in seen:
        torch.testing.assert_close(noisy[:2], noisy[2:], rtol=0, atol=0)
        with torch.no_grad():
            pair = guidance.model.predict(noisy[:2], t.repeat(2), embeddings.select(("null", "text"), views), views)
        assert output.shape[1] == (6 if kind == "pixel" else 4)
        assert pair.shape[1] == (3 if kind == "pixel" else 4)
        torch.testing.assert_close(pair, output[:, : pair.shape[1]], rtol=1e-9, atol=1e-9)
        assert (pair[:2] - pair[2:]).abs().max() > 1e-3, "the text must matter for this test to see anything"


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_prediction_equals_the_unet_asked_twice(pipeline: Pipelines, kind: str) -> None:
    folder = pipeline(kind)
    guidance = _guidance(folder)
    embeddings = guidance.embed("a teapot")
    noisy = torch.randn(3, 3 if kind == "pixel" else 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([3, 50, 98])
    with torch.no_grad():
        pair = guidance.model.predict(noisy, t, embeddings.select(("null", "text"), VIEWS), VIEWS)
        unet = _diffusers(folder, kind).unet
        null = torch.cat([_ask(unet, noisy[i], t[i], embeddings, -1) for i in range(3)])
        text = torch.cat([_ask(unet, noisy[i], t[i], embeddings, ROWS[i]) for i in range(3)])
    torch.testing.assert_close(pair, torch.cat((null, text)), rtol=1e-9, atol=1e-9)
    assert (text - null).abs().max() > 1e-3, "the text must matter for this test to see anything"


def _ask(unet: Any, noisy: Tensor, t: Tensor, embeddings: PromptEmbeddings, row: int) -> Tensor:
    """One prediction for one input, without the learned variance."""
    told = {name: value[row][None].double() for name, value in embeddings.tensors.items()}
    added = None
    if "pooled" in told:
        sizes = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=torch.float64)
        added = {"text_embeds": told["pooled"], "time_ids": sizes}
    output = unet(noisy[None], t, encoder_hidden_states=told["hidden"], added_cond_kwargs=added)
    return output.sample[:, : len(noisy)]


def _derived(pipeline: Any, kind: str, images: Tensor, embeddings: PromptEmbeddings, t: Tensor, **how: Any) -> Tensor:
    """The gradient by autograd of the SDS objective, written with diffusers' own encoder, scheduler and U-Net."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=how["clip"], variance_type="fixed_small"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    images = images.clone().requires_grad_(True)
    x = images.mul(2).sub(1)
    if kind != "pixel":
        x = pipeline.vae.encode(x).latent_dist.mode() * pipeline.vae.config.scaling_factor

    generator = torch.Generator().manual_seed(how["seed"])
    torch.randint(2, 98, (len(images),), generator=generator)
    noise = torch.randn(x.shape, generator=generator).double()
    objective = torch.zeros((), dtype=torch.float64)
    for i in range(len(images)):
        with torch.no_grad():
            noisy = scheduler.add_noise(x[i : i + 1], noise[i : i + 1], t[i : i + 1])
            null = _ask(pipeline.unet, noisy[0], t[i], embeddings, -1)
            text = _ask(pipeline.unet, noisy[0], t[i], embeddings, ROWS[i])
            start = null if how["convention"] == "null" else text
            x0 = scheduler.step(start + how["scale"] * (text - null), int(t[i]), noisy).pred_original_sample
            assert not how["clip"] or x0.abs().max() == 1, "nothing was clamped"
            abar = scheduler.alphas_cumprod[t[i]]
            epsilon = (noisy - abar.sqrt() * x0) / (1 - abar).sqrt()
            pull = (1 - abar) * (epsilon - noise[i : i + 1])
        objective = objective + (pull * x[i : i + 1]).sum()
    return torch.autograd.grad(objective, images)[0]


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("kind", "prediction_type", "convention", "clip"),
    [
        ("latent", "epsilon", "null", False),
        ("latent", "epsilon", "text", False),
        ("latent", "v_prediction", "null", False),
        ("latent", "v_prediction", "text", False),
        ("sdxl", "epsilon", "null", False),
        ("sdxl", "v_prediction", "text", False),
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
    out = guidance.gradient(GuidanceRequest(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(9)))
    expected = _derived(
        _diffusers(folder, kind), kind, images, embeddings, out.t, clip=clip, convention=convention, scale=8.0, seed=9
    )
    assert len(set(out.t.tolist())) > 1
    assert expected.norm() > 1e-2
    torch.testing.assert_close(out.gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.quick(1)
@pytest.mark.parametrize("size", [(16, 16), (7, 7), (33, 33), (16, 9)])
def test_gradient_through_the_resize(pipeline: Pipelines, size: tuple[int, int]) -> None:
    guidance = _guidance(pipeline("pixel"))
    embeddings = guidance.embed("a teapot")
    images = torch.rand(3, 3, *size, dtype=torch.float64)
    out = guidance.gradient(GuidanceRequest(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(2)))
    small = resize(images, 8)
    inner = guidance.gradient(GuidanceRequest(small, embeddings, VIEWS, generator=torch.Generator().manual_seed(2)))
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
    assert (latent.model.schedule.prediction_type, pixel.model.schedule.prediction_type) == ("v_prediction", "epsilon")
    assert (latent.guidance_scale, pixel.guidance_scale) == (100.0, 20.0)
    sdxl = _guidance(pipeline("sdxl"), dtype="float16").model
    assert isinstance(sdxl, SDXLModel)
    assert (sdxl.image_size, sdxl.dtype) == (16, torch.float16)
    betas = torch.linspace(0.001**0.5, 0.12**0.5, 100, dtype=torch.float64) ** 2
    torch.testing.assert_close(
        latent.model.schedule.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=1e-6
    )


def test_half_precision_model_gives_a_float32_gradient_near_the_exact_one(pipeline: Pipelines) -> None:
    results = []
    for dtype in ("float64", "bfloat16"):
        guidance = _guidance(pipeline("latent"), dtype=dtype, guidance_scale=2.0)
        images = torch.linspace(0, 1, 3 * 3 * 256).view(3, 3, 16, 16)
        embeddings = guidance.embed("a teapot")
        out = guidance.gradient(GuidanceRequest(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(4)))
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


@pytest.mark.parametrize(("kind", "wanted"), [("latent", torch.float16), ("sdxl", torch.float32)])
def test_autoencoder_that_overflows_in_half_precision_is_run_in_float32(
    pipeline: Pipelines, kind: str, wanted: torch.dtype
) -> None:
    guidance = _guidance(pipeline(kind), dtype="float16")
    guidance.model.load()
    modules = {type(value).__name__: value for value in vars(guidance.model).values() if hasattr(value, "dtype")}
    assert modules["AutoencoderKL"].dtype == wanted
    assert modules["UNet2DConditionModel"].dtype == torch.float16


@pytest.mark.quick(1)
@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16"])
def test_an_autoencoder_that_overflows_is_rescaled_where_its_encoder_is_ours(
    own_pipeline: Pipelines, wanted: str
) -> None:
    """Here on a CPU. Its weights are made to overflow in float16; the gradient is that of float64 all the same."""
    from safetensors.torch import load_file, save_file

    folder = own_pipeline("sdxl")
    (path,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(path)
    for name in ("weight", "bias"):
        tensors[f"encoder.conv_in.{name}"] *= 3e5
    save_file(tensors, path, metadata={"format": "pt"})
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def gradient(dtype: str, **options: Any) -> tuple[Any, Tensor]:
        model: Any = _guidance(folder, dtype=dtype, **options).model
        model._fuses = dtype == "float16"
        given = images.clone().requires_grad_()
        return model, torch.autograd.grad(model.encode(given).sum(), given)[0]

    _, exact = gradient("float64")
    model, found = gradient("float16", autoencoder_dtype=wanted)
    assert model._vae.encoder.conv_in.weight.dtype == {"auto": torch.float16}.get(wanted, getattr(torch, wanted, None))
    assert model.memory_needs(1, 64).encode > 0
    error = float((found - exact).norm() / exact.norm())
    assert error < {"auto": 1e-2, "float32": 1e-4, "bfloat16": 0.2}[wanted]


@pytest.mark.quick(2)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_the_quicker_parts_give_the_same(pipeline: Pipelines, kind: str, recompute: bool) -> None:
    """The modules that a GPU runs in place of diffusers' own, here on the CPU in float64."""
    results = []
    for quicker in (False, True):
        guidance = _guidance(pipeline(kind), dtype="float64")
        guidance.model._fuses = quicker
        guidance.set_recompute(recompute)
        torch.manual_seed(8)
        images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
        views = Views(torch.tensor([0.1, 3.0]), torch.tensor([0.2, 0.1]))
        embeddings = guidance.embed("a red chair")
        results.append(
            guidance.gradient(GuidanceRequest(images, embeddings, views, generator=torch.Generator().manual_seed(9)))
        )
    plain, other = results
    assert plain.gradient.abs().max() > 1e-3
    torch.testing.assert_close(other.residual, plain.residual, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(other.gradient, plain.gradient, rtol=1e-8, atol=1e-10)


def test_a_model_says_what_memory_it_needs(pipeline: Pipelines) -> None:
    guidance = _guidance(pipeline("latent"), dtype="float32")
    needs = guidance.memory_needs(1, 64)
    guidance.model.load()
    model: Any = guidance.model
    unet = 4 * sum(parameter.numel() for parameter in model._network.parameters())
    encoder = 4 * sum(parameter.numel() for parameter in model._vae.encoder.parameters())
    assert unet + encoder < needs.weights < unet + 4 * encoder
    assert needs.unet > 0
    assert _guidance(pipeline("pixel")).memory_needs(1, 64).encode == 0


def test_memory_of_the_encoding_is_that_of_the_encoder_that_runs(own_pipeline: Pipelines) -> None:
    """Only the package's own has less to keep; a plan that counted on it elsewhere would save nothing."""
    from diffusers import AutoencoderKL

    folder = own_pipeline("latent")

    def planned(quicker: bool) -> tuple[int, int, bool]:
        guidance = _guidance(folder, dtype="float32")
        model: Any = guidance.model
        model._fuses = quicker
        needs = guidance.memory_needs(1, 64)
        limit = MemoryLimit(10**9, "--memory 1GB")
        planner = MemoryPlanner(guidance, RendererConfig(), 1, 64, 0, limit, torch.device("cpu"))
        model.load()
        assert (model._encoder is not None) == (needs.encode_recomputed < needs.encode)
        return needs.encode, needs.encode_recomputed, any(plan.recompute for plan in planner.ladder)

    plain, recomputed, can = planned(quicker=False)
    own, own_recomputed, own_can = planned(quicker=True)
    assert (recomputed, can, own_can) == (plain, False, True)
    assert 0 < own_recomputed < own < plain / 2
    # A GPU with the quicker parts, and an autoencoder that they do not know.
    config = AutoencoderKL.load_config(folder / "vae")
    blocks = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    AutoencoderKL.from_config({**config, "down_block_types": blocks}).save_pretrained(folder / "vae")
    assert planned(quicker=True) == (plain, plain, False)


def test_an_autoencoder_that_did_not_fit_is_loaded_again(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever saves memory elsewhere may call `load` once more."""
    from diffusers import AutoencoderKL

    guidance: Any = _guidance(pipeline("latent"), dtype="float32")
    move, moved = AutoencoderKL.to, 0

    def to(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal moved
        if torch.device("cpu") in arguments:
            moved += 1
            if moved == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return move(self, *arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        guidance.load()
    guidance.load()
    assert moved == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_networks_as_diffusers_runs_them_give_the_same(pipeline: Pipelines, kind: str) -> None:
    folder, results = pipeline(kind), []
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()
    views = Views(VIEWS.azimuth.cuda(), VIEWS.elevation.cuda())
    for fused in (False, True):
        config = GuidanceConfig(name=str(folder), dtype="float32", fused=fused, cache=False)
        guidance = create_guidance(config, torch.device("cuda", 0))
        embeddings = guidance.embed("a teapot")
        for _ in range(2):  # the second time graphs are replayed
            given = images.clone().requires_grad_()
            generator = torch.Generator().manual_seed(4)
            output = guidance.gradient(GuidanceRequest(given, embeddings, views, generator=generator))
        results.append(output.gradient)
        assert bool(guidance.model._evaluate._graphs) == fused
    scale = float(results[0].abs().max())
    assert scale > 0
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4 * scale)
