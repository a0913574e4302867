"""An autoencoder in place of a pipeline's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, create_guidance

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Shrinks by two, as the tiny pipelines do."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(5)
    channels: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(
        **channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4, scaling_factor=0.9
    ).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def _model(folder: Path, autoencoder: str | Path, **options: Any) -> Any:
    config = GuidanceConfig(name=str(folder), autoencoder=str(autoencoder), **{"dtype": "float64", **options})
    return create_guidance(config).model


@pytest.mark.parametrize("kind", ["latent", "sdxl"])
def test_latents_are_those_of_a_tiny_autoencoder(pipeline: Pipelines, tiny: Path, kind: str) -> None:
    from diffusers import AutoencoderTiny

    model = _model(pipeline(kind), tiny)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    latents = model.encode(images)
    vae: Any = AutoencoderTiny.from_pretrained(tiny).double()
    wanted = vae.encode(images * 2 - 1).latents * vae.config.scaling_factor
    torch.testing.assert_close(latents, wanted, rtol=1e-12, atol=1e-12)
    mix = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(each, images, mix)[0] for each in (latents, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3
    assert model.memory_needs(1, 64).encode > 0


def test_one_of_another_pipeline(pipeline: Pipelines, own_pipeline: Pipelines) -> None:
    """Its scale is its own; it is kept by its absolute path."""
    folder = own_pipeline("sdxl")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 3.0}))
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    plain, model = _model(pipeline("latent"), pipeline("latent") / "vae"), _model(pipeline("latent"), folder / "vae")
    torch.testing.assert_close(plain.encode(images), create_latents(pipeline("latent"), images), rtol=0, atol=0)
    torch.testing.assert_close(model.encode(images), create_latents(folder, images), rtol=1e-12, atol=1e-12)


def create_latents(folder: Path, images: torch.Tensor) -> torch.Tensor:
    guidance: Any = create_guidance(GuidanceConfig(name=str(folder), dtype="float64"))
    return guidance.model.encode(images)


@pytest.mark.parametrize(("kind", "hub_id"), [("latent", "madebyollin/taesd"), ("sdxl", "madebyollin/taesdxl")])
def test_tiny_is_the_one_that_is_published_for_the_latents(
    pipeline: Pipelines, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hub_id: str
) -> None:
    import huggingface_hub

    snapshot = Path(shutil.copytree(tiny, tmp_path / "0123abc"))
    asked: set[tuple[str, str]] = set()

    def download(hub_id: str, relative: str, revision: str | None = None) -> str:
        asked.add((hub_id, relative))
        return str(snapshot / relative)

    def listing(hub_id: str, revision: str | None = None) -> list[str]:
        return [path.name for path in snapshot.iterdir()]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listing)
    model = _model(pipeline(kind), "tiny", revision="main", variant=None)
    model.encode(torch.rand(1, 3, 16, 16, dtype=torch.float64))
    assert model.files == {hub_id: "0123abc"}
    assert asked == {(hub_id, "config.json"), (hub_id, "diffusion_pytorch_model.safetensors")}


def test_what_is_no_autoencoder(pipeline: Pipelines, tiny: Path, tmp_path: Path) -> None:
    def refused(autoencoder: str | Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            _model(pipeline("latent"), autoencoder)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "guidance autoencoder .*want tiny, a folder")
    refused("small", "guidance autoencoder 'small': want tiny, a folder")
    refused(pipeline("latent"), "it lacks config.json")
    refused(pipeline("latent") / "unet", "vae is of class UNet2DConditionModel of diffusers, wanted is")
    config = tiny / "config.json"
    before = json.loads(config.read_text())
    for fields, message in (
        ({"latent_channels": 16}, "the unet reads 4 channels, 16 are wanted"),
        ({"encoder_block_out_channels": [8] * 3, "num_encoder_blocks": [1] * 3}, "the unet reads .8, 8."),
        ({"encoder_block_out_channels": [10**6] * 2}, "the weights of|is described as|describes"),
        ({"_class_name": ["evil", "Evil"]}, "vae is of class"),
        ({"scaling_factor": "a"}, "the vae's scaling_factor must be a number"),
    ):
        config.write_text(json.dumps({**before, **fields}))
        with pytest.raises(UserError, match=message):
            _model(pipeline("latent"), tiny).load()
    config.write_text(json.dumps(before))
    (tiny / "diffusion_pytorch_model.safetensors").unlink()
    refused(tiny, "vae holds no weights")
