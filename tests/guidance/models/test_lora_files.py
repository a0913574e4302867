"""LoRA files: what they change, against diffusers and PEFT, and what is said of those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, Views, create_guidance
from dreamfusion_fast.guidance.models.lora import product
from dreamfusion_fast.guidance.models.original_layout import plain_text_name
from dreamfusion_fast.guidance.prompts import Prompt
from dreamfusion_fast.settings import SettingError

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
VIEWS = Views(torch.zeros(1), torch.zeros(1))


def _model(folder: Path, *files: str | Path, **options: Any) -> Any:
    config = GuidanceConfig(name=str(folder), lora=tuple(map(str, files)), **{"dtype": "float64", **options})
    return create_guidance(config).model


def _refused(folder: Path, message: str, *files: str | Path, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _model(folder, *files, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("guidance lora ")


def _component(folder: Path, component: str) -> Any:
    import diffusers
    import transformers

    kind: Any = {
        "unet": diffusers.UNet2DConditionModel,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }[component]
    return kind.from_pretrained(folder / component).double()


def _predicted(model: Any) -> Tensor:
    noisy = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    condition = {
        name: torch.randn(1, *(n or 5 for n in shape), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for name, shape in model.text_shapes().items()
    }
    with torch.no_grad():
        return model.predict(noisy, torch.tensor([40]), condition, VIEWS)


def _weights(model: Any, component: str) -> dict[str, Tensor]:
    loaded = model._source.load(component, torch.float64)
    return {plain_text_name(name): value for name, value in loaded.named_parameters()}


def _check(folder: Path, component: str, changes: dict[str, tuple[Tensor, Tensor, float]], *files: Any) -> None:
    """That weights are W + factor up down, and all others as they were."""
    before = {plain_text_name(name): value for name, value in _component(folder, component).named_parameters()}
    after = _weights(_model(folder, *files), component)
    assert before.keys() == after.keys()
    for name, value in before.items():
        wanted = value
        if name.removesuffix(".weight") in changes and name.endswith(".weight"):
            down, up, factor = changes[name.removesuffix(".weight")]
            delta = torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1))
            wanted = value + factor * delta.reshape(value.shape)
            assert (wanted - value).abs().max() > 1e-3
        torch.testing.assert_close(after[name], wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.quick(4)
@pytest.mark.parametrize("names", ["kohya", "original", "diffusers", "old diffusers", "unet alone"])
@pytest.mark.parametrize("kind", ["latent", "sdxl"])
def test_a_unet_is_changed_by_the_product(pipeline: Pipelines, tmp_path: Path, kind: str, names: str) -> None:
    folder, path = pipeline(kind), tmp_path / "a.safetensors"
    unet = _component(folder, "unet")
    layers = loras.UNET_LAYERS if "old" not in names else loras.UNET_LAYERS[:2]
    pairs, alpha = loras.pairs(unet, layers), 1.0 * loras.RANK
    if names in ("kohya", "original"):
        alpha = 1.5
        original = loras.original_names(unet) if names == "original" else None
        loras.kohya(path, {"lora_unet": pairs}, alpha, original)
    elif names == "diffusers":
        loras.diffusers(path, {"unet": pairs})
    else:
        loras.old_diffusers(path, {layer: pairs[layer] for layer in layers[:2]}, "unet." if names[0] == "o" else "")
        pairs = {layer: pairs[layer] for layer in layers[:2]}
    factor = 0.8 * alpha / loras.RANK
    _check(folder, "unet", {name: (*pair, factor) for name, pair in pairs.items()}, f"{path}:0.8")


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_text_encoders_are_changed_too(pipeline: Pipelines, tmp_path: Path, component: str, names: str) -> None:
    folder, path = pipeline("sdxl"), tmp_path / "a.safetensors"
    pairs = loras.pairs(_component(folder, component), loras.TEXT_LAYERS)
    if names == "kohya":
        loras.kohya(path, {"lora_te2" if component.endswith("2") else "lora_te1": pairs}, 2.0)
    else:
        loras.diffusers(path, {component: pairs})
    factor = 2.0 / loras.RANK if names == "kohya" else 1.0
    _check(folder, component, {name: (*pair, factor) for name, pair in pairs.items()}, path)


@pytest.mark.quick(1)
@pytest.mark.parametrize("names", ["kohya", "original", "diffusers"])
@pytest.mark.parametrize("kind", ["latent", "sdxl"])
def test_diffusers_and_peft_make_the_same_of_it(pipeline: Pipelines, tmp_path: Path, kind: str, names: str) -> None:
    """Predictions and embeddings of a pipeline into which diffusers loaded the same file."""
    pytest.importorskip("peft")
    import diffusers

    folder, path = pipeline(kind), tmp_path / "a.safetensors"
    unet, text = _component(folder, "unet"), _component(folder, "text_encoder")
    # diffusers does not know every layer of each format.
    layers = [layer for layer in loras.UNET_LAYERS if "attn" in layer or "ff" in layer]
    parts = loras.pairs(unet, layers), loras.pairs(text, loras.TEXT_LAYERS[:2])
    if names == "diffusers":
        loras.diffusers(path, {"unet": parts[0], "text_encoder": parts[1]})
    else:
        prefix = "lora_te1" if kind == "sdxl" else "lora_te"
        original = loras.original_names(unet) if names == "original" else None
        loras.kohya(path, {"lora_unet": parts[0], prefix: parts[1]}, 1.5, original)
    if names == "original" and kind == "latent":
        pytest.skip("diffusers does not know these names of layers in a U-Net like Stable Diffusion's")
    pipeline_class = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    reference: Any = pipeline_class.from_pretrained(folder)
    reference.load_lora_weights(path)
    reference.fuse_lora(lora_scale=0.7)
    reference.unload_lora_weights()
    model, plain = _model(folder, f"{path}:0.7", dtype="float32"), _model(folder, dtype="float32")
    texts = model.embed_texts([Prompt("a chair")])["hidden"]
    wanted = reference.encode_prompt(
        prompt="a chair", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    torch.testing.assert_close(texts, wanted, rtol=1e-5, atol=1e-5)
    assert (plain.embed_texts([Prompt("a chair")])["hidden"] - wanted).abs().max() > 1e-2
    model.load()
    plain.load()
    unets = [reference.unet.double(), model._network.double(), plain._network.double()]
    for used in (model, plain):
        used.dtype = torch.float64
    if kind == "sdxl":
        for used in (model, plain):
            used._time_ids = used._time_ids.double()
    found, without = _predicted(model), _predicted(plain)
    model._network = unets[0]
    torch.testing.assert_close(found, _predicted(model), rtol=1e-6, atol=1e-6)
    assert (found - without).abs().max() > 1e-2


def test_several_add_up(pipeline: Pipelines, tmp_path: Path) -> None:
    folder, layer = pipeline("latent"), loras.UNET_LAYERS[0]
    made = [loras.pairs(_component(folder, "unet"), [layer], seed, rank=seed) for seed in (1, 2)]
    paths = [loras.kohya(tmp_path / f"{i}.safetensors", {"lora_unet": pair}, None) for i, pair in enumerate(made)]
    before = dict(_component(folder, "unet").named_parameters())[f"{layer}.weight"]
    after = _weights(_model(folder, paths[0], f"{paths[1]}:-2"), "unet")[f"{layer}.weight"]
    (down, up), (down2, up2) = (pair[layer] for pair in made)
    wanted = before + up.double() @ down.double() - 2 * up2.double() @ down2.double()
    torch.testing.assert_close(after, wanted, rtol=1e-13, atol=1e-14)


def test_a_convolution_in_three_parts() -> None:
    """lora_mid: the product is that of the three convolutions, one after the other."""
    down, middle = torch.randn(3, 5, 1, 1, dtype=torch.float64), torch.randn(3, 3, 3, 3, dtype=torch.float64)
    up, images = torch.randn(7, 3, 1, 1, dtype=torch.float64), torch.randn(2, 5, 6, 6, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(images, down), middle, padding=1), up)
    torch.testing.assert_close(conv(images, product(down, up, middle), padding=1), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"unet.r": 3, "unet.lora_alpha": 6}, 2.0),
        ({"unet.r": 3, "unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 3**0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn2.to_q": 1}}, 1 / 3),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_alpha_in_the_metadata_of_diffusers(
    pipeline: Pipelines, tmp_path: Path, fields: dict[str, Any], factor: float
) -> None:
    folder, layer = pipeline("latent"), loras.UNET_LAYERS[0]
    pairs = loras.pairs(_component(folder, "unet"), [layer])
    path = tmp_path / "a.safetensors"
    loras.diffusers(path, {"unet": pairs}, {"lora_adapter_metadata": json.dumps(fields)})
    _check(folder, "unet", {layer: (*pairs[layer], factor)}, path)


def test_in_half_precision_the_sum_is_rounded_once(pipeline: Pipelines, tmp_path: Path) -> None:
    folder, layer = pipeline("latent"), loras.UNET_LAYERS[0]
    pairs = loras.pairs(_component(folder, "unet"), [layer])
    path = loras.kohya(tmp_path / "a.safetensors", {"lora_unet": pairs}, None)
    before = dict(_component(folder, "unet").half().named_parameters())[f"{layer}.weight"]
    loaded = _model(folder, path, dtype="float16")._source.load("unet", torch.float16)
    down, up = pairs[layer]
    wanted = (before.float() + up @ down).half()
    torch.testing.assert_close(dict(loaded.named_parameters())[f"{layer}.weight"], wanted, rtol=0, atol=0)


def test_the_key_of_the_cache_changes_with_text_encoders_alone(pipeline: Pipelines, tmp_path: Path) -> None:
    folder = pipeline("latent")
    pairs = loras.pairs(_component(folder, "unet"), loras.UNET_LAYERS[:1])
    text = loras.pairs(_component(folder, "text_encoder"), loras.TEXT_LAYERS[:1])
    unet = loras.kohya(tmp_path / "unet.safetensors", {"lora_unet": pairs})
    both = loras.kohya(tmp_path / "both.safetensors", {"lora_unet": pairs, "lora_te": text})
    plain = _model(folder).text_identity
    assert _model(folder, unet).text_identity == plain
    changed = {plain, *(_model(folder, f"{both}{scale}").text_identity for scale in ("", ":0.5", ":1e-3"))}
    assert len(changed) == 4
    assert _model(folder, both).text_identity == _model(folder, f"{both}:1").text_identity
    save_file({name: value + 1 for name, value in load_file(both).items()}, both)
    assert _model(folder, both).text_identity not in changed


def _file(path: Path, unet: Any, **changes: Any) -> Path:
    """A LoRA of two layers, less or more of it: values are tensors, None, or functions of the tensor that was there."""
    loras.kohya(path, {"lora_unet": loras.pairs(unet, loras.UNET_LAYERS[:1])}, 1.0)
    tensors = load_file(path)
    for end, value in changes.items():
        name = next((key for key in tensors if key.endswith(end.replace("__", "."))), end.replace("__", "."))
        value = value(tensors[name]) if callable(value) else value
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)
    return path


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_down__weight": lambda x: x[:, :-1].contiguous()},
            r"is \[3, 15\] and .* do not fit .*\[16, 16\]",
        ),
        ({"lora_up__weight": lambda x: x[:-1].contiguous()}, "do not fit a weight of .*it was made for another model"),
        ({"lora_up__weight": lambda x: x[:, :-1].contiguous()}, "do not fit"),
        ({"lora_up__weight": lambda x: x[None]}, "do not fit"),
        ({"lora_up__weight": lambda x: x * float("nan")}, "lora_up.weight holds NaN or infinity"),
        ({"alpha": torch.tensor(float("inf"))}, "alpha holds NaN or infinity"),
        ({"alpha": torch.ones(2)}, "alpha is .2., want one number"),
        ({"lora_up__weight": lambda x: x.to(torch.int32)}, "is of torch.int32, want real numbers"),
        ({"lora_up__weight": None}, "lacks up"),
        ({"lora_down__weight": None}, "lacks down"),
        (
            {"lora_unet_nowhere.lora_down.weight": torch.ones(3, 3)},
            "1 of the 2 layers .* lora_unet_nowhere; it",
        ),
        ({"lora_te2_text_model_a.lora_up.weight": torch.ones(3, 3)}, "1 of the 2 layers that it changes are not in"),
        ({"something": torch.ones(3)}, "it is no LoRA, 1 of its tensors are no part of one: something"),
        ({"lora_unet_conv_in.dora_scale": torch.ones(3)}, "it is a DoRA .* which is not served"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(3)}, "it is a LoHa"),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(3)}, "it is a LoKr"),
    ],
)
def test_files_that_do_not_fit(pipeline: Pipelines, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = pipeline("latent")
    _refused(folder, message, _file(tmp_path / "a.safetensors", _component(folder, "unet"), **changes))


def test_a_layer_that_is_changed_twice(pipeline: Pipelines, tmp_path: Path) -> None:
    folder, path = pipeline("latent"), tmp_path / "a.safetensors"
    pairs = loras.pairs(_component(folder, "unet"), loras.UNET_LAYERS[:1])
    tensors = load_file(loras.kohya(path, {"lora_unet": pairs})) | load_file(loras.diffusers(path, {"unet": pairs}))
    save_file(tensors, path)
    _refused(folder, "is changed twice, by", path)


def test_of_another_model(pipeline: Pipelines, tmp_path: Path) -> None:
    text = loras.pairs(_component(pipeline("sdxl"), "text_encoder_2"), loras.TEXT_LAYERS)
    path = loras.kohya(tmp_path / "a.safetensors", {"lora_te2": text})
    _refused(pipeline("latent"), "3 of the 3 layers that it changes are not in this pipeline: lora_te2_", path)


def test_files_that_are_none(pipeline: Pipelines, tmp_path: Path) -> None:
    folder = pipeline("latent")
    _refused(folder, "there is no such file", tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    _refused(folder, "it is no file", tmp_path / "b.safetensors")
    path = tmp_path / "a.safetensors"
    for content in (b"", b"\0" * 8, b"\xff" * 64, b"PK\3\4" + b"\0" * 64):
        path.write_bytes(content)
        _refused(folder, "it is no safetensors file", path)
    torch.save({"a": torch.ones(1)}, path)
    _refused(folder, "it is no safetensors file", path)
    with pytest.raises(SettingError, match=r"lora: got .*want paths that end in \.safetensors"):
        GuidanceConfig(lora=(str(tmp_path / "a.pt"),))
    save_file({}, path)
    _refused(folder, "it is no LoRA, it is empty", path)


@pytest.mark.parametrize("scale", ["nan", "inf", "much", ""])
def test_a_scale_is_a_number(scale: str) -> None:
    with pytest.raises(
        SettingError, match=r"GuidanceConfig\.lora: got .*want file.safetensors or file.safetensors:0.8"
    ):
        GuidanceConfig(lora=(f"a.safetensors:{scale}",))


def test_paths_are_kept_as_absolute_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert GuidanceConfig(lora=("a.safetensors:0.5", "b:c.safetensors")).lora == (
        f"{tmp_path}/a.safetensors:0.5",
        f"{tmp_path}/b:c.safetensors",
    )


def test_a_file_that_changes_before_it_is_merged(pipeline: Pipelines, tmp_path: Path) -> None:
    folder = pipeline("latent")
    path = _file(tmp_path / "a.safetensors", _component(folder, "unet"))
    model = _model(folder, path)
    _file(path, _component(folder, "unet"), lora_up__weight=lambda x: x + 1)
    with pytest.raises(UserError, match=r"a\.safetensors has changed since it was checked"):
        model.load()


def test_a_weight_that_leaves_the_range_of_its_type(pipeline: Pipelines, tmp_path: Path) -> None:
    folder = pipeline("latent")
    path = _file(tmp_path / "a.safetensors", _component(folder, "unet"))
    with pytest.raises(UserError, match=r"out of the range of torch\.float16"):
        _model(folder, f"{path}:1e6", dtype="float16").load()
