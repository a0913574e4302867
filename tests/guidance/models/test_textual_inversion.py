"""Textual inversions: what prompts become with them, against diffusers, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, create_guidance
from dreamfusion_fast.guidance.prompts import Prompt

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]


def _model(folder: Path, *files: str | Path, **options: Any) -> Any:
    config = GuidanceConfig(name=str(folder), textual_inversion=tuple(map(str, files)), dtype="float32", **options)
    return create_guidance(config).model


def _save(path: Path, **tensors: Tensor) -> Path:
    save_file(tensors, path)
    return path


def _vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.quick(2)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("text", ["a <cat> chair", "<cat>", "red <cat>, a <cat>"])
def test_embeddings_equal_those_of_diffusers(pipeline: Pipelines, tmp_path: Path, count: int, text: str) -> None:
    from diffusers import StableDiffusionPipeline

    folder, vectors = pipeline("latent"), _vectors(count, 16)
    path = _save(tmp_path / "a.safetensors", **{"<cat>": vectors[0] if count == 1 else vectors})
    model = _model(folder, path)
    found = model.embed_texts([Prompt(text), Prompt("a chair")])["hidden"]
    reference: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    plain = reference.encode_prompt(text, "cpu", 1, False)[0]
    reference.load_textual_inversion(path)
    wanted = reference.encode_prompt([text, "a chair"], "cpu", 1, False)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (plain[0] - wanted[0]).abs().max() > 1e-2


def test_negative_prompts_have_the_words_too(pipeline: Pipelines, tmp_path: Path) -> None:
    path = _save(tmp_path / "ugly.safetensors", emb_params=_vectors(2, 16))
    rows = []
    for files in ((path,), ()):
        options = {"textual_inversion": tuple(map(str, files)), "negative_prompt": "ugly", "cache": False}
        guidance = create_guidance(GuidanceConfig(name=str(pipeline("latent")), **options))
        rows.append(guidance.embed("a chair").tensors["hidden"])
    assert torch.equal(rows[0][:-1], rows[1][:-1])
    assert (rows[0][-1] - rows[1][-1]).abs().max() > 1e-2


@pytest.mark.slow
def test_both_encoders_of_sdxl(pipeline: Pipelines, own_pipeline: Pipelines, tmp_path: Path) -> None:
    """The pooled output stays that of the end of the text, also where a configuration has the old number of its end."""
    folder = own_pipeline("sdxl")
    parts = {"clip_l": _vectors(2, 10), "clip_g": _vectors(2, 6, seed=1)}
    path = _save(tmp_path / "cat.safetensors", **parts)
    embedded = _model(folder, path).embed_texts([Prompt("a cat chair")])
    for suffix, key in (("", "clip_l"), ("_2", "clip_g")):
        model = _model(folder, path)
        model._source.load(f"tokenizer{suffix}")
        encoder = model._source.load(f"text_encoder{suffix}", torch.float32)
        assert torch.equal(encoder.get_input_embeddings().weight[-2:], parts[key])
    config = folder / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    again = _model(folder, path).embed_texts([Prompt("a cat chair")])
    assert torch.equal(again["pooled"], embedded["pooled"])
    assert not torch.allclose(embedded["pooled"], _model(folder).embed_texts([Prompt("a cat chair")])["pooled"])


@pytest.mark.slow
def test_words_are_those_of_option_file_or_name(pipeline: Pipelines, tmp_path: Path) -> None:
    folder = pipeline("latent")
    named = _save(tmp_path / "x.safetensors", **{"<dog>": _vectors(1, 16)})
    unnamed = _save(tmp_path / "bird.safetensors", emb_params=_vectors(1, 16))
    plain = _model(folder)

    def changed(text: str, *files: str | Path) -> bool:
        pair = [model.embed_texts([Prompt(text)])["hidden"] for model in (plain, _model(folder, *files))]
        return not torch.equal(*pair)

    assert changed("a <dog>", named)
    assert changed("a <DOG>!", named)
    assert not changed("a dog", named)
    assert changed("bird", unnamed)
    assert not changed("birds", unnamed)
    assert not changed("bird", f"{unnamed}:fish")
    assert changed("a fish", f"{unnamed}:fish", named)
    assert changed("chair", f"{unnamed}:chair")


def test_a_long_prompt_loses_words_not_the_program(pipeline: Pipelines, tmp_path: Path) -> None:
    path = _save(tmp_path / "cat.safetensors", emb_params=_vectors(20, 16))
    with pytest.warns(UserWarning, match="does not see 'cat chair'"):
        _model(pipeline("latent"), path).embed_texts([Prompt("a cat chair")])


def test_the_key_of_the_cache_changes(pipeline: Pipelines, tmp_path: Path) -> None:
    folder = pipeline("latent")
    path = _save(tmp_path / "cat.safetensors", emb_params=_vectors(1, 16))
    keys = {_model(folder, *files).text_identity for files in ((), (path,), (f"{path}:dog",))}
    _save(path, emb_params=_vectors(1, 16, seed=1))
    assert len(keys | {_model(folder, path).text_identity}) == 4
    assert _model(folder, path).files.keys() == {str(path)}


@pytest.mark.parametrize(
    ("tensors", "word", "message"),
    [
        ({"emb_params": (1, 20)}, "", r"is \[1, 20\], want 1 to 75 vectors of width 16, .* made for another model"),
        ({"emb_params": (0, 16)}, "", "want 1 to 75 vectors"),
        ({"emb_params": (76, 16)}, "", "want 1 to 75 vectors"),
        ({"emb_params": (1, 1, 16)}, "", "want 1 to 75 vectors"),
        (
            {"clip_l": (1, 16), "clip_g": (1, 16)},
            "",
            "text_encoder_2, this pipeline has text_encoder",
        ),
        ({"a": (1, 16), "b": (1, 16)}, "", "it is no textual inversion, it holds 2 tensors .a, b."),
        ({}, "", "it is no textual inversion, it holds 0 tensors"),
        ({"emb_params": (1, 16)}, ":", "is no word for it"),
        ({"a\x1bb": (1, 16)}, "", "is no word for it"),
    ],
)
def test_files_that_do_not_fit(
    pipeline: Pipelines, tmp_path: Path, tensors: dict[str, Any], word: str, message: str
) -> None:
    path = _save(tmp_path / "a.safetensors", **{name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(UserError, match=message) as caught:
        _model(pipeline("latent"), f"{path}{word}")
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("guidance textual_inversion ")


def test_other_files_that_do_not_fit(pipeline: Pipelines, tmp_path: Path) -> None:
    path = _save(tmp_path / "a.safetensors", emb_params=torch.full((1, 16), float("nan")))
    with pytest.raises(UserError, match="holds NaN or infinity"):
        _model(pipeline("latent"), path)
    _save(path, emb_params=torch.ones(1, 16))
    with pytest.raises(UserError, match="two of them are for the same word"):
        _model(pipeline("latent"), path, path)
    with pytest.raises(UserError, match="this pipeline has no CLIP text encoder"):
        _model(pipeline("pixel"), path)
    one_more = _save(tmp_path / "b.safetensors", clip_l=torch.ones(1, 10), clip_g=torch.ones(2, 6))
    with pytest.raises(UserError, match="more vectors for one text encoder than for the other"):
        _model(pipeline("sdxl"), one_more)
