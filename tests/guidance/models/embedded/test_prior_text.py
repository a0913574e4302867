"""The text encoder that ships in the package: shapes, and that words of one meaning are near each other."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.guidance import PromptSet
from dreamfusion_fast.guidance.models.embedded.guide import EmbeddedPrior
from dreamfusion_fast.guidance.models.embedded.text_encoder import MAX_TOKENS, WEIGHTS, WIDTH, TextEncoder


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder()


def cosine(encoder, first, second):
    _, pooled = encoder([first, second])
    return float(torch.nn.functional.cosine_similarity(pooled[0], pooled[1], dim=0))


@pytest.mark.parametrize("n", [1, 3])
def test_shapes_and_variance(encoder, n):
    tokens, pooled = encoder(["a wooden chair, side view", "", "a red car with black wheels"][:n])
    assert tokens.shape == (n, MAX_TOKENS, WIDTH)
    assert pooled.shape == (n, WIDTH)
    assert tokens.dtype == pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.square().mean(dim=1), torch.ones(n))
    words = tokens[tokens.abs().sum(dim=-1) > 0]
    assert 0.8 < float(words.std()) < 1.2


def test_padding_is_zero_and_long_captions_are_cut(encoder):
    tokens, _ = encoder(["chair", "chair " * 100])
    used = (tokens.abs().sum(dim=-1) > 0).sum(dim=1).tolist()
    assert used == [3, MAX_TOKENS]  # [CLS] chair [SEP]
    alone, _ = encoder(["chair"])
    torch.testing.assert_close(tokens[0], alone[0], atol=1e-4, rtol=0)  # a longer neighbour changes nothing


def test_what_fits(encoder):
    assert encoder.fits("chair " * (MAX_TOKENS - 2))
    assert not encoder.fits("chair " * (MAX_TOKENS - 1))
    assert encoder.fits("")


def test_long_prompts_keep_their_view():
    views = PromptSet("a wooden chair with " + "carved legs and " * 8 + "a cushion").texts
    with pytest.warns(
        UserWarning, match="'embedded' reads at most 20 tokens of a prompt: .* it does not see '.*cushion'"
    ):
        found = EmbeddedPrior("cpu").embed_texts(views)["pooled"]
    similar = torch.nn.functional.normalize(found[:4], dim=1)
    assert float((similar @ similar.T - torch.eye(4)).max()) < 0.98


@pytest.mark.parametrize(
    ("word", "synonym", "other"),
    [
        ("a couch", "a sofa", "a car"),
        ("an automobile", "a car", "a chair"),
        ("a potted cactus", "a cactus in a pot", "a teapot"),
        ("a red car", "a crimson car", "a blue table"),
    ],
)
def test_synonyms_are_near(encoder, word, synonym, other):
    assert cosine(encoder, word, synonym) > cosine(encoder, word, other) + 0.2


def test_views_can_be_told_apart(encoder):
    _, pooled = encoder([f"a chair, {view} view" for view in ("front", "side", "back", "overhead")])
    pooled = torch.nn.functional.normalize(pooled, dim=1)
    similar = pooled @ pooled.T - torch.eye(4)
    assert float(similar.max()) < 0.98


def test_what_ships_is_small():
    assert sum(file.stat().st_size for file in WEIGHTS.glob("text_encoder*")) < 15e6
    assert sum(file.stat().st_size for file in WEIGHTS.glob("tokenizer*")) < 1e6
