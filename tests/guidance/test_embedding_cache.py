"""Prompt embeddings on disk."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.guidance.cache import EmbeddingCache, default_cache_dir
from dreamfusion_fast.guidance.prompts import Prompt


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


class Encoder:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: list[Prompt]) -> dict[str, Tensor]:
        self.calls += 1
        hidden = torch.tensor([[len(str(text)), 0.1] for text in texts]).T.contiguous().T
        return {"hidden": hidden, "pooled": hidden.sum(1, keepdim=True).to(torch.bfloat16)}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_a_direction_apart_is_another_entry(tmp_path: Path) -> None:
    encoder, cache = Encoder(), EmbeddingCache(tmp_path)
    cache.get_or_compute("model", [Prompt("a, side view")], encoder)
    cache.get_or_compute("model", [Prompt("a", "side")], encoder)
    assert encoder.calls == 2


def test_second_call_reads_the_file(tmp_path: Path) -> None:
    encoder, texts = Encoder(), prompts("a", "bc", "")
    first = EmbeddingCache(tmp_path).get_or_compute("model", texts, encoder)
    again = EmbeddingCache(tmp_path).get_or_compute("model", texts, encoder)
    assert encoder.calls == 1
    assert _same(first, again)
    assert _same(first, Encoder()(texts))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(("identity", "texts"), [("other", ["a", "b"]), ("model", ["b", "a"]), ("model", ["a,b"])])
def test_other_model_or_texts_are_another_entry(tmp_path: Path, identity: str, texts: list[str]) -> None:
    encoder, cache = Encoder(), EmbeddingCache(tmp_path)
    cache.get_or_compute("model", prompts("a", "b"), encoder)
    cache.get_or_compute(identity, prompts(*texts), encoder)
    assert encoder.calls == 2


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [_truncate, _flip_last_bit, lambda _: b"", lambda _: b"\xff" * 64])
def test_damaged_file_is_made_again(tmp_path: Path, damage: object) -> None:
    encoder, cache, texts = Encoder(), EmbeddingCache(tmp_path), prompts("a", "bc")
    cache.get_or_compute("model", texts, encoder)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="made again"):
        again = cache.get_or_compute("model", texts, encoder)
    assert encoder.calls == 2
    assert _same(again, Encoder()(texts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _same(cache.get_or_compute("model", texts, encoder), again)
    assert encoder.calls == 2


@pytest.mark.parametrize(
    "shapes",
    [
        {"hidden": (3,), "pooled": (1,)},
        {"hidden": (2, 2), "pooled": (1,)},
        {"hidden": (2,)},
        {"hidden": (2,), "other": (1,)},
    ],
)
def test_what_does_not_fit_the_model_is_made_again(tmp_path: Path, shapes: dict[str, tuple[int | None, ...]]) -> None:
    encoder, cache, texts = Encoder(), EmbeddingCache(tmp_path), prompts("a", "bc")
    cache.get_or_compute("model", texts, encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.get_or_compute("model", texts, encoder, {"hidden": (2,), "pooled": (None,)})
    assert encoder.calls == 1
    with pytest.warns(UserWarning, match="are not this model's and are made again"):
        again = cache.get_or_compute("model", texts, encoder, shapes)
    assert encoder.calls == 2
    assert _same(again, Encoder()(texts))


def test_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not kept"):
        result = EmbeddingCache(tmp_path / "file" / "folder").get_or_compute("model", prompts("a"), Encoder())
    assert _same(result, Encoder()(prompts("a")))


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFUSION_FAST_CACHE", str(tmp_path / "chosen"))
    assert default_cache_dir() == tmp_path / "chosen"
    assert EmbeddingCache().directory == tmp_path / "chosen" / "embeddings"
    monkeypatch.delenv("DREAMFUSION_FAST_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "dreamfusion_fast"
