"""Names that lead nowhere, or to something that cannot guide: one clear line each, before anything large is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import KNOWN_GUIDANCE, GuidanceConfig, create_guidance

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]


def _refused(name: str | Path, message: str, **options: Any) -> str:
    with pytest.raises(UserError, match=message) as caught:
        create_guidance(GuidanceConfig(name=str(name), **options))
    text = str(caught.value)
    assert "\n" not in text
    return text


def _edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_unknown_name_lists_the_known_ones() -> None:
    text = _refused("dall-e", "unknown guidance 'dall-e'")
    assert all(name in text for name in KNOWN_GUIDANCE)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder-here", "a/b/c"])
def test_folder_that_is_not_there(name: str) -> None:
    _refused(name, "there is no such folder.*model_index.json")


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    _refused(tmp_path, "no diffusers pipeline, it lacks model_index.json")


@pytest.mark.parametrize(("name", "message"), [("model.ckpt", "which can run code"), ("model.txt", "no checkpoint in")])
def test_other_files(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"")
    _refused(tmp_path / name, f"is a file, .*{message}.*want one in safetensors, or a folder")


@pytest.mark.parametrize("content", ["{not json", "[1, 2]", ""])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    _refused(tmp_path, "model_index.json")


@pytest.mark.parametrize(
    ("kind", "component"),
    [
        *(("latent", component) for component in ("scheduler", "text_encoder", "tokenizer", "vae")),
        *(("sdxl", component) for component in ("scheduler", "tokenizer", "tokenizer_2", "vae")),
        *(("pixel", component) for component in ("scheduler", "text_encoder", "tokenizer")),
    ],
)
def test_component_missing_from_the_index(own_pipeline: Pipelines, kind: str, component: str) -> None:
    folder = own_pipeline(kind)
    _edit(folder / "model_index.json", **{component: [None, None]})
    _refused(folder, f"Pipeline.*has no {component}:")


@pytest.mark.parametrize(
    ("component", "lacking"),
    [
        ("unet", "unet/config.json"),
        ("vae", "vae/config.json"),
        ("scheduler", "scheduler/scheduler_config.json"),
        ("text_encoder", "text_encoder/config.json"),
        ("text_encoder_2", "text_encoder_2/config.json"),
    ],
)
def test_component_missing_on_disk(own_pipeline: Pipelines, component: str, lacking: str) -> None:
    folder = own_pipeline("sdxl" if component.endswith("_2") else "latent")
    shutil.rmtree(folder / component)
    _refused(folder, f"lacks {lacking}")


def test_folder_with_a_safety_checker_only(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": ["stable_diffusion", "Checker"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    _refused(tmp_path, "has no unet or transformer, only safety_checker")


def test_pipeline_of_another_kind(tmp_path: Path) -> None:
    index = {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    _refused(tmp_path, "SanaPipeline has a transformer of class SanaTransformer2DModel: pipelines of Stable Diffusion")


def test_a_flow_without_its_parts(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    _refused(tmp_path, r"\(StableDiffusion3Pipeline\) has no vae, text_encoder, tokenizer, tokenizer_2: ")


def test_refiner(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("sdxl")
    _edit(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    _refused(folder, "text_encoder_2 alone, as SDXL's refiner.*name the base model")


def test_unet_of_sdxl_with_one_text_encoder(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("sdxl")
    _edit(folder / "model_index.json", text_encoder_2=[None, None])
    _refused(folder, "reads two text encoders, but the pipeline has no text_encoder_2")


def test_unet_of_stable_diffusion_with_two_text_encoders(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("sdxl")
    _edit(folder / "unet" / "config.json", addition_embed_type=None)
    _refused(folder, "the pipeline has two text encoders, but the unet is not one of SDXL")


@pytest.mark.parametrize(
    ("component", "class_name", "message"),
    [
        (
            "unet",
            "UNet3DConditionModel",
            "unet is of class UNet3DConditionModel of diffusers, wanted is UNet2DConditionModel",
        ),
        (
            "vae",
            "AutoencoderDC",
            "vae is of class AutoencoderDC of diffusers, wanted is AutoencoderKL or AutoencoderTiny of diffusers",
        ),
        (
            "text_encoder",
            "BertModel",
            "text_encoder is of class BertModel, wanted is CLIPTextModel or .*T5EncoderModel",
        ),
        ("text_encoder_2", "CLIPTextModel", "text_encoder_2 is of class CLIPTextModel, wanted is CLIPTextModelWithP"),
    ],
)
def test_component_of_another_class(own_pipeline: Pipelines, component: str, class_name: str, message: str) -> None:
    folder = own_pipeline("sdxl")
    _edit(
        folder / "model_index.json", **{component: ["transformers" if "text" in component else "diffusers", class_name]}
    )
    _refused(folder, message)


@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_class_embeds": 1000}, "reads more than text .num_class_embeds is 1000"),
        ({"class_embed_type": "projection"}, "reads more than text .class_embed_type is 'projection'"),
        ({"addition_embed_type": "text_image"}, "reads more than text .addition_embed_type is 'text_image'"),
        ({"encoder_hid_dim_type": "image_proj"}, "reads more than text .encoder_hid_dim_type is 'image_proj'"),
        ({"time_cond_proj_dim": 256}, "is distilled and takes the guidance scale"),
    ],
)
def test_unet_that_reads_more(own_pipeline: Pipelines, kind: str, fields: dict[str, Any], message: str) -> None:
    folder = own_pipeline(kind)
    _edit(folder / "unet" / "config.json", **fields)
    _refused(folder, message)


def test_autoencoder_with_a_scale_per_channel(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("sdxl")
    _edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    _refused(folder, "latents_mean or latents_std per channel is not served")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_component_without_weights(own_pipeline: Pipelines, component: str) -> None:
    folder = own_pipeline("sdxl")
    for path in (folder / component).glob("*.safetensors"):
        path.unlink()
    _refused(folder, f"{component} holds no weights")


def test_pickles_are_loaded_on_request_only(own_pipeline: Pipelines) -> None:
    from safetensors.torch import load_file

    folder = own_pipeline("latent")
    (weights,) = (folder / "unet").glob("*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    _refused(folder, "unet are stored as pickles")
    create_guidance(GuidanceConfig(name=str(folder), allow_pickle=True)).model.load()
    weights.with_suffix(".bin").unlink()
    _refused(folder, r"unet holds no weights \(\*.safetensors or pickles\)", allow_pickle=True)


def test_damaged_weights(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    guidance = create_guidance(GuidanceConfig(name=str(folder)))
    with pytest.raises(UserError, match=r"cannot load unet \(UNet2DConditionModel\)") as caught:
        guidance.model.load()
    assert "\n" not in str(caught.value)


def test_class_from_elsewhere_is_not_imported(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")
    _edit(folder / "model_index.json", tokenizer=["os", "system"])
    _refused(folder, "tokenizer is of class system of os, wanted is CLIPTokenizer or .* of transformers")
    _edit(folder / "model_index.json", tokenizer=["transformers", "NoSuchTokenizer"])
    _refused(folder, "tokenizer is of class NoSuchTokenizer of transformers, wanted is")


def test_text_encoder_of_the_wrong_width(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")
    _edit(folder / "text_encoder" / "config.json", hidden_size=20)
    _refused(folder, "width 20.*width 16")
    _edit(folder / "text_encoder" / "config.json", hidden_size=16)
    create_guidance(GuidanceConfig(name=str(folder)))


@pytest.mark.parametrize("kind", ["latent", "sdxl"])
def test_width_given_for_each_block(own_pipeline: Pipelines, kind: str) -> None:
    folder = own_pipeline(kind)
    for widths, others in [([16, 16], None), ([16, 24], "24"), ([24, 16], "24"), ([24, 32], "24 and 32")]:
        _edit(folder / "unet" / "config.json", cross_attention_dim=widths)
        if others is None:
            create_guidance(GuidanceConfig(name=str(folder)))
        else:
            _refused(folder, f"vectors of width 16( together)?, the unet reads width {others}: they were not made")


@pytest.mark.parametrize("value", ["16", [], [16, None], 16.5])
@pytest.mark.parametrize(("kind", "field"), [("latent", "cross_attention_dim"), ("pixel", "encoder_hid_dim")])
def test_width_that_is_none(own_pipeline: Pipelines, kind: str, field: str, value: Any) -> None:
    folder = own_pipeline(kind)
    _edit(folder / "unet" / "config.json", **{field: value})
    _refused(folder, f"the unet's {field} must be a whole number, or one for each block, got ")


@pytest.mark.parametrize(("component", "width"), [("text_encoder", 16 + 6), ("text_encoder_2", 10 + 16)])
def test_text_encoders_of_the_wrong_width_together(own_pipeline: Pipelines, component: str, width: int) -> None:
    folder = own_pipeline("sdxl")
    _edit(folder / component / "config.json", hidden_size=16)
    _refused(folder, f"text encoders give vectors of width {width} together, the unet reads width 16")


def test_pooled_output_of_the_wrong_width(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("sdxl")
    _edit(folder / "text_encoder_2" / "config.json", projection_dim=16)
    _refused(folder, "text_encoder_2 gives pooled vectors of width 16, the unet reads width 12 beside 6 numbers")
    _edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=None)
    _refused(folder, "lacks addition_time_embed_dim or projection_class_embeddings_input_dim")


def test_pixel_text_encoder_of_the_wrong_width(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("pixel")
    _edit(folder / "text_encoder" / "config.json", d_model=16)
    _refused(folder, "width 16.*width 24")


@pytest.mark.parametrize(("kind", "channels"), [("latent", 9), ("sdxl", 8), ("pixel", 6)])
def test_inpainting_and_upscaling(own_pipeline: Pipelines, kind: str, channels: int) -> None:
    folder = own_pipeline(kind)
    _edit(folder / "unet" / "config.json", in_channels=channels)
    _refused(folder, f"reads {channels} channels.*text-to-image")


@pytest.mark.quick(3)
@pytest.mark.parametrize("channels", [1, 5, "4"])
@pytest.mark.parametrize(("kind", "wanted"), [("latent", 4), ("sdxl", 4), ("pixel", 3)])
def test_unet_that_predicts_something_else(own_pipeline: Pipelines, kind: str, wanted: int, channels: Any) -> None:
    folder = own_pipeline(kind)
    _edit(folder / "unet" / "config.json", out_channels=channels)
    _refused(folder, f"out_channels must be {wanted}, as many as it reads, or {2 * wanted} .*, got {channels!r}")
    for served in (wanted, 2 * wanted):
        _edit(folder / "unet" / "config.json", out_channels=served)
        create_guidance(GuidanceConfig(name=str(folder)))


@pytest.mark.parametrize("field", ["scaling_factor", "shift_factor"])
@pytest.mark.parametrize("value", ["0.5", [0.5], True, float("nan"), float("inf")])
def test_autoencoder_whose_scale_is_no_number(own_pipeline: Pipelines, field: str, value: Any) -> None:
    folder = own_pipeline("latent")
    _edit(folder / "vae" / "config.json", **{field: value})
    _refused(folder, f"the vae's {field} must be a number, got ")


def test_autoencoder_whose_scale_is_zero_or_not_given(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")
    _edit(folder / "vae" / "config.json", scaling_factor=0)
    _refused(folder, "the vae's scaling_factor is 0")
    _edit(folder / "vae" / "config.json", scaling_factor=None, shift_factor=None)
    create_guidance(GuidanceConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "got 'flow_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler is no diffusion"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler is no diffusion"),
        ({"num_train_timesteps": None}, "no diffusion noise schedule"),
        ({"beta_schedule": "other"}, "noise schedule"),
    ],
)
def test_schedules_that_are_not_understood(own_pipeline: Pipelines, fields: dict[str, Any], message: str) -> None:
    folder = own_pipeline("latent")
    _edit(folder / "scheduler" / "scheduler_config.json", **fields)
    _refused(folder, message)


@pytest.mark.parametrize("size", [None, [8, 4], 0, "8"])
def test_unet_without_a_size(own_pipeline: Pipelines, size: Any) -> None:
    folder = own_pipeline("pixel")
    _edit(folder / "unet" / "config.json", sample_size=size)
    _refused(folder, "sample_size")


def test_variant_is_found_by_its_files(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")
    for component in ("unet", "vae", "text_encoder"):
        (weights,) = (folder / component).glob("*.safetensors")
        weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    guidance = create_guidance(GuidanceConfig(name=str(folder)))
    guidance.embed("a chair")
    guidance.model.load()


def test_variant_is_found_for_each_component(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    guidance = create_guidance(GuidanceConfig(name=str(folder)))
    guidance.embed("a chair")
    guidance.model.load()
    _refused(folder, "vae holds no weights of the variant 'fp16'|text_encoder holds no weights of the", variant="fp16")


def test_diffusers_not_installed(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "diffusers" else find(name, *rest)
    )
    _refused(pipeline("latent"), "needs diffusers, not installed here: pip install diffusers")
