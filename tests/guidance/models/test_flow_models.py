"""Flow-matching pipelines as guidance, against diffusers itself and a float64 derivation by autograd."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import (
    GuidanceConfig,
    GuidanceRequest,
    PromptEmbeddings,
    ScoreDistillation,
    Views,
    create_guidance,
)
from dreamfusion_fast.guidance.models.flow_pipelines import FluxModel, StableDiffusion3Model
from dreamfusion_fast.guidance.models.schedule import FlowMatching

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
KINDS = ["sd3", "sd3-without-t5", "flux", "schnell"]
VIEWS = Views(torch.tensor([3.1, 0.0, 0.5]), torch.tensor([0.0, 0.1, 1.4]))
ROWS = [2, 0, 3]
STEPS = 100
ATOL = 5e-5  # of numbers up to 4, behind sums over up to 512 tokens in float32


def _guidance(folder: Path, **options: Any) -> Any:
    guidance = create_guidance(GuidanceConfig(name=str(folder), **{"dtype": "float64", "cache": False, **options}))
    assert isinstance(guidance, ScoreDistillation)
    return guidance


def _diffusers(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The same pipeline by diffusers."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(dtype)


def _encoded(pipeline: Any, prompt: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Embedding and pooled embedding of a text, by diffusers."""
    if "Flux" in type(pipeline).__name__:
        hidden, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=tokens)
        return hidden, pooled
    hidden, _, pooled, _ = pipeline.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    return hidden, pooled


@pytest.mark.quick(2)
@pytest.mark.parametrize("negative", ["", "red view"])
@pytest.mark.parametrize(("kind", "tokens"), [("sd3", 256), ("sd3-without-t5", 256), ("flux", 512), ("schnell", 256)])
def test_embeddings_equal_those_of_diffusers(pipeline: Pipelines, kind: str, tokens: int, negative: str) -> None:
    folder = pipeline(kind)
    embeddings = _guidance(folder, dtype="float32", negative_prompt=negative).embed("a teapot")
    reference = _diffusers(folder, torch.float32)
    texts = [f"a teapot, {view} view" for view in ("front", "side", "back", "overhead")]
    assert sorted(embeddings.tensors) == ["hidden", "pooled"]
    for row, text in enumerate([*texts, negative]):
        for name, expected in zip(("hidden", "pooled"), _encoded(reference, text, tokens), strict=True):
            assert embeddings.tensors[name][row].shape == expected[0].shape
            torch.testing.assert_close(embeddings.tensors[name][row], expected[0], rtol=1e-5, atol=ATOL)
    for value in embeddings.tensors.values():
        assert not torch.allclose(value[0], value[1])


def _sampled(folder: Path, kind: str, embeddings: PromptEmbeddings, views: Views, indices: list[int]) -> list[Any]:
    """What the transformer was given and gave while diffusers drew two pictures: (noisy, time, null, text) each."""
    pipeline = _diffusers(folder)
    null, text = (half.double() for half in embeddings.select(("null", "text"), views)["hidden"].chunk(2))
    null_pooled, text_pooled = (half.double() for half in embeddings.select(("null", "text"), views)["pooled"].chunk(2))
    calls: list[tuple[dict[str, Any], Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, inputs, given, output: calls.append((given, output[0])), with_kwargs=True
    )
    given = {
        "prompt_embeds": text,
        "negative_prompt_embeds": null,
        "pooled_prompt_embeds": text_pooled,
        "negative_pooled_prompt_embeds": null_pooled,
        "generator": torch.Generator().manual_seed(5),
        "sigmas": np.array([(index + 1) / STEPS for index in indices]),
        "num_inference_steps": len(indices),
        "height": 16,
        "width": 16,
        "output_type": "latent",
    }
    if kind.startswith("sd3"):
        pipeline(**given, guidance_scale=4.0)
        assert all(torch.equal(*call["hidden_states"].chunk(2)) for call, _ in calls)
        return [(call["hidden_states"][:2], call["timestep"][:2], *output.chunk(2)) for call, output in calls]
    pipeline(**given, true_cfg_scale=4.0)
    seen = []
    for (call, text), (other, null) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(call["hidden_states"], other["hidden_states"])
        # diffusers takes the size of the picture, with the factor of the autoencoder.
        noisy, null, text = (
            pipeline._unpack_latents(value, 16, 16, 2) for value in (call["hidden_states"], null, text)
        )
        seen.append((noisy, call["timestep"] * 1000, null, text))
    return seen


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_prediction_equals_that_of_the_pipeline_while_it_samples(pipeline: Pipelines, kind: str) -> None:
    folder, indices = pipeline(kind), [97, 40, 3]
    guidance = _guidance(folder, negative_prompt="red")
    embeddings = guidance.embed("a teapot")
    views = Views(torch.tensor([3.1, 0.0]), torch.zeros(2))
    seen = _sampled(folder, kind, embeddings, views, indices)
    assert len(seen) == len(indices)
    for index, (noisy, time, null, text) in zip(indices, seen, strict=True):
        t = torch.full((2,), index)
        level = guidance.model.schedule.at(t, torch.float64)
        torch.testing.assert_close(level.sigma.flatten() * STEPS, time.double(), rtol=1e-6, atol=0)
        with torch.no_grad():
            pair = guidance.model.predict(noisy, t, embeddings.select(("null", "text"), views), views)
        torch.testing.assert_close(pair, torch.cat((null, text)), rtol=1e-9, atol=1e-9)
        assert (pair[:2] - pair[2:]).abs().max() > 1e-3, "the text must matter for this test to see anything"


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_prediction_in_float32(pipeline: Pipelines, kind: str) -> None:
    folder = pipeline(kind)
    exact, single = _guidance(folder), _guidance(folder, dtype="float32")
    embeddings = single.embed("a teapot")
    noisy = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    condition, t = embeddings.select(("null", "text"), VIEWS), torch.tensor([0, 50, 99])
    with torch.no_grad():
        expected = exact.model.predict(noisy.double(), t, condition, VIEWS)
        found = single.model.predict(noisy, t, condition, VIEWS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def _sigma(kind: str, t: Tensor) -> Tensor:
    """sigma of a timestep, by the papers' formulas."""
    s = (t.double() + 1) / STEPS
    if kind == "schnell":
        return s
    if kind != "flux":
        return 3 * s / (1 + 2 * s)
    mu = 0.5 + (1.15 - 0.5) * (16 - 8) / (40 - 8)  # 4 x 4 tokens
    return math.exp(mu) / (math.exp(mu) + 1 / s - 1)


def _asked(pipeline: Any, noisy: Tensor, time: Tensor, embeddings: PromptEmbeddings, row: int) -> Tensor:
    """One velocity for one input, by the transformer and the packing of diffusers' pipeline."""
    hidden, pooled = (embeddings.tensors[name][row][None].double() for name in ("hidden", "pooled"))
    told: dict[str, Any] = {"encoder_hidden_states": hidden, "pooled_projections": pooled, "return_dict": False}
    if "Flux" not in type(pipeline).__name__:
        return pipeline.transformer(hidden_states=noisy[None], timestep=time[None], **told)[0]
    scale = torch.tensor([3.5]) if pipeline.transformer.config.guidance_embeds else None
    output = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy[None], 1, 16, 8, 8),
        timestep=time[None].double() / 1000,
        guidance=scale,
        txt_ids=torch.zeros(hidden.shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float64),
        **told,
    )[0]
    return pipeline._unpack_latents(output, 16, 16, 2)


def _derived(
    pipeline: Any, kind: str, images: Tensor, embeddings: PromptEmbeddings, sigmas: Tensor, **how: Any
) -> Tensor:
    """The gradient by autograd of the objective, written with diffusers' own encoder and transformer."""
    images = images.clone().requires_grad_(True)
    config = pipeline.vae.config
    x = (pipeline.vae.encode(2 * images - 1).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    generator = torch.Generator().manual_seed(how["seed"])
    torch.randint(2, 98, (len(images),), generator=generator)
    noise = torch.randn(x.shape, generator=generator).double()
    objective = torch.zeros((), dtype=torch.float64)
    for i in range(len(images)):
        with torch.no_grad():
            sigma, n = sigmas[i].double(), noise[i : i + 1]
            noisy = (1 - sigma) * x[i : i + 1] + sigma * n
            null, text = (_asked(pipeline, noisy[0], sigmas[i] * STEPS, embeddings, row) for row in (-1, ROWS[i]))
            v = (null if how["convention"] == "null" else text) + how["scale"] * (text - null)
            if how["mode"] == "rfds":
                pull = v - (n - x[i : i + 1])
            else:
                clean = noisy - sigma * v
                epsilon = (noisy - (1 - sigma) * clean) / sigma
                pull = sigma**2 * (epsilon - n)
        objective = objective + (pull * x[i : i + 1]).sum()
    return torch.autograd.grad(objective, images)[0]


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mode", "weighting", "convention"),
    [("sds", "sds", "null"), ("sds", "sds", "text"), ("rfds", "uniform", "null"), ("rfds", "uniform", "text")],
)
def test_gradient_equals_an_independent_derivation(
    pipeline: Pipelines, kind: str, mode: str, weighting: str, convention: str
) -> None:
    folder = pipeline(kind)
    how = {"mode": mode, "convention": convention}
    guidance = _guidance(folder, guidance_scale=8.0, weighting=weighting, **how)
    embeddings = guidance.embed("a red chair")
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = guidance.gradient(GuidanceRequest(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(9)))
    sigmas = guidance.model.schedule.sigmas[out.t]
    torch.testing.assert_close(sigmas.double(), _sigma(kind, out.t), rtol=1e-6, atol=0)
    expected = _derived(_diffusers(folder), kind, images, embeddings, sigmas, scale=8.0, seed=9, **how)
    assert len(set(out.t.tolist())) > 1
    assert expected.norm() > 1e-2
    torch.testing.assert_close(out.gradient, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_half_precision_gives_a_float32_gradient_near_the_exact_one(pipeline: Pipelines, kind: str) -> None:
    results = []
    for dtype in ("float64", "bfloat16"):
        guidance = _guidance(pipeline(kind), dtype=dtype, guidance_scale=2.0)
        images = torch.linspace(0, 1, 3 * 3 * 256).view(3, 3, 16, 16)
        embeddings = guidance.embed("a teapot")
        out = guidance.gradient(GuidanceRequest(images, embeddings, VIEWS, generator=torch.Generator().manual_seed(4)))
        assert out.gradient.dtype == torch.float32
        results.append(out.gradient)
    assert (results[0] - results[1]).norm() / results[0].norm() < 0.05


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same(pipeline: Pipelines, kind: str) -> None:
    results = []
    for device in ("cpu", "cuda:0"):
        config = GuidanceConfig(name=str(pipeline(kind)), dtype="float32", cache=False)
        guidance = create_guidance(config, device)
        images = torch.linspace(0, 1, 3 * 3 * 256, device=device).view(3, 3, 16, 16)
        views = Views(VIEWS.azimuth.to(device), VIEWS.elevation.to(device))
        generator = torch.Generator().manual_seed(4)
        request = GuidanceRequest(images, guidance.embed("a teapot"), views, generator=generator)
        results.append(guidance.gradient(request).gradient.cpu())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4 * float(results[0].abs().max()))


def test_vsd_is_not_for_flows(pipeline: Pipelines) -> None:
    with pytest.raises(UserError, match=r"mode vsd: .* is a flow-matching model"):
        _guidance(pipeline("sd3"), mode="vsd")


def test_rfds_is_for_flows(pipeline: Pipelines) -> None:
    with pytest.raises(UserError, match=r"mode rfds: .* is no flow-matching model.*use mode sds"):
        _guidance(pipeline("latent"), mode="rfds")


def test_what_the_folders_say_about_the_models(pipeline: Pipelines) -> None:
    sd3, flux = _guidance(pipeline("sd3")), _guidance(pipeline("flux"))
    assert isinstance(sd3.model, StableDiffusion3Model)
    assert isinstance(flux.model, FluxModel)
    assert (sd3.image_size, flux.image_size) == (16, 16)
    assert (sd3.guidance_scale, flux.guidance_scale) == (100.0, 29.0)
    assert all(isinstance(guidance.model.schedule, FlowMatching) for guidance in (sd3, flux))
    assert sd3.model.schedule.steps == STEPS
    without = _guidance(pipeline("sd3-without-t5"))
    assert without.model.text_identity != sd3.model.text_identity


def test_flux_is_of_1024_pixels_where_nothing_else_is_said(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("flux")
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"other": 8'))
    guidance = _guidance(folder)
    assert guidance.image_size == 256, "128 latents a side, and an autoencoder that halves sides once"
    mu = 0.5 + (1.15 - 0.5) * (64**2 - 8) / (40 - 8)
    s = torch.arange(1, STEPS + 1).double() / STEPS
    expected = 1 / (1 + math.exp(-mu) * (1 / s - 1))
    torch.testing.assert_close(guidance.model.schedule.sigmas.double(), expected, rtol=1e-5, atol=0)


def test_only_a_flux_of_few_steps_is_warned_of(pipeline: Pipelines, said: Callable[[], list[str]]) -> None:
    _guidance(pipeline("flux"))
    assert not [line for line in said() if "few steps" in line]
    _guidance(pipeline("schnell"))
    assert len([line for line in said() if "few steps" in line]) == 1


def test_a_long_prompt_is_read_on_by_t5(pipeline: Pipelines) -> None:
    prompt = " ".join(["a red chair"] * 4)  # twelve words, of which CLIP takes ten with its view apart
    with pytest.warns(UserWarning, match="reads at most 12 tokens") as caught:
        found = _guidance(pipeline("flux"), dtype="float32").embed(prompt)
    assert len(caught) == 1
    whole = _encoded(_diffusers(pipeline("flux"), torch.float32), f"{prompt}, side view", 512)[0]
    torch.testing.assert_close(found.tensors["hidden"][1], whole[0], rtol=1e-5, atol=ATOL)
    assert not torch.allclose(found.tensors["pooled"][0], found.tensors["pooled"][1]), "the view is read by CLIP"


@pytest.mark.parametrize(
    ("kind", "relative", "old", "new", "message"),
    [
        ("sd3", "transformer/config.json", '"joint_attention_dim": 24', '"joint_attention_dim": 32', "of width 24"),
        ("sd3", "transformer/config.json", '"pooled_projection_dim": 20', '"pooled_projection_dim": 12', "of width 20"),
        ("sd3", "transformer/config.json", '"in_channels": 16', '"in_channels": 33', "not one for inpainting"),
        ("sd3", "transformer/config.json", '"pos_embed_max_size": 12', '"pos_embed_max_size": 3', "must be 4, the pat"),
        ("sd3", "transformer/config.json", '"pos_embed_max_size": 12', '"pos_embed_max_size": 100000', "to 512, got"),
        ("sd3", "scheduler/scheduler_config.json", "FlowMatchEuler", "DDIM", "no schedule of a flow from images"),
        ("sd3", "scheduler/scheduler_config.json", '"shift": 3.0', '"shift": -3.0', "and up to 1000, got -3.0"),
        ("sd3", "scheduler/scheduler_config.json", '"shift": 3.0', '"shift": NaN', "and up to 1000, got nan"),
        ("sd3-without-t5", "transformer/config.json", '_dim": 24', '_dim": 14', "together, more than the 14"),
        ("flux", "transformer/config.json", '"in_channels": 64', '"in_channels": 384', "not one for inpainting"),
        ("flux", "transformer/config.json", '"sample_size": 8', '"sample_size": 7', "no patches of 2 x 2 latents"),
        ("flux", "transformer/config.json", '"pooled_projection_dim": 10', '"pooled_projection_dim": 12', "width 10"),
        ("flux", "model_index.json", '"text_encoder_2": ["transformers', '"other": ["transformers', "has no text"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    own_pipeline: Pipelines, kind: str, relative: str, old: str, new: str, message: str
) -> None:
    folder = own_pipeline(kind)
    path = folder / relative
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)):
        _guidance(folder)
