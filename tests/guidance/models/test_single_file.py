"""Checkpoints in one file: tiny pipelines turned into the original layout, beside their folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, Views, create_guidance
from dreamfusion_fast.guidance.models import single_file
from dreamfusion_fast.guidance.models.original_layout import plain_text_name, unet_names, vae_name
from dreamfusion_fast.guidance.models.single_file_configs import CONFIGS

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
VIEWS = Views(torch.tensor([3.1, 0.0]), torch.tensor([0.0, 0.1]))


def _weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def original(folder: Path, open_clip: bool = False) -> dict[str, Tensor]:
    """The tensors of a tiny pipeline in the layout of the sites' files."""
    unet, vae = _weights(folder / "unet"), _weights(folder / "vae")
    tensors = {f"model.diffusion_model.{new}": unet[name] for name, new in unet_names(unet, 1).items()}
    for name, value in vae.items():
        wide = "attentions" in name and value.ndim == 2
        tensors[f"first_stage_model.{vae_name(name, 2)}"] = value[..., None, None].contiguous() if wide else value
    two = (folder / "text_encoder_2").exists()
    text = {plain_text_name(name): value for name, value in _weights(folder / "text_encoder").items()}
    if open_clip:
        tensors |= _open_clip(text, "cond_stage_model.model.")
    else:
        prefix = "conditioner.embedders.0" if two else "cond_stage_model"
        tensors |= {f"{prefix}.transformer.text_model.{name}": value for name, value in text.items()}
    if two:
        second = {plain_text_name(name): value for name, value in _weights(folder / "text_encoder_2").items()}
        tensors |= _open_clip(second, "conditioner.embedders.1.model.")
    return tensors


def _open_clip(text: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By hand, as OpenCLIP names its parts."""
    tensors = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
    }
    for end in ("weight", "bias"):
        tensors[f"ln_final.{end}"] = text[f"final_layer_norm.{end}"]
        for layer in range(2):
            old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            projections = [text[f"{old}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            tensors[f"{new}.attn.in_proj_{end}"] = torch.cat(projections)
            tensors[f"{new}.attn.out_proj.{end}"] = text[f"{old}.self_attn.out_proj.{end}"]
            for name, other in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
                tensors[f"{new}.{other}.{end}"] = text[f"{old}.{name}.{end}"]
            for name, other in (("fc1", "c_fc"), ("fc2", "c_proj")):
                tensors[f"{new}.mlp.{other}.{end}"] = text[f"{old}.mlp.{name}.{end}"]
    if "text_projection.weight" in text:
        tensors["text_projection"] = text["text_projection.weight"].T.contiguous()
    return {prefix + name: value for name, value in tensors.items()}


def _guidance(name: Path, base: Path | str | None = None, **options: Any) -> Any:
    base = None if base is None else str(base)
    return create_guidance(GuidanceConfig(name=str(name), base=base, cache=False, **{"dtype": "float64", **options}))


def _refused(path: Path, message: str, base: Path | str | None = None, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _guidance(path, base, **options)
    assert "\n" not in str(caught.value)


def _gradient(guidance: Any) -> Tensor:
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    request = GuidanceRequest(images, guidance.embed("a red chair"), VIEWS, generator=torch.Generator().manual_seed(9))
    return guidance.gradient(request).gradient


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "open clip", "sdxl"])
def test_it_guides_as_the_folder_does(pipeline: Pipelines, tmp_path: Path, kind: str) -> None:
    folder, path = pipeline("sdxl" if kind == "sdxl" else "latent"), tmp_path / "model.safetensors"
    save_file(original(folder, open_clip=kind == "open clip"), path)
    guidance = _guidance(path, folder)
    wanted = _gradient(_guidance(folder))
    assert wanted.abs().max() > 1e-2
    torch.testing.assert_close(_gradient(guidance), wanted, rtol=1e-12, atol=1e-12)
    assert guidance.files.keys() == {str(path)}
    assert guidance.model.text_identity != _guidance(folder).model.text_identity


def test_diffusers_reads_the_same_layout(pipeline: Pipelines) -> None:
    """So that the files of these tests are those that people have."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils

    for kind in ("latent", "sdxl"):
        folder = pipeline(kind)
        tensors = original(folder)
        unet = single_file_utils.convert_ldm_unet_checkpoint(tensors, UNet2DConditionModel.load_config(folder / "unet"))
        vae = single_file_utils.convert_ldm_vae_checkpoint(tensors, AutoencoderKL.load_config(folder / "vae"))
        for found, component in ((unet, "unet"), (vae, "vae")):
            wanted = _weights(folder / component)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def own_configs(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], Path]:
    """own_configs(kind, model): a file, whose tiny pipeline the held configurations of the model then describe."""

    def get(kind: str, model: str) -> Path:
        folder = pipeline(kind)
        files = {name: json.loads((folder / name).read_text()) for name in CONFIGS[model]}
        monkeypatch.setitem(single_file.CONFIGS, model, files)
        vocabulary = tmp_path / "vocabulary"
        shutil.copytree(folder / "tokenizer", vocabulary)
        monkeypatch.setattr(single_file, "hub_file", lambda hub_id, name, revision: vocabulary / name)
        save_file(original(folder), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return get


@pytest.mark.quick(1)
@pytest.mark.parametrize(("kind", "model"), [("latent", "stable-diffusion-1.5"), ("sdxl", "sdxl")])
def test_without_a_base_the_file_says_what_it_is(
    pipeline: Pipelines, own_configs: Callable[[str, str], Path], kind: str, model: str
) -> None:
    path = own_configs(kind, model)
    torch.testing.assert_close(_gradient(_guidance(path)), _gradient(_guidance(pipeline(kind))), rtol=1e-12, atol=1e-12)
    assert _guidance(path).model.schedule.prediction_type == "epsilon"
    save_file({**load_file(path), "v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, path)
    schedule = _guidance(path).model.schedule
    assert schedule.prediction_type == "v_prediction"
    assert schedule.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("model", list(CONFIGS))
def test_held_configurations_are_those_of_the_published_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    """By the numbers of their weights, in millions."""
    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr(single_file, "hub_file", lambda hub_id, name, revision: tmp_path / "vocab.json")
    source = single_file._HeldSource(model, GuidanceConfig(name=model))
    sizes = {
        name: round(source.parameters(name) / 1e6)
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
        if source.class_name(name)
    }
    wanted = {"unet": 860, "vae": 84, "text_encoder": 123}
    if model.startswith("stable-diffusion") and model != "stable-diffusion-1.5":
        wanted |= {"unet": 866, "text_encoder": 340}
    if model == "sdxl":
        wanted |= {"unet": 2567, "text_encoder_2": 695}
    assert sizes == wanted
    assert source.image_size == {"sdxl": 1024, "stable-diffusion-2.1": 768}.get(model, 512)


def test_a_vocabulary_that_cannot_be_had(
    pipeline: Pipelines, own_configs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_configs("latent", "stable-diffusion-1.5")

    def fail(*_: Any) -> Path:
        raise single_file.HubError("the hub cannot be reached", unreachable=True)

    monkeypatch.setattr(single_file, "hub_file", fail)
    _refused(path, "needs the vocabulary of CLIP, .*as guidance base, or let it come from the hub: the hub cannot")


def _without(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(prefixes)}


def test_files_that_lack_something(pipeline: Pipelines, tmp_path: Path) -> None:
    folder, path = pipeline("latent"), tmp_path / "model.safetensors"
    tensors = original(folder)

    def refused(held: dict[str, Tensor], message: str, base: Path | str | None = folder) -> None:
        save_file(held, path)
        _refused(path, message, base)

    refused(_without(tensors, "cond_stage_model"), "it holds no text_encoder: the whole checkpoint is wanted")
    refused(_without(tensors, "cond_stage_model"), "it holds no text encoder: the whole checkpoint", None)
    refused(_without(tensors, "first_stage_model"), "it holds no vae: the whole checkpoint is wanted")
    refused(_without(tensors, "model."), "it holds no unet: the whole checkpoint is wanted")
    gone = "model.diffusion_model.input_blocks.0.0.bias"
    refused(_without(tensors, gone), f"weights of unet are incomplete .*missing are 1 of its tensors .{gone}")
    wrong = {**tensors, gone: torch.ones(5)}
    refused(wrong, "of another shape are 1 of its tensors .*is .5. in place of .8.")
    refused({"a": torch.ones(1)}, "it holds no")
    refused({**tensors, "edm_mean": torch.ones(4)}, "a mean and deviation per channel")
    refused(original(folder, open_clip=True), "Stable Diffusion 2, .* name stable-diffusion .* as guidance base", None)
    refused({"conditioner.embedders.0.model.a": torch.ones(1)}, "as its refiner does", None)
    refused(
        original(pipeline("sdxl")), "the weights of text_encoder are incomplete or another model's: of another shape"
    )


def test_a_base_is_for_a_file(pipeline: Pipelines) -> None:
    _refused(pipeline("latent"), "guidance base 'sdxl' is for a checkpoint in one file", "sdxl")


def test_files_that_are_none(pipeline: Pipelines, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content in (b"", b"\0" * 8, b"\xff" * 64, b"PK\3\4" + b"\0" * 64, (2**62).to_bytes(8, "little")):
        path.write_bytes(content)
        _refused(path, "it is no safetensors file", pipeline("latent"))
        _refused(path, "it is no safetensors file")


def test_a_lora_and_a_word_on_top(pipeline: Pipelines, tmp_path: Path) -> None:
    """By the same code, so the same numbers as in a folder."""
    import loras
    from diffusers import UNet2DConditionModel

    folder, path = pipeline("latent"), tmp_path / "model.safetensors"
    save_file(original(folder), path)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    lora = loras.kohya(tmp_path / "lora.safetensors", {"lora_unet": loras.pairs(unet, loras.UNET_LAYERS)})
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "red.safetensors")
    options = {"lora": (str(lora),), "textual_inversion": (str(tmp_path / "red.safetensors"),)}
    found, wanted = _gradient(_guidance(path, folder, **options)), _gradient(_guidance(folder, **options))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (found - _gradient(_guidance(folder))).abs().max() > 1e-3


def test_paths_are_kept_as_absolute_ones(pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = GuidanceConfig(name="model.safetensors", base=str(pipeline("latent")))
    assert config.name == str(tmp_path / "model.safetensors")
