"""Files of a pipeline: what is missing or damaged is refused, and what embeddings depend on is told by its contents."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, create_guidance
from dreamfusion_fast.guidance.contract import Guidance
from dreamfusion_fast.guidance.models import pipeline_files
from dreamfusion_fast.guidance.models.pipeline_files import content_hash, holds_tokenizer
from dreamfusion_fast.guidance.models.pipeline_origins import open_source

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
Tensors = dict[str, Tensor]
TOKENIZERS = [("latent", "tokenizer"), ("sdxl", "tokenizer"), ("sdxl", "tokenizer_2"), ("pixel", "tokenizer")]
LARGE = 9 * 2**20


def _guidance(folder: Path, **options: Any) -> Guidance:
    return create_guidance(GuidanceConfig(name=str(folder), dtype="float32", **options))


def _refused(name: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create_guidance(GuidanceConfig(name=str(name), **options))
    assert "\n" not in str(caught.value)


def _rewrite(folder: Path, component: str, change: Callable[[Tensors], Tensors]) -> Tensors:
    """Change the tensors in a component's file; what they were."""
    (path,) = (folder / component).glob("*.safetensors")
    before = load_file(path)
    save_file(change(dict(before)), path, metadata={"format": "pt"})
    return before


def _use(folder: Path, component: str) -> None:
    """Load a component as a run does."""
    guidance = _guidance(folder)
    if component.startswith("text_encoder"):
        guidance.embed("a chair")
    else:
        guidance.load()


# Tokenizers


@pytest.mark.parametrize(("kind", "component"), TOKENIZERS)
def test_tokenizer_missing_on_disk(own_pipeline: Pipelines, kind: str, component: str) -> None:
    folder = own_pipeline(kind)
    for path in (folder / component).iterdir():
        if path.name in ("vocab.json", "merges.txt", "tokenizer.json"):
            path.unlink()
    _refused(folder, f"{component} holds only .*tokenizer_config.json, but the files of a tokenizer are wanted: tokeni")
    shutil.rmtree(folder / component)
    _refused(folder, f"{component} holds nothing, but the files of a tokenizer are wanted: tokenizer.json, vocab.json")


@pytest.mark.parametrize("class_name", ["T5Tokenizer", "T5TokenizerFast"])
def test_tokenizer_of_t5_missing_on_disk(own_pipeline: Pipelines, class_name: str) -> None:
    folder = own_pipeline("pixel")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer": ["transformers", class_name]}))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    _refused(folder, "tokenizer holds only tokenizer_config.json, but")
    # What it is, loading tells; that it is there, is enough before.
    (folder / "tokenizer" / "spiece.model").write_bytes(b"")
    _guidance(folder)


@pytest.mark.parametrize("lacking", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary(own_pipeline: Pipelines, lacking: str) -> None:
    folder = own_pipeline("latent")
    (folder / "tokenizer" / lacking).unlink()
    _refused(folder, "tokenizer holds only .*, but the files of a tokenizer are wanted")


def test_names_of_vocabularies() -> None:
    names = ["special_tokens_map.json", "tokenizer_config.json"]
    assert not holds_tokenizer(names)
    for found in (["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.txt"], ["spiece.model"]):
        assert holds_tokenizer([*names, *found])


def _hub(monkeypatch: pytest.MonkeyPatch, snapshot: Path, listing: list[str] | None) -> None:
    """A hub that holds a folder; None: it cannot be asked for its files, and only what is in the cache can be had."""
    import huggingface_hub

    def files(hub_id: str, revision: str | None = None) -> list[str]:
        if listing is None:
            raise OSError("no route to host")
        return listing

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, relative, revision: snapshot / relative)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", files)


@pytest.mark.parametrize(("kind", "component"), TOKENIZERS)
def test_tokenizer_missing_on_the_hub(
    own_pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch, kind: str, component: str
) -> None:
    folder = own_pipeline(kind)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    _hub(monkeypatch, folder, names)
    _guidance(Path("owner/name"))
    _hub(monkeypatch, folder, [name for name in names if not name.startswith(f"{component}/")])
    _refused("owner/name", f"'owner/name': {component} holds nothing, but the files of a tokenizer are wanted")


@pytest.mark.parametrize(
    ("kind", "component", "class_name"),
    [*((*where, None) for where in TOKENIZERS), ("pixel", "tokenizer", "T5Tokenizer")],
)
def test_tokenizer_missing_from_the_cache(
    own_pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch, kind: str, component: str, class_name: str | None
) -> None:
    """Where the hub cannot be asked, what loading gave is looked at; not every tokenizer loads without files."""
    folder = own_pipeline(kind)
    if class_name:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), component: ["transformers", class_name]}))
    shutil.rmtree(folder / component)
    _hub(monkeypatch, folder, None)
    guidance = _guidance(Path("owner/name"))
    with pytest.raises(
        UserError, match=rf"{component} \(.*knows no words, its vocabulary is missing|cannot load {component}"
    ):
        guidance.embed("a chair")


# Weights


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("kind", "component", "part"),
    [
        ("latent", "unet", "mid_block."),
        ("latent", "vae", "encoder.mid_block."),
        ("latent", "text_encoder", "layers.1."),
        ("sdxl", "text_encoder", "layers.0."),
        ("sdxl", "text_encoder_2", "text_projection."),
        ("pixel", "unet", "encoder_hid_proj."),
        ("pixel", "text_encoder", "block.1."),
        ("pixel", "text_encoder", "shared."),
    ],
)
def test_weights_that_lack_tensors(own_pipeline: Pipelines, kind: str, component: str, part: str) -> None:
    folder = own_pipeline(kind)
    before = _rewrite(folder, component, lambda tensors: {k: v for k, v in tensors.items() if part not in k})
    lost = sorted(name for name in before if part in name)
    with pytest.raises(UserError) as caught:
        _use(folder, component)
    text = str(caught.value)
    assert "\n" not in text
    assert f"guidance '{folder}': the weights of {component} (" in text
    # Both names of T5's embedding of tokens are missing; the file has one.
    assert f"missing are {2 if part == 'shared.' else len(lost)} of its tensors (" in text
    assert any(name in text for name in lost)
    assert text.endswith(", ...)") == (len(lost) > 3)


@pytest.mark.parametrize(
    ("component", "name"),
    [("unet", "time_embedding.linear_1.weight"), ("vae", "encoder.conv_in.weight"), ("text_encoder", "fc1.weight")],
)
def test_weights_of_another_shape(own_pipeline: Pipelines, component: str, name: str) -> None:
    folder = own_pipeline("latent")
    before = _rewrite(
        folder, component, lambda tensors: {k: v[:-1].clone() if name in k else v for k, v in tensors.items()}
    )
    tensor = next(value for key, value in sorted(before.items()) if name in key)
    import transformers

    found, wanted = [len(tensor) - 1, *tensor.shape[1:]], list(tensor.shape)
    message = rf"the weights of {component} .*of another shape are \d of its tensors \(.*{name}"
    shapes = re.escape(f" {found} in place of {wanted}")
    if component == "text_encoder" and int(transformers.__version__.split(".")[0]) < 5:
        shapes = r"\)"  # it tells names alone
    with pytest.raises(UserError, match=message + shapes):
        _use(folder, component)


def _of_an_old_autoencoder(tensors: Tensors) -> Tensors:
    """Names as in the files of Stable Diffusion 1.x."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        for new, former in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        return name

    return {old(name): value for name, value in tensors.items()}


def _of_an_old_clip(tensors: Tensors) -> Tensors:
    """As in files that older versions of transformers wrote."""
    named = {name if name.startswith("text_") else f"text_model.{name}": value for name, value in tensors.items()}
    return {**named, "text_model.embeddings.position_ids": torch.arange(12)[None]}


def _with_another(tensors: Tensors) -> Tensors:
    return {**tensors, "of_another.weight": torch.ones(3)}


def _with_both_embeddings(tensors: Tensors) -> Tensors:
    return {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


def _with_the_other_embedding(tensors: Tensors) -> Tensors:
    return {"encoder.embed_tokens.weight": tensors.pop("shared.weight"), **tensors}


@pytest.mark.parametrize(
    ("kind", "component", "change"),
    [
        ("latent", "unet", _with_another),
        ("latent", "vae", _with_another),
        ("latent", "text_encoder", _with_another),
        ("latent", "vae", _of_an_old_autoencoder),
        ("latent", "text_encoder", _of_an_old_clip),
        ("sdxl", "text_encoder_2", _of_an_old_clip),
        ("pixel", "text_encoder", _with_both_embeddings),
        ("pixel", "text_encoder", _with_the_other_embedding),
    ],
)
def test_weights_under_other_names_are_all_there(
    own_pipeline: Pipelines, kind: str, component: str, change: Callable[[Tensors], Tensors]
) -> None:
    folder = own_pipeline(kind)
    expected = open_source(GuidanceConfig(name=str(folder))).load(component, torch.float32).state_dict()
    before = _rewrite(folder, component, change)
    assert change(dict(before)).keys() != before.keys(), "nothing was changed"
    found = open_source(GuidanceConfig(name=str(folder))).load(component, torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.quick(1)
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_variant_stored_as_a_pickle_beside_whole_weights(own_pipeline: Pipelines, component: str) -> None:
    folder = own_pipeline("latent")
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (folder / part).glob("*.safetensors")
        if part == component:
            # transformers gives pickles another name than safetensors.
            stem = "pytorch_model" if part == "text_encoder" else weights.stem
            torch.save(load_file(weights), weights.with_name(f"{stem}.fp16.bin"))
        else:
            shutil.copy(weights, weights.with_name(f"{weights.stem}.fp16.safetensors"))
    message = f"{component} holds no weights of the variant 'fp16' but pickles, which can run code on loading"
    _refused(folder, message, variant="fp16")
    _guidance(folder)
    guidance = _guidance(folder, variant="fp16", allow_pickle=True)
    guidance.embed("a chair")
    guidance.load()


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_the_network_is_described_once(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A plan asks for what memory is needed again and again."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    made: list[str] = []
    for model in (UNet2DConditionModel, AutoencoderKL):

        def counting(config: Any, make: Callable[..., Any] = model.from_config, name: str = model.__name__) -> Any:
            made.append(name)
            return make(config)

        monkeypatch.setattr(model, "from_config", counting)
    guidance: Any = _guidance(pipeline(kind))
    needs = [guidance.memory_needs(views, 64) for views in (1, 2, 1)]
    assert needs[0] == needs[2]
    assert sorted(made) == (["AutoencoderKL", "UNet2DConditionModel"] if kind == "latent" else ["UNet2DConditionModel"])
    _guidance(pipeline(kind)).memory_needs(1, 64)  # type: ignore[attr-defined]
    assert made.count("UNet2DConditionModel") == 2, "another source has files of its own"


# Identity


def _identity(folder: Path, **options: Any) -> str:
    return open_source(GuidanceConfig(name=str(folder), **options)).identity(["tokenizer", "text_encoder"])


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("in_place", [True, False])
def test_other_weights_of_the_same_size_and_time_are_others(own_pipeline: Pipelines, size: int, in_place: bool) -> None:
    folder = own_pipeline("latent")
    weights = folder / "text_encoder" / "more.safetensors"
    weights.write_bytes(bytes(size))
    status = weights.stat()
    before = _identity(folder)
    assert _identity(folder) == before
    if not in_place:
        weights.unlink()
    weights.write_bytes(bytes(size - 1) + b"\x01")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert _identity(folder) != before
    weights.write_bytes(bytes(size))
    assert _identity(folder) == before


def test_a_copy_of_a_folder_is_the_same(own_pipeline: Pipelines, tmp_path: Path) -> None:
    folder = own_pipeline("latent")
    (folder / "text_encoder" / "more.safetensors").write_bytes(bytes(LARGE))
    copy = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    assert _identity(copy) == _identity(folder)
    guidances: list[Any] = [_guidance(path) for path in (folder, copy)]
    assert guidances[0].model.text_identity == guidances[1].model.text_identity
    (copy / "text_encoder" / "more.safetensors").rename(copy / "text_encoder" / "other.safetensors")
    assert _identity(copy) != _identity(folder)


def test_only_what_decides_an_embedding_counts(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("latent")
    before = _identity(folder)
    trusted = _identity(folder, allow_pickle=True)
    (folder / "unet" / "more.safetensors").write_bytes(b"other")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"other")
    assert _identity(folder) == before, "pickles are not read, and the U-Net does not embed"
    assert _identity(folder, allow_pickle=True) != trusted
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert _identity(folder) != before


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * 2**20 + 5))
    first = content_hash(path)
    monkeypatch.setattr(pipeline_files.hashlib, "sha256", None)
    assert content_hash(path) == first
    path.write_bytes(b"other")
    with pytest.raises(TypeError):
        content_hash(path)


def test_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    import hashlib

    content = torch.arange(2**20, dtype=torch.int32).numpy().tobytes() + b"end"
    (tmp_path / "weights").write_bytes(content)
    (tmp_path / "nothing").write_bytes(b"")
    assert content_hash(tmp_path / "weights") == hashlib.sha256(content).hexdigest()
    assert content_hash(tmp_path / "nothing") == hashlib.sha256(b"").hexdigest()
